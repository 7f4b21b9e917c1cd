"""Prints a dataset's card and writes a contact sheet of its images: ``... --dataset DigitsSubpop --output sheet.png``.

The card says where the images come from, which environments and groups they form, and whether they are as many as
published. Nothing is trained.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainbed import cards, datasets, hparams_registry, input_pipelines, overrides, registry
from domainbed.algorithms import get_algorithm_class
from domainbed.datasets.base import ImageEnvironment, Integers, MultipleDomainDataset, confounders, locate
from domainbed.lib.misc import known_array, labels
from domainbed.scripts import bad_input, run_cli
from domainbed.scripts.arguments import DomainBedParser
from domainbed.scripts.train_building import build_dataset, seed_everything
from domainbed.splits import check_test_envs

BASELINE = "ERM"  # whose hparams the dataset is built with
SEED = 0  # of datasets that draw their images, and of the pictures chosen


def parser() -> argparse.ArgumentParser:
    p = DomainBedParser(("dataset", "data_dir", "hparams", "test_envs"), description=__doc__)
    p.add_argument("--dataset", required=True, help="a name, or the path of a CSV file or a file of features")
    p.add_argument("--data_dir", help="directory of the datasets; the embedded ones need none")
    p.add_argument("--test_envs", type=int, nargs="+", help="default: the dataset's own, else 0")
    p.add_argument("--hparams", help='JSON object that overrides hparams, like {"image_size": 64}')
    p.add_argument("--confounders", nargs="+", help="whose product forms the groups, for datasets that know several")
    p.add_argument("--output", help="the contact sheet, a PNG file; default: the dataset's name, in this directory")
    return p


def main(argv: Sequence[str]) -> int:
    """Prints the card and writes the contact sheet; returns the exit status."""
    args = vars(parser().parse_args(argv))
    with bad_input():
        output = output_file(args)
        dataset = build(args)
        facts = survey(dataset, args["test_envs"])
    print(card(dataset, facts, chosen=getattr(dataset, "TEST_ENVS", None) is None))
    if len(dataset.input_shape) == 1:
        print("\nNo contact sheet: these are features, not images.")
        return 0
    sheet = contact_sheet(dataset, facts)
    with bad_input():
        sheet.save(output, format="PNG")
    print(f"\nContact sheet: {output} (images of all environments, at random)")
    return 0


def output_file(args: dict[str, Any]) -> Path:
    """Where the contact sheet goes.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    name = args["dataset"]
    output = Path(args["output"] or f"{Path(name).stem if registry.is_file(name) else name}.png")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no folder {output.parent}; make it first")
    return output


def build(args: dict[str, Any]) -> MultipleDomainDataset:
    """The dataset as train would build it, its files checked; fills in the test environments.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: what was asked for can't be had, or files are missing.
    """
    name = args["dataset"]
    cls = datasets.get_dataset_class(name)
    args["test_envs"] = args["test_envs"] or list(cls.TEST_ENVS or [0])
    given = overrides.parse(args["hparams"])
    hparams_registry.check_given(get_algorithm_class(BASELINE), name, given)
    seed_everything(SEED)
    dataset: MultipleDomainDataset = build_dataset(args, hparams_registry.default_hparams(BASELINE, name) | given)
    check_test_envs(dataset, args["test_envs"])
    dataset.use_input_pipeline(input_pipelines.DEFAULT)
    return dataset


@dataclass(frozen=True)
class Facts:
    """What the arrays of a dataset say.

    Attributes:
        environments: with their counts.
        groups: per environment, the group of each image, or its label where no confounder is known.
        names: of the groups.
        title: what they are: "group" or "class".
        opened: environments whose labels were read image by image.
    """

    environments: list[cards.Environment]
    groups: list[Integers]
    names: list[str]
    title: str
    opened: list[str]


def survey(dataset: MultipleDomainDataset, test_envs: Sequence[int]) -> Facts:
    """Counts the groups of every environment."""
    env_names = dataset.ENVIRONMENTS or [str(e) for e in range(len(dataset))]
    opened = [name for name, env in zip(env_names, dataset, strict=True) if known_array(env, "y") is None]
    if opened:
        print(f"Reading the labels of {cards.few(opened)} image by image; this takes a while.")
    v = dataset.num_confounders
    groups: list[Integers] = [np.asarray(labels(env) * v + (confounders(env) if v > 1 else 0)) for env in dataset]
    n = dataset.num_classes * v
    environments = [
        cards.Environment(name, _role(dataset, e, test_envs), np.bincount(g, minlength=n))
        for e, (name, g) in enumerate(zip(env_names, groups, strict=True))
    ]
    names = [dataset.group_name(g) for g in range(n)] if v > 1 else class_names(dataset)
    return Facts(environments, groups, names, "group" if v > 1 else "class", opened)


