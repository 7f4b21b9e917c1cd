"""The optimizer LARS: each layer's step is as long as its weights allow."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum in which every weight matrix or kernel w has a learning rate of its own.

    With the gradient d = g + weight_decay * w, the local rate is trust_coefficient * ||w|| / ||d||, and 1 where one of
    the norms is 0; then m <- momentum * m + rate * d, w <- w - lr * m. Biases and scales (one dimension or none) take
    m <- momentum * m + g: no decay, no local rate.

    Source: Yang You, Igor Gitman and Boris Ginsburg, Large Batch Training of Convolutional Networks, 2017,
        https://arxiv.org/abs/1708.03888, Algorithm 1.
    Differs: the norm in the denominator is that of the sum d, not the sum of the norms; the rate stands inside the
        momentum and lr outside, so that a new lr counts at once; biases and scales are left out. As in DomainBed.

    Args:
        params: what is trained.
        lr: global learning rate.
        weight_decay: of weights with two dimensions or more.
        momentum: share of m that stays.
        trust_coefficient: length of a step as a share of the weights' own.

    Raises:
        ValueError: one of the numbers is negative.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ):
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        settings |= {"trust_coefficient": trust_coefficient}
        if negative := {name: value for name, value in settings.items() if not value >= 0}:
            raise ValueError(f"LARS takes no negative numbers, got {negative}")
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure``, where given, computes the loss (and its gradients) that is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        direction = parameter.grad
        assert direction is not None
        if parameter.ndim > 1:
            direction = direction + group["weight_decay"] * parameter
            direction = direction * _local_rate(parameter, direction, group["trust_coefficient"])
        state = self.state[parameter]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(parameter)
        state["mu"].mul_(group["momentum"]).add_(direction)
        parameter.sub_(group["lr"] * state["mu"])


def _local_rate(weights: Tensor, direction: Tensor, trust_coefficient: float) -> Tensor:
    weight_norm, norm = torch.linalg.vector_norm(weights), torch.linalg.vector_norm(direction)
    known = (weight_norm > 0) & (norm > 0)
    return torch.where(known, trust_coefficient * weight_norm / norm, 1.0)
