"""Just Train Twice: what a first network gets wrong is drawn more often to train a second one."""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from domainbed.algorithms.base import Minibatches, register
from domainbed.algorithms.erm import ERM
from domainbed.lib.misc import predicted_labels
from domainbed.messages import listed
from domainbed.partitions import Examples
from domainbed.stages import Stage

if TYPE_CHECKING:
    from domainbed.samples import StageData

logger = logging.getLogger(__name__)


@register
class JTT(ERM):
    """ERM that starts afresh with odds ``1 + jtt_upweight`` for the training images that it got wrong, 1 for others.

    The first stage is ERM; its errors ``{i: argmax_k f(x_i)_k != y_i}`` are the error set. The second one is ERM from
    new initial weights (pretrained ones where the backbone has them), with a new optimizer. It needs no training
    confounders; those of validation images serve selection, on which the method depends.

    The error set is empty where the first stage fits all training images: a short first stage and a large weight_decay
    prevent that. Then, as with upweight 0, the second stage is plain ERM.

    Source: Evan Zheran Liu, Behzad Haghgoo, Annie S. Chen, Aditi Raghunathan, Pang Wei Koh, Shiori Sagawa, Percy Liang
        and Chelsea Finn, Just Train Twice: Improving Group Robustness without Training Group Information, ICML 2021,
        https://arxiv.org/abs/2107.09044, Algorithm 1.
    Differs: images are drawn with odds, the source trains on a set that holds the error set's images jtt_upweight
        times more, the same in expectation; so its published code has it, where Algorithm 1 counts an error
        jtt_upweight times in all. Both stages share a run's updates, whose number is that of other methods;
        the source trains longer. Optimizer and learning rate are the suite's, and the weight decay is fit to them.

    Hparams:
        jtt_first_share: share of the run's updates that the first stage has; the source's is 1/6 on Waterbirds and 1/51
            on CelebA.
        jtt_upweight: how many times more an image of the error set is drawn, at least 0; the source's candidates are
            20, 50 and 100. With 20 an error set of 5 percent makes up half of the second stage's draws.
        weight_decay: of both stages. The default times SGD's default learning rate for large images is 1e-5, as the
            source has it on Waterbirds.
    """

    HPARAMS = {
        "jtt_first_share": (0.2, lambda r: r.uniform(0.02, 0.5)),
        "jtt_upweight": (20.0, lambda r: 10 ** r.uniform(0, 2.5)),
        "weight_decay": (1e-2, lambda r: 10 ** r.uniform(-4, -1)),
    }
    CONTROL = {"jtt_upweight": 0.0}
    PARTITION = "random"
    STAGES = (Stage("errors", "jtt_first_share"), Stage("retraining"))

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not 0 <= (upweight := hparams["jtt_upweight"]) < float("inf"):
            raise ValueError(f"hparam jtt_upweight is {upweight}: say how many times more an error is drawn, 0 or more")
        self._given = (tuple(input_shape), num_classes, num_domains)
        self.error_share: float | None = None  # known from the second stage on

    def begin_stage(self, stage: str, data: "StageData") -> NDArray[np.float64] | None:
        """Finds the error set and starts afresh; the odds ``1 + jtt_upweight * wrong`` (N,)."""
        examples, upweight = data.training.examples, self.hparams["jtt_upweight"]
        predicted = data.training.map(lambda x: predicted_labels(self.predict(x)))
        wrong = predicted.numpy() != examples.y
        self._report(wrong, examples)
        self.error_share = float(wrong.mean())
        self._start_afresh()
        return 1.0 + upweight * wrong if upweight and wrong.any() else None

    def _start_afresh(self) -> None:
        """Puts the network and its optimizer into a state as when newly built."""
        self.network.load_state_dict(ERM(*self._given, self.hparams).network.state_dict())
        self.optimizer = self.new_optimizer()

    def _report(self, wrong: NDArray[np.bool_], examples: Examples) -> None:
        share = self.hparams["jtt_first_share"]
        head = f"{type(self).__name__}: the first stage gets {wrong.sum()} of {len(wrong)} training images wrong"
        if wrong.any():
            logger.info(listed(head, list(_groups(wrong, examples))))
            return
        logger.warning(
            "%s, so that the second stage is plain ERM; shorten the first one (hparam jtt_first_share, %s) or take a "
            "larger weight_decay (%s)",
            head,
            share,
            self.hparams["weight_decay"],
        )

    def update(self, minibatches: Minibatches, unlabeled: Sequence[torch.Tensor] | None = None) -> dict[str, float]:
        values = super().update(minibatches, unlabeled)
        return values if self.error_share is None else values | {"error_share": self.error_share}


def _groups(wrong: NDArray[np.bool_], examples: Examples) -> Iterator[str]:
    """How many images of each group are wrong, in words; nothing where no confounder is known."""
    if examples.num_confounders < 2:
        return
    for g in np.unique(examples.g[wrong]):
        label, confounder = divmod(int(g), examples.num_confounders)
        name = "confounder not annotated" if g < 0 else f"label {label}, confounder {confounder}"
        here = examples.g == g
        yield f"{name}: {wrong[here].sum()} of {here.sum()}"
