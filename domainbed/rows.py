"""Records -> which run, and which row of a table, they belong to."""

import contextlib
import functools
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from domainbed import registry

logger = logging.getLogger(__name__)

# What tells the runs of a row apart, or changes no number.
NOT_ROW = {
    "seed", "hparams_seed", "trial_seed", "dataset", "test_envs", "data_dir", "output_dir",
    "eval_splits", "explain", "keep_best", "skip_model_save", "save_model_every_checkpoint", "overwrite",
    "save_every_s", "log_to",
}  # fmt: skip
NAMED = {"algorithm", "partition", "label", "hparams"}
# What a record without the key was run with; other keys default to None.
DEFAULTS = {
    "annotation_budget": 1.0,
    "validation_budget": 1.0,
    "input_pipeline": "pil",
    "precision": "fp32",
    "task": "domain_generalization",
    "holdout_fraction": 0.2,
    "uda_holdout_fraction": 0,
}
# Extras that a name states even where all rows share them, and their words there: DomainBed's tables cut names at 20
# characters.
ALWAYS_NAMED = {"annotation_budget": "budget", "validation_budget": "val_budget"}

INFERRED = "inferred:"  # begins what --confounders names where they are not the dataset's

Record = Mapping[str, Any]
Cell = tuple[str, tuple[int, ...]]  # dataset, test environments


def declared(package: str, name: str, attribute: str, default: Any = None) -> Any:
    """A class attribute of an algorithm or dataset; the default if no such class can be found."""
    try:
        return registry.attribute(package, name, attribute, default)
    except (NotImplementedError, ImportError) as error:
        if registry.is_file(name):
            where = "its path counts from where the runs were started: collect there"
            _warn_once(f"{name}: its environments and their roles are not known ({error}); {where}")
        return default


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def pseudo_confounders(args: Mapping[str, Any]) -> str:
    """The METHOD in ``--confounders inferred:METHOD``; "" where true confounders are asked for.

    Raises:
        ValueError: something else is asked for at the same time.
    """
    given = args.get("confounders") or []
    found = [name.removeprefix(INFERRED) for name in given if name.startswith(INFERRED)]
    if found and len(given) > 1:
        raise ValueError(f"--confounders {' '.join(given)}: what is inferred stands alone; name one")
    return found[0] if found else ""


def default_partition(algorithm: str) -> str:
    """The partition that an algorithm trains on unless told otherwise."""
    return str(declared("algorithms", algorithm, "PARTITION", "environment"))


@dataclass(frozen=True)
class Row:
    """What a line of a table stands for: everything in a record's args but seeds, data and places.

    Attributes:
        algorithm: its name.
        partition: which examples shared a minibatch.
        label: the user's own name for the row, if given.
        extras: further settings that are not the default, as (key, JSON); overridden hparams one by one.
    """

    algorithm: str
    partition: str
    label: str | None = None
    extras: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.algorithm, self.partition, self.label, self.extras))

    def __hash__(self) -> int:
        return self._hash  # rows are looked up for every run of a sweep

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> "Row":
        """The row of a run with these arguments; an argument that is missing or None has its default."""
        algorithm = args["algorithm"]
        settings = {key: value for key, value in args.items() if key not in NOT_ROW | NAMED}
        settings["ranges"] = _parsed(settings.get("ranges")) or None
        extras = {k: v for k, v in settings.items() if v not in (None, DEFAULTS.get(k)) and v is not False}
        extras |= _overrides(args.get("hparams"))
        return cls(
            algorithm,
            args.get("partition") or default_partition(algorithm),
            args.get("label") or None,
            tuple(sorted((key, json.dumps(value, sort_keys=True)) for key, value in extras.items())),
        )

    @property
    def name(self) -> str:
        """The row's name where no other row is near: its label, or the algorithm with all that is not default."""
        return self.titled({key for key, _ in self.extras})

    def titled(self, keys: Collection[str], partition: bool = True) -> str:
        """The label with what a name always states, or the description where there is no label."""
        return " ".join([self.label, *self._words(())]) if self.label else self.describe(keys, partition)

    def describe(self, keys: Collection[str], partition: bool = True) -> str:
        """``ALG``, ``ALG:partition`` if the partition is not the algorithm's own, and the extras among the keys.

        Those of ALWAYS_NAMED are stated in any case.
        """
        other = partition and self.partition != default_partition(self.algorithm)
        return " ".join([f"{self.algorithm}:{self.partition}" if other else self.algorithm, *self._words(keys)])

    def _words(self, keys: Collection[str]) -> list[str]:
        """``key=value`` of the extras among the keys and of those that are always named; these come first."""
        stated = [(ALWAYS_NAMED[key], text) for key, text in self.extras if key in ALWAYS_NAMED]
        others = [(key, text) for key, text in self.extras if key in keys and key not in ALWAYS_NAMED]
        return [f"{key}={text.strip(chr(34))}" for key, text in stated + others]


