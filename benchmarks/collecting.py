"""What collecting a sweep's results costs: ``python benchmarks/collecting.py``.

Makes sweeps of 1,000, 5,000 and 20,000 finished jobs (18,000, 90,000 and 576,480 records of about 2 kB) as DomainBed
would leave them, and prints a Markdown table: CPU seconds (user and system), seconds and peak memory of
``collect_results`` in a process of its own, the least of ``--repeats``, with nothing collected before, with nothing
changed since, and with one more record in 1 % of the runs. Beside it stands what merely reading all lines into dicts by
``json``, as DomainBed's collector starts, costs in the same place, and how ``collect_results`` compares with
DomainBed's collector as it was measured (commit b93c22a) on another machine, of the kind that it names, all alone.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from domainbed.run_index.database import INDEX_FILE

UPSTREAM = {1_000: (9.0, 960.0), 5_000: (16.9, 1350.0), 20_000: (64.6, 4250.0)}  # jobs -> CPU s, peak MB
MACHINE = "two AMD EPYC cores with AVX-512"
DATASETS = {  # environments, steps between two records; in the order in which jobs are taken
    "VLCS": (4, 300), "PACS": (4, 300), "OfficeHome": (4, 300), "TerraIncognita": (4, 300), "ColoredMNIST": (3, 100),
    "RotatedMNIST": (6, 100),
}  # fmt: skip
ALGORITHMS = [
    "ERM", "IRM", "GroupDRO", "Mixup", "CORAL", "MMD", "DANN", "CDANN", "VREx", "ALIGN", "DRE", "SGT", "RRR", "CARE",
]  # fmt: skip
DRAWS, TRIALS, STEPS = 20, 3, 5001
FLAGS = (
    "class_balanced",
    "data_augmentation",
    "dinov2",
    "freeze_bn",
    "lars",
    "nonlinear_classifier",
    "resnet18",
    "vit",
)
PLAIN = """
import json, sys
from pathlib import Path
records = [json.loads(line) for path in Path(sys.argv[1]).glob("*/results.jsonl") for line in open(path)]
"""
COLLECT = """
import sys
from domainbed.scripts import collect_results
collect_results.main(["--input_dir", sys.argv[1]])
"""
WATCHED = """
import resource
used = resource.getrusage(resource.RUSAGE_SELF)
print([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024], file=sys.stderr)
"""


def jobs() -> Iterator[tuple[str, int, str, int, int]]:
    """Dataset, test environment, algorithm, draw and trial."""
    for dataset, (n_envs, _) in DATASETS.items():
        for env in range(n_envs):
            for algorithm in ALGORITHMS:
                for job in range(DRAWS * TRIALS):
                    yield dataset, env, algorithm, job // TRIALS, job % TRIALS


def lines(rng: random.Random, place: Path, job: tuple[str, int, str, int, int]) -> list[str]:
    """The records of one job."""
    dataset, env, algorithm, draw, trial = job
    n_envs, frequency = DATASETS[dataset]
    args: dict[str, Any] = dict.fromkeys(("checkpoint_freq", "hparams", "steps"))
    args |= {"algorithm": algorithm, "data_dir": "/data/domainbed", "dataset": dataset, "holdout_fraction": 0.2}
    args |= {"hparams_seed": draw, "output_dir": str(place), "save_model_every_checkpoint": False, "test_envs": [env]}
    args |= {"seed": rng.getrandbits(31), "skip_model_save": False, "task": "domain_generalization"}
    args |= {"trial_seed": trial, "uda_holdout_fraction": 0}
    hparams = dict.fromkeys(FLAGS, False) | {"batch_size": 32, "resnet_dropout": 0.1, "linear_steps": 500}
    hparams |= {f"{algorithm.lower()}_strength_of_penalty_{i}": rng.random() for i in range(8)}
    hparams |= {"lr": rng.random() / 1e3, "weight_decay": rng.random() / 1e3, "vit_attn_tune": False}
    numbers = [f"env{e}_{split}_acc" for e in range(n_envs) for split in ("in", "out")]
    numbers += ["loss", "nll", "penalty", "step_time"]
    steps = dict.fromkeys([*range(0, STEPS, frequency), STEPS - 1])
    return [
        json.dumps(
            {name: rng.random() for name in numbers}
            | {"args": args, "epoch": step / 37, "hparams": hparams, "mem_gb": 9.123, "step": step},
            sort_keys=True,
        )
        for step in steps
    ]


def make_sweep(directory: Path, n_jobs: int) -> int:
    """Writes the first jobs, and returns the number of their records."""
    rng, total = random.Random(0), 0
    for _, job in zip(range(n_jobs), jobs(), strict=False):
        place = directory / f"{rng.getrandbits(128):032x}"
        place.mkdir(parents=True)
        written = lines(rng, place, job)
        (place / "results.jsonl").write_text("\n".join(written) + "\n", encoding="utf-8")
        (place / "done").write_text("done", encoding="utf-8")
        total += len(written)
    return total


def measured(code: str, directory: Path) -> tuple[float, float, float]:
    """CPU seconds, seconds and peak MB of a process."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code + WATCHED, str(directory)]
    done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    cpu, memory = json.loads(done.stderr.splitlines()[-1])
    return cpu, time.perf_counter() - start, memory


def go_on(directory: Path, start: int) -> None:
    """One more record in every hundredth run."""
    for name in sorted(os.listdir(directory))[start::100]:
        path = directory / name / "results.jsonl"
        if path.exists():
            last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(last | {"step": last["step"] + 1}, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of which the least counts")
    parser.add_argument("--jobs", type=int, nargs="+", default=[*UPSTREAM], choices=[*UPSTREAM])
    args = parser.parse_args()
    print(f"DomainBed's: on {MACHINE}\n")
    header = [
        "jobs",
        "records",
        "command",
        "CPU s",
        "wall s",
        "peak MB",
        "DomainBed's CPU s",
        "less CPU",
        "less memory",
    ]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for n_jobs in args.jobs:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), n_jobs, args.repeats)


def compare(directory: Path, n_jobs: int, repeats: int) -> None:
    """Prints the rows of a sweep of that many jobs."""
    records = make_sweep(directory, n_jobs)
    upstream_s, upstream_mb = UPSTREAM[n_jobs]

    def row(name: str, found: list[tuple[float, float, float]]) -> None:
        cpu, wall, memory = map(min, zip(*found, strict=True))
        ratios = f"{upstream_s} | {upstream_s / cpu:.1f}x | {upstream_mb / memory:.1f}x"
        print(f"| {n_jobs} | {records} | {name} | {cpu:.2f} | {wall:.2f} | {memory:.0f} | {ratios} |", flush=True)

    row("json.loads of every line, nothing else", [measured(PLAIN, directory) for _ in range(repeats)])
    cold = []
    for _ in range(repeats):
        (directory / INDEX_FILE).unlink(missing_ok=True)
        cold.append(measured(COLLECT, directory))
    row("collect_results, the first time", cold)
    measured(COLLECT, directory)  # by now no file is too young to be trusted
    row("collect_results, nothing changed", [measured(COLLECT, directory) for _ in range(repeats)])
    changed = []
    for start in range(repeats):
        go_on(directory, start)
        changed.append(measured(COLLECT, directory))
    row("collect_results, 1 % of the runs went on", changed)


if __name__ == "__main__":
    main()
