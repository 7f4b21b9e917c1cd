"""One training, from its first step or from a snapshot, to its models."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from domainbed import (
    explanation_records,
    interruption,
    records,
    saved_models,
    snapshots,
    training,
)
from domainbed.algorithms.base import Task
from domainbed.claims import Claim
from domainbed.console import print_row
from domainbed.evaluation import ExplanationPlan, explanations
from domainbed.explanation_tables import run_table
from domainbed.loaders import TrainingLoader
from domainbed.loggers import LoggedRun, Logging
from domainbed.rows import pseudo_confounders
from domainbed.samples import StageData
from domainbed.scripts import train_stages
from domainbed.scripts.train_stages import RunStage
from domainbed.splits import Split
from domainbed.state_trees import NotResumable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything that one training needs.

    Attributes:
        about: what its models say of the dataset.
        facts: numbers that every record holds.
    """

    args: dict[str, Any]
    hparams: dict[str, Any]
    task: Task
    algorithm: Any
    stages: Sequence[RunStage]
    stage_data: StageData
    unlabeled: TrainingLoader | None
    validation: Sequence[Split]
    plan: training.Plan
    stopping: training.EarlyStopping | None
    device: torch.device
    about: dict[str, Any]
    facts: dict[str, float]

    @property
    def directory(self) -> Path:
        return Path(self.args["output_dir"])


