"""eX2L: keep a label network's eyes off what a confounder network looks at; one row per similarity."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    confounders,
    learning_rate,
    make_optimizer,
    register,
    weight_decay,
)
from domainbed.attribution import METHODS, POLICIES, differentiable, heatmaps
from domainbed.branches import Branch, trunk_output
from domainbed.feature_maps import capture, check_maps, has_active_dropout, has_linear_head
from domainbed.lib.misc import predicted_labels


def _featurizer(input_shape: Sequence[int], hparams: dict[str, Any]) -> Any:
    featurizer = networks.Featurizer(input_shape, hparams)
    if not hasattr(featurizer, "map_layer"):
        raise ValueError(
            f"{type(featurizer).__name__} has no feature maps (B, C, h, w), which Grad-CAM needs; "
            "take a convolutional network, a ViT or a Swin (docs/backbones.md)"
        )
    if hparams["map_layer"]:
        check_maps(featurizer, hparams["map_layer"], input_shape)
    return featurizer


def risk(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, nats, of logits (B, K); of one logit (B, 1), which speaks for class 1, too."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits.dtype))
    return F.cross_entropy(logits, target)


class TwoNetworks(Algorithm):
    """A label network f and a confounder network g that can say where they look; what trains them is the subclass's.

    Hparams:
        lr_l, lr_c: learning rates of the label and of the confounder network.
        wd_l, wd_c: their weight decays (the shared lr and weight_decay are not read).
        shared_from: "" for two networks; "classifier" for one featurizer with two classifiers; or the name of the
            featurizer's first module that the two do not share. What is shared is trained with lr_l.
        one_logit: a network with two outputs has a single logit instead.
        map_gradient: what a loss on the heatmaps trains: "constant" (the maps A), "full" (A and their weights w),
            "none" (nothing).
        map_target: explain the "true" label and confounder, or the "predicted" ones.
        map_layer: module of the featurizer whose output is explained; "" is its ``map_layer``.
        map_relu: keep only what speaks for the target.
        map_method: a name in ``attribution.METHODS``.
    """

    NEEDS_CONFOUNDERS = True
    UNREAD_HPARAMS = ("lr", "weight_decay")
    HPARAMS = {
        "lr_l": learning_rate,
        "lr_c": learning_rate,
        "wd_l": weight_decay,
        "wd_c": weight_decay,
        "shared_from": ("", lambda r: ""),
        "one_logit": (False, lambda r: False),
        "map_gradient": ("constant", lambda r: "constant"),
        "map_target": ("true", lambda r: "true"),
        "map_layer": ("", lambda r: ""),
        "map_relu": (True, lambda r: True),
        "map_method": ("grad_cam", lambda r: "grad_cam"),
    }
    CHOICES: ClassVar[Mapping[str, Any]] = {
        "map_gradient": POLICIES,
        "map_target": ("true", "predicted"),
        "map_method": METHODS,
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
        self._check_hparams(num_classes, num_confounders)
        self.featurizer = _featurizer(input_shape, hparams)
        self.classifier = self._classifier(num_classes)
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.confounder_featurizer = self._confounder_featurizer(input_shape)
        self.confounder_classifier = self._classifier(num_confounders)
        self.confounder_network = nn.Sequential(self.confounder_featurizer, self.confounder_classifier)
        own = self.confounder_classifier if self._shares_all() else self.confounder_network
        self.optimizer = make_optimizer(self.network.parameters(), hparams["lr_l"], hparams["wd_l"], hparams)
        self.confounder_optimizer = make_optimizer(own.parameters(), hparams["lr_c"], hparams["wd_c"], hparams)
        self.linear_head = not hparams["map_layer"] and has_linear_head(self.featurizer, self.classifier, input_shape)

    @classmethod
    def from_task(cls, task: Task, hparams: dict[str, Any]) -> "TwoNetworks":
        return cls(task.input_shape, task.num_classes, task.num_domains, hparams, task.num_confounders)

    def _check_hparams(self, num_classes: int, num_confounders: int) -> None:
        for name, choices in self.CHOICES.items():
            if self.hparams[name] not in choices:
                raise ValueError(f"{name} {self.hparams[name]!r} is unknown; take one of {', '.join(choices)}")
        if self.hparams["one_logit"] and 2 not in (num_classes, num_confounders):
            raise ValueError(
                f"one_logit is for two classes or two confounder values; there are {num_classes} and {num_confounders}"
            )

    def _classifier(self, num_values: int) -> nn.Module:
        n_outputs = 1 if num_values == 2 and self.hparams["one_logit"] else num_values
        return networks.Classifier(self.featurizer.n_outputs, n_outputs, self.hparams["nonlinear_classifier"])

    def _shares_all(self) -> bool:
        return self.hparams["shared_from"] == "classifier"

    def _confounder_featurizer(self, input_shape: Sequence[int]) -> Any:
        if self._shares_all():
            return self.featurizer
        if layer := self.hparams["shared_from"]:
            return Branch(self.featurizer, layer, input_shape, self.hparams["map_layer"])
        return _featurizer(input_shape, self.hparams)

    def explain(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Logits and heatmaps (B, h, w) of the label and of the confounder network, for targets y and c (B,)."""
        with differentiable(self.hparams["map_gradient"]):
            with capture(self._map_layer(self.featurizer)) as seen, self._trunk() as trunk:
                features = self.featurizer(x)
            label = self._explained(self.classifier, features, seen.maps, y)
            if not self._shares_all():
                with capture(self._map_layer(self.confounder_featurizer)) as seen:
                    features = self.confounder_featurizer(trunk.value if trunk else x)
            return label, self._explained(self.confounder_classifier, features, seen.maps, c)

    def _map_layer(self, featurizer: Any) -> Any:
        name = self.hparams["map_layer"]
        return featurizer.get_submodule(name) if name and not isinstance(featurizer, Branch) else featurizer.map_layer

    def _trunk(self) -> AbstractContextManager[Any]:
        other = self.confounder_featurizer
        return trunk_output(self.featurizer, other.layer) if isinstance(other, Branch) else nullcontext()

    def _explained(
        self, classifier: nn.Module, features: Tensor, maps: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, hparams = classifier(features), self.hparams
        linear: Any = classifier if self.linear_head and not has_active_dropout(self.featurizer) else None
        wanted = target if hparams["map_target"] == "true" else None
        found = heatmaps(
            maps, logits, wanted, hparams["map_method"], hparams["map_gradient"], hparams["map_relu"], linear
        )
        return logits, found

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)

    def predict_confounder(self, x: Tensor) -> Tensor:
        """Confounder logits (B, V) of images x (B, C, H, W)."""
        featurizer = self.confounder_featurizer
        features = featurizer.full(self.featurizer, x) if isinstance(featurizer, Branch) else featurizer(x)
        return self.confounder_classifier(features)


