"""What a method that trains in stages declares of them, and how long each of them is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A part of a run's updates, with minibatches of its own.

    Attributes:
        name: by which ``Algorithm.begin_stage`` is told of it.
        share: of the run's updates, in [0, 1], or the name of the hparam that says it; a stage has at least one
            update, and the last stage takes what is left, whatever its share.
        partition: which examples share a minibatch; None: the partition of the run.
        of_features: its minibatches hold, in place of images, what ``Algorithm.stage_features`` gives for them (B, D):
            computed once, when the stage begins, of images that are not augmented.
    """

    name: str
    share: float | str = 1.0
    partition: str | None = None
    of_features: bool = False


def ends(stages: Sequence[Stage], steps: int, hparams: Mapping[str, Any]) -> list[int]:
    """The number of updates after which each stage is over.

    Raises:
        ValueError: there are fewer updates than stages, or a share is none.
    """
    if steps < len(stages):
        names = ", ".join(stage.name for stage in stages)
        raise ValueError(f"{steps} steps are too few for the stages {names}, of one update at least; give more --steps")
    found = [0]
    for number, stage in enumerate(stages[:-1]):
        left = len(stages) - 1 - number
        share = hparams[stage.share] if isinstance(stage.share, str) else stage.share
        if not 0 <= share <= 1:
            named = f"hparam {stage.share}" if isinstance(stage.share, str) else f"the share of stage {stage.name}"
            raise ValueError(f"{named} is {share}: give the stage's share of all updates, from 0 to 1")
        found.append(min(max(found[-1] + 1, found[-1] + round(share * steps)), steps - left))
    return [*found[1:], steps]
