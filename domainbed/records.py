"""One JSON line per checkpoint: every record key is spelled here; writing, tolerant reading."""

import errno
import json
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from domainbed.scores import Granted, Pooled, PooledMeans, adjusted_average, group_mean

if TYPE_CHECKING:
    from domainbed.evaluation import Accuracy

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


def adj_acc_key(env: int, split: str) -> str:
    """Adjusted average accuracy (``adjusted_average``), a fraction; absent where it can't be had."""
    return f"env{env}_{split}_adj_acc"


def group_mean_key(env: int, split: str) -> str:
    """Unweighted mean of the accuracies of the split's non-empty groups, a fraction."""
    return f"env{env}_{split}_group_mean_acc"


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


def size_key(env: int, split: str) -> str:
    """Number of the split's examples, over which its accuracy is; only where the validation budget cuts its groups.

    Then all keys of its groups, also its worst-group accuracy, are of the annotated examples, and absent without any.
    """
    return f"env{env}_{split}_n"


def training_count_key(group: int) -> str:
    """Number of the run's training images in group g; absent when there are none, or groups are too many."""
    return f"train_g{group}_n"


def inferred(num_values: int, agreement: Mapping[str, float]) -> dict[str, float]:
    """What records say of pseudo-confounders: ``inferred_values``, how many there are, and ``inferred_ami``.

    The latter, and ``inferred_ami_within_labels``, is the adjusted mutual information with the true confounders of the
    training images; absent where these are not known.
    """
    known = [name for name in ("ami", "ami within labels") if name in agreement]
    found = {f"inferred_{name.replace(' ', '_')}": agreement[name] for name in known}
    return {"inferred_values": num_values, **found}


FULL_DATA = "fd_"  # begins the keys of the second stage of ``train_autolr``, which trains on all images


def full_data_acc_key(env: int) -> str:
    """Accuracy of an environment's in-split after a second stage that trains on everything (train_autolr)."""
    return FULL_DATA + acc_key(env, "in")


def is_full_data(keys: Iterable[str]) -> bool:
    """Whether these are a record's of such a second stage, which only ``collect_results --auto_lr`` reads."""
    return any(key.startswith(f"{FULL_DATA}env") for key in keys)


def is_group_key(key: str) -> bool:
    """Whether a key speaks of a single group, is the mean over the groups, or a count; consoles leave these out."""
    return re.fullmatch(r"train_g\d+_n|(fd_)?env\d+_[a-z]+_(g\d+_(acc|n)|wga_[gn]|group_mean_acc|n)", key) is not None


class GroupCounts(NamedTuple):
    """Accuracy and number of examples by group, read back from a record."""

    acc: dict[int, float]
    n: dict[int, int]


def group_metrics(record: Mapping[str, Any], env: int, split: str) -> GroupCounts:
    """The per-group numbers of one split, of groups that have both; empty where the record carries none."""
    prefix = f"env{env}_{split}_g"
    counted = [key[len(prefix) : -2] for key in record if key.startswith(prefix) and key.endswith("_n")]
    groups = [int(g) for g in counted if g.isdecimal() and group_acc_key(env, split, int(g)) in record]
    return GroupCounts(
        {g: record[group_acc_key(env, split, g)] for g in sorted(groups)},
        {g: record[group_count_key(env, split, g)] for g in sorted(groups)},
    )


def training_group_counts(record: Mapping[str, Any]) -> dict[int, int]:
    """Training images of each non-empty group; empty where the record does not carry them."""
    found = ((re.fullmatch(r"train_g(\d+)_n", key), n) for key, n in record.items())
    return {int(match[1]): n for match, n in found if match}


def environments(record: Mapping[str, Any], split: str) -> list[int]:
    """The environments whose accuracy on the split is in the record, ascending."""
    end = f"_{split}_acc"
    found = (re.fullmatch(r"env(\d+)", key.removesuffix(end)) for key in record if key.endswith(end))
    return sorted(int(match[1]) for match in found if match)


def has_groups(record: Mapping[str, Any]) -> bool:
    """Whether some split's groups were measured."""
    return any(key.endswith("_wga") for key in record)


