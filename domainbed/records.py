"""One JSON line per checkpoint: every record key is spelled here; writing, tolerant reading."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.jsonl"
DONE_FILE = "done"
MAX_GROUPS_WRITTEN = 64  # beyond that, only the worst group is written, with its number and count


def acc_key(env: int, split: str) -> str:
    """Accuracy of a split ("in", "out", "uda") of an environment, a fraction."""
    return f"env{env}_{split}_acc"


def wga_key(env: int, split: str) -> str:
    """Worst-group accuracy over the split's non-empty groups, a fraction."""
    return f"env{env}_{split}_wga"


def worst_group_key(env: int, split: str) -> str:
    """Number g of the worst group (only where groups are too many to be written one by one)."""
    return f"env{env}_{split}_wga_g"


def worst_group_count_key(env: int, split: str) -> str:
    """Number of examples of the worst group (only where groups are too many to be written one by one)."""
    return f"env{env}_{split}_wga_n"


def group_acc_key(env: int, split: str, group: int) -> str:
    """Accuracy of group g = y * V + c; absent when the group is empty."""
    return f"env{env}_{split}_g{group}_acc"


def group_count_key(env: int, split: str, group: int) -> str:
    """Number of examples of group g; absent when the group is empty."""
    return f"env{env}_{split}_g{group}_n"


class GroupCounts(NamedTuple):
    """Accuracy and number of examples by group, read back from a record."""

    acc: dict[int, float]
    n: dict[int, int]


def group_metrics(record: Mapping[str, Any], env: int, split: str) -> GroupCounts:
    """The per-group numbers of one split; empty where the record carries none."""
    prefix = f"env{env}_{split}_g"
    groups = [int(key[len(prefix) : -2]) for key in record if key.startswith(prefix) and key.endswith("_n")]
    return GroupCounts(
        {g: record[group_acc_key(env, split, g)] for g in sorted(groups)},
        {g: record[group_count_key(env, split, g)] for g in sorted(groups)},
    )


def _plain(value: Any) -> Any:
    """JSON for numpy scalars (a 0-d array or scalar has ``item``)."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a record holds {type(value).__name__} {value!r}; only numbers, strings, lists and dicts are allowed")


def dumps(record: Mapping[str, Any]) -> str:
    """The record as one JSON line without its newline, keys sorted."""
    return json.dumps(record, sort_keys=True, default=_plain)


def append(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Appends one line in a single write and syncs it, so that a kill leaves at most one torn last line."""
    line = (dumps(record) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """The records of one file, and how many lines were skipped as torn or foreign."""
    records, skipped = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in filter(str.strip, file):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("args"), dict):
                records.append(record)
            else:
                skipped += 1
    return records, skipped


def iterate(directory: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of every job directly under a sweep's directory, jobs in name order; warns of skipped lines."""
    for path in sorted(Path(directory).glob(f"*/{RESULTS_FILE}")):
        records, skipped = read(path)
        if skipped:
            logger.warning("%s: skipped %d line(s) that hold no record", path, skipped)
        yield from records