def _overrides(hparams: Any) -> dict[str, Any]:
    """The overridden hparams by name, from --hparams as given (JSON) or already parsed."""
    found = _parsed(hparams)
    return found if isinstance(found, dict) else {"hparams": found} if found else {}


def _parsed(value: Any) -> Any:
    """What a JSON text holds, so that settings are compared by content; anything else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _varying(cell: Collection[Row]) -> set[str]:
    """The extras in which some of these rows differ."""
    extras = [dict(row.extras) for row in cell]
    return {key for some in extras for key in some if len({other.get(key) for other in extras}) > 1}


def row_names(cells: Iterable[Collection[Row]], partition: bool = True) -> dict[Row, str]:
    """A short name for each row, distinct among rows that meet in a cell.

    A name is the row's label; without one it is the algorithm (with its partition, if that is not its own) and
    those extras in which rows that meet somewhere differ. So what all rows share is not repeated, and rows that
    never meet, as one draw chosen per dataset, may share a line. Rows of one label that do meet are told apart by
    what a name without label would say. The extras of ALWAYS_NAMED are stated whether rows share them or not.

    Args:
        cells: rows that meet, as those of one dataset and its test environments.
        partition: False for names that stand beside a column of partitions: then only rows of one partition need
            distinct names, and the partition is not shown.
    """
    together = [dict.fromkeys(cell) for cell in cells]  # a set's order would be another one in each process
    varying = set().union(*map(_varying, together))
    names = {row: row.titled(varying, partition) for cell in together for row in cell}
    for cell in together:
        lines = Counter((names[row], partition or row.partition) for row in cell)
        clashing = [row for row in cell if row.label and lines[names[row], partition or row.partition] > 1]
        names |= {row: f"{row.label} ({row.describe(varying, partition)})" for row in clashing}
    return names


class Run(NamedTuple):
    """One training run: the records with the same arguments."""

    row: Row
    dataset: str
    test_envs: tuple[int, ...]
    trial_seed: int
    hparams_seed: int
    seed: int

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> "Run":
        seeds = (args.get(key) or 0 for key in ("trial_seed", "hparams_seed", "seed"))
        return cls(Row.of(args), args["dataset"], tuple(sorted(args["test_envs"])), *seeds)

    @property
    def cell(self) -> Cell:
        """Where its row meets others."""
        return self.dataset, self.test_envs


def runs(records: Iterable[Record]) -> dict[Run, list[Record]]:
    """The records by run, in order of appearance."""
    found: dict[Run, list[Record]] = defaultdict(list)
    for record in records:
        found[Run.of(record["args"])].append(record)
    return dict(found)


def meeting(found: Iterable[Run]) -> dict[Cell, list[Row]]:
    """The rows by dataset and test environments, each once, in order of appearance."""
    cells: dict[Cell, dict[Row, None]] = defaultdict(dict)
    for run in found:
        cells[run.cell][run.row] = None
    return {cell: list(rows) for cell, rows in cells.items()}


def replicates(found: Iterable[Run]) -> dict[Run, int]:
    """The rank of each run's seed among the runs that differ in nothing else.

    It is 0 throughout a random search, where each draw has one seed. Where a draw is trained again with other
    seeds, runs of equal rank are compared with each other, and the ranks are trials of their own.
    """
    same: dict[Any, list[Run]] = defaultdict(list)
    for run in found:
        same[run[:-1]].append(run)
    ranked = (sorted(some, key=lambda run: run.seed) if len(some) > 1 else some for some in same.values())
    return {run: rank for some in ranked for rank, run in enumerate(some)}


def for_domainbed(records: Iterable[Record]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Records in which "algorithm" is the row's name and "trial_seed" the trial, for DomainBed's tables and methods.

    Returns:
        The records with args.algorithm and args.trial_seed replaced, and the algorithm of each name, in the order of
        their appearance. A trial is (trial_seed, replicate).
    """
    by_run = runs(records)
    names, replicate = row_names(meeting(by_run).values()), replicates(by_run)
    renamed = [
        {
            **record,
            "args": {**record["args"], "algorithm": names[run.row], "trial_seed": (run.trial_seed, replicate[run])},
        }
        for run, checkpoints in by_run.items()
        for record in checkpoints
    ]
    return renamed, {names[run.row]: run.row.algorithm for run in by_run}
