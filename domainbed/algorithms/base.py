"""What every algorithm shares: the contract with the training loop, and the order of the names."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from domainbed.registry import Registry
from domainbed.stages import Stage

if TYPE_CHECKING:
    from domainbed.samples import StageData

DOMAINBED_ORDER = (
    "ERM", "ERMPlusPlus", "Fish", "IRM", "GroupDRO", "Mixup", "MLDG", "CORAL", "MMD", "DANN", "CDANN", "MTL",
    "SagNet", "ARM", "VREx", "RSC", "SD", "ANDMask", "SANDMask", "IGA", "SelfReg", "Fishr", "TRM", "IB_ERM",
    "IB_IRM", "CAD", "CondCAD", "Transfer", "CausIRL_CORAL", "CausIRL_MMD", "EQRM", "RDM", "ADRMX", "URM",
)  # fmt: skip
OWN_ORDER = (
    "EX2L_MAE", "EX2L_MSE", "EX2L_RMSE", "EX2L_SoftIoU", "EX2L_KL", "EX2L_JSDivergence", "EX2L_JSDistance",
    "EX2L_Cosine", "EX2L_NCC", "EX2L_SSIM", "EX2L_SoftDice", "ALIGN", "ALIGN_NoGuidance", "ALIGN_GrayMask",
    "ALIGN_GivenMask", "DRE", "SGT", "RRR", "RRR_Confounder", "GRADIA", "CARE", "RWG", "RWY", "SUBG", "SUBY",
    "ReWeight", "CVaR_DRO", "LfF", "LISA", "InBatchMixup", "CDAN", "MMD_GivenLabel", "CORAL_GivenLabel", "JTT", "CRT",
    "ReWeightCRT", "DFR", "DFR_Training",
)  # fmt: skip

REGISTRY: Registry[Any] = Registry("algorithm", DOMAINBED_ORDER + OWN_ORDER)
register = REGISTRY.register

Minibatches: TypeAlias = Sequence[tuple[Tensor, Tensor]]
HparamsEntry: TypeAlias = tuple[Any, Callable[[Any], Any]] | Callable[[Any], tuple[Any, Callable[[Any], Any]]]


@dataclass(frozen=True)
class Task:
    """What an algorithm is built for; plain numbers, stored in model.pkl.

    Attributes:
        input_shape: (C, H, W) of one image.
        num_classes: K.
        num_domains: number of minibatches that ``update`` gets (parts of the partition).
        num_confounders: V; 1 where the dataset knows no confounder.
        group_counts: examples of each of the K * V groups in the training in-splits.
        steps: updates of the run, if it is not stopped early; 0: not known.
        part_counts: examples in each part of the partition, in the order of the minibatches; empty: not known.
        hidden_counts: training examples of each of the K labels whose confounder is not annotated; empty where no
            confounder is known.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    num_domains: int
    num_confounders: int = 1
    group_counts: tuple[int, ...] = ()
    steps: int = 0
    part_counts: tuple[int, ...] = ()
    hidden_counts: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Task":
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()}
        return cls(**fields)


