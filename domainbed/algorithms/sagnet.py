"""Style-agnostic networks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import networks
from domainbed.algorithms.base import Algorithm, Minibatches, concatenate, descend, make_optimizer, register


@register
class SagNet(Algorithm):
    """Classifies by content, with styles mixed, from features whose style does not tell the class.

    The style of an image is the mean and the variance of its features, its content what is left when they are
    normalised. Three steps an update, each with draws of its own:
    content: featurizer f and content head c descend the risk of ``c(f(x) with another image's style mixed in)``;
    style: the style head s descends the risk of ``s(f(x) with the content of another image)``;
    adversary: f descends ``sag_w_adv * cross-entropy of s(f(x) with the content of another image)`` to the uniform
    distribution, which is least where the style head finds all classes equally likely.
    ``predict`` is ``c(f(x))``.

    Source: Hyeonseob Nam, HyunJae Lee, Jongchan Park, Wonjun Yoon and Donggeun Yoo, Reducing Domain Gap by Reducing
        Style Bias, CVPR 2021, https://arxiv.org/abs/1910.11645.
    Differs: as DomainBed, style is that of the feature vector after pooling (the source takes each channel's mean and
        variance over the places of an early map), each head is a plain classifier, and the adversary's step trains
        all of f (there the affine parameters of its batch normalisations).

    Hparams:
        sag_w_adv: weight of the adversary's loss.
    """

    HPARAMS = {"sag_w_adv": (0.1, lambda r: 10 ** r.uniform(-2, 1))}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.network_f = networks.Featurizer(input_shape, hparams)
        width, nonlinear = self.network_f.n_outputs, hparams["nonlinear_classifier"]
        self.network_c = networks.Classifier(width, num_classes, nonlinear)
        self.network_s = networks.Classifier(width, num_classes, nonlinear)
        self.optimizer_f = self._optimizer(self.network_f)
        self.optimizer_c = self._optimizer(self.network_c)
        self.optimizer_s = self._optimizer(self.network_s)

    @property
    def featurizer(self) -> Any:
        """Another name of ``network_f``, under which heatmaps and features look for it."""
        return self.network_f

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(module.parameters(), self.hparams["lr"], self.hparams["weight_decay"], self.hparams)

    def forward_c(self, x: Tensor) -> Tensor:
        """Logits (B, K) of the content head, the styles mixed."""
        return self.network_c(self.randomize(self.network_f(x), "style"))

    def forward_s(self, x: Tensor) -> Tensor:
        """Logits (B, K) of the style head, the contents exchanged."""
        return self.network_s(self.randomize(self.network_f(x), "content"))

    def randomize(self, x: Tensor, what: str = "style", eps: float = 1e-5) -> Tensor:
        """Features x (B, D) with the style or the content of others, at random; of maps (B, C, h, w) each channel.

        Args:
            what: "style" mixes each row's mean and variance (over D, unbiased) with another row's, in a share drawn
                from U(0, 1); "content" puts another row's normalised features, taken as constants, in place.
            eps: added to the variances.

        Raises:
            ValueError: ``what`` is something else.
        """
        if what not in ("style", "content"):
            raise ValueError(f"what is {what!r}; take style or content")
        flat = x.flatten(2) if x.dim() > 2 else x
        share = torch.rand(len(x), *[1] * (flat.dim() - 1)).to(x.device)  # drawn on the CPU: equal on all devices
        other = torch.randperm(len(x)).to(x.device)
        variance, mean = torch.var_mean(flat, -1, keepdim=True)
        content = (flat - mean) / (variance + eps).sqrt()
        if what == "style":
            mean = share * mean + (1 - share) * mean[other]
            variance = share * variance + (1 - share) * variance[other]
        else:
            content = content[other].detach()
        return (content * (variance + eps).sqrt() + mean).view(x.shape)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        loss_c = F.cross_entropy(self.forward_c(x), y)
        descend(loss_c, self.optimizer_f, self.optimizer_c)
        loss_s = F.cross_entropy(self.forward_s(x), y)
        descend(loss_s, self.optimizer_s)
        scores = self.forward_s(x)
        uniform = torch.full_like(scores, 1 / scores.shape[1])
        loss_adv = self.hparams["sag_w_adv"] * F.cross_entropy(scores, uniform)
        descend(loss_adv, self.optimizer_f)
        return {"loss_c": loss_c.item(), "loss_s": loss_s.item(), "loss_adv": loss_adv.item()}

    def predict(self, x: Tensor) -> Tensor:
        return self.network_c(self.network_f(x))
