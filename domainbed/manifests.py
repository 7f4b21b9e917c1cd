"""Manifests: CSV files that are datasets; what environments, classes and confounders they hold, without torch."""

import functools
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainbed.messages import not_found
from domainbed.metadata import Problems, Table, read_csv

REQUIRED = ("path", "label")
CONFOUNDER = "confounder"
SPLITS = {  # what the column split may say
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
WHAT_TO_DO = "mend these rows, or take them out"


@dataclass(frozen=True, eq=False)
class Manifest:
    """A CSV file as a dataset. Rows that say nothing usable are among the problems, not in ``e`` or ``y``.

    Attributes:
        table: its rows.
        classes: names of the labels.
        environments: names of the environments.
        e: (N,) environment of each row; -1: not said.
        validation_envs, test_envs: those made of the rows with split validation and test; empty without that column.
        problems: bad rows.
    """

    table: Table
    classes: tuple[str, ...]
    environments: tuple[str, ...]
    e: NDArray[np.int64]
    validation_envs: tuple[int, ...]
    test_envs: tuple[int, ...]
    problems: Problems

    @functools.cached_property
    def class_attributes(self) -> dict[str, Any]:
        """What a dataset class declares that is made of this file and nothing else."""
        columns = self.confounder_columns(None)
        return {
            "ENVIRONMENTS": self.environments,
            "VALIDATION_ENVS": self.validation_envs,
            "TEST_ENVS": self.test_envs or None,
            "CLASSES": self.classes,
            "CONFOUNDERS": self.confounders(columns, Problems(self.table.path))[0] if columns else (),
            "OPTIONS": ("confounders",),
            "NEEDS_DATA_DIR": False,
        }

    def confounder_columns(self, chosen: Sequence[str] | None) -> tuple[str, ...]:
        """The columns whose product forms the groups: those chosen, else the column ``confounder`` if there is one.

        Raises:
            ValueError: the file lacks one, or one is chosen twice.
        """
        if chosen is None:
            return (CONFOUNDER,) if CONFOUNDER in self.table.columns else ()
        allowed = [name for name in self.table.columns if name not in (*REQUIRED, "split")]
        for name in chosen:
            if name not in allowed:
                raise ValueError("--confounders: " + not_found(f"column of {self.table.path}", name, allowed))
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"--confounders {' '.join(chosen)}: name each column once")
        return tuple(chosen)

    def confounders(
        self, columns: Sequence[str], problems: Problems, names: Sequence[str] | None = None
    ) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """The values of the columns' product, like "land+male", and which of them each row has (N,); -1: not said.

        Args:
            columns: at least one.
            problems: gets the rows that lack a value.
            names: of the values of a single column, in order; None: those that occur.
        """
        one = [self.table.categories(column, problems, names) for column in columns]
        product, c = one[0]
        for values, more in one[1:]:
            known = (c >= 0) & (more >= 0)
            c = np.where(known, c * len(values) + more, -1)
            product = tuple(f"{a}+{b}" for a in product for b in values)
        return product, c

    def require_variation(self, columns: Sequence[str], held_out: Collection[int]) -> None:
        """Raises ValueError if a column has one value in all rows of the environments that are trained on."""
        training = ~np.isin(self.e, list(held_out))
        for column in columns:
            values = {cell for cell, trained in zip(self.table.columns[column], training, strict=True) if trained}
            if len(values) == 1:
                raise ValueError(
                    f"{self.table.path}: {column} is {values.pop()!r} in all {training.sum()} training rows and so "
                    "confounds nothing; name other columns with --confounders, or train on other environments"
                )


def read(path: str | os.PathLike[str]) -> Manifest:
    """The manifest, from memory while the file stays the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no CSV file with these columns, or its rows can't be trained and tested on.
    """
    path = Path(os.path.abspath(path))
    stat = path.stat() if path.is_file() else None
    return _read(path, stat and (stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=8)
def _read(path: Path, _state: Any) -> Manifest:
    table = read_csv(path, REQUIRED)
    problems = Problems(table.path)
    classes, _ = table.categories("label", problems)
    environments, e, roles = (_by_split if "split" in table.columns else _by_environment)(table, problems)
    if len(classes) == 1:
        raise _unusable(problems, f"label is {classes[0]!r} in all rows; a classifier needs two labels")
    validation, test = (tuple(e for e, r in enumerate(roles) if r == role) for role in ("validation", "test"))
    return Manifest(table, classes, environments, e, validation, test, problems)


Names = tuple[str, ...]
Layout = tuple[Names, NDArray[np.int64], Names]  # names of environments, e (N,), their roles


def _by_split(table: Table, problems: Problems) -> Layout:
    """The training rows by environment, then the validation rows, then the test rows."""
    splits = [SPLITS.get(cell.lower()) for cell in table.columns["split"]]
    for line, cell, split in zip(table.lines, table.columns["split"], splits, strict=True):
        if split is None:
            problems.add(line, f"split is {cell!r}; allowed: train, validation (val, valid), test")
    for needed in ("train", "test"):
        if needed not in splits:
            raise _unusable(problems, f"no row has split {needed}; add some, or leave the column split out")
    training = [row for row, split in enumerate(splits) if split == "train"]
    names: Names = ("train",)
    e = np.where(np.array(splits) == "train", 0, -1)
    if "environment" in table.columns:
        names, e = table.categories("environment", problems, rows=training)
    roles: Names = ("train",) * len(names)
    for split in ("validation", "test"):
        if split in splits:
            e[np.array(splits) == split] = len(names)
            names, roles = (*names, split), (*roles, split)
    if len(set(names)) < len(names):
        raise _unusable(problems, "a training environment is called like a split; rename it")
    return names, e, roles


def _by_environment(table: Table, problems: Problems) -> Layout:
    names: Names = ("all",)
    e = np.zeros(len(table), dtype=np.int64)
    if "environment" in table.columns:
        names, e = table.categories("environment", problems)
    if len(names) < 2:
        raise _unusable(
            problems,
            "all rows are in one environment, so that nothing is left to test on; add a column split (train, "
            "validation, test), or a column environment with at least two values",
        )
    return names, e, ("",) * len(names)


def _unusable(problems: Problems, message: str) -> ValueError:
    """The error, unless bad rows explain it; then they are raised."""
    problems.raise_if_any(f"{WHAT_TO_DO} (as they are, {message.partition(';')[0]})")
    return ValueError(f"{problems.path}: {message}")