def annotated_splits(record: Mapping[str, Any], splits: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """The splits without those whose confounders the validation budget hides altogether."""
    return [place for place in splits if size_key(*place) not in record or wga_key(*place) in record]


def _pooled_groups(
    record: Mapping[str, Any], splits: Sequence[tuple[int, str]]
) -> tuple[dict[int, float], dict[int, int]] | None:
    """Correct and all annotated images of each group of the splits together; None where some are not in the record."""
    metrics = [group_metrics(record, env, split) for env, split in annotated_splits(record, splits)]
    if not metrics or not all(metric.n for metric in metrics):
        return None
    count: dict[int, int] = defaultdict(int)
    correct: dict[int, float] = defaultdict(float)
    for metric in metrics:
        for g, n in metric.n.items():
            count[g] += n
            correct[g] += n * metric.acc[g]
    return correct, count


def pooled_groups(record: Mapping[str, Any], splits: Sequence[tuple[int, str]]) -> GroupCounts:
    """``group_metrics`` of all examples of the splits together; empty where a split's are not in the record."""
    correct, count = _pooled_groups(record, splits) or ({}, {})
    return GroupCounts({g: correct[g] / count[g] for g in sorted(count)}, {g: count[g] for g in sorted(count)})


def pooled(record: Mapping[str, Any], splits: Sequence[tuple[int, str]]) -> Pooled | None:
    """AA and WGA of all examples of the splits ``(env, "in" or "out")`` together, weighted by the groups' counts.

    Where groups are too many to be written one by one, AA is the mean of the splits' accuracies and WGA the
    smallest of their worst-group accuracies: counts that would pool them exactly are not in the record.

    Under a validation budget AA is of all examples still, WGA of the annotated ones.

    Returns:
        None if there is no split, or one of them is not in the record or without groups; under a validation budget
        if they all are without.
    """
    found = granted(record, splits)
    return None if found is None or found.wga is None else Pooled(found.aa, found.wga)


def granted(record: Mapping[str, Any], splits: Sequence[tuple[int, str]]) -> Granted | None:
    """As ``pooled``, but where the validation budget hides all confounders of the splits, there is AA alone."""
    annotated = _pooled_annotated(record, annotated_splits(record, splits))
    places = [(acc_key(*place), size_key(*place)) for place in splits]
    if not places or not all(acc in record and n in record for acc, n in places):
        return None if annotated is None else Granted(*annotated)
    correct = sum(record[acc] * record[n] for acc, n in places)
    return Granted(correct / sum(record[n] for _, n in places), None if annotated is None else annotated.wga)


def _pooled_annotated(record: Mapping[str, Any], splits: Sequence[tuple[int, str]]) -> Pooled | None:
    """``pooled``, of the examples whose groups are known."""
    groups = _pooled_groups(record, splits)
    if groups is not None:
        correct, count = groups
        return Pooled(sum(correct.values()) / sum(count.values()), min(correct[g] / count[g] for g in count))
    keys = [(acc_key(env, split), wga_key(env, split)) for env, split in splits]
    if not keys or not all(acc in record and wga in record for acc, wga in keys):
        return None
    return Pooled(sum(record[acc] for acc, _ in keys) / len(keys), min(record[wga] for _, wga in keys))


def pooled_means(record: Mapping[str, Any], splits: Sequence[tuple[int, str]]) -> PooledMeans:
    """Adjusted average accuracy and group mean of all examples of the splits together.

    One split's are read from its keys. Several splits' follow from the groups' counts and the training counts, so
    they are None where groups are too many to be written one by one, and in records that were written without them.
    """
    if len(splits) == 1:
        (place,) = splits
        return PooledMeans(record.get(adj_acc_key(*place)), record.get(group_mean_key(*place)))
    groups = _pooled_groups(record, splits)
    if groups is None or not all(group_mean_key(*place) in record for place in splits):
        return PooledMeans(None, None)
    correct, count = groups
    acc = {g: correct[g] / n for g, n in count.items()}
    return PooledMeans(adjusted_average(acc, training_group_counts(record)), group_mean(acc))


def accuracies(
    measured: Mapping[tuple[int, str], "Accuracy"], num_groups: int, training_counts: Sequence[int] = ()
) -> dict[str, float | int]:
    """The record keys of measured splits.

    Args:
        measured: accuracy by environment number and kind of split.
        num_groups: K * V; up to MAX_GROUPS_WRITTEN each non-empty group is written, else the worst one.
        training_counts: the run's training images in each of the K * V groups; empty where they are not known, and
            then nothing is adjusted.
    """
    assert len(training_counts) in (0, num_groups)
    training = {g: int(n) for g, n in enumerate(training_counts) if n}
    record: dict[str, float | int] = {}
    for place, accuracy in measured.items():
        record[acc_key(*place)] = accuracy.average
        if accuracy.images is not None:
            record[size_key(*place)] = accuracy.images
        if accuracy.groups:
            record |= _group_accuracies(*place, accuracy, training, num_groups <= MAX_GROUPS_WRITTEN)
    if num_groups <= MAX_GROUPS_WRITTEN and any(accuracy.groups for accuracy in measured.values()):
        record |= {training_count_key(g): n for g, n in training.items()}
    return record


def _group_accuracies(
    env: int, kind: str, accuracy: "Accuracy", training: Mapping[int, int], one_by_one: bool
) -> dict[str, float | int]:
    """What a split's groups add to its average."""
    record: dict[str, float | int] = {
        wga_key(env, kind): accuracy.worst,
        group_mean_key(env, kind): group_mean(accuracy.groups),
    }
    adjusted = adjusted_average(accuracy.groups, training)
    if adjusted is not None:
        record[adj_acc_key(env, kind)] = adjusted
    if not one_by_one:
        record[worst_group_key(env, kind)] = accuracy.worst_group
        record[worst_group_count_key(env, kind)] = accuracy.counts[accuracy.worst_group]
        return record
    for g, n in accuracy.counts.items():
        record[group_acc_key(env, kind, g)] = accuracy.groups[g]
        record[group_count_key(env, kind, g)] = n
    return record


def _plain(value: Any) -> Any:
    """JSON for numpy scalars (a 0-d array or scalar has ``item``)."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(
        f"a record holds {type(value).__name__} {value!r}; only numbers, strings, lists and dicts are allowed"
    )


def dumps(record: Mapping[str, Any]) -> str:
    """The record as one JSON line without its newline, keys sorted."""
    return json.dumps(record, sort_keys=True, default=_plain)


def append(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Appends one line in a single write and syncs it, so that a kill leaves at most one torn last line.

    A line that was torn before is closed first. What can't be written whole, on a full disk, is taken back.

    Raises:
        OSError: nothing was written.
    """
    line = (dumps(record) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
            os.fsync(descriptor)
        except OSError:
            with suppress(OSError):  # of the two errors, the first one says what is wrong
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def has_args(record: Any) -> bool:
    """Whether what a line holds says what it was run with."""
    return isinstance(record, dict) and isinstance(record.get("args"), dict)


def _is_text(value: Any) -> bool:
    """Whether a value is a string that can be printed: JSON can hold half a character, which UTF-8 can't."""
    return isinstance(value, str) and value.encode(errors="replace") == value.encode(errors="surrogatepass")


def names_run(record: Any) -> bool:
    """Whether what a line holds says which run it is of, by arguments of the kinds that tables expect."""
    if not has_args(record):
        return False
    args, envs = record["args"], record["args"].get("test_envs")
    named = all(_is_text(args.get(key)) for key in ("algorithm", "dataset"))
    tested = isinstance(envs, list) and all(isinstance(env, int) for env in envs)
    seeded = all(isinstance(args.get(key), int | None) for key in ("trial_seed", "hparams_seed", "seed"))
    labelled = all(args.get(key) is None or _is_text(args[key]) for key in ("partition", "label"))
    return named and tested and seeded and labelled


def is_step(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def is_checkpoint(record: Any) -> bool:
    """Whether what a line holds can be a record of a run: tables need at least its arguments and the step."""
    return names_run(record) and is_step(record.get("step"))


def read_checkpoints(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """As ``read``, of a results file: lines that are no record of a run are skipped, too."""
    return read(path, is_checkpoint)


def read(path: str | os.PathLike[str], is_record: Callable[[Any], bool] = has_args) -> tuple[list[dict[str, Any]], int]:
    """The records of one file, and how many lines were skipped as torn or foreign."""
    records, skipped = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in filter(str.strip, file):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if is_record(record):
                records.append(record)
            else:
                skipped += 1
    return records, skipped


def iterate(directory: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of every job directly under a sweep's directory, jobs in name order; warns of skipped lines."""
    for path in filter(Path.is_file, sorted(Path(directory).glob(f"*/{RESULTS_FILE}"))):
        records, skipped = read_checkpoints(path)
        if skipped:
            logger.warning("%s: skipped %d line(s) that hold no record", path, skipped)
        yield from records
