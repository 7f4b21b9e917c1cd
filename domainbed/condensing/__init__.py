"""A results file -> what tables need of it: the checkpoints that some way of choosing may take, and a summary.

Every line is parsed, few are kept. What is kept is a superset: each score is computed on all lines of a run at once,
and lines within rounding of the best stay, so that the exact choice among the kept lines is the choice among all.
"""

import functools
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from statistics import fmean
from typing import Any, NamedTuple

import msgspec
import numpy as np

from domainbed import records as keys
from domainbed.condensing.lines import Keys, Line, Segment, Values, is_number, numbers
from domainbed.model_selection import (
    CRITERIA,
    IIDAccuracySelectionMethod,
    mean_acc,
    validation_envs,
    validation_splits,
)
from domainbed.rows import NOT_ROW
from domainbed.scores import Granted, aa_wga

WITHIN = 1e-9  # of the best: kept


class Pool(NamedTuple):
    """Where the numbers stand of which ``records.pooled`` makes AA and WGA.

    Attributes:
        groups: the places of accuracy and count in each split that has the group.
        splits: the places of AA and WGA of each split, where groups are not written one by one.
        sizes: the places of AA and count of each split under a validation budget, whose AA is of all images; WGA is
            of groups or splits, and there is none if both are empty.
    """

    groups: tuple[tuple[tuple[int, int], ...], ...]
    splits: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...] = ()


class Plan(NamedTuple):
    """Where the numbers stand, in lines of one shape, that ways of choosing look at; None: some of them are missing.

    Attributes:
        iid, oracle: of DomainBed's methods: what validates, and what is reported; for one test environment only.
        accuracy: what validates where the mean accuracy chooses for any number of test environments.
        validation, test: for the criteria of groups.
        grouped: whether the lines know groups.
    """

    iid: tuple[tuple[int, ...], int] | None
    oracle: tuple[int, int] | None
    accuracy: tuple[int, ...] | None
    validation: Pool | None
    test: Pool | None
    grouped: bool

    @property
    def lacking(self) -> bool:
        """Whether some way of choosing would leave the lines out, and say so."""
        return self.accuracy is None or (self.grouped and (self.validation is None or self.test is None))


@functools.lru_cache(maxsize=1024)
def _plan(shape: Keys, dataset: str, test_envs: tuple[int, ...], official: tuple[int, ...]) -> Plan:
    """The plan of lines with these keys.

    Args:
        official: the dataset's validation environments, which are looked up again here: the cache is theirs, too.
    """
    place = {key: i for i, key in enumerate(shape)}
    record = {**place, "args": {"dataset": dataset, "test_envs": list(test_envs)}}

    def places(names: Sequence[str]) -> tuple[int, ...] | None:
        return tuple(place[name] for name in names) if names and all(name in place for name in names) else None

    iid = oracle = None
    if len(test_envs) == 1:
        (env,) = test_envs
        val, out_acc = places(IIDAccuracySelectionMethod.val_keys(record)), places([keys.acc_key(env, "out")])
        test = place.get(keys.acc_key(env, "in"))
        iid = None if val is None or test is None else (val, test)
        oracle = None if official or out_acc is None or test is None else (out_acc[0], test)
    tested = places([keys.acc_key(env, "in") for env in test_envs])
    splits = validation_splits(record)
    return Plan(
        iid,
        oracle,
        tested and places([keys.acc_key(*split) for split in splits]),
        _pool(record, place, splits),
        _pool(record, place, [(env, "in") for env in test_envs]),
        keys.has_groups(record),
    )


def _pool(record: dict[str, Any], place: dict[str, int], splits: Sequence[tuple[int, str]]) -> Pool | None:
    pool = _annotated_pool(record, place, keys.annotated_splits(record, splits))
    sizes = _both(place, [(keys.acc_key(*split), keys.size_key(*split)) for split in splits])
    return pool if sizes is None else (pool or Pool((), ()))._replace(sizes=sizes)


def _both(place: dict[str, int], pairs: Sequence[tuple[str, str]]) -> tuple[tuple[int, int], ...] | None:
    """The places of pairs of keys; None without any, or if one is missing."""
    known = all(first in place and second in place for first, second in pairs)
    return tuple((place[first], place[second]) for first, second in pairs) if pairs and known else None


