"""Classes as users write them, for the kill test: all kinds of state, and images that loader processes open."""

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import register as register_algorithm
from domainbed.algorithms.erm import ERM
from domainbed.datasets.base import InMemoryEnvironment, MultipleDomainDataset
from domainbed.datasets.base import register as register_dataset


@register_algorithm
class KeepsMuch(ERM):
    """An inner loop on a clone, and state of every kind that a method may gather.

    Source: none, made for the kill test.
    """

    HPARAMS = {}

    seen: Tensor

    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.teacher = copy.deepcopy(self.network)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=5, gamma=0.7)
        self.register_buffer("seen", torch.zeros(0))  # grows
        self.last_losses: deque[float] = deque(maxlen=3)
        self.own, self.old = np.random.default_rng(7), np.random.RandomState(8)
        self.torchs, self.pythons = torch.Generator().manual_seed(9), random.Random(10)
        self.lowest: float | None = None
        self.held_out: dict[int, int] = {}

    def _noise(self) -> Tensor:
        """One number from each kind of generator."""
        own = [self.own.normal(), self.old.normal(), self.pythons.gauss(0, 1), random.gauss(0, 1), np.random.normal()]
        return torch.cat([torch.tensor(own), torch.randn(1), torch.randn(1, generator=self.torchs)]).sum()

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        order = self.own.permutation(len(minibatches))
        inner = copy.deepcopy(self.network)
        inner_optimizer = torch.optim.SGD(inner.parameters(), 0.01, momentum=0.9)
        for i in order[1:]:
            x, y = minibatches[i]
            inner_optimizer.zero_grad()
            F.cross_entropy(inner(x + 0.01 * self._noise()), y).backward()
            inner_optimizer.step()
        x, y = minibatches[order[0]]
        loss = F.cross_entropy(inner(x), y)
        gradients = torch.autograd.grad(loss, list(inner.parameters()))
        scale = 1 + 0.1 * float(np.mean(self.last_losses or [0.0])) + 0.01 * len(self.seen)
        for parameter, gradient in zip(self.network.parameters(), gradients, strict=True):
            parameter.grad = scale * gradient if parameter.grad is None else 0.5 * parameter.grad + scale * gradient
        self.optimizer.step()  # its gradients stay, as momentum of our own
        self.schedule.step()
        return self._remember(int(order[0]), loss.detach())

    def _remember(self, held_out: int, loss: Tensor) -> dict[str, float]:
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
                old.lerp_(new, 0.1)
        self.seen = torch.cat([self.seen, loss[None]])
        self.last_losses.append(loss.item())
        self.lowest = loss.item() if self.lowest is None else min(self.lowest, loss.item())
        self.held_out[held_out] = self.held_out.get(held_out, 0) + 1
        return {"loss": loss.item(), "lowest": self.lowest, "held_out_0": self.held_out.get(0, 0)}

    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.teacher(x)
        return logits


@register_algorithm
class MakesLate(ERM):
    """Its second optimizer is made in the third update: nothing can be poured into that, so it starts over.

    Source: none, made for the kill test.
    """

    HPARAMS = {}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.updates = 0
        self.late: torch.optim.Optimizer | None = None

    def step(self, loss: Tensor) -> None:
        self.updates += 1
        if self.updates == 3:
            self.late = torch.optim.SGD(self.network.parameters(), 0.01, momentum=0.9)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.late is not None:
            self.late.step()


@register_dataset
class FewImages(MultipleDomainDataset):
    """Forty noisy images in each of three environments; label and confounder each show in a channel's brightness.

    Source: none, random. Licence: none needed. Layout: no files.
    """

    ENVIRONMENTS = ("0", "1", "2")
    CONFOUNDERS = ("even", "odd")
    HPARAMS_SIZE = "small"
    HAS_MASKS = True
    ENVIRONMENT: Any = InMemoryEnvironment

    def __init__(self, root: str | None, test_envs: Any, hparams: dict[str, Any]):
        self.input_shape, self.num_classes = (3, 28, 28), 2
        self.datasets = [self._environment(40) for _ in self.ENVIRONMENTS]

    def _environment(self, n: int) -> Any:
        x, y, c = torch.randn(n, *self.input_shape), torch.randint(0, 2, (n,)), torch.arange(n) % 2
        x[:, 0] += 0.2 * y[:, None, None]
        x[:, 1] += 0.3 * c[:, None, None]
        environment = self.ENVIRONMENT(x, y, c)
        environment.masks = np.arange(28) < np.full((n, 28, 1), 14)
        return environment


class _Opened:
    """Images that are opened one by one and augmented from the global generators."""

    def __init__(self, x: Tensor, y: Tensor, c: Tensor):
        self.x, self.y, self.c = x, y.numpy(), c.numpy()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        noise = random.gauss(0, 1) + float(np.random.normal()) + torch.randn(1)
        return self.x[key] + 0.5 * noise, int(self.y[key])


@register_dataset
class OpenedImages(FewImages):
    """The same, opened by two loader processes where there are two cores.

    Source: none, random. Licence: none needed. Layout: no files.
    """

    N_WORKERS = 2
    ENVIRONMENT = _Opened


@register_dataset
class OpenedHere(OpenedImages):
    """The same, opened without loader processes.

    Source: none, random. Licence: none needed. Layout: no files.
    """

    N_WORKERS = 0
