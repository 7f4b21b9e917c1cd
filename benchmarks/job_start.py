"""What it costs to start a local job: forked from a process that has torch loaded, against a process of its own.

``python benchmarks/job_start.py`` prints a Markdown table of CPU seconds (user and system, of all processes that a job
consists of) for both ways, which take turns:

start     train in the directory of a finished run, where it reads its arguments and ends.
one step  a training of one step on Debug28: the start, what is imported on the way, and the work.
server    the fork server's own start, once a launch.

``--sweep FILE [--steps N]`` also launches a whole sweep in both ways, with two workers.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from domainbed.children import Child, ForkServer, ProcessChild
from domainbed.commands import Command, train_command

TICKS = os.sysconf("SC_CLK_TCK")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells])


def of_children() -> float:
    """CPU seconds of this process's children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def of_process(pid: int) -> float:
    """CPU seconds of another process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def measured(start: Callable[[], Child], cpu_s: Callable[[], float]) -> float:
    """CPU seconds from a job's start to its end."""
    before, child = cpu_s(), start()
    while (code := child.poll()) is None:
        time.sleep(0.005)
    assert code == 0, child.last_lines()
    child.close()
    return cpu_s() - before


def jobs(repeats: int) -> str:
    """CPU seconds of a job, by what it does and how it is started."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    server = ForkServer(environment)
    spent: dict[str, list[tuple[float, float]]] = {"start": [], "one step": []}
    while not server.ready and server.pid(0) is None:
        time.sleep(0.01)
    server_s = of_process(server.process_id)

    def both(command: Command, again: Command) -> tuple[float, float]:
        fork = measured(lambda: server.start(command, environment), lambda: of_process(server.process_id))
        return fork, measured(lambda: ProcessChild(again, environment), of_children)

    with tempfile.TemporaryDirectory() as directory:
        args = {"dataset": "Debug28", "algorithm": "ERM", "test_envs": [0], "steps": 1}
        for i in range(repeats):
            fork, process = (train_command(args | {"output_dir": f"{directory}/{name}{i}"}) for name in "fp")
            spent["one step"].append(both(fork, process))
            spent["start"].append(both(fork, fork))
    server.close()
    rows = [[name, *map(statistics.median, zip(*pairs, strict=True)), spread(pairs)] for name, pairs in spent.items()]
    return table(["job", "forked", "own process", "ratio"], [*rows, ["server", server_s, "", ""]])


def spread(pairs: Sequence[tuple[float, float]]) -> str:
    ratios = [process / fork for fork, process in pairs]
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def sweep(file: str, steps: int | None) -> str:
    """CPU and wall seconds of a whole launch."""
    rows = []
    for isolation in ("fork", "process"):
        with tempfile.TemporaryDirectory() as directory:
            words = ["launch", file, "--output_dir", directory, "--command_launcher", "local", "--workers", "2"]
            words += ["--isolation", isolation, "--skip_confirmation", *(["--steps", str(steps)] if steps else [])]
            cpu_s, wall_s = of_children(), time.perf_counter()
            command = [sys.executable, "-m", "domainbed.scripts.sweep", *words]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            rows.append([isolation, of_children() - cpu_s, time.perf_counter() - wall_s])
    rows.append(["ratio", rows[1][1] / rows[0][1], rows[1][2] / rows[0][2]])
    return table(["isolation", "CPU s", "wall s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--sweep", help="a sweep file")
    parser.add_argument("--steps", type=int, help="of the sweep's jobs; default: as the file says")
    args = parser.parse_args()
    print(jobs(args.repeats))
    if args.sweep:
        print(f"\n{sweep(args.sweep, args.steps)}")


if __name__ == "__main__":
    main()
