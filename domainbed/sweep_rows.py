"""The rows that a sweep is asked for, and the controls that belong to them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from domainbed import overrides, registry

Budget = tuple[float, float]  # shares of the training and of the validation images whose confounder is known
FULL_BUDGET: Budget = (1.0, 1.0)


@dataclass(frozen=True)
class SweepRow:
    """What becomes one row of the tables: an algorithm, and what tells it from other rows of the same algorithm.

    Attributes:
        algorithm: its name.
        partition: None for the algorithm's own.
        label: what tables call the row; None for the name.
        hparams: overrides, laid over the sweep's.
        ranges: how hparams are drawn (``overrides.parse_ranges``), laid over the sweep's.
        control: whether the row's control follows it; None: as the sweep says.
        confounders: as train's flag has them; None: as the sweep says.
        budgets: the shares of annotated training and validation images at which the row is trained; None: as the sweep
            says.
        on: for some datasets, by name, ``{"hparams": ..., "ranges": ...}`` that are laid over the row's there.
    """

    algorithm: str
    partition: str | None = None
    label: str | None = None
    hparams: Mapping[str, Any] | None = None
    ranges: Mapping[str, Any] | None = None
    control: bool | None = None
    confounders: Sequence[str] | None = None
    budgets: Sequence[Budget] | None = None
    on: Mapping[str, Mapping[str, Any]] | None = None

    @classmethod
    def parse(cls, entry: str) -> "SweepRow":
        """The row meant by ``"NAME"`` or ``"NAME:partition"``."""
        algorithm, _, partition = entry.partition(":")
        return cls(algorithm, partition or None)

    @property
    def own_partition(self) -> str:
        """The partition that the algorithm trains on unless told otherwise."""
        return str(registry.attribute("algorithms", self.algorithm, "PARTITION", "environment"))

    @property
    def name(self) -> str:
        """``NAME``, or ``NAME:partition`` where the partition is not the algorithm's own."""
        other = self.partition not in (None, self.own_partition)
        return f"{self.algorithm}:{self.partition}" if other else self.algorithm

    def on_dataset(self, dataset: str) -> "SweepRow":
        """The row as it is on one dataset.

        Raises:
            NotImplementedError: ``on`` names a dataset that does not exist.
        """
        for other in self.on or {}:
            registry.attribute("datasets", other, "ENVIRONMENTS")
        there = (self.on or {}).get(dataset, {})
        hparams, ranges = ({**(getattr(self, key) or {}), **there.get(key, {})} for key in ("hparams", "ranges"))
        return replace(self, hparams=hparams, ranges=ranges, on=None)

    def train_args(self, common_hparams: str | None, common_ranges: str | None = None) -> dict[str, Any]:
        """The row's arguments of train; an own partition spelled out is the same job as none.

        Raises:
            NotImplementedError: no such algorithm or partition.
            ValueError: ``common_hparams`` is no JSON object, or ranges are not what ``overrides.parse_ranges`` takes.
        """
        own = self.partition in (None, self.own_partition)
        overrides.parse_ranges(common_ranges)
        ranges = merged_hparams(common_ranges, self.ranges)
        overrides.parse_ranges(ranges)
        args = {
            "algorithm": self.algorithm,
            "partition": None if own else _known_partition(str(self.partition)),
            "label": self.label,
            "hparams": merged_hparams(common_hparams, self.hparams),
            "ranges": ranges,
            "confounders": None if self.confounders is None else list(self.confounders),
        }
        return {key: value for key, value in args.items() if value is not None}


def _known_partition(name: str) -> str:
    from domainbed import partitions  # only sweeps that name a partition pay for the import

    return partitions.REGISTRY[name].__name__


def merged_hparams(common: str | None, own: Mapping[str, Any] | None) -> str | None:
    """``own`` over ``common`` as JSON; ``common`` alone stays as it was typed, for it is hashed.

    Raises:
        ValueError: ``common`` is no JSON object.
    """
    parsed = overrides.parse(common)
    return json.dumps(parsed | dict(own), sort_keys=True) if own else common


def parse_budget(text: str) -> Budget:
    """The shares in "0.05", of training and validation images alike, or in "0.05,1".

    Raises:
        ValueError: there are none.
    """
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) not in (1, 2) or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"{text!r} is no share from 0 to 1, nor two: training,validation")
    return shares[0], shares[-1]


def budget_args(budget: Budget) -> dict[str, float]:
    """A budget of training and validation annotations as arguments of train; a full one is left out, as ever."""
    named = zip(("annotation_budget", "validation_budget"), budget, strict=True)
    return {name: share for name, share in named if share != 1}


def control_hparams(algorithm: str) -> dict[str, Any]:
    """The hparams that switch off what an algorithm adds; none if it has no control.

    Raises:
        NotImplementedError: no such algorithm.
    """
    return dict(registry.attribute("algorithms", algorithm, "CONTROL", {}))


def control_label(name: str) -> str:
    """What the tables call the control of the row of that name."""
    return f"{name}, control"


def contains(hparams: Mapping[str, Any], control: Mapping[str, Any]) -> bool:
    """Whether hparams switch off all that ``control`` does."""
    return bool(control) and all(name in hparams and hparams[name] == value for name, value in control.items())


def no_controls(algorithms: Iterable[str]) -> ValueError:
    """The error where controls are asked for and there can't be any."""
    return ValueError(
        f"controls are asked for, and none of {', '.join(sorted(set(algorithms)))} has one; leave out --controls, or "
        "declare in the class what switches the method off: CONTROL, hparams by name"
    )


def with_controls(
    rows: Sequence[SweepRow], everywhere: bool, common_hparams: str | None = None, label: str | None = None
) -> list[SweepRow]:
    """The rows, each followed by its control if it wants one: the same row with the class's CONTROL laid over.

    A row that is its own control already gets none.

    Args:
        everywhere: what rows want that don't say.
        common_hparams: the sweep's, JSON.
        label: the sweep's, for rows without their own.

    Raises:
        NotImplementedError: no such algorithm.
        ValueError: a row asks for its control and has none, or all should have one and none has.
    """
    known = {row.algorithm: control_hparams(row.algorithm) for row in rows}
    found = []
    for row in rows:
        found.append(row)
        control = known[row.algorithm]
        if row.control and not control:
            raise no_controls([row.algorithm])
        wanted = everywhere if row.control is None else row.control
        hparams = overrides.parse(merged_hparams(common_hparams, row.hparams))
        if wanted and control and not contains(hparams, control):
            named = control_label(row.label or label or row.name)
            found.append(replace(row, label=named, hparams={**(row.hparams or {}), **control}))
    if everywhere and rows and not any(known.values()):
        raise no_controls(known)
    return found
