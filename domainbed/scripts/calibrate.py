"""Times jobs of a sweep: ``sweep_plan`` asks, see ``torch_process``.

Of each kind of job one is built as train does, some of its updates are timed, and one evaluation or a part of it.
"""

import dataclasses
import gc
import itertools
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from domainbed import evaluation, training
from domainbed.scripts import run_cli, torch_process, train_building
from domainbed.scripts.train_arguments import completed, resolve

_UPDATES = 3  # at least, after a first one that does not count
_LONG_S = 0.5  # as long updates are timed, if there are that many
_CAP_S = 5.0  # no further update, and no whole evaluation, that is expected to end later than this
_MOST_UPDATES = 200


def typical(draws: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and hparams of the draw whose batch size is nearest to the mean.

    The time of a step grows by about as much with every image, so the mean time is that of the mean batch size.
    """
    resolved = []
    for draw in draws:
        args = completed(draw)
        resolved.append((args, resolve(args)))
    mean = statistics.fmean(hparams["batch_size"] for _, hparams in resolved)
    return min(resolved, key=lambda pair: abs(pair[1]["batch_size"] - mean))


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step_seconds(run: Any) -> float:
    """Mean seconds of an update, waiting for data included; the first is left out unless it takes all the time."""
    progress = training.Progress()
    plan = dataclasses.replace(run.plan, splits=(), steps=_MOST_UPDATES + 1, checkpoint_freq=_MOST_UPDATES + 1)
    unlabeled = None if run.unlabeled is None else ([x for x, _ in step] for step in run.unlabeled)
    first, times = 0.0, []
    for _ in training.train(
        run.algorithm, iter(run.stages[0].minibatches(None)), unlabeled, plan, run.device, progress
    ):
        if not progress.updated:
            continue
        times = progress.values["step_time"]
        if progress.step == 0:
            first, times = times[0], []
        if first + sum(times) > _CAP_S or (len(times) >= _UPDATES and sum(times) > _LONG_S):
            break
    return statistics.fmean(times or [first])


def evaluation_seconds(run: Any) -> tuple[float, bool]:
    """Seconds of the evaluation for a record, and whether that is extrapolated from some images of the first split."""
    plan, total = run.plan, sum(map(len, run.plan.splits))

    def evaluate(splits: Sequence[Any]) -> float:
        asked = plan.num_confounders, run.device, plan.precision, plan.num_workers
        return timed(lambda: evaluation.evaluate(run.algorithm, splits, *asked))

    for images in (64 * 4**power for power in itertools.count()):
        part = plan.splits[0].at(slice(images))
        estimate = evaluate([part]) * total / len(part)
        if estimate <= _CAP_S:
            return evaluate(plan.splits), False
        if estimate * len(part) / total > _CAP_S / 5 or len(part) < images:
            break
    return estimate, True


def timing(draws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The values of a ``plans.Timing`` for jobs with these arguments, which differ in their draws only."""
    args, hparams = typical(draws)
    start = time.perf_counter()
    run = train_building.build(args, hparams)
    start_s = time.perf_counter() - start
    step_s = step_seconds(run)
    evaluation_s, extrapolated = evaluation_seconds(run)
    return {
        "steps": run.plan.steps,
        "checkpoint_freq": run.plan.checkpoint_freq,
        "step_s": step_s,
        "evaluation_s": evaluation_s,
        "start_s": start_s,
        "extrapolated": extrapolated,
        "stops_early": run.stopping is not None,
    }


def calibrate(question: Mapping[str, Any]) -> dict[str, Any]:
    """Times each of the question's kinds, which are ``{"name": ..., "draws": [train's arguments, ...]}``.

    Returns:
        ``{"device": ..., "import_s": ..., "kinds": [...]}``: CPU seconds until this process could begin, and of each
        kind its timing, or ``{"reason": ...}`` if it has none.
    """
    found, import_s = [], time.process_time()
    with suppress(Exception):  # what is imported only now is no part of the first kind's start; it fails again below
        train_building.build(*typical(question["kinds"][0]["draws"]))
    for number, kind in enumerate(question["kinds"], 1):
        print(f"timing {number} of {len(question['kinds'])}: {kind['name']}", file=sys.stderr, flush=True)
        try:
            found.append(timing(kind["draws"]))
        except Exception as error:  # any failure is the answer for its kind, and none of the other kinds'
            found.append({"reason": " ".join(str(error).split()) or type(error).__name__})
        gc.collect()  # a run's tensors go before the next is built
    return {"device": str(train_building.device()), "import_s": import_s, "kinds": found}


def main(argv: Sequence[str]) -> int:
    """Answers the question on stdin."""
    logging.getLogger().setLevel(logging.WARNING)  # what a dataset tells of itself it would tell of every kind
    return torch_process.answer(calibrate, argv, __doc__)


if __name__ == "__main__":
    run_cli(main)
