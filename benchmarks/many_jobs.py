"""What a sweep of 21,000 jobs costs before anything trains: ``python benchmarks/many_jobs.py``.

Prints a Markdown table: CPU seconds (user and system) and peak memory of each command in a process of its own, the
least of ``--repeats``; and how that compares with DomainBed's launch of as many jobs (measured at commit b93c22a on a
machine of the same kind with two cores: 10.0 s wall time, nearly all of it CPU time, of the first launch, and 0.95 GB).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from domainbed.job_lists import JOBS_FILE

UPSTREAM_S, UPSTREAM_MB = 10.0, 950.0
ENVIRONMENTS = {  # 25 in all
    "ColoredMNIST": 3, "RotatedMNIST": 6, "VLCS": 4, "PACS": 4, "OfficeHome": 4, "TerraIncognita": 4,
}  # fmt: skip
DRAWS, TRIALS, ROWS = 20, 3, 14
WATCHED = """
import json, resource, sys
from domainbed.scripts import sweep
sweep.main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]), file=sys.stderr)
"""


def sweep_file(path: Path) -> str:
    """A sweep of 14 rows; they are labels of one algorithm, for the number of algorithms here may change."""
    rows = "".join(f'[[rows]]\nalgorithm = "ERM"\nlabel = "row {i}"\n' for i in range(ROWS))
    head = {"datasets": list(ENVIRONMENTS), "data_dir": "/data", "n_hparams": DRAWS, "n_trials": TRIALS}
    lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
    path.write_text("\n".join([*lines, "single_test_envs = true", rows]), encoding="utf-8")
    return str(path)


def measured(*words: str) -> tuple[float, float, float]:
    """CPU seconds, seconds and peak MB of one command of the sweep script."""
    start = time.perf_counter()
    command = [sys.executable, "-c", WATCHED, *words]
    process = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    cpu, memory = json.loads(process.stderr.splitlines()[-1])
    return cpu, time.perf_counter() - start, memory


def make_runs(sweep: Path, marks: Iterable[str]) -> None:
    """A directory for every listed job, with what ``marks`` give in turn: "done", "failed", "results", or nothing."""
    lines = Path(sweep, JOBS_FILE).read_text(encoding="utf-8").splitlines()
    for line, mark in zip(lines, itertools.cycle(marks)):
        job = json.loads(line)
        directory = sweep / job["name"]
        directory.mkdir(exist_ok=True)
        if mark in ("results", "done"):
            (directory / "results.jsonl").write_text(json.dumps({"args": job["args"], "step": 0}), encoding="utf-8")
        if mark == "done":
            (directory / "done").write_text("done", encoding="utf-8")
        if mark == "failed":
            failure = {"error": "ValueError: no", "exit_status": 1, "attempt": 1, "time": time.time()}
            (directory / "failed").write_text(json.dumps(failure), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of which the least counts")
    repeats = parser.parse_args().repeats
    jobs = ROWS * sum(ENVIRONMENTS.values()) * DRAWS * TRIALS
    print(f"{jobs} jobs\n\n| command | CPU s | of DomainBed's | wall s | peak MB | of DomainBed's |\n|{' --- |' * 6}")

    def row(name: str, *words: str, times: int = repeats) -> None:
        cpu, wall, memory = map(min, zip(*(measured(*words) for _ in range(times)), strict=True))
        shares = f"{cpu / UPSTREAM_S:.0%} | {wall:.2f} | {memory:.0f} | {memory / UPSTREAM_MB:.0%}"
        print(f"| {name} | {cpu:.2f} | {shares} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        sweep = Path(folder, "sweep")
        place = ["--output_dir", str(sweep)]
        file = sweep_file(Path(folder, "many.toml"))
        launch = ["launch", file, *place, "--command_launcher", "dummy", "--skip_confirmation"]
        row("launch, the first", *launch, times=1)
        row("launch again", *launch)
        row("status, all queued", "status", *place)
        make_runs(sweep, ["results", "done", "failed", ""])
        row("launch, a quarter each done, failed, preempted, queued", *launch)
        row("status, a quarter each done, failed, preempted, queued", "status", *place)
        make_runs(sweep, ["done"])
        row("launch, all done", *launch)
        row("status, all done", "status", *place)
        row("status of the sweep file, all done", "status", file, *place)
        os.unlink(sweep / JOBS_FILE)
        row("status, all done, without a list", "status", *place)


if __name__ == "__main__":
    main()
