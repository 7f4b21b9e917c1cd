"""Transfer risk minimisation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import networks
from domainbed.algorithms.base import Algorithm, Minibatches, concatenate, descend, make_optimizer, register

HEAD_STEPS, HEAD_LR = 30, 0.1
TERMS, LARGEST = 10, 10.0  # of the series for the inverse Hessian: most terms after the first, largest entry


@register
class TRM(Algorithm):
    """Asks that the classifier fitted to one minibatch do well on the others: ``risk + mean_Q transfer_Q``.

    Every minibatch Q has a linear head w_Q of its own, which each update fits to it a little more. With the weights
    alpha of the other minibatches P, ``transfer_Q = sum_P alpha_QP risk_P(w_Q) - cos_lambda * <H^-1 g, grad risk_Q>``,
    where g is the gradient of that sum by w_Q and H the Hessian of risk_Q: what a change of the features does to the
    sum by way of w_Q. alpha leans to the worst transfer: ``alpha_QP ~ alpha_QP * exp(groupdro_eta * alpha_QP risk_P)``.
    ``H^-1 g = sum_k (1 - H)^k g``, at most ten terms after the first, and none after an entry beyond 10.

    Attributes: ``featurizer``, ``classifier`` with ``optimizer_f`` and ``optimizer_c``; the heads ``clist`` (plain
    SGD, ``olist``) and ``alpha`` are no part of the state dict.

    Source: Yilun Xu and Tommi Jaakkola, Learning Representations that Support Robust Transfer of Predictors, 2021,
        https://arxiv.org/abs/2110.09940.
    Differs: as DomainBed, ERM comes first, and the classifier is linear whatever nonlinear_classifier says. DomainBed
        overwrites the series' terms while it adds them up, and so gets ``H^-1 g - H g`` in place of ``H^-1 g``; and
        its gradient takes alpha from after the update's change of it, here from before. It needs a GPU, and has one
        more head that is never used; train() and eval() take a mode here as everywhere.

    Hparams:
        cos_lambda: weight of the inner product.
        iters: updates of ERM before the transfer counts.
        groupdro_eta: step size of alpha.
        class_balanced: the shared one; if it is true, each update starts the heads' weights at the classifier's.
    """

    HPARAMS = {
        "cos_lambda": (1e-4, lambda r: 10 ** r.uniform(-5, 0)),
        "iters": (200, lambda r: int(10 ** r.uniform(0, 4))),
        "groupdro_eta": (0.01, lambda r: 10 ** r.uniform(-3, -1)),
    }
    MIN_PARTS = 2
    CONTROL = {"iters": 1000000000}
    UNREAD_HPARAMS = ("nonlinear_classifier",)

    update_count: Tensor
    alpha: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.register_buffer("update_count", torch.tensor([0]))
        self.featurizer = networks.Featurizer(input_shape, hparams)
        width = self.featurizer.n_outputs
        self.classifier = nn.Linear(width, num_classes)
        self.clist = [nn.Linear(width, num_classes) for _ in range(num_domains)]
        sgd = {"optimizer": "sgd", "momentum": 0.0}
        self.olist = [make_optimizer(head.parameters(), HEAD_LR, 0.0, sgd) for head in self.clist]
        self.optimizer_f = self._optimizer(self.featurizer)
        self.optimizer_c = self._optimizer(self.classifier)
        alpha = (1 - torch.eye(num_domains)) / max(num_domains - 1, 1)
        self.register_buffer("alpha", alpha, persistent=False)

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(module.parameters(), self.hparams["lr"], self.hparams["weight_decay"], self.hparams)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TRM":
        for head in self.clist:  # in a plain list, which torch does not look into
            head._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        features = self.featurizer(x)
        nll = F.cross_entropy(self.classifier(features), y)
        transfer = torch.zeros_like(nll)
        if int(self.update_count) >= self.hparams["iters"]:
            sizes = [len(labels) for _, labels in minibatches]
            with torch.autocast(x.device.type, enabled=False):
                features = features.to(self.alpha.dtype)
                transfer = self._transfer_risk(features.split(sizes), y.split(sizes))
        descend(nll + transfer, self.optimizer_f, self.optimizer_c)
        self.update_count += 1
        return {"nll": nll.item(), "trm_loss": transfer.item()}

    def _transfer_risk(self, features: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Mean transfer of the minibatches with features (B, D) and labels (B,); moves the heads and alpha."""
        if self.hparams["class_balanced"]:
            for head in self.clist:
                head.weight.data.copy_(self.classifier.weight.data)
        for head, optimizer, f, y in zip(self.clist, self.olist, features, labels, strict=True):
            for _ in range(HEAD_STEPS):
                descend(F.cross_entropy(head(f.detach()), y), optimizer)
        return torch.stack([self._transfer(q, features, labels) for q in range(len(features))]).mean()

    def _transfer(self, q: int, features: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """``transfer_Q`` of minibatch number q, through which the features have a gradient; moves alpha's row q."""
        weight, bias = self.clist[q].weight.detach(), self.clist[q].bias.detach()
        logits = [F.linear(f, weight, bias) for f in features]
        shares = self.alpha[q].clone()  # 0 at q
        risks = shares * torch.stack([F.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)])
        slopes = [_slope(z, f, y) for z, f, y in zip(logits, features, labels, strict=True)]
        swapped = sum(share * slope.detach() for share, slope in zip(shares, slopes, strict=True))
        direction = _inverse_hessian_product(swapped, logits[q].detach(), features[q].detach())
        self.alpha[q] = (shares.log() + self.hparams["groupdro_eta"] * risks.detach()).softmax(0)
        return risks.sum() - self.hparams["cos_lambda"] * (direction * slopes[q]).sum()

    def predict(self, x: Tensor) -> Tensor:
        return self.classifier(self.featurizer(x))


def _slope(logits: Tensor, features: Tensor, y: Tensor) -> Tensor:
    """Gradient (K, D) of the mean cross-entropy by a linear classifier's weight; logits (B, K), features (B, D)."""
    error = logits.softmax(1) - F.one_hot(y, logits.shape[1])
    return error.T @ features / len(y)


def _inverse_hessian_product(v: Tensor, logits: Tensor, features: Tensor) -> Tensor:
    """``H^-1 v`` (K, D) by its series, H the Hessian of the mean cross-entropy by a linear classifier's weight."""
    p, total = logits.softmax(1), v
    for _ in range(TERMS):
        change = p * (features @ v.T)  # (B, K)
        v = v - (change - p * change.sum(1, keepdim=True)).T @ features / len(features)
        total = total + v
        if total.abs().max() > LARGEST:
            break
    return total
