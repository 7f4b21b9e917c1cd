"""Group distributionally robust optimisation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, register
from domainbed.algorithms.erm import ERM


@register
class GroupDRO(ERM):
    """Minimises ``sum_e q_e risk_e``, where q leans to the worst minibatches: ``q_e ~ q_e * exp(eta * risk_e)``.

    What counts as a group is what the partition puts into one minibatch: by environment this is DomainBed's
    GroupDRO, on the ``group`` partition it is the source's, with its balanced sampling.

    Source: Shiori Sagawa, Pang Wei Koh, Tatsunori B. Hashimoto and Percy Liang, Distributionally Robust Neural
        Networks for Group Shifts, ICLR 2020, https://arxiv.org/abs/1911.08731, Algorithm 1.
    Differs: no adjustment for the groups' sizes (the source's C is 0).

    Hparams:
        groupdro_eta: step size of q.
    """

    HPARAMS = {"groupdro_eta": (0.01, lambda r: 10 ** r.uniform(-3, -1))}
    CONTROL = {"groupdro_eta": 0.0}

    q: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.register_buffer("q", torch.ones(num_domains))

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        risk = torch.stack([F.cross_entropy(self.predict(x), y) for x, y in minibatches])  # (E,)
        q = self.q * (self.hparams["groupdro_eta"] * risk.detach()).exp()
        self.q = q / q.sum()
        loss = (risk * self.q).sum()
        self.step(loss)
        return {"loss": loss.item()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Files of DomainBed hold an empty q until the first update.
        if f"{prefix}q" in state_dict and not len(state_dict[f"{prefix}q"]):
            state_dict[f"{prefix}q"] = torch.ones_like(self.q)
        super()._load_from_state_dict(state_dict, prefix, *args)
