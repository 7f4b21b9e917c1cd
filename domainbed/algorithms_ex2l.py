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
from domainbed.lib.misc import predicted_labels


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


def explain(
    network: nn.Sequential, x: Tensor, target: Tensor | None, *, policy: str, layer: str = "", relu: bool = True
) -> tuple[Tensor, Tensor]:
    """Logits, and Grad-CAM of the target class, from one forward pass.

    Args:
        network: featurizer and classifier.
        x: (B, C, H, W).
        target: (B,) int64, the class whose logit is explained; None: the predicted one.
        policy: what a loss on the heatmaps can change (see ``grad_cam``).
        layer: name of the featurizer's module that is explained; "" is its ``map_layer``.
        relu: keep only what speaks for the target.

    Returns:
        Logits (B, K) and heatmaps (B, h, w), float32.
    """
    featurizer: Any = network[0]
    with capture(featurizer.get_submodule(layer) if layer else featurizer.map_layer) as seen:
        logits = network(x)
    score = target_logit(logits, predicted_labels(logits) if target is None else target)
    return logits, grad_cam(seen.maps, score, policy=policy, relu=relu)


def is_live(maps: Tensor) -> Tensor:
    """Which heatmaps (B, h, w) say anything: (B,) bool."""
    return maps.detach().abs().amax(dim=(1, 2)) > 0


def watch(label_maps: Tensor, confounder_maps: Tensor) -> dict[str, float]:
    """What tells how the two networks look, from their heatmaps (B, h, w).

    ``dead_maps`` is the fraction of images with an all-zero map, ``dead_label_maps`` and ``dead_confounder_maps`` by
    network. Of the others: ``map_overlap``, the soft intersection over union of the two maps, and ``label_coverage``
    and ``confounder_coverage``, the mean of a map divided by its maximum.
    """
    with torch.no_grad():
        live = is_live(label_maps), is_live(confounder_maps)
        both = (live[0] & live[1]).float()
        a, b = (similarities.normalise(maps.relu(), "max") for maps in (label_maps, confounder_maps))
        overlap = similarities.soft_iou(a, b)
        number = both.sum().clamp_min(1)
        found = {
            "dead_maps": 1 - both.mean(),
            "dead_label_maps": 1 - live[0].float().mean(),
            "dead_confounder_maps": 1 - live[1].float().mean(),
            "map_overlap": (overlap * both).sum() / number,
            "label_coverage": (a.mean(dim=(1, 2)) * both).sum() / number,
            "confounder_coverage": (b.mean(dim=(1, 2)) * both).sum() / number,
        }
    return {name: value.item() for name, value in found.items()}


