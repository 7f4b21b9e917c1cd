"""Two classifiers side by side, of the label and of the confounder, that can say where they look."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import networks, similarities
from domainbed.algorithms.base import Algorithm, Task, descend, learning_rate, make_optimizer, weight_decay
from domainbed.algorithms.explained import MAP_HPARAMS, check_choices, map_layer, require_maps
from domainbed.attribution import METHODS, POLICIES, differentiable, heatmaps
from domainbed.branches import Branch, trunk_output
from domainbed.feature_maps import capture, has_active_dropout, has_linear_head
from domainbed.lib.misc import predicted_labels


def risk(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, nats, of logits (B, K); of one logit (B, 1), which speaks for class 1, too; 0 of no image."""
    if not len(target):
        return logits.sum()
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits.dtype))
    return F.cross_entropy(logits, target)


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of right predictions, of logits (B, K) or (B, 1); 0 of no image."""
    return mean((predicted_labels(logits) == target).float()).item()


def mean(values: Tensor) -> Tensor:
    """Scalar; 0 of no value."""
    return values.mean() if values.numel() else values.sum()


def annotated(c: Tensor) -> Any:
    """An index of the rows whose confounder c (B,) is known (not -1); of all of them, one that copies nothing."""
    known = c >= 0
    return slice(None) if bool(known.all()) else known


def watched(label_maps: Tensor, confounder_maps: Tensor) -> dict[str, float]:
    """What ``similarities.describe`` tells of heatmaps (B, h, w); 0 of no image."""
    values = similarities.describe(label_maps, confounder_maps)
    return {name: value if len(label_maps) else 0.0 for name, value in values.items()}


def _check_one_logit(num_classes: int, num_confounders: int) -> None:
    if 2 not in (num_classes, num_confounders):
        raise ValueError(
            f"one_logit is for two classes or two confounder values; there are {num_classes} and {num_confounders}"
        )


class TwoNetworks(Algorithm):
    """A label network f and a confounder network g that can say where they look; what trains them is the subclass's.

    A subclass whose ``update`` leaves images without a confounder (-1) to the label network says ``TAKES_HIDDEN``.

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
        "map_target": ("true", lambda r: "true"),
        **MAP_HPARAMS,
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
        check_choices(hparams, self.CHOICES)
        if hparams["one_logit"]:
            _check_one_logit(num_classes, num_confounders)
        self.featurizer = self._featurizer(input_shape)
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

    def _featurizer(self, input_shape: Sequence[int]) -> Any:
        featurizer = networks.Featurizer(input_shape, self.hparams)
        require_maps(featurizer, input_shape, self.hparams)
        return featurizer

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
        return self._featurizer(input_shape)

    def explain(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Logits and heatmaps (B, h, w) of the label and of the confounder network, for targets y and c (B,).

        Where c is -1, not known, the confounder's heatmap is that of the predicted value.
        """
        with differentiable(self.hparams["map_gradient"]):
            with capture(self._map_layer(self.featurizer)) as seen, self._trunk() as trunk:
                features = self.featurizer(x)
            label = self._explained(self.classifier, features, seen.maps, y)
            if not self._shares_all():
                with capture(self._map_layer(self.confounder_featurizer)) as seen:
                    features = self.confounder_featurizer(trunk.value if trunk else x)
            return label, self._explained(self.confounder_classifier, features, seen.maps, c)

    def _map_layer(self, featurizer: Any) -> Any:
        return featurizer.map_layer if isinstance(featurizer, Branch) else map_layer(featurizer, self.hparams)

    def _trunk(self) -> AbstractContextManager[Any]:
        other = self.confounder_featurizer
        return trunk_output(self.featurizer, other.layer) if isinstance(other, Branch) else nullcontext()

    def _explained(
        self, classifier: nn.Module, features: Tensor, maps: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, hparams = classifier(features), self.hparams
        linear: Any = classifier if self.linear_head and not has_active_dropout(self.featurizer) else None
        known = torch.where(target < 0, predicted_labels(logits), target)
        wanted = known if hparams["map_target"] == "true" else None
        found = heatmaps(
            maps, logits, wanted, hparams["map_method"], hparams["map_gradient"], hparams["map_relu"], linear
        )
        return logits, found

    def step(self, loss: Tensor) -> None:
        """Takes one step of each network's optimizer down the gradient of a scalar loss."""
        descend(loss, self.optimizer, self.confounder_optimizer)

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)

    def predict_confounder(self, x: Tensor) -> Tensor:
        """Confounder logits (B, V) of images x (B, C, H, W)."""
        featurizer = self.confounder_featurizer
        features = featurizer.full(self.featurizer, x) if isinstance(featurizer, Branch) else featurizer(x)
        return self.confounder_classifier(features)
