"""A run's records -> what its page draws: accuracies by step, the chosen checkpoint, its groups."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from domainbed import records as keys
from domainbed.model_selection import CRITERIA, validation_splits
from domainbed.scores import Pooled

Record = Mapping[str, Any]
Splits = Sequence[tuple[int, str]]
DIGITS = 4  # of a fraction on the page


class Curves(NamedTuple):
    """What a run's page draws.

    Attributes:
        steps: of the checkpoints, ascending.
        series: AA and WGA of test and validation by name, each as long as the steps; None where not measured.
        groups: accuracy of each group on test, by number.
        chosen: position of the checkpoint that validation takes; None where nothing can be judged.
        counts: training, validation and test images by group.
        validation: accuracy of each group on validation at the chosen checkpoint.
    """

    steps: list[float]
    series: dict[str, list[float | None]]
    groups: dict[int, list[float | None]]
    chosen: int | None
    counts: dict[str, dict[int, int]]
    validation: dict[int, float | None]


def curves(records: Sequence[Record], criterion: str) -> Curves | None:
    """The curves of one run's records; None where there are none.

    The choice is that of ``model_selection.choose`` among this run's own checkpoints; without groups it is the highest
    mean accuracy on validation, for whatever criterion.

    Args:
        criterion: a name in CRITERIA.
    """
    by_step = {record["step"]: record for record in records}
    if not by_step:
        return None
    checkpoints = [by_step[step] for step in sorted(by_step)]
    last = checkpoints[-1]
    validation = validation_splits(last)
    test = [(env, "in") for env in last["args"]["test_envs"]]
    judged = [(_aa_wga(record, test), _aa_wga(record, validation)) for record in checkpoints]
    chosen = _best([on_validation for _, on_validation in judged], criterion)
    test_keys, validation_keys = _group_keys(last, test), _group_keys(last, validation)
    at = checkpoints[-1 if chosen is None else chosen]
    counts = {
        "training": keys.training_group_counts(last),
        "validation": _counts(last, validation_keys),
        "test": _counts(last, test_keys),
    }
    return Curves(
        sorted(by_step),
        _series(judged),
        {g: [_group_accuracy(record, of) for record in checkpoints] for g, of in test_keys.items()},
        chosen,
        counts,
        {g: _group_accuracy(at, of) for g, of in validation_keys.items()},
    )


def _series(judged: Sequence[tuple[Pooled, Pooled]]) -> dict[str, list[float | None]]:
    """AA and WGA over the steps by name; a series without any number is left out."""
    found = {}
    for i, kind in enumerate(("test", "validation")):
        for j, metric in enumerate(("AA", "WGA")):
            found[f"{metric} {kind}"] = [rounded(pair[i][j]) for pair in judged]
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def rounded(value: float) -> float | None:
    """A number as the page has it: NaN and infinity are no JSON."""
    return round(value, DIGITS) if math.isfinite(value) else None


def _aa_wga(record: Record, splits: Splits) -> Pooled:
    """AA and WGA of the splits together, NaN where not measured; without groups AA is the mean of the splits'."""
    found = keys.granted(record, splits)
    if found is not None:
        return Pooled(found.aa, math.nan if found.wga is None else found.wga)
    accs = [record.get(keys.acc_key(*split), math.nan) for split in splits]
    return Pooled(sum(accs) / len(accs) if accs else math.nan, math.nan)


def _best(judged: Sequence[Pooled], criterion: str) -> int | None:
    """The earliest checkpoint that is best on validation."""
    scores = [pooled.aa if math.isnan(pooled.wga) else CRITERIA[criterion](*pooled) for pooled in judged]
    known = [position for position, score in enumerate(scores) if not math.isnan(score)]
    return max(known, key=lambda position: scores[position], default=None)


def _group_keys(record: Record, splits: Splits) -> dict[int, list[tuple[str, str]]]:
    """The record keys of accuracy and count by group, one pair for each split that has the group."""
    found: dict[int, list[tuple[str, str]]] = {}
    for split in splits:
        for g in keys.group_metrics(record, *split).n:
            found.setdefault(g, []).append((keys.group_acc_key(*split, g), keys.group_count_key(*split, g)))
    return dict(sorted(found.items()))


def _counts(record: Record, group_keys: Mapping[int, Sequence[tuple[str, str]]]) -> dict[int, int]:
    return {g: sum(record[n] for _, n in pairs) for g, pairs in group_keys.items()}


def _group_accuracy(record: Record, pairs: Sequence[tuple[str, str]]) -> float | None:
    """A group's accuracy over splits, weighted by its counts there."""
    try:
        correct = sum(record[acc] * record[n] for acc, n in pairs)
        return rounded(correct / sum(record[n] for _, n in pairs))
    except (KeyError, ZeroDivisionError):  # a checkpoint that measured less than the last one
        return None
