"""Group distributionally robust optimisation."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, Task, register
from domainbed.algorithms.erm import ERM


@register
class GroupDRO(ERM):
    """Minimises ``sum_e q_e risk_e``, where q leans to the worst minibatches: ``q_e ~ q_e * exp(eta * risk_e)``.

    What counts as a group is what the partition puts into one minibatch: by environment this is DomainBed's
    GroupDRO, on the ``group`` partition it is the source's, with its balanced sampling. A group that never occurs in
    training has no minibatch and no q; images whose confounder is not annotated form one group for each label.

    On the ``group`` partition it needs training confounders, as many as there are; validation's only for selection.

    Source: Shiori Sagawa, Pang Wei Koh, Tatsunori B. Hashimoto and Percy Liang, Distributionally Robust Neural
        Networks for Group Shifts, ICLR 2020, https://arxiv.org/abs/1911.08731, Algorithm 1; the adjustment: section
        3.3.
    Differs: each step holds a minibatch of every group, where Algorithm 1 draws one group; q starts from ones, which
        the first update divides by their sum.

    Hparams:
        groupdro_eta: step size of q.
        groupdro_adjustment: the source's C >= 0, 0 unless given: q is updated with ``risk_e + C / sqrt(n_e)``, n_e
            being the number of training images that minibatch e is drawn from, so that small groups, whose risk
            generalises worse, count more. The weights of the network are updated with the risks alone.
    """

    HPARAMS = {"groupdro_eta": (0.01, lambda r: 10 ** r.uniform(-3, -1))}
    OPTIONAL_HPARAMS = {"groupdro_adjustment": 0.0}
    CONTROL = {"groupdro_eta": 0.0}

    q: Tensor
    sizes: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        num_domains: int,
        hparams: dict[str, Any],
        part_counts: Sequence[int] = (),
    ):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.adjustment = hparams.get("groupdro_adjustment", 0.0)
        _check_adjustment(self.adjustment, num_domains, part_counts)
        self.register_buffer("q", torch.ones(num_domains))
        sizes = torch.tensor(part_counts if self.adjustment else [1] * num_domains, dtype=torch.get_default_dtype())
        self.register_buffer("sizes", sizes, persistent=False)

    @classmethod
    def from_task(cls, task: Task, hparams: dict[str, Any]) -> "GroupDRO":
        return cls(task.input_shape, task.num_classes, task.num_domains, hparams, task.part_counts)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        risk = torch.stack([self._risk(x, y) for x, y in minibatches])  # (E,)
        bonus = self.adjustment / self.sizes.sqrt()
        adjusted = risk.detach() + bonus - bonus.min()  # what all share changes nothing, but could overflow
        q = self.q * (self.hparams["groupdro_eta"] * adjusted).exp()
        self.q = q / q.sum()
        loss = (risk * self.q).sum()
        self.step(loss)
        return {"loss": loss.item()}

    def _risk(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.predict(x), y) if len(y) else self.q.new_zeros(())  # a mean of none is no number

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Files of DomainBed hold an empty q until the first update.
        if f"{prefix}q" in state_dict and not len(state_dict[f"{prefix}q"]):
            state_dict[f"{prefix}q"] = torch.ones_like(self.q)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_adjustment(adjustment: float, num_domains: int, part_counts: Sequence[int]) -> None:
    if not 0 <= adjustment < math.inf:
        raise ValueError(f"hparam groupdro_adjustment is {adjustment}: give C, a number of at least 0")
    if adjustment and (len(part_counts) != num_domains or min(part_counts) < 1):
        raise ValueError(
            f"hparam groupdro_adjustment {adjustment} needs the number of training images behind each of the "
            f"{num_domains} minibatches, all above 0; known are {list(part_counts)}: build with from_task, whose task "
            "has part_counts, or give 0"
        )
