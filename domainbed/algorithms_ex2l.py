"""eX2L: keep a label network's eyes off what a confounder network looks at; one row per similarity."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import networks, similarities
from domainbed.algorithms.base import (
    Algorithm,
    Minibatches,
    Task,
    concatenate,
    learning_rate,
    register,
    weight_decay,
)
from domainbed.attribution import POLICIES, capture, grad_cam, target_logit


def _network(input_shape: Sequence[int], n_outputs: int, hparams: dict[str, Any]) -> nn.Sequential:
    featurizer = networks.Featurizer(input_shape, hparams)
    if not hasattr(featurizer, "map_layer"):
        raise ValueError(
            f"{type(featurizer).__name__} has no feature maps (B, C, h, w), which Grad-CAM needs; "
            "take a convolutional network, a ViT or a Swin (docs/backbones.md)"
        )
    return nn.Sequential(
        featurizer, networks.Classifier(featurizer.n_outputs, n_outputs, hparams["nonlinear_classifier"])
    )


def explain(network: nn.Sequential, x: Tensor, target: Tensor, policy: str) -> tuple[Tensor, Tensor]:
    """Logits, and Grad-CAM of the target class, from one forward pass.

    Args:
        network: featurizer and classifier; the featurizer's ``map_layer`` is the layer that is explained.
        x: (B, C, H, W).
        target: (B,) int64, the class whose logit is explained.
        policy: what a loss on the heatmaps can change (see ``grad_cam``).

    Returns:
        Logits (B, K) and heatmaps (B, h, w), float32, non-negative.
    """
    featurizer: Any = network[0]
    with capture(featurizer.map_layer) as seen:
        logits = network(x)
    return logits, grad_cam(seen.maps, target_logit(logits, target), policy=policy)


def confounders(minibatches: Minibatches) -> Tensor:
    """All confounder labels c of a step, in the minibatches' order; (sum of B,) int64 in [0, V).

    Raises:
        ValueError: a minibatch carries none.
    """
    labels: list[Any] = [getattr(minibatch, "c", None) for minibatch in minibatches]
    if any(c is None for c in labels):
        raise ValueError(
            "eX2L got minibatches (x, y) without confounder labels; draw them with the package's own loaders, "
            "whose minibatches carry `.c`"
        )
    return torch.cat(labels)


class EX2L(Algorithm):
    """Two classifiers, and a price on looking at the same pixels; a row names the similarity s.

    ``L = CE(f(x), y) + lambda_1 CE(g(x), c) + lambda_2 mean_i s(H^Y_i, H^C_i)``

    f is the label network (K logits), g the confounder network (V logits), both with a featurizer of their own.
    H^Y_i (h, w) is Grad-CAM of logit y_i of f on image i, H^C_i that of logit c_i of g: with the maps A (C, h, w)
    of the featurizer's ``map_layer`` and Z = h w pixels, ``H = ReLU(sum_k w_k A_k)``,
    ``w_k = (1 / Z) sum_p d logit / d A_kp``. One forward of each network, one backward of the sum, one Adam step
    of each. Only f predicts.

    Source: Medina, Minoza, Ibanez 2026, "eXplaining to Learn (eX2L): Regularization Using Contrastive Visual
    Explanation Pairs for Distribution Shifts", https://arxiv.org/abs/2605.06368, equations 2 to 4.

    Differs (docs/ex2l.md has the reasons at length):
        The paper calls the heatmap detached, with which lambda_2 would have no effect at all. Here the weights w
        are constants and the maps A are live: no second derivatives, yet a penalty that trains both networks.
        Heatmaps are put on a common scale before they are compared, for s must not fall by scaling one of them.
        Images with an all-zero heatmap are left out of the mean: where a network looks is not defined for them.
        lambda_2 is .3 and drawn from 10^U(-2, 1), not 10^U(-1, 2): at 1 most of our first runs collapsed.
        Adam in place of SGD, since the learning rates of the paper are those of DomainBed, tuned for Adam.

    Hparams:
        lambda_1: weight of the confounder network's risk.
        lambda_2: weight of the similarity.
        lr_l, lr_c: learning rates of the label and of the confounder network.
        wd_l, wd_c: their weight decays (the shared lr and weight_decay are not read).
        map_gradient: what the similarity trains: "constant" (A), "full" (A and w), "none" (nothing: the control).
    """

    PARTITION = "group"
    NEEDS_CONFOUNDERS = True
    SIMILARITY: ClassVar[str]
    HPARAMS = {
        "lambda_1": (1.0, lambda r: 10 ** r.uniform(-1, 2)),
        "lambda_2": (0.3, lambda r: 10 ** r.uniform(-2, 1)),
        "lr_l": learning_rate,
        "lr_c": learning_rate,
        "wd_l": weight_decay,
        "wd_c": weight_decay,
        "map_gradient": ("constant", lambda r: "constant"),
    }

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        num_domains: int,
        hparams: dict[str, Any],
        num_confounders: int | None = None,
    ):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if num_confounders is None or num_confounders < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least 2 confounder values, got num_confounders={num_confounders}; "
                "take a dataset with confounder labels and build with from_task, which passes their number on"
            )
        if hparams["map_gradient"] not in POLICIES:
            raise ValueError(f"map_gradient {hparams['map_gradient']!r} is unknown; take one of {', '.join(POLICIES)}")
        self.similarity = similarities.REGISTRY[self.SIMILARITY]

        self.network = _network(input_shape, num_classes, hparams)
        self.featurizer, self.classifier = self.network
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=hparams["lr_l"], weight_decay=hparams["wd_l"])
        self.confounder_network = _network(input_shape, num_confounders, hparams)
        self.confounder_featurizer, self.confounder_classifier = self.confounder_network
        self.confounder_optimizer = torch.optim.Adam(
            self.confounder_network.parameters(), lr=hparams["lr_c"], weight_decay=hparams["wd_c"]
        )

    @classmethod
    def from_task(cls, task: Task, hparams: dict[str, Any]) -> "EX2L":
        return cls(task.input_shape, task.num_classes, task.num_domains, hparams, task.num_confounders)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        c = confounders(minibatches)
        policy = self.hparams["map_gradient"]
        label_logits, label_maps = explain(self.network, x, y, policy)
        confounder_logits, confounder_maps = explain(self.confounder_network, x, c, policy)

        label_loss = F.cross_entropy(label_logits, y)
        confounder_loss = F.cross_entropy(confounder_logits, c)
        similarity, dead = self.mean_similarity(label_maps, confounder_maps)
        loss = label_loss + self.hparams["lambda_1"] * confounder_loss + self.hparams["lambda_2"] * similarity

        self.optimizer.zero_grad()
        self.confounder_optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.confounder_optimizer.step()
        return {
            "loss": loss.item(),
            "label_loss": label_loss.item(),
            "confounder_loss": confounder_loss.item(),
            "similarity": similarity.item(),
            "dead_maps": dead.item(),
            "confounder_acc": (confounder_logits.argmax(1) == c).float().mean().item(),
        }

    def mean_similarity(self, label_maps: Tensor, confounder_maps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of s over the images with two live heatmaps (0 if there are none), and the fraction without."""
        alive = (label_maps.amax(dim=(1, 2)) > 0) & (confounder_maps.amax(dim=(1, 2)) > 0)  # (B,)
        scores = self.similarity(label_maps, confounder_maps)
        return (scores * alive).sum() / alive.sum().clamp_min(1), 1 - alive.float().mean()

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)

    def predict_confounder(self, x: Tensor) -> Tensor:
        """Confounder logits (B, V) of images x (B, C, H, W)."""
        return self.confounder_network(x)


