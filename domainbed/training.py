"""The training loop, and the model that it leaves behind."""

import ctypes
import io
import math
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domainbed import interruption, records, run_directory, snapshots
from domainbed.algorithms.base import Task
from domainbed.evaluation import Accuracy, autocast, evaluate
from domainbed.loaders import Minibatch
from domainbed.splits import Split

Measured: TypeAlias = dict[tuple[int, str], tuple[float, dict[int, float], dict[int, int], int | None]]  # an Accuracy's

MODEL_FILE = "model.pkl"
BEST_MODEL_FILE = "model_best.pkl"


@dataclass(frozen=True)
class Plan:
    """How long and how to train, and what to measure.

    Attributes:
        steps: number of updates.
        checkpoint_freq: updates between two records; the last update is always recorded.
        steps_per_epoch: updates that see as many examples as the smallest in-split has.
        splits: what is evaluated at each record.
        num_classes, num_confounders: K and V.
        precision: "fp32" or "bf16".
        num_workers: the most processes that open images.
        training_counts: training images of each of the K * V groups; empty where no confounder is known.
    """

    steps: int
    checkpoint_freq: int
    steps_per_epoch: float
    splits: Sequence[Split]
    num_classes: int
    num_confounders: int
    precision: str = "fp32"
    num_workers: int = 0
    training_counts: tuple[int, ...] = ()

    def is_recorded(self, step: int) -> bool:
        """Whether a record follows the update of that step."""
        return step % self.checkpoint_freq == 0 or step == self.steps - 1

    def unmeasured(self, measured: Container[tuple[int, str]]) -> Iterator[list[Split]]:
        """The splits of each environment that is not measured yet."""
        for env in dict.fromkeys(split.env for split in self.splits):
            splits = [split for split in self.splits if split.env == env]
            if not all((split.number, split.kind) in measured for split in splits):
                yield splits


class EarlyStopping:
    """When to end training, because the validation score stopped rising.

    It is over after ``patience`` scores in a row that are not above the best before them by more than ``min_delta``.
    Only scores that are above it by more count as best, so that many small steps up count once they add up.

    Attributes:
        best, best_step: the highest score that counted, and the step of its checkpoint.
        waited: how many checkpoints ago that was.

    Args:
        patience: number of checkpoints.
        min_delta: a difference of scores.

    Raises:
        ValueError: patience is below 1, or min_delta below 0.
    """

    def __init__(self, patience: int, min_delta: float = 1e-4):
        if patience < 1 or not min_delta >= 0:
            raise ValueError(
                f"hparams patience {patience} and min_delta {min_delta}: stopping early takes a patience of at least "
                "1 checkpoint and a min_delta of at least 0"
            )
        self.patience, self.min_delta = patience, min_delta
        self.best, self.best_step, self.waited = -math.inf, -1, 0

    def is_over(self, score: float, step: int) -> bool:
        """Whether the score of the next checkpoint, after ``step``, was the last one to wait for; NaN is no rise."""
        if score > self.best + self.min_delta:
            self.best, self.best_step, self.waited = score, step, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def __str__(self) -> str:
        found = f"of step {self.best_step} ({self.best:.4f})"
        return f"{self.waited} checkpoints brought no validation score more than {self.min_delta} above that {found}"


def keep_freed_memory() -> None:
    """Lets the C library keep freed memory for the next step, instead of handing it back to the system.

    Every step allocates the same large tensors; fetched anew, their pages cost about a tenth of a step on a CPU. For
    the script that owns the process; does nothing where the C library is not GNU's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 26)):  # mmap and trim threshold, top pad
            mallopt(option, value)


@dataclass
class Progress:
    """How far a run is: with the algorithm and the random states, all that the loop needs to go on.

    Attributes:
        step: the step that is under way, or comes next.
        updated: its update is done; what remains is to measure and record it.
        values: what the updates since the last record returned, by name, and their times.
        measured: accuracies for the record under way, by split.
        best: highest validation score of a record.
        stopped: the training was ended before its last step.
        stage: the stage that is under way, of a method that has several.
        odds: how it draws the training images; None: all alike.
    """

    step: int = 0
    updated: bool = False
    values: dict[str, list[float]] = field(default_factory=dict)
    measured: Measured = field(default_factory=dict)
    best: float = -math.inf
    stopped: bool = False
    stage: int = 0
    odds: NDArray[np.float64] | None = None

    @property
    def updates(self) -> int:
        """How many updates are done."""
        return self.step + self.updated

    def add(self, values: Mapping[str, Any]) -> None:
        """Keeps what one update returned until the next record."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(float(value))

    def means(self) -> dict[str, float]:
        """The mean of each kind of value."""
        return {name: float(np.mean(numbers)) for name, numbers in self.values.items()}


