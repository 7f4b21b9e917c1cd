"""ERM++: empirical risk with a first phase for the classifier, averaged weights and a search of the learning rate."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from domainbed.algorithms.base import Minibatches, concatenate, learning_rate, make_optimizer, register
from domainbed.algorithms.erm import ERM
from domainbed.lib.lars import LARS
from domainbed.lib.weight_average import ErmPlusPlusMovingAvg

Schedule = list[list[float]]  # learning rates by checkpoint, each in a list

CHANGES = 3  # of the learning rate; the third one ends the search


def _linear_lr(dataset: Any) -> tuple[float, Callable[[Any], float]]:
    return learning_rate(dataset) if dataset.optimizer == "sgd" else (5e-5, lambda r: 10 ** r.uniform(-5, -3.5))


@register
class ERMPlusPlus(ERM, ErmPlusPlusMovingAvg):
    """Empirical risk, trained well: ``predict`` uses the mean of the weights ``w`` since update 600.

    The first updates train the classifier alone (``linear_optimizer``), the others everything (``optimizer``):
    ``w_sma <- (w_sma * n + w) / (n + 1)``. Where the averaged network has BatchNorm that is not frozen, each step's
    images are passed through it as well, so that its statistics follow. ``scripts.train_autolr`` also chooses the
    learning rate's schedule and the number of steps by validation (``set_lr``), then trains on all images.

    Source: Piotr Teterwak, Kuniaki Saito, Theodoros Tsiligkaridis, Kate Saenko and Bryan A. Plummer, ERM++: An
        Improved Baseline for Domain Generalization, 2023, https://arxiv.org/abs/2304.01973. Stronger initial weights
        and data are not the algorithm's: see the hparam ``backbone``.
    Differs: averaging begins at update 600 whatever the length, the first phase takes linear_steps + 1 updates, as in
        DomainBed. Other than there, ``lars`` works; a schedule may be shorter than a run; the classifier's phase
        computes no other gradients, the averaged network sees a step's images only if something in it depends on that,
        and without gradients.

    Hparams:
        linear_lr: learning rate of the first phase.
        linear_steps: the last update of the first phase, counted from 0; below 0: no such phase.
        lars: true takes LARS in place of the hparam optimizer.
        freeze_bn: BatchNorm keeps its statistics.
    """

    HPARAMS = {"linear_lr": _linear_lr}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.linear_optimizer = self._optimizer(self.classifier, hparams["linear_lr"])
        self.lr_schedule: Schedule = []
        self.lr_schedule_changes = 0
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=1)
        ErmPlusPlusMovingAvg.__init__(self, self.network)

    def new_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer(self.network, self.hparams["lr"])

    def _optimizer(self, module: nn.Module, lr: float) -> torch.optim.Optimizer:
        if not self.hparams["lars"]:
            return make_optimizer(module.parameters(), lr, self.hparams["weight_decay"], self.hparams)
        if named := self.hparams.get("optimizer"):
            raise ValueError(f"hparams lars and optimizer {named!r}: give one of them")
        return LARS(module.parameters(), lr, self.hparams["weight_decay"])

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        loss = F.cross_entropy(self.network(x), y)
        self.step(loss)
        self.update_sma()
        if not self.hparams["freeze_bn"]:
            self._refresh_statistics(x)
        return {"loss": loss.item()}

    def step(self, loss: Tensor) -> None:
        """Takes one step of the phase's optimizer down the gradient of a scalar loss."""
        optimizer = self.linear_optimizer if self._is_linear else self.optimizer
        optimizer.zero_grad()
        loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"] if p.requires_grad])
        optimizer.step()

    @property
    def _is_linear(self) -> bool:
        return self.global_iter <= self.hparams["linear_steps"]

    def _refresh_statistics(self, x: Tensor) -> None:
        """Shows a step's images to the averaged network; dropout too draws its masks, as in DomainBed."""
        self.network_sma.train()
        if any(isinstance(m, _BatchNorm) or (isinstance(m, _DropoutNd) and m.p) for m in self.network_sma.modules()):
            with torch.no_grad():
                self.network_sma(x)

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K) of the averaged network."""
        return self.network_sma.eval()(x)

    @torch.no_grad()
    def set_lr(
        self,
        eval_loaders_iid: Sequence[Iterable[tuple[Tensor, Tensor]]] | None = None,
        schedule: Schedule | None = None,
        device: torch.device | str | None = None,
    ) -> Schedule | None:
        """Sets the learning rate at a checkpoint; in the classifier's phase nothing happens.

        Without a schedule it is searched: it is divided by 10 where the risk of the averaged network on the validation
        loaders did not fall at two checkpoints in a row. The third time is the end.

        Args:
            eval_loaders_iid: of validation images; the mean over a loader's batches, then over loaders, counts.
            schedule: to follow in place of searching: the rates of the checkpoints to come.
            device: where the images shall be; default: where the network is.

        Returns:
            The schedule so far, whose last entry is [0.0] at the end; of a given one what is left; before the end of
            the classifier's phase the given one.

        Raises:
            ValueError: neither loaders nor a schedule.
        """
        if self._is_linear:
            return schedule
        if schedule is not None:
            return self._follow(schedule)
        if not eval_loaders_iid:
            raise ValueError("set_lr got neither validation loaders nor a schedule; give one of them")
        place = next(self.network_sma.parameters()).device if device is None else device
        risks = [_mean(self._risks(loader, place)) for loader in eval_loaders_iid]
        self.scheduler.step(_mean(risks))
        self._note(self.optimizer.param_groups[0]["lr"])
        return self.lr_schedule

    def _follow(self, schedule: Schedule) -> Schedule:
        for (lr,) in schedule[:1]:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        return schedule[1:]

    def _risks(self, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device | str) -> Iterator[float]:
        self.network_sma.eval()
        for x, y in loader:
            yield F.cross_entropy(self.network_sma(x.to(device)), y.to(device)).item()

    def _note(self, lr: float) -> None:
        """Adds a checkpoint's rate to the schedule."""
        self.lr_schedule_changes += bool(self.lr_schedule and self.lr_schedule[-1] != [lr])
        self.lr_schedule.append([lr if self.lr_schedule_changes < CHANGES else 0.0])


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