class EX2L(TwoNetworks):
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
        similarity_gradient: through whose heatmap: "both", "label" or "confounder".
        map_normalisation: "own" (the similarity's), or one of ``similarities.NORMALISATIONS``.
        map_gradient and the others of ``TwoNetworks``.
    """

    PARTITION = "group"
    CONTROL = {"map_gradient": "none"}
    SIMILARITY: ClassVar[str]
    update_count: Tensor
    HPARAMS = {
        "lambda_1": (1.0, lambda r: 10 ** r.uniform(-1, 2)),
        "lambda_2": (0.3, lambda r: 10 ** r.uniform(-2, 1)),
        "lambda_2_ramp": (0, lambda r: 0),
        "similarity_gradient": ("both", lambda r: "both"),
        "map_normalisation": ("own", lambda r: "own"),
    }
    CHOICES = {
        **TwoNetworks.CHOICES,
        "similarity_gradient": ("both", "label", "confounder"),
        "map_normalisation": ("own", *similarities.NORMALISATIONS),
    }

    def __init__(self, *task: Any, **options: Any):
        super().__init__(*task, **options)
        self.similarity = similarities.REGISTRY[self.SIMILARITY]
        chosen = self.hparams["map_normalisation"]
        self.normalisation = self.similarity.normalisation if chosen == "own" else chosen
        self.similarity.check(self.normalisation, self.hparams["map_relu"])
        for name in ("lambda_1", "lambda_2", "lambda_2_ramp"):
            if self.hparams[name] < 0:
                raise ValueError(f"{name} {self.hparams[name]}: must not be negative")
        self.register_buffer("update_count", torch.zeros((), dtype=torch.int64))

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        c = confounders(minibatches)
        (label_logits, label_maps), (confounder_logits, confounder_maps) = self.explain(x, y, c)
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

    def similarity_weight(self) -> float:
        """The weight of the similarity in this update."""
        ramp = self.hparams["lambda_2_ramp"]
        grown = min(1.0, (self.update_count.item() + 1) / ramp) if ramp else 1.0
        return float(grown * self.hparams["lambda_2"])

    def mean_similarity(self, label_maps: Tensor, confounder_maps: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean of s over the images with two live heatmaps (0 if there are none), and what to watch of the maps."""
        values = similarities.describe(label_maps, confounder_maps)
        if self.hparams["similarity_gradient"] == "label":
            confounder_maps = confounder_maps.detach()
        elif self.hparams["similarity_gradient"] == "confounder":
            label_maps = label_maps.detach()
        alive = similarities.is_live(label_maps) & similarities.is_live(confounder_maps)  # (B,)
        scores = self.similarity(label_maps, confounder_maps, self.normalisation)
        mean = (scores * alive).sum() / alive.sum().clamp_min(1)
        return mean, {"similarity": mean.item(), **values}


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