def _annotated_pool(record: dict[str, Any], place: dict[str, int], splits: Sequence[tuple[int, str]]) -> Pool | None:
    metrics = [keys.group_metrics(record, *split) for split in splits]  # places instead of numbers
    if metrics and all(metric.n for metric in metrics):
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for metric in metrics:
            for g, n in metric.n.items():
                found[g].append((int(metric.acc[g]), n))
        return Pool(tuple(tuple(places) for places in found.values()), ())
    known = _both(place, [(keys.acc_key(*split), keys.wga_key(*split)) for split in splits])
    return None if known is None else Pool((), known)


def _pooled(lines: Sequence[Values], pool: Pool) -> tuple[Any, Any]:
    """AA and WGA (N,) of N lines, up to rounding those of ``records.granted``; WGA is None where it has none."""

    def column(place: int) -> Any:
        return np.array([line[place] for line in lines], dtype=float)

    if pool.sizes:
        with np.errstate(invalid="ignore", divide="ignore"):
            aa = sum(column(acc) * column(n) for acc, n in pool.sizes) / sum(column(n) for _, n in pool.sizes)
        known = pool.groups or pool.splits
        return aa, _pooled(lines, pool._replace(sizes=()))[1] if known else None
    if not pool.groups:
        aa = sum(column(acc) for acc, _ in pool.splits) / len(pool.splits)
        return aa, np.min([column(wga) for _, wga in pool.splits], axis=0)
    count = [sum(column(n) for _, n in places) for places in pool.groups]
    correct = [sum(column(acc) * column(n) for acc, n in places) for places in pool.groups]
    with np.errstate(invalid="ignore", divide="ignore"):
        wga = np.min([right / n for right, n in zip(correct, count, strict=True)], axis=0)
        return sum(correct) / sum(count), wga


def _scores(lines: Sequence[Values], plan: Plan) -> Iterator[list[float]]:
    """Of lines of one shape, by each way of choosing that can judge them."""
    sums = {places for places in (plan.iid and plan.iid[0], plan.accuracy) if places}
    for places in sums:
        accs = itemgetter(*places) if len(places) > 1 else lambda line, i=places[0]: (line[i],)
        yield [math.fsum(accs(line)) for line in lines]
    if plan.validation is None or plan.test is None:
        return
    validation = Granted(*_pooled(lines, plan.validation))
    unseen = np.isnan(validation.score())  # what validation can't judge is not in the running
    for criterion in CRITERIA.values():
        yield np.where(unseen, np.nan, validation.score(criterion)).tolist()
    aa, wga = _pooled(lines, plan.test)
    yield np.where(unseen, np.nan, aa_wga(aa, wga)).tolist()


def _near_best(scores: Sequence[float]) -> list[int]:
    """The places of scores within rounding of the largest; NaN is less than any, and of nothing but NaN the first."""
    known = [score for score in scores if score == score]
    if not known:
        return [0]
    best = max(known)
    least = best - WITHIN * max(1.0, abs(best)) if math.isfinite(best) else best
    return [i for i, score in enumerate(scores) if score >= least]


