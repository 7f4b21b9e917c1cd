"""Gradient matching by steps on one minibatch after another."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed import networks
from domainbed.algorithms.base import Algorithm, Minibatches, descend, make_optimizer, register
from domainbed.lib.misc import ParamDict


@register
class Fish(Algorithm):
    """Moves the network towards where an inner copy gets by one step per minibatch: ``w + meta_lr * (inner - w)``.

    The steps follow one another, so in expectation they also raise the inner product of the minibatches' gradients;
    a step on all minibatches at once does not. ``optimizer_inner`` keeps its moments from update to update.

    Attributes: ``network`` (a ``networks.WholeFish``), its copy ``network_inner``, ``optimizer_inner``; ``optimizer``,
    over ``network``, takes no step and stands here for those who look for it. The reported ``loss`` is the last
    minibatch's.

    Source: Yuge Shi, Jeffrey Seely, Philip H. S. Torr, N. Siddharth, Awni Hannun, Nicolas Usunier and Gabriel Synnaeve,
        Gradient Matching for Domain Generalization, ICLR 2022, https://arxiv.org/abs/2104.09937, Algorithm 1.
    Differs: the minibatches come in their own order, where the source shuffles them, and there is no warm-up with ERM,
        as in DomainBed. There the inner network is built anew in every update (which also draws random numbers) and
        is missing from a fresh instance, so that a saved model does not load; here it is there from the start.

    Hparams:
        meta_lr: share of the way to the inner copy, above 0; at 1 the network takes its place.
    """

    HPARAMS = {"meta_lr": (0.5, lambda r: r.choice([0.05, 0.1, 0.5]))}
    MIN_PARTS = 2

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not hparams["meta_lr"] > 0:
            raise ValueError(f"hparam meta_lr is {hparams['meta_lr']}; give a number above 0, else nothing is learned")
        self.input_shape, self.num_classes = input_shape, num_classes
        self.network = networks.WholeFish(input_shape, num_classes, hparams)
        self.network_inner = copy.deepcopy(self.network)
        self.optimizer = self._new_optimizer(self.network)
        self.optimizer_inner = self._new_optimizer(self.network_inner)

    def _new_optimizer(self, network: networks.WholeFish) -> torch.optim.Optimizer:
        return make_optimizer(network.parameters(), self.hparams["lr"], self.hparams["weight_decay"], self.hparams)

    def create_clone(self, device: torch.device) -> None:
        """Makes the inner network equal to the network, on the device; its optimizer keeps its moments."""
        self.network_inner.to(device).reset_weights(self.network.state_dict())

    def fish(self, meta_weights: Mapping[str, Any], inner_weights: Mapping[str, Any], lr_meta: float) -> ParamDict:
        """State dict of the network, moved by the share lr_meta from meta_weights to inner_weights."""
        meta = ParamDict(meta_weights)
        return meta + lr_meta * (ParamDict(inner_weights) - meta)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        self.create_clone(minibatches[0][0].device)
        for x, y in minibatches:
            loss = F.cross_entropy(self.network_inner(x), y)
            descend(loss, self.optimizer_inner)
        moved = self.fish(self.network.state_dict(), self.network_inner.state_dict(), self.hparams["meta_lr"])
        self.network.reset_weights(moved)
        return {"loss": loss.item()}

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Files that DomainBed wrote without an update hold no inner network.
        inner, own = f"{prefix}network_inner.", f"{prefix}network."
        if not any(name.startswith(inner) for name in state_dict):
            state_dict |= {
                inner + name[len(own) :]: value for name, value in [*state_dict.items()] if name.startswith(own)
            }
        super()._load_from_state_dict(state_dict, prefix, *args)
