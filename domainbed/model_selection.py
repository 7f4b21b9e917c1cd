"""Records -> the run and the step that one would have chosen.

DomainBed's methods, for one test environment; training-domain validation for several; the group-aware choice.
"""

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from domainbed import records as keys
from domainbed import scores
from domainbed.lib.query import Q
from domainbed.rows import Run, declared, replicates, runs

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
Accs = dict[str, float]  # val_acc, test_acc


def validation_envs(dataset: str) -> Sequence[int]:
    """The dataset's official validation environments; empty where the out-splits validate."""
    return tuple(declared("datasets", dataset, "VALIDATION_ENVS") or ())


def get_test_records(records: Q) -> Q:
    """The records with exactly one test environment (the others serve leave-one-out only)."""
    return records.filter(lambda record: len(record["args"]["test_envs"]) == 1)


def _accs(record: Record, val_keys: Sequence[str], test_key: str) -> Accs | None:
    """Mean of the validation keys and the test key; None where the record lacks one of them."""
    if not val_keys or any(key not in record for key in (*val_keys, test_key)):
        return None
    return {"val_acc": mean_acc([record[key] for key in val_keys]), "test_acc": record[test_key]}


def mean_acc(values: Sequence[float]) -> float:
    """The mean, rounded as DomainBed's is."""
    return float(np.mean(values))


def _present(accs: Iterable[Any], records: Sequence[Record], counted: bool = True) -> list[Any]:
    """The accs that are not None, with a warning about the others.

    Args:
        counted: say how many; not where the records may be a part of the run's (``run_index.Collected.records``).
    """
    found = list(accs)
    present = [acc for acc in found if acc is not None]
    if len(present) < len(found):
        args = records[0]["args"]
        name = f"{args['algorithm']}, {args['dataset']}, test_envs {args['test_envs']}, seed {args.get('seed')}"
        warn_lacking(f"{len(found) - len(present)} of {len(found)}" if counted else "some", name)
    return present


def warn_lacking(how_many: str, run: str) -> None:
    """Says that some checkpoints of a run can't be chosen."""
    message = "left out %s checkpoints of a run (%s): they lack an accuracy that its selection needs"
    logger.warning(message, how_many, run)


def _val_acc(acc: Accs) -> float:
    """The validation accuracy as something to maximise: NaN is worse than every number."""
    return float("-inf") if math.isnan(acc["val_acc"]) else acc["val_acc"]


def chosen_acc(judged: Mapping[Any, Accs]) -> float | None:
    """Test accuracy of the draw with the best validation; ties: the larger hparams seed, the key; NaN last."""
    best = max(judged, key=lambda draw: (_val_acc(judged[draw]), draw), default=None)
    return None if best is None else judged[best]["test_acc"]


class SelectionMethod:
    """How to choose among the checkpoints of a sweep; class methods only.

    The records handed in are those of one trial seed, dataset, algorithm and test environment. Subclasses say how
    one run (all its checkpoints) is judged. Unlike in DomainBed, a NaN validation accuracy never wins over a number
    within a run, and a checkpoint that lacks an environment's key is left out with a warning instead of ending the
    collection.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} holds class methods only; use the class itself")

    @classmethod
    def run_acc(cls, run_records: Q) -> Accs | None:
        """``{"val_acc", "test_acc"}`` (fractions) of the run's chosen checkpoint; None if it can't be judged."""
        raise NotImplementedError

    @classmethod
    def hparams_accs(cls, records: Q) -> list[tuple[Accs, Q]]:
        """(run_acc, records) of each hparams seed, best validation first; ties: the larger seed; NaN last."""
        judged = records.group("args.hparams_seed").map(lambda _, run: (cls.run_acc(run), run))
        return judged.filter(lambda pair: pair[0] is not None).sorted(key=lambda pair: pair[0]["val_acc"])[::-1]

    @classmethod
    def sweep_acc(cls, records: Q) -> float | None:
        """Test accuracy of the chosen hparams seed; None if no run can be judged."""
        judged = cls.hparams_accs(records)
        return judged[0][0]["test_acc"] if judged else None


class IIDAccuracySelectionMethod(SelectionMethod):
    """Highest mean accuracy on the training environments' out-splits, over steps and draws.

    A dataset with official validation environments is judged by the mean over these instead.
    """

    name = "training-domain validation set"

    @classmethod
    def run_acc(cls, run_records: Q) -> Accs | None:
        records = list(get_test_records(run_records))
        accs = _present(map(cls._step_acc, records), records)
        return max(accs, key=_val_acc) if accs else None  # the first of ties

    @classmethod
    def _step_acc(cls, record: Record) -> Accs | None:
        (test_env,) = record["args"]["test_envs"]
        return _accs(record, cls.val_keys(record), cls.test_key(test_env))

    @classmethod
    def val_keys(cls, record: Record) -> list[str]:
        """The record keys of what validates a run with one test environment."""
        official = validation_envs(record["args"]["dataset"])
        if official:
            return [keys.acc_key(env, "in") for env in official]
        (test_env,) = record["args"]["test_envs"]
        return [keys.acc_key(env, "out") for env in _held_out(record) if env != test_env]

    @classmethod
    def test_key(cls, test_env: int) -> str:
        """The record key of the accuracy that is reported for a test environment."""
        return keys.acc_key(test_env, "in")


class IIDAutoLRAccuracySelectionMethod(IIDAccuracySelectionMethod):
    """As the training-domain method, but reports the second training stage of ``train_autolr``.

    Expects the records of both stages merged (``scripts.collect_results.merge_records``).
    """

    name = "auto lr training-domain validation set"

    @classmethod
    def test_key(cls, test_env: int) -> str:
        return keys.full_data_acc_key(test_env)


class OracleSelectionMethod(SelectionMethod):
    """Highest accuracy on the test environment's out-split at the last step: sees the test environment."""

    name = "test-domain validation set (oracle)"

    @classmethod
    def run_acc(cls, run_records: Q) -> Accs | None:
        records = get_test_records(run_records)
        if not len(records) or validation_envs(records[0]["args"]["dataset"]):
            return None
        last = records.sorted(key=lambda record: record["step"])[-1]
        (test_env,) = last["args"]["test_envs"]
        accs = _accs(last, [keys.acc_key(test_env, "out")], keys.acc_key(test_env, "in"))
        return next(iter(_present([accs], [last])), None)