class Judged(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What one of DomainBed's methods says of a run: validation and test accuracy of the checkpoint that it takes.

    Attributes:
        accs: None if it can take none.
        lacking: the number of checkpoints that lack an accuracy that it needs.
        of: the number of checkpoints that it looked at.
    """

    accs: tuple[float, float] | None
    lacking: int
    of: int


class Timing(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What a run took.

    Attributes:
        step_time_s: mean over the checkpoints but the first, whose step also warms up; of one checkpoint, its own.
        mem_gb: the most of any checkpoint.
        steps_per_epoch: by the last checkpoint that tells; None while the first epoch has not begun.
        steps: the last checkpoint's.
        checkpoints: how many.
    """

    step_time_s: float | None
    mem_gb: float | None
    steps_per_epoch: float | None
    steps: float
    checkpoints: int

    @classmethod
    def of(cls, steps: Sequence[float], times: Sequence[Any], memory: Sequence[Any], epochs: Sequence[Any]) -> "Timing":
        """Of all checkpoints of a run, in any order.

        Args:
            times, memory, epochs: what each checkpoint has as step_time, mem_gb and epoch; None where it lacks it.
        """
        order = sorted(range(len(steps)), key=steps.__getitem__)
        known = numbers([times[i] for i in order])
        later = known[1:] or known
        begun = next((i for i in reversed(order) if is_number(epochs[i]) and epochs[i] > 0), None)
        return cls(
            step_time_s=fmean(later) if later else None,
            mem_gb=max(numbers(memory), default=None),
            steps_per_epoch=None if begun is None else steps[begun] / epochs[begun],
            steps=steps[order[-1]],
            checkpoints=len(steps),
        )


class Summary(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What tables need of a segment without looking at its checkpoints.

    Attributes:
        settings: the arguments that make its row, as JSON.
        seeds: trial_seed, hparams_seed, seed.
        whole: whether every checkpoint was kept.
        grouped: whether some checkpoint knows groups.
        iid, oracle: of DomainBed's methods; None where they must look at the checkpoints themselves.
    """

    settings: str
    dataset: str
    test_envs: tuple[int, ...]
    seeds: tuple[Any, Any, Any]
    whole: bool
    grouped: bool
    iid: Judged | None
    oracle: Judged | None
    timing: Timing


class Condensed(NamedTuple):
    """A segment's summary, and the segment with the lines that were kept."""

    summary: Summary
    segment: Segment


def condense(segment: Segment, whole: bool = False, explained: Collection[Any] = ()) -> Condensed:
    """What of a run any table can need.

    Args:
        whole: keep every line, for ways of choosing that compare the same step of several runs.
        explained: steps that are kept in any case.
    """
    args, lines = segment.args, segment.lines
    official = tuple(validation_envs(args["dataset"]))
    plans = [_plan(shape, args["dataset"], tuple(args["test_envs"]), official) for shape in segment.shapes]
    steps = segment.column("step")
    try:
        chosen = [lines[i] for i in _kept(lines, plans, steps, explained)]
        iid, oracle = _iid(chosen, lines, plans), _oracle(lines, plans, steps, official)
    except (TypeError, ValueError, OverflowError):  # an accuracy that is no number
        chosen, iid, oracle = lines, None, None
    if whole:
        chosen = lines
    summary = Summary(
        settings=json.dumps({key: value for key, value in args.items() if key not in NOT_ROW}),
        dataset=args["dataset"],
        test_envs=tuple(args["test_envs"]),
        seeds=(args.get("trial_seed"), args.get("hparams_seed"), args.get("seed")),
        whole=len(chosen) == len(lines),
        grouped=any(plan.grouped for plan in plans),
        iid=iid,
        oracle=oracle,
        timing=Timing.of(steps, *map(segment.column, ("step_time", "mem_gb", "epoch"))),
    )
    return Condensed(summary, replace(segment, lines=chosen))


def _kept(
    lines: Sequence[Line], plans: Sequence[Plan], steps: Sequence[float], explained: Collection[Any]
) -> list[int]:
    """The numbers of the lines to keep, ascending: those that may be chosen, the last, one that lacks accuracies."""
    last = max(steps)
    found = {i for i, step in enumerate(steps) if step == last or step in explained}
    for shape, plan in enumerate(plans):
        places = [i for i, (own, _) in enumerate(lines) if own == shape]
        found |= {places[0]} if plan.lacking else set()
        for scores in _scores([lines[i][1] for i in places], plan):
            found |= {places[i] for i in _near_best(scores)}
    return sorted(found)


def _iid(candidates: Iterable[Line], lines: Sequence[Line], plans: Sequence[Plan]) -> Judged:
    """``IIDAccuracySelectionMethod.run_acc``, which takes one of the candidates."""
    accs = []
    for shape, values in candidates:
        places = plans[shape].iid
        if places is not None:
            accs.append((mean_acc([values[i] for i in places[0]]), float(values[places[1]])))
    lacking = sum(plans[shape].iid is None for shape, _ in lines)
    best = max(accs, key=lambda acc: -math.inf if math.isnan(acc[0]) else acc[0], default=None)  # the first of ties
    return Judged(best, lacking, len(lines))


def _oracle(lines: Sequence[Line], plans: Sequence[Plan], steps: Sequence[float], official: tuple[int, ...]) -> Judged:
    """``OracleSelectionMethod.run_acc``."""
    if official:
        return Judged(None, 0, 0)
    last = max(steps)
    shape, values = lines[max(i for i, step in enumerate(steps) if step == last)]
    places = plans[shape].oracle
    if places is None:
        return Judged(None, 1, 1)
    return Judged((float(values[places[0]]), float(values[places[1]])), 0, 1)
