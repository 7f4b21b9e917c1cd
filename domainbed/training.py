"""The training loop, and the model that it leaves behind."""

import ctypes
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainbed import records
from domainbed.algorithms.base import Task
from domainbed.evaluation import autocast, evaluate
from domainbed.loaders import Minibatch
from domainbed.splits import Split

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


def train(
    algorithm: Any,
    minibatches: Iterator[list[Minibatch]],
    unlabeled: Iterator[list[Tensor]] | None,
    plan: Plan,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Trains the algorithm and yields one record per checkpoint, while the next steps wait.

    A record holds step, epoch, the means since the last record of what ``update`` returned and of the step's time
    (seconds, waiting for data included), the accuracies of ``plan.splits`` and the peak of GPU memory.
    """
    values = defaultdict(list)
    for step in range(plan.steps):
        start = time.perf_counter()
        batch = next(minibatches)
        extra = None if unlabeled is None else next(unlabeled)
        with autocast(device, plan.precision):
            step_values = algorithm.update(batch, extra)
        values["step_time"].append(time.perf_counter() - start)
        for name, value in step_values.items():
            values[name].append(float(value))

        if step % plan.checkpoint_freq == 0 or step == plan.steps - 1:
            record = {"step": step, "epoch": step / plan.steps_per_epoch}
            record |= {name: float(np.mean(numbers)) for name, numbers in values.items()}
            record |= measurements(algorithm, plan, device)
            record["mem_gb"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
            values.clear()
            yield record


def measurements(algorithm: Any, plan: Plan, device: torch.device) -> dict[str, float | int]:
    """The record keys of the accuracies of the plan's splits."""
    found = evaluate(algorithm, plan.splits, plan.num_confounders, device, plan.precision, plan.num_workers)
    return records.accuracies(found, plan.num_classes * plan.num_confounders, plan.training_counts)


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
    temporary = Path(f"{os.fspath(path)}.partial")
    torch.save(content, temporary)
    os.replace(temporary, path)
