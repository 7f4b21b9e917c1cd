"""How fast a run starts, and what the speed options bring: ``python benchmarks/speed.py``. (Steps: ``ex2l.py``.)

Prints a Markdown table for each question:

start     seconds from process start to the end of the first update.
options   (needs --data_dir with MNIST) a ColoredMNIST run of 501 steps with ``--precision bf16 --eval_splits
          selection`` against the defaults, in turn; and the share of evaluation in each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells])


# Runs the train script in a process of its own; measures from outside the code, by wrapping the evaluation.
WATCHED = """
import json, os, sys, time
from domainbed import training
measure, spent = training.measurements, [0.0]
def watched(*args):
    if sys.argv[1] == "first step":  # evaluation follows the first update at once
        print(json.dumps({"time": time.time()}), file=sys.stderr)
        os._exit(0)
    start = time.perf_counter()
    try:
        return measure(*args)
    finally:
        spent[0] += time.perf_counter() - start
training.measurements = watched
from domainbed.scripts import train
train.main(sys.argv[2:])
print(json.dumps({"evaluation": spent[0]}), file=sys.stderr)
"""


def train(output_dir: Path, until: str, *flags: str) -> tuple[float, dict[str, float]]:
    """Starts one run of the train script; returns the time of the start and what the process measured."""
    command = [sys.executable, "-c", WATCHED, until, "--output_dir", str(output_dir), "--skip_model_save", *flags]
    start = time.time()
    process = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return start, json.loads(process.stderr.splitlines()[-1])


def first_step(repeats: int, data_dir: str | None) -> str:
    """Seconds from process start to the end of the first update."""
    rows = []
    for dataset in ["DigitsM2M", "ColoredMNIST"] if data_dir else ["DigitsM2M"]:
        flags = ["--dataset", dataset, *(["--data_dir", data_dir] if data_dir else [])]
        times = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as directory:
                start, measured = train(Path(directory), "first step", *flags)
                times.append(measured["time"] - start)
        rows.append([dataset, statistics.median(times), f"{min(times):.2f} to {max(times):.2f}"])
    return table(["dataset", "process start to first update (s)", "min to max"], rows)


def options(repeats: int, data_dir: str) -> str:
    """ColoredMNIST, 501 steps: the defaults against both speed options, in turn, other seeds each time."""
    variants = {"defaults": [], "bf16, selection": ["--precision", "bf16", "--eval_splits", "selection"]}
    common = ["--dataset", "ColoredMNIST", "--data_dir", data_dir, "--test_envs", "2", "--steps", "501"]
    runs: dict[str, list[list[float]]] = {name: [] for name in variants}  # wall s, evaluation's share, accuracies
    for seed in range(repeats):
        for name, flags in variants.items():
            with tempfile.TemporaryDirectory() as directory:
                seeds = ["--seed", str(seed), "--trial_seed", str(seed)]
                start, measured = train(Path(directory), "end", *common, *seeds, *flags)
                took = time.time() - start
                last = json.loads(Path(directory, "results.jsonl").read_text().splitlines()[-1])
            accuracies = [last[f"env{e}_out_acc"] for e in range(3)]
            runs[name].append([took, measured["evaluation"] / took, *accuracies])
            print(f"    seed {seed}, {name}: {took:.0f} s", file=sys.stderr)
    medians = {name: np.median(values, axis=0) for name, values in runs.items()}
    spreads = {name: np.ptp(values, axis=0) for name, values in runs.items()}
    rows = [
        [name, float(m[0]), float(m[1])]
        + [f"{accuracy:.3f} ({spread:.3f})" for accuracy, spread in zip(m[2:], spreads[name][2:], strict=True)]
        for name, m in medians.items()
    ]
    ratios = [slow[0] / fast[0] for slow, fast in zip(*runs.values(), strict=True)]
    header = ["run", "wall s", "evaluation's share", "+90% acc (range)", "+80% acc (range)", "-90% acc (range)"]
    return table(header, rows) + f"\n\ntime ratio, pair by pair: {', '.join(f'{ratio:.2f}' for ratio in ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="directory with MNIST/raw")
    parser.add_argument("--runs", type=int, default=2, help="pairs of whole runs")
    parser.add_argument("--only", nargs="+", choices=["start", "options"], default=["start", "options"])
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    if "start" in args.only:
        print(first_step(5, args.data_dir), flush=True)
    if "options" in args.only and args.data_dir:
        print("\n" + options(args.runs, args.data_dir), flush=True)


if __name__ == "__main__":
    main()
