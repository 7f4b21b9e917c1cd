"""Trains in two stages: the first finds the learning rate's schedule by validation, the second trains on all images.

    python -m domainbed.scripts.train_autolr --dataset DigitsM2M --algorithm ERMPlusPlus --output_dir runs/1

It takes train's arguments. Both stages' records stand in one results.jsonl, the second's with ``holdout_fraction`` 0
and keys that begin with ``fd_`` (full data); ``collect_results --auto_lr`` joins them. The model is the second's.

Differs from DomainBed's: the second stage starts from the first's initial weights, ends with the step of the first's
last record, not one checkpoint before it, and does not fail where the schedule is shorter than the run or was never
begun. A record's means are over the updates since the one before, in the first stage too. Official validation
environments are what validates, and are trained on in neither stage. Interrupted, it goes on where it was.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from domainbed import algorithms
from domainbed.algorithms import get_algorithm_class
from domainbed.claims import Claim
from domainbed.datasets.base import Integers
from domainbed.evaluation import autocast
from domainbed.loaders import EVALUATION_BATCH, TrainingLoader, evaluation_batches
from domainbed.loggers import LoggedRun, Logging
from domainbed.records import FULL_DATA
from domainbed.scripts import BadInput, run_cli, train, train_arguments, train_building
from domainbed.scripts.train_execution import Execution, Run
from domainbed.splits import Split

END = [0.0]  # the last entry of a schedule that is complete
SECOND = "second_stage"  # in its snapshots


def parser() -> argparse.ArgumentParser:
    p = train_arguments.parser("Finds the learning rate's schedule, then trains on all images.", ["auto_lr"])
    p.add_argument("--auto_lr", action="store_true", help="without effect, as in DomainBed")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs both stages, or goes on with them; returns the exit status."""
    args = vars(parser().parse_args(argv))
    args["auto_lr"] = False  # in the records, as DomainBed's; they are no records of train
    return train.run(args, begin)


class EachOnce(TrainingLoader):
    """Draws without replacement: no image of a part comes again before all of them have come.

    What step s draws stays a function of (seed, s) alone. Where classes are balanced, draws are with replacement.
    """

    def draw(self, step: int) -> Integers:
        if any(odds is not None for odds in self._odds):
            return super().draw(step)
        return np.concatenate([self._rows_of(p, step * self.rows) for p in range(len(self.parts))])

    def _rows_of(self, part: int, first: int) -> Integers:
        """The rows of a step from one part, which are some of an endless row of shuffled passes over it."""
        n = len(self.parts[part].positions)
        passes = range(first // n, (first + self.rows - 1) // n + 1)
        start = first - passes[0] * n
        return np.concatenate([self._shuffled(part, number) for number in passes])[start : start + self.rows]

    @functools.cached_property
    def _last(self) -> dict[int, tuple[int, Integers]]:
        """The latest shuffled pass of each part, since many steps draw from one."""
        return {}

    def _shuffled(self, part: int, number: int) -> Integers:
        if part not in self._last or self._last[part][0] != number:
            rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 2, part, number]))
            self._last[part] = number, rng.permutation(self.parts[part].positions)
        return self._last[part][1]