def class_names(dataset: MultipleDomainDataset) -> list[str]:
    return list(dataset.CLASSES) or [f"y={y}" for y in range(dataset.num_classes)]


def _role(dataset: MultipleDomainDataset, e: int, test_envs: Sequence[int]) -> str:
    if e in dataset.VALIDATION_ENVS:
        return "validation"
    return "test" if e in test_envs else "training"


def card(dataset: MultipleDomainDataset, facts: Facts, chosen: bool = False) -> str:
    """The card's text.

    Args:
        chosen: whether the class leaves the choice of test environments to the user.
    """
    cls, names = type(dataset), (facts.names, facts.title)
    expected = cards.PARTS if dataset.NEEDS_DATA_DIR else cards.PARTS[:-1]  # embedded sets have no layout
    blocks = [
        f"{cls.__name__}\n{'=' * len(cls.__name__)}\n{cards.description(cls.__doc__, expected)}",
        "\n".join(_summary(dataset, facts)),
        f"Images of each {facts.title} (share of the environment)\n\n{cards.group_table(facts.environments, *names)}",
        "\n".join(_notes(dataset, facts, chosen)),
        cards.published(release(dataset), here(dataset, facts), facts.names),
    ]
    return "\n\n".join(blocks)


def release(dataset: MultipleDomainDataset) -> dict[str, Any]:
    """The published counts; sums over groups where the user has named another confounder than the release's."""
    own = tuple(dataset.CONFOUNDERS) == tuple(type(dataset).CONFOUNDERS)
    counts = dataset.PUBLISHED_COUNTS.items()
    return {part: n if own or isinstance(n, int) else sum(n) for part, n in counts}


def here(dataset: MultipleDomainDataset, facts: Facts) -> dict[str, Integers]:
    """Images of each group in whatever part a release may count."""
    return cards.parts(facts.environments, getattr(dataset, "split_counts", {}))


def _summary(dataset: MultipleDomainDataset, facts: Facts) -> Iterator[str]:
    n, shape = sum(map(len, facts.groups)), " x ".join(map(str, dataset.input_shape))
    yield f"Images: {n} of {shape}, in {len(facts.environments)} environments"
    yield f"Classes: {dataset.num_classes} ({cards.few(class_names(dataset))})"
    if dataset.num_confounders > 1:
        yield f"Confounder: {dataset.num_confounders} values ({cards.few(list(dataset.CONFOUNDERS))})"
    else:
        yield "Confounder: none is known, so there are no groups"


def _notes(dataset: MultipleDomainDataset, facts: Facts, chosen: bool) -> Iterator[str]:
    yield cards.unseen_groups(facts.environments, facts.names, facts.title)
    if not dataset.VALIDATION_ENVS:
        yield "There is no official validation set: train holds out a share of each environment (--holdout_fraction)."
    if chosen:
        yield "The test environments are yours to choose with --test_envs; sweeps leave out each in turn."
    if facts.opened:
        yield f"No array of labels: {cards.few(facts.opened)}; every image was opened for its label."


def contact_sheet(dataset: MultipleDomainDataset, facts: Facts) -> Any:
    """A row of pictures for each group that the card's table shows and that has images."""
    groups = np.concatenate(facts.groups)
    places = [(env, key) for env, some in zip(dataset, facts.groups, strict=True) for key in range(len(some))]
    counts = np.bincount(groups, minlength=len(facts.names))
    shown = [g for g in cards.shown_groups(counts) if counts[g]]
    rows = []
    for g, chosen in zip(shown, cards.choose(groups, shown, np.random.default_rng(SEED)), strict=True):
        rows.append((f"{facts.names[g]}\n{counts[g]} images", [picture(*places[position]) for position in chosen]))
    return cards.contact_sheet(rows)


def picture(environment: Any, key: int) -> Any:
    """An example's image as people see it."""
    x = np.asarray(environment[key][0], dtype=np.float32)
    if isinstance(locate(environment, key)[0], ImageEnvironment):
        mean, std = (np.reshape(values, (3, 1, 1)) for values in (input_pipelines.MEAN, input_pipelines.STD))
        x = np.clip(x * std + mean, 0, 1)
    return cards.to_picture(x)


if __name__ == "__main__":
    run_cli(main)