class LeaveOneOutSelectionMethod(SelectionMethod):
    """Highest mean accuracy on a second environment left out of training, each in turn."""

    name = "leave-one-domain-out cross-validation"

    @classmethod
    def run_acc(cls, run_records: Q) -> Accs | None:
        if len(run_records) and validation_envs(run_records[0]["args"]["dataset"]):
            return None
        accs = run_records.group("step").map(lambda _, records: cls._step_acc(records)).filter_not_none()
        return max(accs, key=_val_acc) if len(accs) else None

    @classmethod
    def _step_acc(cls, records: Q) -> Accs | None:
        """None unless each other environment was left out together with the test environment."""
        singles = get_test_records(records)
        if len(singles) != 1:
            return None
        (test_env,) = singles[0]["args"]["test_envs"]
        test_key = keys.acc_key(test_env, "in")
        found = {test_key: singles[0][test_key]} if test_key in singles[0] else {}
        for record in records.filter(lambda record: len(record["args"]["test_envs"]) == 2):
            other_keys = [keys.acc_key(env, "in") for env in record["args"]["test_envs"] if env != test_env]
            found |= {key: record[key] for key in other_keys if key in record}
        others = [env for env in _held_out(singles[0]) if env != test_env]
        return _accs(found, [keys.acc_key(env, "in") for env in others], test_key)


def _held_out(record: Record) -> Iterable[int]:
    """Environments 0, 1, ... up to the first one without an out-split."""
    return itertools.takewhile(lambda env: keys.acc_key(env, "out") in record, itertools.count())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with what validation says of it.

    Attributes:
        run: the run it belongs to.
        replicate: 0, or 1, 2, ... for further seeds of the same draw (see ``rows.replicates``).
        record: its numbers.
        score: what is maximised; NaN on validation is minus infinity.
    """

    run: Run
    replicate: int
    record: Record
    score: float

    @property
    def step(self) -> int:
        return int(self.record["step"])


C = TypeVar("C", bound=Checkpoint)


def _best(by_run: Mapping[Run, Sequence[Record]], judge: Callable[[Run, int, Record], C | None]) -> list[C]:
    """The best checkpoint per row, dataset, test environments and trial, as ``choose`` describes.

    Args:
        judge: says of a run, its replicate and one of its records what validation says; None is left out with a
            warning.
    """
    replicate = replicates(by_run)
    trials: dict[Any, list[C]] = defaultdict(list)
    for run in sorted(by_run, key=lambda run: (run.trial_seed, run.hparams_seed, run.seed)):
        checkpoints = sorted(by_run[run], key=lambda record: record["step"])
        judged = [judge(run, replicate[run], record) for record in checkpoints]
        trials[run.row, run.cell, run.trial_seed, replicate[run]] += _present(judged, checkpoints, counted=False)
    best = (max(judged, key=lambda checkpoint: checkpoint.score) for judged in trials.values() if judged)
    return [checkpoint for checkpoint in best if checkpoint.score > float("-inf")]


@dataclass(frozen=True)
class AccuracyChoice(Checkpoint):
    """The checkpoint that the mean validation accuracy takes among the draws of one trial.

    Attributes:
        test: accuracy of each test environment, a fraction.
    """

    test: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The mean over the test environments."""
        return float(np.mean(list(self.test.values())))


def with_several_test_envs(records: Iterable[Record]) -> list[Record]:
    """The records of runs that test on several environments for their own sake.

    DomainBed also trains with pairs of test environments, which serve leave-one-out selection for the runs with a
    single one. So a run with two test environments is not among them if its row was also trained on its dataset with
    a single test environment; one with three or more always is.
    """
    by_run = runs(records)
    return [record for run in several_test_envs(by_run) for record in by_run[run]]