def risk(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, nats, of logits (B, K); of one logit (B, 1), which speaks for class 1, too."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits.dtype))
    return F.cross_entropy(logits, target)


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
    ``w_k = (1 / Z) sum_p d logit / d A_kp``. One forward of each network, one backward of the sum, one step of each
    network's optimizer. Only f predicts. docs/ex2l.md has every reading of the paper that the hparams choose among.

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
        lambda_2_ramp: updates in which that weight grows from 0, linearly; 0: it is constant.
        lr_l, lr_c: learning rates of the label and of the confounder network.
        wd_l, wd_c: their weight decays (the shared lr and weight_decay are not read).
        map_gradient: what the similarity trains: "constant" (A), "full" (A and w), "none" (nothing: the control).
        similarity_gradient: through whose heatmap: "both", "label" or "confounder".
        map_normalisation: "own" (the similarity's), or one of ``similarities.NORMALISATIONS``.
        map_target: "true" labels, or "predicted" ones.
        map_layer: module of the featurizer whose output is explained; "" is its ``map_layer``.
        map_relu: keep only what speaks for the target.
        one_logit: a network with two outputs has a single logit instead.
    """

    PARTITION = "group"
    NEEDS_CONFOUNDERS = True
    CONTROL = {"map_gradient": "none"}
    UNREAD_HPARAMS = ("lr", "weight_decay")
    SIMILARITY: ClassVar[str]
    update_count: Tensor
    HPARAMS = {
        "lambda_1": (1.0, lambda r: 10 ** r.uniform(-1, 2)),
        "lambda_2": (0.3, lambda r: 10 ** r.uniform(-2, 1)),
        "lambda_2_ramp": (0, lambda r: 0),
        "lr_l": learning_rate,
        "lr_c": learning_rate,
        "wd_l": weight_decay,
        "wd_c": weight_decay,
        "map_gradient": ("constant", lambda r: "constant"),
        "similarity_gradient": ("both", lambda r: "both"),
        "map_normalisation": ("own", lambda r: "own"),
        "map_target": ("true", lambda r: "true"),
        "map_layer": ("", lambda r: ""),
        "map_relu": (True, lambda r: True),
        "one_logit": (False, lambda r: False),
    }
    CHOICES = {
        "map_gradient": POLICIES,
        "similarity_gradient": ("both", "label", "confounder"),
        "map_normalisation": ("own", *similarities.NORMALISATIONS),
        "map_target": ("true", "predicted"),
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
        self.similarity = similarities.REGISTRY[self.SIMILARITY]
        self._check_readings(num_classes, num_confounders)

        self.network = _network(input_shape, self._outputs(num_classes), hparams)
        self.featurizer, self.classifier = self.network
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=hparams["lr_l"], weight_decay=hparams["wd_l"])
        self.confounder_network = _network(input_shape, self._outputs(num_confounders), hparams)
        self.confounder_featurizer, self.confounder_classifier = self.confounder_network
        self.confounder_optimizer = torch.optim.Adam(
            self.confounder_network.parameters(), lr=hparams["lr_c"], weight_decay=hparams["wd_c"]
        )
        self.register_buffer("update_count", torch.zeros((), dtype=torch.int64))

    def _check_readings(self, num_classes: int, num_confounders: int) -> None:
        for name, choices in self.CHOICES.items():
            if self.hparams[name] not in choices:
                raise ValueError(f"{name} {self.hparams[name]!r} is unknown; take one of {', '.join(choices)}")
        how = self.similarity.normalisation if self.hparams["map_normalisation"] == "own" else None
        if not self.hparams["map_relu"] and (
            not self.similarity.signed or "l1" in (how, self.hparams["map_normalisation"])
        ):
            raise ValueError(
                f"map_relu false: {type(self).__name__} compares maps without negative values; keep the ReLU"
                + (", or set map_normalisation to max" if self.similarity.signed else "")
            )
        if self.hparams["one_logit"] and 2 not in (num_classes, num_confounders):
            raise ValueError(
                f"one_logit is for two classes or two confounder values; there are {num_classes} and {num_confounders}"
            )

    def _outputs(self, num_values: int) -> int:
        return 1 if num_values == 2 and self.hparams["one_logit"] else num_values

    @classmethod
    def from_task(cls, task: Task, hparams: dict[str, Any]) -> "EX2L":
        return cls(task.input_shape, task.num_classes, task.num_domains, hparams, task.num_confounders)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        c = confounders(minibatches)
        label_logits, label_maps = self._explain(self.network, x, y)
        confounder_logits, confounder_maps = self._explain(self.confounder_network, x, c)

        label_loss, confounder_loss = risk(label_logits, y), risk(confounder_logits, c)
        similarity, values = self.mean_similarity(label_maps, confounder_maps)
        loss = label_loss + self.hparams["lambda_1"] * confounder_loss + self.similarity_weight() * similarity

        self.optimizer.zero_grad()
        self.confounder_optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.confounder_optimizer.step()
        self.update_count += 1
        return {
            "loss": loss.item(),
            "label_loss": label_loss.item(),
            "confounder_loss": confounder_loss.item(),
            "confounder_acc": (predicted_labels(confounder_logits) == c).float().mean().item(),
            **values,
        }

    def _explain(self, network: nn.Sequential, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        hparams = self.hparams
        return explain(
            network,
            x,
            target if hparams["map_target"] == "true" else None,
            policy=hparams["map_gradient"],
            layer=hparams["map_layer"],
            relu=hparams["map_relu"],
        )

    def similarity_weight(self) -> float:
        """The weight of the similarity in this update."""
        ramp = self.hparams["lambda_2_ramp"]
        grown = min(1.0, (self.update_count.item() + 1) / ramp) if ramp else 1.0
        return float(grown * self.hparams["lambda_2"])

    def mean_similarity(self, label_maps: Tensor, confounder_maps: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean of s over the images with two live heatmaps (0 if there are none), and what to watch of the maps."""
        values = watch(label_maps, confounder_maps)
        if self.hparams["similarity_gradient"] == "label":
            confounder_maps = confounder_maps.detach()
        elif self.hparams["similarity_gradient"] == "confounder":
            label_maps = label_maps.detach()
        alive = is_live(label_maps) & is_live(confounder_maps)  # (B,)
        how = self.hparams["map_normalisation"]
        scores = self.similarity(label_maps, confounder_maps, None if how == "own" else how)
        mean = (scores * alive).sum() / alive.sum().clamp_min(1)
        return mean, {"similarity": mean.item(), **values}

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
class EX2L_MSE(EX2L):
    """eX2L with ``s = -mean_p (H^Y_p - H^C_p)^2``, maps divided by their maximum.

    Source: eX2L, equation 20.
    """

    SIMILARITY = "mse"
    HPARAMS = {}


@register
class EX2L_RMSE(EX2L):
    """eX2L with the root of the mean squared difference, negative, maps divided by their maximum.

    Source: eX2L, equation 21.
    """

    SIMILARITY = "rmse"
    HPARAMS = {}


@register
class EX2L_SoftIoU(EX2L):
    """eX2L with the soft intersection over union of the maps, divided by their maximum.

    Source: eX2L, equation 22.
    """

    SIMILARITY = "soft_iou"
    HPARAMS = {}


@register
class EX2L_KL(EX2L):
    """eX2L with the negative divergence of the label map from the confounder map, as distributions over pixels.

    Source: eX2L, equation 23.
    """

    SIMILARITY = "kl"
    HPARAMS = {}


@register
class EX2L_JSDivergence(EX2L):
    """eX2L with the negative Jensen-Shannon divergence of the maps as distributions over pixels.

    Source: eX2L, equation 24.
    """

    SIMILARITY = "js_divergence"
    HPARAMS = {}


@register
class EX2L_JSDistance(EX2L):
    """eX2L with the negative Jensen-Shannon distance of the maps as distributions over pixels.

    Source: eX2L, equations 24 and 25.
    """

    SIMILARITY = "js_distance"
    HPARAMS = {}


@register
class EX2L_Cosine(EX2L):
    """eX2L with the cosine of the angle between the two maps.

    Source: eX2L, equation 26.
    """

    SIMILARITY = "cosine"
    HPARAMS = {}


@register
class EX2L_NCC(EX2L):
    """eX2L with the correlation of the two maps over their pixels.

    Source: eX2L, equation 27.
    """

    SIMILARITY = "ncc"
    HPARAMS = {}


@register
class EX2L_SSIM(EX2L):
    """eX2L with the structural similarity of the whole maps, divided by their maximum.

    Source: eX2L, equations 28 to 33.
    """

    SIMILARITY = "ssim"
    HPARAMS = {}


@register
class EX2L_SoftDice(EX2L):
    """eX2L with ``s = 2 sum_p H^Y_p H^C_p / sum_p (H^Y_p + H^C_p)``, maps divided by their maximum.

    Source: eX2L, equation 34.
    """

    SIMILARITY = "soft_dice"
    HPARAMS = {}