class Algorithm(nn.Module):
    """Learns from minibatches and predicts; subclasses implement ``update`` and ``predict``.

    Where it looks can be shown if a network that ``predict`` runs has an attribute ``map_layer``, as those of
    ``networks.Featurizer`` mostly do; of several the one that is called ``featurizer`` is explained.

    Class attributes:
        HPARAMS: own hparams, name -> ``(default, draw)`` with ``draw(RandomState)``, or name -> function of the
            dataset's traits that returns such a pair; added to those of the bases and to the shared table.
        OPTIONAL_HPARAMS: own hparams that are read where they are given, name -> default, and that no table holds: of
            DomainBed's algorithms, whose tables are DomainBed's.
        PARTITION: the partition that ``train`` takes unless told otherwise.
        MIN_PARTS: the fewest minibatches that ``update`` can work with.
        NEEDS_CONFOUNDERS: True if ``update`` reads confounders: then it is given annotated images only.
        TAKES_HIDDEN: True if an ``update`` that reads confounders knows what to do with those that are not annotated
            (-1): then it is given all images.
        STAGES: of a method that trains in stages, one after the other: before each but the first, ``begin_stage`` is
            called. Empty: all updates are alike. Only the last stage's updates are measured and recorded.
        NEEDS_MASKS: True if ``update`` reads masks: then (and only then) its minibatches carry ``.m``.
        CONTROL: hparams that switch off what the method adds; the run with them, all else equal, is the method's
            control. A literal; empty: it has none.
        UNREAD_HPARAMS: hparams of the shared table that the class does not read; a literal.
    """

    HPARAMS: ClassVar[Mapping[str, HparamsEntry]] = {}
    OPTIONAL_HPARAMS: ClassVar[Mapping[str, Any]] = {}
    PARTITION: ClassVar[str] = "environment"
    MIN_PARTS: ClassVar[int] = 1
    NEEDS_CONFOUNDERS: ClassVar[bool] = False
    TAKES_HIDDEN: ClassVar[bool] = False
    STAGES: ClassVar[Sequence[Stage]] = ()
    NEEDS_MASKS: ClassVar[bool] = False
    CONTROL: ClassVar[Mapping[str, Any]] = {}
    UNREAD_HPARAMS: ClassVar[Sequence[str]] = ()

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__()
        self.hparams = hparams

    @classmethod
    def from_task(cls, task: Task, hparams: dict[str, Any]) -> "Algorithm":
        """Builds the algorithm; override to use more of the task than DomainBed's four arguments.

        Raises:
            ValueError: the partition has fewer parts than the method needs.
        """
        if task.num_domains < cls.MIN_PARTS:
            raise ValueError(
                f"{cls.__name__} compares at least {cls.MIN_PARTS} minibatches, this partition has {task.num_domains}; "
                "train on more environments, or by --partition group or confounder where a confounder is known"
            )
        return cls(task.input_shape, task.num_classes, task.num_domains, hparams)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        """One training step.

        Args:
            minibatches: one ``(x, y)`` per part of the partition, x (B, C, H, W) float, y (B,) int64 in [0, K);
                our loaders' minibatches also carry ``.c``, ``.g``, ``.e``, ``.i``, and ``.m`` where it is needed.
            unlabeled: None, or one x per test environment (domain adaptation).

        Returns:
            Numbers by name; their means since the last checkpoint become columns of the record.
        """
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images x (B, C, H, W)."""
        raise NotImplementedError

    def check_stages(self, data: "StageData") -> None:
        """Raises ValueError, before anything is trained, if a later stage could not be begun with such images."""

    def begin_stage(self, stage: str, data: "StageData") -> NDArray[np.float64] | None:
        """Called once before the first update of each stage but the first, in evaluation mode, without gradients.

        Args:
            stage: its name.
            data: the images that it may look at.

        Returns:
            (N,) the odds of each of the N training images to be drawn, relative to the others of its part of the
            partition, at least one of them above 0 in each part; None: all are alike.
        """
        raise NotImplementedError

    def stage_features(self, x: Tensor) -> Tensor:
        """What a stage ``of_features`` is given in place of images x (B, C, H, W): (B, D)."""
        raise NotImplementedError


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    hparams: Mapping[str, Any],
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """A new optimizer of the kind that the hparams name; whatever trains a network takes its optimizer from here.

    Args:
        hparams: ``optimizer`` is "adam" (also where it is missing) or "sgd"; ``momentum`` of SGD, .9 where it is
            missing, 0 for plain SGD.
        betas: of Adam.

    Raises:
        ValueError: another optimizer is named, or there is nothing to train.
    """
    parameters, name = list(parameters), hparams.get("optimizer", "adam")
    if not parameters:
        raise ValueError(
            "one of the method's optimizers has nothing to train: its network has no weights, as the backbone identity "
            "has none; take another backbone or method"
        )
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, betas=betas)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=hparams.get("momentum", 0.9))
    raise ValueError(f"hparam optimizer is {name!r}; take adam or sgd")


def learning_rate(dataset: Any) -> tuple[float, Callable[[Any], float]]:
    """Default and range of a learning rate; ``dataset`` is a ``DatasetTraits``: small images or not, which optimizer.

    Adam's are DomainBed's. With SGD these would train too little: large images take SubpopBench's (1e-3, 10^U(-4, -2)),
    small ones ten times that.
    """
    if dataset.optimizer == "sgd":
        return (1e-2, lambda r: 10 ** r.uniform(-3, -1)) if dataset.small else (1e-3, lambda r: 10 ** r.uniform(-4, -2))
    if dataset.small:
        return 1e-3, lambda r: 10 ** r.uniform(-4.5, -2.5)
    return 5e-5, lambda r: 10 ** r.uniform(-5, -3.5)


def batch_size(dataset: Any) -> tuple[int, Callable[[Any], int]]:
    """DomainBed's default and range of the rows of a minibatch."""
    if dataset.small:
        return 64, lambda r: int(2 ** r.uniform(3, 9))
    return 32, lambda r: int(2 ** r.uniform(3, 5.5))


def weight_decay(dataset: Any) -> tuple[float, Callable[[Any], float]]:
    """DomainBed's default and range of a weight decay."""
    if dataset.small:
        return 0.0, lambda r: 0.0
    return 0.0, lambda r: 10 ** r.uniform(-6, -2)


def build(algorithm_class: Any, task: Task, hparams: dict[str, Any]) -> Any:
    """An instance for the task, also of a class that has nothing of ``Algorithm`` but its four-argument constructor."""
    if hasattr(algorithm_class, "from_task"):
        return algorithm_class.from_task(task, hparams)
    return algorithm_class(task.input_shape, task.num_classes, task.num_domains, hparams)


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step of each optimizer down the gradient of a scalar loss."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def part_numbers(minibatches: Minibatches) -> Tensor:
    """For each image of a step, in the order of ``concatenate``, the number of its minibatch; (sum of B,) int64."""
    return torch.cat([torch.full_like(y, number) for number, (_, y) in enumerate(minibatches)])


def concatenate(minibatches: Minibatches) -> tuple[Tensor, Tensor]:
    """All images and all labels of a step, in the minibatches' order."""
    return torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches])


def confounders(minibatches: Minibatches) -> Tensor:
    """All confounder labels c of a step, in the minibatches' order; (sum of B,) int64 in [0, V).

    Raises:
        ValueError: a minibatch carries none.
    """
    return _carried(
        minibatches,
        "c",
        "minibatches (x, y) came without confounder labels; draw them with the package's own loaders, "
        "whose minibatches carry `.c`",
    )


def masks(minibatches: Minibatches) -> Tensor:
    """All masks m of a step, in the minibatches' order; (sum of B, H, W) float32 in [0, 1], 1 on what should matter.

    Raises:
        ValueError: a minibatch carries none.
    """
    return _carried(
        minibatches,
        "m",
        "minibatches came without masks; set NEEDS_MASKS = True in the algorithm's class and train on a dataset "
        "that has masks or with --mask_dir, or draw them by TrainingLoader(..., with_masks=True): they carry `.m`",
    )


def _carried(minibatches: Minibatches, name: str, missing: str) -> Tensor:
    """What minibatches carry by that name, joined; a ValueError that says what is missing if one carries none."""
    known: list[Any] = [getattr(minibatch, name, None) for minibatch in minibatches]
    if any(values is None for values in known):
        raise ValueError(missing)
    return torch.cat(known)