class Execution:
    """A run under way.

    Args:
        run: freshly built.
        claim: on the run's directory.
        save_every_s: seconds between two snapshots (``snapshots.Schedule``).

    Attributes:
        state: what a snapshot keeps beside the algorithm.
        pace: see ``training.train``.
        earlier, later: updates of other executions of the same run.
    """

    pace: Callable[[], Mapping[str, float] | None] | None = None
    earlier: int = 0
    later: int = 0

    def __init__(self, run: Run, claim: Claim, save_every_s: float):
        self.run, self.claim = run, claim
        self.progress = training.Progress()
        self.state: list[Any] = [self.progress, run.stopping]
        self.schedule = snapshots.Schedule(save_every_s)
        self.resumable = True
        self.columns: list[str] = []

    def resume(self, content: dict[str, Any]) -> None:
        """Goes on from a snapshot.

        Raises:
            NotResumable: it doesn't fit the data or the algorithm, which is of no use from then on.
        """
        if self.run.task.to_dict() | content["task"] != self.run.task.to_dict():  # older ones lack some fields
            raise NotResumable(f"the data were those of {content['task']} and are of {self.run.task.to_dict()}")
        snapshots.restore(self.run.directory, content, self.run.algorithm, self.state)
        for pattern in (explanation_records.EXPLANATIONS_FILE, "*.partial"):
            for path in self.run.directory.glob(pattern):
                path.unlink()
        print("resumed after {} of {} updates".format(*self.amount()))

    def logged(self) -> LoggedRun:
        """What trackers are told of the run."""
        return LoggedRun(self.run.directory, self.run.args, self.run.hparams, self.earlier + self.progress.step)

    def amount(self) -> tuple[int, int]:
        """Updates done, and updates in all."""
        return self.earlier + self.progress.updates, self.earlier + self.run.plan.steps + self.later

    def identity(self) -> dict[str, Any]:
        """What tells a snapshot of this run from one of another."""
        return {"args": self.run.args, "hparams": self.run.hparams, "task": self.run.task.to_dict()}

    def named(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record of the loop under the keys by which it is written."""
        return record

    def train(self, trackers: Logging) -> None:
        """Trains to the end.

        Args:
            trackers: get each record once it is written.

        Raises:
            Preempted: somebody asked to end, and a snapshot is written.
            Unsaved: somebody asked to end, and none can be written.
        """
        try:
            self._train(trackers)
        except interruption.Unsaved:
            raise
        except interruption.Preempted as request:
            if not self.save():
                raise interruption.Unsaved(str(request)) from request
            raise

    def finish(self, trackers: Logging) -> None:
        """Trains to the end and writes the models; see ``train``."""
        self.train(trackers)
        if not self.run.args["skip_model_save"]:
            self._save_model(training.MODEL_FILE, step=self.progress.step - 1)
        if self.run.args["explain"]:
            self.save()  # explaining is not resumed halfway
            with interruption.at_once():
                explain(self.run, self.progress.step - 1)
        self.claim.check()

    def _train(self, trackers: Logging) -> None:
        progress = self.progress
        for number, stage in enumerate(self.run.stages):
            if progress.stopped:
                return
            if number > progress.stage:
                self._begin(number)
            if number == progress.stage:
                self._go_through(stage, trackers)

    def _begin(self, number: int) -> None:
        """Goes over to the next stage; a request to end meanwhile leaves the snapshot from which it begins anew."""
        run, progress = self.run, self.progress
        self.save()
        print(f"stage {number + 1} of {len(run.stages)}, {run.stages[number].name}, after {progress.step} updates")
        progress.odds = train_stages.begin(run.algorithm, run.stages[number], run.stage_data)
        progress.stage = number

    def _go_through(self, stage: RunStage, trackers: Logging) -> None:
        run, progress = self.run, self.progress
        unlabeled = None
        if run.unlabeled is not None:
            unlabeled = ([x for x, _ in step] for step in run.unlabeled.start_at(progress.updates))
        minibatches = train_stages.loader(stage, progress.odds).start_at(progress.updates)
        steps = training.train(run.algorithm, minibatches, unlabeled, stage.plan, run.device, progress, self.pace)
        for found in steps:
            if found is not None:
                record = self.named(found | run.facts)
                self._keep(record)
                trackers.log(record | {"step": self.earlier + record["step"]})
                if progress.stopped:
                    return
            self._pause()

    def _pause(self) -> None:
        """Between two steps, all is in order."""
        self.claim.report(*self.amount())
        interruption.check()
        if self.schedule.is_due():
            self.save()

    def _keep(self, record: dict[str, Any]) -> None:
        """Writes a record of the last stage, and the models that it asks for; others are but shown."""
        run, progress = self.run, self.progress
        self.claim.check()
        is_last = progress.stage == len(run.stages) - 1
        if is_last:
            constants = {"hparams": run.hparams, "args": run.args}
            records.append(run.directory / records.RESULTS_FILE, record | constants)
        self.columns = print_record(record, self.columns)  # after it is written: whoever follows the output looks there
        if not is_last:
            return
        score = validation_score(record, run.validation)
        if run.args["keep_best"] and score > progress.best:
            progress.best = score
            self._save_model(training.BEST_MODEL_FILE, step=record["step"], validation_aa_wga=score)
        if run.args["save_model_every_checkpoint"]:
            self._save_model(f"model_step{record['step']}.pkl", step=record["step"])
        if run.stopping is not None and run.stopping.is_over(score, record["step"]):
            print(f"stopped early after step {record['step']}: {run.stopping}")
            progress.stopped = True

    def _save_model(self, name: str, **more: Any) -> None:
        self.claim.check()
        run = self.run
        more |= run.about
        training.save_model(run.directory / name, run.algorithm, run.task, run.hparams, run.args, **more)

    def save(self) -> bool:
        """Writes a snapshot; one that can't be written is a warning, since the run itself is not hurt by it."""
        if not self.resumable:
            return False
        started, written, run = time.monotonic(), False, self.run
        self.claim.check()
        try:
            content = snapshots.take(run.directory, run.algorithm, self.state, self.identity())
            snapshots.write(run.directory, content)
            written = True
        except NotResumable as error:
            self.resumable = False
            logger.warning("no snapshots: %s; if it is killed, this run starts over", error)
        except OSError as error:
            logger.warning("a snapshot could not be written (%s); training goes on, the last one stays", error)
        self.schedule.done(started)
        return written


def explain(run: Run, step: int) -> None:
    """Measures explanations on the test environments' in-splits: of the best model if it was kept, else the last."""
    directory, model = run.directory, "" if run.args["skip_model_save"] else training.MODEL_FILE
    if (best := directory / training.BEST_MODEL_FILE).exists():
        saved = saved_models.load(best, run.device)
        run.algorithm.load_state_dict(saved["model_dict"])
        model, step = best.name, saved["step"]
    plan, training_plan = ExplanationPlan(run.args["explain"], inferred=bool(pseudo_confounders(run.args))), run.plan
    num_confounders = training_plan.num_confounders
    tested = [split for split in training_plan.splits if split.kind == "in" and split.env in run.args["test_envs"]]
    measured = explanations(run.algorithm, tested, num_confounders, run.device, plan, training_plan.num_workers)
    settings = explanation_records.Settings.of(plan, model, step)
    num_groups = training_plan.num_classes * num_confounders
    line = explanation_records.write(directory, run.args, settings, plan.fills, measured, num_groups)
    print(run_table(line), end="")


def validation_score(record: dict[str, Any], validation: Sequence[Split]) -> float:
    """(AA + WGA) / 2 of all validation images together, WGA of those that the validation budget grants.

    AA alone where it grants none; NaN where the images or their groups are not known.
    """
    found = records.granted(record, [(split.number, split.kind) for split in validation])
    return math.nan if found is None else found.score()


def print_record(record: dict[str, Any], columns: list[str]) -> list[str]:
    """Prints the record's row, under a header if its columns are new; of groups only WGA; the rest is in the file."""
    shown = sorted(key for key in record if not (records.is_group_key(key) or key.endswith("_adj_acc")))
    if shown != columns:
        print_row(shown, colwidth=12)
    print_row([record[key] for key in shown], colwidth=12)
    return shown
