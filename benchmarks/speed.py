"""Speed of training and evaluation, as ratios measured side by side in one process: ``python benchmarks/speed.py``.

Prints a Markdown table for each question:

steps     steps per second of ERM and eX2L (group partition, equal minibatches) at ColoredMNIST's shapes and with a
          ResNet-18 at 224 px, with and without loading; the two take turns, step by step.
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
from typing import Any

import numpy as np
import torch

from domainbed import algorithms, hparams_registry, partitions, training
from domainbed.algorithms.base import Task
from domainbed.datasets.base import InMemoryEnvironment
from domainbed.loaders import TrainingLoader
from domainbed.splits import Split

CASES = {  # name -> input shape, images per step, images held, hparams
    "ColoredMNIST shapes, 128 images a step": ((2, 28, 28), 128, 2000, {}),
    "ResNet-18 at 224 px, 16 images a step": ((3, 224, 224), 16, 64, {"resnet18": True, "pretrained": False}),
}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells])


def build(
    name: str, shape: tuple[int, ...], batch: int, held: int, hparams: dict[str, Any]
) -> tuple[Any, TrainingLoader]:
    """An algorithm and its loader over random images in two environments, four groups."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(held, *shape, generator=generator)
    numbers = torch.arange(held)
    environment = InMemoryEnvironment(x, numbers % 2, numbers // 2 % 2)
    splits = [Split(e, "in", environment, np.arange(e, held, 2), e) for e in (0, 1)]
    for split in splits:  # every group in both environments
        split.keys[:] = np.random.default_rng(split.env).permutation(held)[: len(split.keys)]
    dataset = "ColoredMNIST" if shape[1] == 28 else "Waterbirds"
    all_hparams = hparams_registry.default_hparams(name, dataset) | hparams
    loader = TrainingLoader(splits, partitions.REGISTRY["group"], batch // 2, num_confounders=2)
    torch.manual_seed(0)
    task = Task(shape, 2, len(loader.parts), 2, loader.group_counts(2))
    return algorithms.get_algorithm_class(name).from_task(task, all_hparams), loader


def steps(repeats: int) -> str:
    """ERM and eX2L in turn; medians, and the median of the ratio pair by pair."""
    rows = []
    for case, (shape, batch, held, hparams) in CASES.items():
        pairs = {name: build(name, shape, batch, held, hparams) for name in ("ERM", "EX2L_MAE")}
        fixed = {name: next(iter(loader)) for name, (_, loader) in pairs.items()}
        streams = {name: iter(loader) for name, (_, loader) in pairs.items()}
        for loading in (False, True):
            times: dict[str, list[float]] = {name: [] for name in pairs}
            for turn in range(repeats + 2):
                for name, (algorithm, _) in pairs.items():
                    start = time.perf_counter()
                    algorithm.update(next(streams[name]) if loading else fixed[name])
                    if turn >= 2:  # the first ones warm up
                        times[name].append(time.perf_counter() - start)
            ratios = [b / a for a, b in zip(*times.values(), strict=True)]
            erm, ex2l = (statistics.median(t) for t in times.values())
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            ratio = f"{statistics.median(ratios):.2f}"
            rows.append([case, "yes" if loading else "no", 1 / erm, 1 / ex2l, ratio, spread])
    return table(["case", "with loading", "ERM steps/s", "eX2L steps/s", "time ratio eX2L / ERM", "min to max"], rows)


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
    parser.add_argument("--repeats", type=int, default=12, help="pairs of steps")
    parser.add_argument("--runs", type=int, default=2, help="pairs of whole runs")
    parser.add_argument("--threads", type=int, default=0, help="of each process; 0: torch's default")
    parser.add_argument(
        "--only", nargs="+", choices=["steps", "start", "options"], default=["steps", "start", "options"]
    )
    args = parser.parse_args()
    training.keep_freed_memory()  # as the train script does
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    if "steps" in args.only:
        print(steps(args.repeats), flush=True)
    if "start" in args.only:
        print("\n" + first_step(5, args.data_dir), flush=True)
    if "options" in args.only and args.data_dir:
        print("\n" + options(args.runs, args.data_dir), flush=True)


if __name__ == "__main__":
    main()
