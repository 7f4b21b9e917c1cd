"""How well pseudo-confounders agree with the true ones, on the embedded sets: a Markdown table.

    python benchmarks/inferred_confounders.py --seeds 0 1 2

Each line is the mean and standard deviation over the seeds, with the default hparams.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from domainbed.datasets import get_dataset_class
from domainbed.hparams_registry import default_hparams
from domainbed.inferred_confounders import REGISTRY, Setting, agreement, look
from domainbed.splits import split_environments, training_splits

DATASETS = ["DigitsSubpop", "DigitsM2M", "DigitsO2O", "ColoredDigits"]
COLUMNS = ["ami", "nmi", "accuracy", "majority"]
COLUMNS += [f"{name} within labels" for name in COLUMNS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--methods", nargs="+", default=list(REGISTRY))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=5001)
    args = parser.parse_args()
    print("| dataset | method | values | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for dataset in args.datasets:
        for found in lines(dataset, args.methods, args.seeds, args.steps):
            print(found, flush=True)


def lines(name: str, methods: list[str], seeds: list[int], steps: int) -> Iterator[str]:
    """The lines of a dataset; all methods look at the same networks. The last is of the label taken for c'."""
    hparams = default_hparams("ERM", name)
    dataset_class: Any = get_dataset_class(name)
    test_envs = list(dataset_class.TEST_ENVS)
    dataset = dataset_class(None, test_envs, hparams)
    trained = training_splits(dataset, split_environments(dataset, test_envs, 0.2), test_envs)
    true = np.concatenate([split.c for split in trained])
    setting = Setting(dataset.num_classes, dataset.input_shape, hparams, steps)
    seen = [look(trained, dataclasses.replace(setting, seed=seed)) for seed in seeds]
    for method in [*methods, "(the label)"]:
        values = [REGISTRY[method](one) if method in REGISTRY else one.y for one in seen]
        found = [agreement(some, true, one.y) for some, one in zip(values, seen, strict=True)]
        scores = np.array([[one.get(column, np.nan) for column in COLUMNS] for one in found])
        spread = scores.std(axis=0, ddof=1) if len(seeds) > 1 else np.full(len(COLUMNS), np.nan)
        cells = [f"{mean:.2f} ({sd:.2f})" for mean, sd in zip(scores.mean(axis=0), spread, strict=True)]
        numbers = ", ".join(str(some.max() + 1) for some in values)
        yield " | ".join([f"| {name}", method, numbers, *cells]) + " |"


if __name__ == "__main__":
    main()
