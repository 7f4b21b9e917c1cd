"""What snapshots cost: the share of a training's time that goes into writing them, and their size.

    python benchmarks/snapshots.py

Trains for some minutes with the default interval and watches how long snapshots take, in the same run.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from domainbed.scripts import train
from domainbed.scripts.train_execution import Execution

RUNS = {
    "ERM, small CNN, 36 px": ["--dataset", "DigitsM2M", "--algorithm", "ERM", "--steps", "1500"],
    "ERM, ResNet-18, 224 px": [
        "--dataset", "Debug224", "--algorithm", "ERM", "--steps", "60", "--hparams",
        '{"backbone": "resnet18", "pretrained": false, "batch_size": 8}',
    ],
    "ERM, ResNet-50, 224 px": [
        "--dataset", "Debug224", "--algorithm", "ERM", "--steps", "30", "--hparams",
        '{"backbone": "resnet50", "pretrained": false, "batch_size": 8}',
    ],
}  # fmt: skip
spent: list[float] = []
sizes: list[int] = []
save = Execution.save


def watched(self: Execution) -> None:
    start = time.perf_counter()
    save(self)
    spent.append(time.perf_counter() - start)
    sizes.append((self.run.directory / "snapshot.pkl").stat().st_size)


def main() -> None:
    Execution.save = watched  # type: ignore[method-assign]
    print("| run | seconds | snapshots | MB each | seconds each | share of the time |\n|---|---|---|---|---|---|")
    for name, flags in RUNS.items():
        spent.clear()
        sizes.clear()
        with tempfile.TemporaryDirectory() as directory:
            console, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
            start = time.perf_counter()
            train.main([*flags, "--checkpoint_freq", "10000", "--output_dir", str(Path(directory, "run"))])
            total = time.perf_counter() - start
            sys.stdout = console
        each = sum(spent) / len(spent) if spent else float("nan")
        size = sizes[-1] / 1e6 if sizes else float("nan")
        share = sum(spent) / total
        print(f"| {name} | {total:.0f} | {len(spent)} | {size:.1f} | {each:.3f} | {share:.2%} |", flush=True)


if __name__ == "__main__":
    main()
