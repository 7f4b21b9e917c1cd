"""The stages of a run: how long each is, what its minibatches are drawn from, and how the next one is begun."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from domainbed import interruption, snapshots, training
from domainbed.feature_maps import evaluating
from domainbed.loaders import TrainingLoader
from domainbed.samples import StageData
from domainbed.stages import Stage, ends

Odds = NDArray[np.float64] | None


@dataclass(frozen=True)
class RunStage:
    """A stage of a run.

    Attributes:
        name: as the algorithm has it.
        plan: its last step, and what is measured meanwhile: nothing, unless it is the last stage.
        minibatches: the loader, for the odds of the training images; it may take a pass over them.
    """

    name: str
    plan: training.Plan
    minibatches: Callable[[Odds], TrainingLoader]


def build_stages(
    algorithm: Any,
    minibatches: TrainingLoader,
    plan: training.Plan,
    hparams: dict[str, Any],
    data: StageData,
    draw: Callable[..., TrainingLoader],
    partition: str,
) -> list[RunStage]:
    """The stages that the algorithm declares, else a single one; only the last one is measured.

    Args:
        minibatches: the run's own loader.
        draw: builds another one, of splits, by a partition and odds.
    """

    stages, sample = getattr(algorithm, "STAGES", ()) or (Stage("training"),), data.training
    of_images = {own: draw(sample.splits, own) for own in {stage.partition for stage in stages} - {None, partition}}
    of_images[partition] = minibatches

    def minibatches_of(stage: Stage, odds: Odds) -> TrainingLoader:
        own = stage.partition or partition
        if not stage.of_features:
            return of_images[own] if odds is None else draw(sample.splits, own, odds=odds)
        with interruption.at_once(), torch.no_grad(), evaluating(algorithm):
            features = sample.map(algorithm.stage_features)
        return draw(sample.replaced(features), own, odds=odds, with_masks=False)

    plans = [replace(plan, steps=end, splits=()) for end in ends(stages, plan.steps, hparams)]
    plans[-1] = plan
    return [
        RunStage(stage.name, own, functools.partial(minibatches_of, stage))
        for stage, own in zip(stages, plans, strict=True)
    ]


def begin(algorithm: Any, stage: RunStage, data: StageData) -> Odds:
    """Has the algorithm begin a stage; the odds of the training images in it.

    Raises:
        Unsaved: somebody asked to end, and the algorithm may be anything between the two stages.
    """
    try:
        with interruption.at_once(), torch.no_grad(), evaluating(algorithm):
            odds: Odds = algorithm.begin_stage(stage.name, data)
    except interruption.Preempted as request:
        raise interruption.Unsaved(str(request)) from request
    return odds


def loader(stage: RunStage, odds: Odds) -> TrainingLoader:
    """The stage's minibatches; opening images for them leaves no trace in the random states."""
    random_states = snapshots.random_states()
    try:
        return stage.minibatches(odds)
    finally:
        snapshots.set_random_states(random_states)
