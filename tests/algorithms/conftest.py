"""Tiny vector data, and the slow way to train on it: written-out forward pass and Adam, in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from domainbed import algorithms, hparams_registry

NETWORK = {"mlp_width": 4, "mlp_depth": 3, "mlp_dropout": 0.0, "lr": 0.01, "weight_decay": 0.1}


@pytest.fixture
def minibatches() -> list[tuple[Tensor, Tensor]]:
    """Three minibatches of 7, 6 and 5 vectors (5,) of three classes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 5, generator=generator, dtype=torch.float64) + e,
            torch.randint(0, 3, (n,), generator=generator),
        )
        for e, n in enumerate((7, 6, 5))
    ]


@pytest.fixture
def build() -> Callable:
    """``build(name, **overrides)``: the algorithm for three minibatches, in float64, always the same weights."""

    def build(name: str, **overrides):
        hparams = hparams_registry.default_hparams(name, "Debug28") | NETWORK | overrides
        torch.manual_seed(0)
        return algorithms.get_algorithm_class(name)((5,), 3, 3, hparams).double()

    return build


class SlowMLP:
    """A copy of a module's linear layers, applied one after the other with ReLU between."""

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.weights = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]

    def __call__(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights[:-2:2], self.weights[1:-2:2], strict=True):
            x = (x @ weight.T + bias) * (x @ weight.T + bias > 0)
        return x @ self.weights[-2].T + self.weights[-1]

    def assert_equal(self) -> None:
        """The module's weights are those of the copy."""
        for weight, parameter in zip(self.weights, self.module.parameters(), strict=True):
            torch.testing.assert_close(parameter.detach(), weight.detach(), rtol=1e-8, atol=1e-10)


class SlowAdam:
    """Adam (Kingma and Ba 2015, Algorithm 1) with L2 weight decay in the gradient."""

    def __init__(self, weights: Sequence[Tensor], lr: float, weight_decay: float, beta1=0.9, beta2=0.999):
        self.weights, self.lr, self.weight_decay, self.betas = weights, lr, weight_decay, (beta1, beta2)
        self.reset()

    def reset(self) -> None:
        self.t, self.m, self.v = 0, [0.0] * len(self.weights), [0.0] * len(self.weights)

    def descend(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.weights, retain_graph=True)
        self.t += 1
        beta1, beta2 = self.betas
        for i, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            gradient = gradient + self.weight_decay * weight.detach()
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * gradient
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * gradient**2
            mean, variance = self.m[i] / (1 - beta1**self.t), self.v[i] / (1 - beta2**self.t)
            weight.data -= self.lr * mean / (variance**0.5 + 1e-8)


class SlowNetwork:
    """Featurizer, classifier and Adam of an ERM-like algorithm, written out."""

    def __init__(self, algorithm):
        self.featurizer, self.classifier = SlowMLP(algorithm.featurizer), SlowMLP(algorithm.classifier)
        self.adam = SlowAdam([*self.featurizer.weights, *self.classifier.weights], 0.01, 0.1)

    def logits(self, x: Tensor) -> Tensor:
        return self.classifier(self.featurizer(x))

    def risk(self, x: Tensor, y: Tensor) -> Tensor:
        return slow_cross_entropy(self.logits(x), y)

    def assert_equal(self) -> None:
        self.featurizer.assert_equal()
        self.classifier.assert_equal()


def slow_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the images of -log of the softmax at the label."""
    return sum(-(z[k].exp() / z.exp().sum()).log() for z, k in zip(logits, y.tolist(), strict=True)) / len(y)


@pytest.fixture
def slow_network() -> Callable:
    return SlowNetwork


@pytest.fixture
def slow_mlp() -> Callable:
    return SlowMLP


@pytest.fixture
def slow_adam() -> Callable:
    return SlowAdam


@pytest.fixture
def cross_entropy() -> Callable:
    return slow_cross_entropy