class ValidationLoader:
    """Batches (x, y) of a split, once and in order, as ``set_lr`` takes them."""

    def __init__(self, split: Split, run: Run):
        self.split, self.run = split, run

    def __len__(self) -> int:
        return math.ceil(len(self.split) / EVALUATION_BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return evaluation_batches(self.split.environment, self.split.keys, self.run.plan.num_workers, self.run.device)


@dataclass
class Rates:
    """What ``set_lr`` gave back last: the schedule so far, or what is left of it; None: nothing yet."""

    schedule: list[list[float]] | None = None


class FirstStage(Execution):
    """Trains on the in-splits until ``set_lr`` has seen enough, or to the last step; leaves records, but no model.

    Raises:
        ValueError: no image validates; see ``train_building.build``.
    """

    def __init__(self, args: dict[str, Any], hparams: dict[str, Any], claim: Claim, save_every_s: float):
        super().__init__(train_building.build(args, hparams, EachOnce), claim, save_every_s)
        if not self.run.validation:
            raise ValueError("the first stage needs validation images; give a --holdout_fraction above 0, like 0.2")
        self.rates, self.pace = Rates(), self._search
        self.state.append(self.rates)
        self.loaders = [ValidationLoader(split, self.run) for split in self.run.validation]
        self.later = self.run.plan.steps

    def _search(self) -> dict[str, float] | None:
        run = self.run
        with autocast(run.device, run.plan.precision):
            schedule = run.algorithm.set_lr(eval_loaders_iid=self.loaders, device=run.device)
        self.rates.schedule = schedule and list(schedule)
        if not (schedule and schedule[-1] == END):
            return {"lr": learning_rate(run.algorithm)}
        if self.progress.step == 0:
            raise BadInput(
                f"{run.args['algorithm']}.set_lr ended its search at the first checkpoint, so that there is nothing to "
                "train; give an lr above 0"
            )
        return None

    @property
    def recorded_steps(self) -> int:
        """How many updates the last record tells of."""
        plan, step = self.run.plan, self.progress.step
        return (step - 1) // plan.checkpoint_freq * plan.checkpoint_freq + 1 if self.progress.stopped else plan.steps

    def _save_model(self, name: str, **more: Any) -> None:
        pass


class SecondStage(Execution):
    """Trains on all images of the training environments, by the schedule.

    Args:
        args: the first stage's.
        steps, checkpoint_freq: the first stage's, as far as it was recorded.
    """

    def __init__(
        self,
        args: dict[str, Any],
        hparams: dict[str, Any],
        claim: Claim,
        save_every_s: float,
        steps: int,
        checkpoint_freq: int,
    ):
        self.args, self.length = args, {"steps": steps, "checkpoint_freq": checkpoint_freq}
        own = args | {"holdout_fraction": 0.0}
        run = replace(train_building.build(own | self.length | {"epochs": None}, hparams, EachOnce), args=own)
        super().__init__(run, claim, save_every_s)
        self.rates, self.pace, self.earlier = Rates(), self._follow, steps
        self.state.append(self.rates)

    def _follow(self) -> dict[str, float]:
        algorithm = self.run.algorithm
        lr = learning_rate(algorithm)
        if self.rates.schedule:
            self.rates.schedule = algorithm.set_lr(schedule=self.rates.schedule)
        return {"lr": lr}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"args": self.args, SECOND: self.length}

    def named(self, record: dict[str, Any]) -> dict[str, Any]:
        return {f"{FULL_DATA}{key}" if key.startswith("env") else key: value for key, value in record.items()}


def learning_rate(algorithm: Any) -> float:
    """That of ``optimizer``'s first group of weights."""
    return float(algorithm.optimizer.param_groups[0]["lr"])


class TwoStages:
    """Both stages, one after the other; between them, only what the first has found is kept.

    Args:
        stage: the one under way.
        make_second: builds the second for the steps and the checkpoint_freq of the first.
    """

    def __init__(self, stage: Execution, make_second: Callable[[int, int], SecondStage]):
        self.stage, self.make_second = stage, make_second

    def logged(self) -> LoggedRun:
        return self.stage.logged()

    def finish(self, trackers: Logging) -> None:
        """Goes through what is left of both stages; see ``Execution.finish``."""
        if isinstance(self.stage, FirstStage):
            self.stage.train(trackers)
            steps, schedule = self.stage.recorded_steps, self.stage.rates.schedule
            freq = self.stage.run.plan.checkpoint_freq
            del self.stage
            print(f"second stage: {steps} updates on all images")
            self.stage = second = self.make_second(steps, freq)
            second.rates.schedule = schedule
            second.save()
        self.stage.finish(trackers)


def begin(
    args: dict[str, Any],
    hparams: dict[str, Any],
    snapshot: dict[str, Any] | None,
    claim: Claim,
    save_every_s: float,
) -> TwoStages:
    """Both stages, as they were when the snapshot was written; without one, or if it does not fit, at the first step.

    Raises:
        ValueError: the algorithm searches no learning rate, something is asked for that can't be had with it, or see
            ``train_building.build``.
    """
    refuse(args, hparams)
    make_second = functools.partial(SecondStage, args, hparams, claim, save_every_s)

    def make(content: dict[str, Any] | None) -> Execution:
        if length := (content or {}).get(SECOND):
            return make_second(**length)
        return FirstStage(args, hparams, claim, save_every_s)

    return TwoStages(train.begin_or_resume(make, snapshot, args["output_dir"]), make_second)


def refuse(args: dict[str, Any], hparams: dict[str, Any]) -> None:
    """Raises ValueError for an algorithm without ``set_lr``, and for what would choose or end beside it."""
    if not searches(get_algorithm_class(args["algorithm"])):
        known = [name for name in algorithms.ALGORITHMS if searches(get_algorithm_class(name))]
        raise ValueError(
            f"{args['algorithm']} has no method set_lr, which finds the learning rates; take an algorithm with one "
            f"({', '.join(known)}), or train"
        )
    for name, asked in {"--keep_best": args["keep_best"], "hparam patience": hparams.get("patience")}.items():
        if asked:
            raise ValueError(f"{name}: train_autolr itself decides when to end; leave it out")


def searches(algorithm_class: type) -> bool:
    return callable(getattr(algorithm_class, "set_lr", None))


if __name__ == "__main__":
    run_cli(main)