def train(
    algorithm: Any,
    minibatches: Iterator[list[Minibatch]],
    unlabeled: Iterator[list[Tensor]] | None,
    plan: Plan,
    device: torch.device,
    progress: Progress | None = None,
    pace: Callable[[], Mapping[str, float] | None] | None = None,
) -> Iterator[dict[str, Any] | None]:
    """Trains the algorithm and yields one record per checkpoint, while the next steps wait.

    A record holds step, epoch, the means since the last record of what ``update`` returned and of the step's time
    (seconds, waiting for data included), the accuracies of ``plan.splits`` and the peak of GPU memory.

    Between the records it yields None wherever algorithm and progress agree, so that they may be written down: after
    each update, and after each environment that is measured.

    Args:
        minibatches, unlabeled: begin with those of step ``progress.updates``.
        progress: where to go on; it is kept up to date. Default: the first step.
        pace: called once at each checkpoint, before anything is measured, to set the algorithm's learning rate, say;
            what it returns joins the record, and None ends the training without one.
    """
    progress = Progress() if progress is None else progress
    while progress.step < plan.steps:
        if not progress.updated:
            progress.add(_update(algorithm, minibatches, unlabeled, plan, device))
            if pace is not None and plan.is_recorded(progress.step):
                paced = pace()
                if paced is None:
                    progress.stopped = True
                    return
                progress.add(paced)
            progress.updated = True
            yield None
        record = None
        if plan.is_recorded(progress.step):
            for splits in plan.unmeasured(progress.measured):
                progress.measured |= measure(algorithm, splits, plan, device)
                yield None
            record = _record(progress, plan, device)
        progress.step, progress.updated = progress.step + 1, False
        if record is not None:
            yield record


def _update(
    algorithm: Any,
    minibatches: Iterator[list[Minibatch]],
    unlabeled: Iterator[list[Tensor]] | None,
    plan: Plan,
    device: torch.device,
) -> dict[str, Any]:
    """What one update returned, and how long it took, waiting for its data included."""
    start = time.perf_counter()
    batch = next(minibatches)
    extra = None if unlabeled is None else next(unlabeled)
    with autocast(device, plan.precision):
        values: dict[str, Any] = algorithm.update(batch, extra)
    return {"step_time": time.perf_counter() - start, **values}


def measure(algorithm: Any, splits: Sequence[Split], plan: Plan, device: torch.device) -> Measured:
    """Accuracies of the splits of one environment; a request to end interrupts it, and leaves no trace of it.

    Raises:
        Preempted: somebody asked to end.
        Unsaved: the same, and predicting has changed the algorithm, as test-time adaptation does.
    """
    random_states, versions = snapshots.random_states(), _versions(algorithm)
    try:
        with interruption.at_once():
            found = evaluate(algorithm, splits, plan.num_confounders, device, plan.precision, plan.num_workers)
    except interruption.Preempted as request:
        snapshots.set_random_states(random_states)  # images may be opened with random transforms
        if versions != _versions(algorithm):
            raise interruption.Unsaved(str(request)) from request
        raise
    return {place: (a.average, a.groups, a.counts, a.images) for place, a in found.items()}


def _versions(algorithm: Any) -> list[tuple[int, int]]:
    """What changes when one of the algorithm's tensors does."""
    return [(id(tensor), tensor._version) for tensor in (*algorithm.parameters(), *algorithm.buffers())]


def _record(progress: Progress, plan: Plan, device: torch.device) -> dict[str, Any]:
    """The record of the step under way, with which the progress's values and measurements begin anew."""
    accuracies = {place: Accuracy(*values) for place, values in progress.measured.items()}
    record = {"step": progress.step, "epoch": progress.step / plan.steps_per_epoch, **progress.means()}
    record |= records.accuracies(accuracies, plan.num_classes * plan.num_confounders, plan.training_counts)
    record["mem_gb"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    progress.values, progress.measured = {}, {}
    return record


def save_model(
    path: str | os.PathLike[str], algorithm: Any, task: Task, hparams: dict[str, Any], args: dict[str, Any], **more: Any
) -> None:
    """Writes DomainBed's model.pkl (plus the task) beside its place and moves it there, so no half file is seen."""
    content = {
        "args": args,
        "model_input_shape": task.input_shape,
        "model_num_classes": task.num_classes,
        "model_num_domains": task.num_domains,
        "model_hparams": hparams,
        "model_dict": algorithm.state_dict(),
        "task": task.to_dict(),
        **more,
    }
    written = io.BytesIO()  # writing to the file itself, torch would hide why it can't
    torch.save(content, written)
    with run_directory.whole(Path(path)) as file:
        file.write(written.getbuffer())
