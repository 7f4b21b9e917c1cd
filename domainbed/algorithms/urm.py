"""Uniformly distributed features."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed.algorithms.base import Minibatches, concatenate, descend, make_optimizer, register
from domainbed.algorithms.erm import ERM

OUTPUTS: dict[str, tuple[type[nn.Module], float]] = {  # activation, and the least value of its uniform noise
    "tanh": (nn.Tanh, -1.0),
    "sigmoid": (nn.Sigmoid, 0.0),
    "relu": (nn.ReLU, 0.0),
}
WIDTH = 100  # units of each hidden layer of the discriminator


def _discriminator_lr(dataset: Any) -> tuple[float, Callable[[Any], float]]:
    if dataset.small:
        return 1e-3, lambda r: 10 ** r.uniform(-5.5, -3.5)
    return 5e-5, lambda r: 10 ** r.uniform(-6, -4.5)


@register
class URM(ERM):
    """Draws the features to a uniform distribution: ``risk + urm_adv_lambda * BCE(D(features), 1)``.

    The discriminator D learns, by a step of its own after the network's, to give 1 to uniform noise and 0 to features:
    ``BCE(D(noise), 1) + urm_adv_lambda * BCE(D(features), 0)``. The featurizer ends in an activation that bounds its
    output to the range of the noise, [-1, 1) or, for sigmoid and relu, [0, 1). The reported ``loss`` is the network's.

    Source: Kiran Krishnamachari, See-Kiong Ng and Chuan-Sheng Foo, Uniformly Distributed Feature Representations for
        Fair and Robust Learning, TMLR 2024, https://openreview.net/forum?id=PgLbS5yp8n.
    Differs: as DomainBed, urm_adv_lambda weighs the features' part of the discriminator's loss too. DomainBed accepts
        the output "identity" and fails in the first update, having no noise for it; here it is refused at once.

    Hparams:
        urm: "adversarial", the only way there is.
        urm_adv_lambda: weight of the discriminator's say, at least 0.
        urm_discriminator_label_smoothing: s in [0, 1]: the discriminator's targets are drawn from [1 - s, 1) for noise
            and from [0, s) for features.
        urm_discriminator_optimizer: "adam" or "sgd"; weight_decay is the shared one.
        urm_discriminator_hidden_layers: of 100 units, besides the first, at least 0.
        urm_generator_output: activation of the features, "tanh", "sigmoid" or "relu"; it stays in ``predict``.
        urm_discriminator_lr: learning rate of the discriminator.
    """

    HPARAMS = {
        "urm": ("adversarial", lambda r: r.choice(["adversarial"])),
        "urm_adv_lambda": (0.1, lambda r: r.uniform(0, 0.2)),
        "urm_discriminator_label_smoothing": (0.0, lambda r: 0.0),
        "urm_discriminator_optimizer": ("adam", lambda r: r.choice(["adam"])),
        "urm_discriminator_hidden_layers": (1, lambda r: int(r.choice([1, 2, 3]))),
        "urm_generator_output": ("tanh", lambda r: r.choice(["tanh", "relu"])),
        "urm_discriminator_lr": _discriminator_lr,
    }
    CONTROL = {"urm_adv_lambda": 0.0}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        _check(hparams)
        if not hasattr(self.featurizer, "activation"):
            raise ValueError(
                f"URM replaces the featurizer's last module, `activation`, and {type(self.featurizer).__name__} has "
                "none; give it one (nn.Identity) that it applies last"
            )
        self.discriminator = _discriminator(self.featurizer.n_outputs, hparams["urm_discriminator_hidden_layers"])
        self.discriminator_opt = make_optimizer(
            self.discriminator.parameters(),
            hparams["urm_discriminator_lr"],
            hparams["weight_decay"],
            {"optimizer": hparams["urm_discriminator_optimizer"]},
        )
        activation, self._least_noise = OUTPUTS[hparams["urm_generator_output"]]
        self.featurizer.activation = activation()

    def return_feats(self, x: Tensor) -> Tensor:
        """Features (B, D), after the activation, of images x."""
        return self.featurizer(x)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        features = self.return_feats(x)
        risk = F.cross_entropy(self.classifier(features), y)
        judged = self.discriminator(features).squeeze(1)
        loss = risk + self.hparams["urm_adv_lambda"] * _bce(judged, torch.ones_like(judged))
        self.step(loss)
        self._train_discriminator(features.detach())
        return {"loss": loss.item()}

    def _train_discriminator(self, features: Tensor) -> None:
        """One step on features (N, D) and as much noise."""
        noise = torch.rand_like(features) * (1 - self._least_noise) + self._least_noise
        of_noise, of_features = self.discriminator(noise).squeeze(1), self.discriminator(features).squeeze(1)
        ones, zeros = self._targets(of_noise)
        loss = _bce(of_noise, ones) + self.hparams["urm_adv_lambda"] * _bce(of_features, zeros)
        descend(loss, self.discriminator_opt)

    def _targets(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Targets (N,) for noise and for features, of the logits' kind."""
        smoothing = self.hparams["urm_discriminator_label_smoothing"]
        if not smoothing:
            return torch.ones_like(logits), torch.zeros_like(logits)
        drawn = [smoothing * torch.rand(len(logits), device=logits.device) for _ in range(2)]
        return (1 - smoothing + drawn[0]).to(logits.dtype), drawn[1].to(logits.dtype)


def _bce(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target)


def _discriminator(width: int, hidden_layers: int) -> nn.Sequential:
    """Features (B, width) -> logits (B, 1); the names are DomainBed's, so that its ``model.pkl`` loads."""
    layers: dict[str, nn.Module] = {"dense1": nn.Linear(width, WIDTH), "act1": nn.LeakyReLU()}
    for i in range(2, hidden_layers + 2):
        layers |= {f"dense{i}": nn.Linear(WIDTH, WIDTH), f"act2{i}": nn.LeakyReLU()}
    network = nn.Sequential()
    for name, layer in {**layers, "output": nn.Linear(WIDTH, 1)}.items():
        network.add_module(name, layer)
    return network


def _check(hparams: dict[str, Any]) -> None:
    """Raises ValueError for the first hparam with a value that is not allowed."""
    allowed = {
        "urm": ["adversarial"],
        "urm_generator_output": [*OUTPUTS],
        "urm_discriminator_optimizer": ["adam", "sgd"],
    }
    for name, values in allowed.items():
        if hparams[name] not in values:
            raise ValueError(f"hparam {name} is {hparams[name]!r}; take {' or '.join(values)}")
    if not 0 <= hparams["urm_discriminator_label_smoothing"] <= 1:
        raise ValueError(
            f"hparam urm_discriminator_label_smoothing is {hparams['urm_discriminator_label_smoothing']}; "
            "give a number from 0 to 1"
        )
    if hparams["urm_discriminator_hidden_layers"] < 0:
        raise ValueError(
            f"hparam urm_discriminator_hidden_layers is {hparams['urm_discriminator_hidden_layers']}; give 0 or more"
        )
