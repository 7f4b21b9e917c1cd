"""Right for the right reasons: a price on depending on what should not matter."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, confounders, masks, register
from domainbed.algorithms.erm import ERM
from domainbed.algorithms.explained import check_not_negative
from domainbed.algorithms.two_networks import TwoNetworks, accuracy, annotated, mean, risk, watched
from domainbed.attribution import differentiable
from domainbed.similarities import normalise


def input_gradient_penalty(
    logits: Tensor, x: Tensor, forbidden: Tensor, trained: bool, rows: Any = slice(None)
) -> Tensor:
    """``mean_icp (A_ip d/dx_icp sum_k log p_ik)^2``: how much predictions depend on forbidden pixels.

    All images share one backward pass, that of the sum over the images: where they meet in a batch norm in training
    mode, an image's gradient holds what it does to the others.

    Args:
        logits: (B, K) of x; (B, 1) is a binary classifier with one logit.
        x: images (B, C, H, W), the leaf of the graph.
        forbidden: A, (n, H, W) in [0, 1], a constant.
        trained: the penalty is differentiable; else it is a number. The graph of the logits is kept in any case.
        rows: index of the n images that pay.

    Returns:
        Scalar mean over these images i, channels c and all pixels p, also those where A is 0; 0 without an image;
        float32 also under autocast.
    """
    if logits.shape[1] == 1:
        logits = F.pad(logits, (1, 0))  # sigmoid(z) is the softmax of (0, z)
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    (gradient,) = torch.autograd.grad(log_p.sum(), x, create_graph=trained, retain_graph=True)
    return mean((forbidden[:, None] * gradient[rows]).square())


@register
class RRR(ERM):
    """ERM with a price on the input gradient where masks say that nothing should matter.

    ``L = CE(f(x), y) + rrr_lambda mean_icp (A_ip d/dx_icp sum_k log p_k(x_i))^2``

    A = 1 - mask, (B, H, W) in [0, 1]: 1 where a pixel p should not matter. The mean is over images, channels and all
    pixels. The gradient is of the sum of all K log-probabilities and is itself differentiated; it belongs to the
    training pass whose logits have the cross-entropy, so that no pass is added. Where the prediction is uniform it is
    0, whatever the network looks at: the price begins as it starts to learn.

    Source: Ross, Hughes and Doshi-Velez 2017, Right for the Right Reasons: Training Differentiable Models by
        Constraining their Explanations, IJCAI, https://arxiv.org/abs/1703.03717.
    Differs: means in place of sums: over images in both terms, which only scales the loss, and over the C H W values of
        an image in the penalty, so that a rrr_lambda suits more than one size of image. The published code has a factor
        1/2 besides, which the paper and this class have not: ``rrr_lambda = l2_grads C H W / 2``. Its l2_grads of 1000,
        for pixels of 0 to 255, is a rrr_lambda of 6 for 28 x 28 pixels of 0 to 1. Weight decay is the optimizer's.

    Hparams:
        rrr_lambda: weight of the penalty, not negative. Its unit is that of squared pixel values: it depends on how
            images are normalised. With 100 the penalty grows to the size of the risk in the first hundred updates of
            a small CNN on 3 x 36 x 36 pixels in [0, 1] (default and range: ours).
    """

    NEEDS_MASKS = True
    HPARAMS = {"rrr_lambda": (100.0, lambda r: 10 ** r.uniform(-1, 3))}
    CONTROL = {"rrr_lambda": 0.0}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        check_not_negative(hparams, "rrr_lambda")

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        x, weight = x.detach().requires_grad_(), self.hparams["rrr_lambda"]
        with differentiable("full" if weight else "constant"):
            logits = self.predict(x)
        nll = F.cross_entropy(logits, y)
        penalty = input_gradient_penalty(logits, x, 1 - masks(minibatches), trained=weight > 0)
        loss = nll + weight * penalty
        self.step(loss)
        return {"loss": loss.item(), "risk": nll.item(), "penalty": penalty.item()}


@register
class RRR_Confounder(TwoNetworks):
    """RRR without masks: nothing should matter where a network that knows the confounder looks for it.

    ``L = CE(f(x), y) + lambda_1 CE(g(x), c) + rrr_lambda P``, P the penalty of ``RRR`` on the label network f with
    ``A_ip = [H^C_ip > rrr_threshold max_p H^C_ip]``, where H^C_i is Grad-CAM of the true confounder by the confounder
    network g, enlarged to the image's size (bilinear) before its maximum is taken. A is a constant, and 0 for an image
    whose heatmap is all zero. Where label and confounder share pixels, A covers the object, too. Images whose
    confounder the annotation budget hides count for the risk of f alone: the other two terms are means over the
    annotated images of a step, 0 without any.

    Source: the penalty is that of Ross, Hughes and Doshi-Velez 2017, https://arxiv.org/abs/1703.03717; confounder
        labels in place of its masks are ours.
    Differs: see ``RRR`` for the penalty's scale.

    Hparams:
        lr_l and the others of ``TwoNetworks``.
        lambda_1: weight of the confounder network's risk, not negative.
        rrr_lambda: weight of the penalty, not negative.
        rrr_threshold: fraction in [0, 1) of the heatmap's maximum above which a pixel should not matter.
        map_gradient: "none" only, since the heatmaps are constants.
    """

    PARTITION = "group"
    TAKES_HIDDEN = True
    HPARAMS = {
        "lambda_1": (1.0, lambda r: 10 ** r.uniform(-1, 2)),
        "rrr_lambda": (100.0, lambda r: 10 ** r.uniform(-1, 3)),
        "rrr_threshold": (0.5, lambda r: r.uniform(0.2, 0.8)),
        "map_gradient": ("none", lambda r: "none"),
    }
    CHOICES = {**TwoNetworks.CHOICES, "map_gradient": ("none",)}
    CONTROL = {"rrr_lambda": 0.0}

    def __init__(self, *task: Any, **options: Any):
        super().__init__(*task, **options)
        check_not_negative(self.hparams, "lambda_1", "rrr_lambda")
        if not 0 <= self.hparams["rrr_threshold"] < 1:
            raise ValueError(f"rrr_threshold {self.hparams['rrr_threshold']}: give a fraction of the maximum in [0, 1)")

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        x, c, weight = x.detach().requires_grad_(), confounders(minibatches), self.hparams["rrr_lambda"]
        with differentiable("full" if weight else "none"):
            (label_logits, label_maps), (confounder_logits, confounder_maps) = self.explain(x, y, c)
        known = annotated(c)
        c, confounder_logits, confounder_maps = c[known], confounder_logits[known], confounder_maps[known]
        forbidden = self.forbidden(confounder_maps, x.shape[2:])
        label_loss, confounder_loss = risk(label_logits, y), risk(confounder_logits, c)
        penalty = input_gradient_penalty(label_logits, x, forbidden, weight > 0, known)
        loss = label_loss + self.hparams["lambda_1"] * confounder_loss + weight * penalty
        self.step(loss)
        return {
            "loss": loss.item(),
            "label_loss": label_loss.item(),
            "confounder_loss": confounder_loss.item(),
            "confounder_acc": accuracy(confounder_logits, c),
            "penalty": penalty.item(),
            "forbidden_share": mean(forbidden).item(),
            **watched(label_maps[known], confounder_maps),
        }

    def forbidden(self, heatmaps: Tensor, size: Sequence[int]) -> Tensor:
        """A: (B, H, W) of 0 and 1, where heatmaps (B, h, w) of the confounder network are high; a constant."""
        enlarged = F.interpolate(heatmaps.detach()[:, None], size=tuple(size), mode="bilinear")[:, 0]
        return (normalise(enlarged, "max") > self.hparams["rrr_threshold"]).to(heatmaps.dtype)
