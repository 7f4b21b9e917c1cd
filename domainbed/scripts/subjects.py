"""Saved runs as scripts open them: the model with its run's dataset and splits; which runs stand for a sweep's rows."""

import argparse
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from domainbed import figures, model_selection, records, saved_models
from domainbed.group_tables import SAMPLING, ordered
from domainbed.rows import Row, Run, meeting, row_names
from domainbed.scripts.arguments import add_trusted
from domainbed.scripts.train_arguments import completed
from domainbed.scripts.train_building import build_data, device
from domainbed.splits import Split
from domainbed.tables import in_order

SAME_IMAGES = (  # arguments in which runs agree if they have the same test images
    "dataset", "trial_seed", "test_envs", "holdout_fraction", "uda_holdout_fraction", "confounders",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A saved model, and the data of its run.

    Attributes:
        file: where it was saved.
        args: arguments of the run as they were saved.
        step: after which it was saved, -1 if that is not known.
        splits: of its run.
    """

    file: Path
    args: dict[str, Any]
    step: int
    algorithm: Any
    dataset: Any
    splits: Sequence[Split]

    @property
    def test_envs(self) -> list[int]:
        return list(self.args["test_envs"])

    @property
    def where(self) -> str:
        """Which model this is, in words."""
        return f"{self.file.parent.name}/{self.file.name}, step {self.step if self.step >= 0 else 'unknown'}"


def open_subject(file: Path, own: Mapping[str, Any] | None = None, trusted: bool = False) -> Subject:
    """The model, with its run's dataset and splits as the run had them.

    Args:
        own: arguments that stand in place of the run's, as data_dir and mask_dir; None among them is the run's.
        trusted: see ``saved_models.load``.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: the model or its data can't be had.
    """
    content = saved_models.load(file, device(), trusted)
    given = {key: value for key, value in (own or {}).items() if value is not None}
    args = completed(content["args"]) | given
    dataset, splits = build_data(args, content["model_hparams"])
    algorithm = saved_models.restore(content, device(), trusted)
    return Subject(file, content["args"], saved_models.step_of(file, content), algorithm, dataset, splits)


def wanted(splits: Sequence[Split], envs: Sequence[int], kinds: Sequence[str]) -> list[Split]:
    """The splits of these environments and kinds.

    Raises:
        ValueError: the run has none of an environment.
    """
    found = [split for split in splits if split.env in envs and split.kind in kinds]
    for env in envs:
        if env not in {split.env for split in found}:
            known = ", ".join(f"env{split.env} {split.kind}" for split in splits)
            raise ValueError(f"--envs {env} --splits {' '.join(kinds)}: this run has the splits {known}")
    return found


def check_same_images(files: Sequence[Path], trusted: bool = False) -> None:
    """Raises ValueError if the runs have not been tested on the same images."""
    first, *others = [completed(_args(file, trusted)) for file in files]
    for file, other in zip(files[1:], others, strict=True):
        differing = [f"{key}: {first[key]!r} and {other[key]!r}" for key in SAME_IMAGES if first[key] != other[key]]
        if differing:
            raise ValueError(
                f"a picture compares models on the same images, but {files[0]} and {file} differ in "
                f"{'; '.join(differing)}; draw them one by one"
            )


def _args(file: Path, trusted: bool) -> dict[str, Any]:
    """The arguments of the run that saved the model."""
    found: dict[str, Any] = saved_models.load(file, torch.device("cpu"), trusted)["args"]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which runs a figure is of."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", nargs="+", metavar="RUN", help="output_dirs of runs, or model*.pkl in them")
    source.add_argument("--input_dir", metavar="SWEEP", help="of each row of a sweep the run that validation chooses")
    add("--rows", nargs="+", metavar="NAME", help="with --input_dir: only these rows, in this order")
    add("--dataset", help="with --input_dir: of which dataset, if the sweep has several")
    add("--test_envs", type=int, nargs="+", help="with --input_dir: of which test environments, if it has several")
    add("--data_dir", help="default: the runs'")
    add("--out", metavar="FILE", help="PNG, PDF or SVG; default with --input_dir: SWEEP/figures/KIND.png")
    add_trusted(parser)


def output_file(args: argparse.Namespace) -> Path:
    """Where the figure goes.

    Raises:
        ValueError: nowhere, or into a file of another kind.
        ImportError: Matplotlib is missing.
    """
    figures.figure_class()  # now, not when everything has been computed
    if not (args.out or args.input_dir):
        raise ValueError("--out: name the file of the figure, as look.png")
    out = Path(args.out or Path(args.input_dir) / "figures" / f"{args.kind}.png")
    figures.check_file(out)
    return out


def chosen_files(args: argparse.Namespace) -> dict[str, Path]:
    """The models that the flags name, by the name under which a figure shows them.

    Raises:
        ValueError, FileNotFoundError: there are none.
    """
    if args.input_dir:
        return stand_ins(Path(args.input_dir), args.dataset, args.test_envs, args.rows)
    if unused := [flag for flag in ("rows", "dataset", "test_envs") if getattr(args, flag) is not None]:
        raise ValueError(f"--{unused[0]} is for --input_dir; with --runs, name the runs that you want")
    files = [saved_models.find(path) for path in args.runs]
    _check_once("--runs", args.runs, [file.resolve() for file in files])
    rows = [Row.of(_args(file, args.trusted)) for file in files]
    names = row_names([set(rows)])
    count = Counter(names[row] for row in rows)
    short = [f"{file.parent.name}/{file.name}" for file in files]
    places = short if len(set(short)) == len(files) else [str(file) for file in files]
    titled = [names[row] if count[names[row]] == 1 else f"{names[row]} ({place})"
              for row, place in zip(rows, places, strict=True)]  # fmt: skip
    return dict(zip(titled, files, strict=True))


def _check_once(flag: str, words: Sequence[str], meant: Sequence[Any]) -> None:
    """Raises ValueError if two words mean the same thing."""
    for i, thing in enumerate(meant):
        if (first := meant.index(thing)) < i:
            both = f"{words[i]} twice" if words[i] == words[first] else f"{words[first]} and {words[i]}, the same model"
            raise ValueError(f"{flag} names {both}; name each once")


def stand_ins(
    directory: Path,
    dataset: str | None = None,
    test_envs: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, Path]:
    """For each row of a sweep the model of one run: which validation takes among the draws of the first trial.

    By (AA + WGA) / 2 where groups are known, else by accuracy. The first trial, and not the best one, so that no row
    is shown at its luckiest.

    Args:
        dataset, test_envs: of which runs, where the sweep has several.
        only: names of rows.

    Raises:
        ValueError, FileNotFoundError: no such runs, or one left no model.
    """
    _check_once("--rows", only or (), only or ())
    directories, found = _runs(directory)
    cells = meeting(directories)
    meant = [cell for cell in cells if dataset in (None, cell[0])]
    meant = [cell for cell in meant if test_envs is None or cell[1] == tuple(sorted(test_envs))]
    if len(meant) != 1:
        known = "; ".join(f"{name} {' '.join(map(str, envs))}" for name, envs in ordered(cells))
        raise ValueError(f"{directory} holds runs of {known}; name one of them: --dataset D --test_envs E")
    here = [record for record in found if Run.of(record["args"]).cell == meant[0]]
    best = model_selection.choose(here) or model_selection.choose_by_accuracy(here)
    firsts: dict[Row, Path] = {}
    for choice in sorted(best, key=lambda choice: (choice.run.trial_seed, choice.replicate)):
        firsts.setdefault(choice.run.row, directories[choice.run])
    if not firsts:
        raise ValueError(f"{directory}: validation can choose no run of {meant[0][0]}; name some with --runs")
    names = row_names([set(firsts)])
    by_name = {names[row]: firsts[row] for row in _in_order(firsts)}
    if unknown := [name for name in only or () if name not in by_name]:
        raise ValueError(f"--rows {' '.join(unknown)}: {directory} has the rows {', '.join(by_name)}")
    return {name: saved_models.find(by_name[name]) for name in only or by_name}


def _in_order(rows: Collection[Row]) -> list[Row]:
    """As tables have them: by algorithm, then by partition."""
    algorithms, partitions = in_order("algorithms", (row.algorithm for row in rows)), [*SAMPLING]
    places = {row: partitions.index(row.partition) if row.partition in SAMPLING else len(SAMPLING) for row in rows}
    return sorted(rows, key=lambda row: (algorithms.index(row.algorithm), places[row], row.partition, row.name))


def _runs(directory: Path) -> tuple[dict[Run, Path], list[dict[str, Any]]]:
    """Where each run of a sweep lies, and all their records."""
    directories, found = {}, []
    for path in sorted(directory.glob(f"*/{records.RESULTS_FILE}")):
        own = records.read_checkpoints(path)[0]
        found += own
        if own:
            directories[Run.of(own[0]["args"])] = path.parent
    if not found:
        raise FileNotFoundError(f"{directory} holds no runs (no */{records.RESULTS_FILE})")
    return directories, found