@register
class EX2L_MAE(EX2L):
    """eX2L with ``s = -mean_p |H^Y_p - H^C_p|``, maps divided by their maximum.

    Source: eX2L, equation 19; the paper's best row on Spawrious M2M-Hard.
    """

    SIMILARITY = "mae"
    HPARAMS = {}


@register
class EX2L_Cosine(EX2L):
    """eX2L with the cosine of the angle between the two maps.

    Source: eX2L, equation 26.
    """

    SIMILARITY = "cosine"
    HPARAMS = {}


@register
class EX2L_SoftDice(EX2L):
    """eX2L with ``s = 2 sum_p H^Y_p H^C_p / sum_p (H^Y_p + H^C_p)``, maps divided by their maximum.

    Source: eX2L, equation 34.
    """

    SIMILARITY = "soft_dice"
    HPARAMS = {}


@register
class EX2L_JSDistance(EX2L):
    """eX2L with the negative Jensen-Shannon distance of the maps as distributions over pixels.

    Source: eX2L, equations 24 and 25.
    """

    SIMILARITY = "js_distance"
    HPARAMS = {}


@register
class EX2L_SSIM(EX2L):
    """eX2L with the structural similarity of the whole maps, divided by their maximum.

    Source: eX2L, equations 28 to 33.
    """

    SIMILARITY = "ssim"
    HPARAMS = {}