def several_test_envs(found: Collection[Run]) -> list[Run]:
    """Those of the runs whose records are in ``with_several_test_envs``."""
    single = {(run.row, run.dataset) for run in found if len(run.test_envs) == 1}
    return [run for run in found if len(run.test_envs) >= (3 if (run.row, run.dataset) in single else 2)]


def choose_by_accuracy(
    records: Iterable[Record], method: type[IIDAccuracySelectionMethod] = IIDAccuracySelectionMethod
) -> list[AccuracyChoice]:
    """The checkpoint per row, dataset, test environments and trial with the highest mean validation accuracy.

    The training-domain method for any number of test environments, none of which it looks at: the mean over the
    training environments' out-splits, or over the official validation environments. Trials and ties as in ``choose``.

    Args:
        records: of any number of runs.
        method: says which accuracy of a test environment is reported.
    """
    return _best(runs(records), lambda run, replicate, record: _judge_accuracy(run, replicate, record, method))


def _judge_accuracy(
    run: Run, replicate: int, record: Record, method: type[IIDAccuracySelectionMethod]
) -> AccuracyChoice | None:
    val_keys = [keys.acc_key(*split) for split in validation_splits(record)]
    found = {env: _accs(record, val_keys, method.test_key(env)) for env in run.test_envs}
    accs = {env: acc for env, acc in found.items() if acc is not None}
    if len(accs) < len(found):
        return None
    score = _val_acc(accs[run.test_envs[0]])  # validation is the same for all
    return AccuracyChoice(run, replicate, record, score, {env: acc["test_acc"] for env, acc in accs.items()})


# name on the command line -> what is maximised over validation, from AA and WGA (``scores.Granted.score``)
CRITERIA: dict[str, Callable[[float, float], float]] = {"aa_wga": scores.aa_wga, "wga": lambda aa, wga: wga}


@dataclass(frozen=True)
class Choice(Checkpoint):
    """The checkpoint that a group-aware criterion takes among the draws of one trial; its score is the criterion.

    Attributes:
        validation: AA and, as far as the validation budget grants confounders, WGA, fractions.
        test: AA and WGA, with all confounders, fractions.
        test_means: adjusted average accuracy and group mean, fractions.
    """

    validation: scores.Granted
    test: scores.Pooled
    test_means: scores.PooledMeans


def validation_splits(record: Record) -> list[tuple[int, str]]:
    """``(env, split)`` of what selection may look at.

    The official validation environments, else the out-splits of the training environments.
    """
    official = validation_envs(record["args"]["dataset"])
    if official:
        return [(env, "in") for env in official]
    return [(env, "out") for env in keys.environments(record, "out") if env not in record["args"]["test_envs"]]


def choose(records: Iterable[Record], criterion: str = "aa_wga") -> list[Choice]:
    """The checkpoint per row, dataset, test environments and trial that is best on validation.

    Validation pools the splits of ``validation_splits`` by counts, test pools the in-splits of the run's test
    environments (``records.pooled``). Where the validation budget grants only a share of the confounders, WGA is that
    of the annotated images; where it grants none, AA alone is maximised. Each run's best step is found first, then the
    best run among the draws (hparams seeds) of a trial. Several seeds of one draw do not compete but are trials of
    their own, so that a chosen draw trained again with new seeds gives one number per seed. Ties go to the earliest
    step, then to the smallest hparams seed and seed. Runs without groups are passed over, NaN never wins.

    Args:
        records: of any number of runs.
        criterion: a name in CRITERIA.

    Raises:
        ValueError: no such criterion.

    Source: eX2L, arXiv 2605.06368, equations 5-7; the pooled validation groups are our reading of its appendix.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is unknown; choose among {', '.join(CRITERIA)}")
    by_run = runs(record for record in records if keys.has_groups(record))
    return _best(by_run, lambda run, replicate, record: _judge(run, replicate, record, CRITERIA[criterion]))


def choose_oracle(records: Iterable[Record]) -> list[Choice]:
    """As ``choose``, but by (AA + WGA) / 2 on the test environments: no method, but a bound on what choosing can do."""
    by_run = runs(record for record in records if keys.has_groups(record))

    def judge(run: Run, replicate: int, record: Record) -> Choice | None:
        choice = _judge(run, replicate, record, scores.aa_wga)
        if choice is None:
            return None
        score = scores.aa_wga(*choice.test)
        return replace(choice, score=float("-inf") if math.isnan(score) else score)

    return _best(by_run, judge)


def _judge(run: Run, replicate: int, record: Record, score: Callable[[float, float], float]) -> Choice | None:
    validation = keys.granted(record, validation_splits(record))
    tested = [(env, "in") for env in run.test_envs]
    test = keys.pooled(record, tested)
    if validation is None or test is None:
        return None
    value = float("-inf") if math.isnan(validation.score()) else validation.score(score)
    return Choice(run, replicate, record, value, validation, test, keys.pooled_means(record, tested))
