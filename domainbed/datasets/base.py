"""What every dataset shares: environments, labels and confounders known before any image is opened, splits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from domainbed.lib import misc
from domainbed.lib.misc import known_array
from domainbed.registry import Registry

# DomainBed's datasets in its order, with the names of their environments: the tables of its sweeps can be printed
# whether or not the dataset's class is here.
DOMAINBED_ORDER = {
    "Debug28": ("0", "1", "2"),
    "Debug224": ("0", "1", "2"),
    "ColoredMNIST": ("+90%", "+80%", "-90%"),
    "RotatedMNIST": ("0", "15", "30", "45", "60", "75"),
    "VLCS": ("C", "L", "S", "V"),
    "PACS": ("A", "C", "P", "S"),
    "OfficeHome": ("A", "C", "P", "R"),
    "TerraIncognita": ("L100", "L38", "L43", "L46"),
    "DomainNet": ("clip", "info", "paint", "quick", "real", "sketch"),
    "SVIRO": ("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"),
    "WILDSCamelyon": ("hospital_0", "hospital_1", "hospital_2", "hospital_3", "hospital_4"),
    "WILDSFMoW": ("region_0", "region_1", "region_2", "region_3", "region_4", "region_5"),
    "SpawriousO2O_easy": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousO2O_medium": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousO2O_hard": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousM2M_easy": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousM2M_medium": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousM2M_hard": ("Test", "SC_group_1", "SC_group_2"),
}
OWN_ORDER = ("ColoredDigits", "DigitsO2O", "DigitsM2M", "DigitsSubpop")

REGISTRY: Registry[Any] = Registry("dataset", (*DOMAINBED_ORDER, *OWN_ORDER))
register = REGISTRY.register

Integers = NDArray[np.int64]


class MultipleDomainDataset:
    """A list of environments, each a map-style dataset of ``(x (C, H, W) float, y int64)``.

    Subclasses take ``(root, test_envs, hparams)`` and set ``self.datasets``, ``self.input_shape`` and
    ``self.num_classes``. The class attributes that sweeps and tables read must be literals.

    Class attributes:
        ENVIRONMENTS: names of the environments, in order.
        TEST_ENVS: test environments that a sweep takes; None: DomainBed's enumeration of all.
        VALIDATION_ENVS: environments that are official validation sets: never trained on, and then no environment
            is split further.
        CONFOUNDERS: names of the values that the environments' ``c`` arrays count; empty: no confounder is known.
        HPARAMS_SIZE: "small" or "large": which of DomainBed's default tables holds.
        HPARAMS: further hparams that the dataset fixes, name -> value.
        NEEDS_DATA_DIR: True for a dataset that reads files.
        N_STEPS, CHECKPOINT_FREQ: training steps, and steps between two records.
        N_WORKERS: the most loader processes; data in memory takes none.
    """

    N_STEPS: ClassVar[int] = 5001
    CHECKPOINT_FREQ: ClassVar[int] = 100
    N_WORKERS: ClassVar[int] = 8
    ENVIRONMENTS: ClassVar[Sequence[str] | None] = None
    INPUT_SHAPE: ClassVar[tuple[int, ...] | None] = None
    TEST_ENVS: ClassVar[Sequence[int] | None] = None
    VALIDATION_ENVS: ClassVar[Sequence[int]] = ()
    CONFOUNDERS: ClassVar[Sequence[str]] = ()
    HPARAMS_SIZE: ClassVar[str] = "large"
    HPARAMS: ClassVar[Mapping[str, Any]] = {}
    NEEDS_DATA_DIR: ClassVar[bool] = False

    datasets: Sequence[Any]
    input_shape: tuple[int, ...]
    num_classes: int

    @property
    def num_confounders(self) -> int:
        """V; 1 where an environment does not know its confounder."""
        known = all(known_array(environment, "c") is not None for environment in self.datasets)
        return len(self.CONFOUNDERS) if known and self.CONFOUNDERS else 1

    def __getitem__(self, index: int) -> Any:
        return self.datasets[index]

    def __len__(self) -> int:
        return len(self.datasets)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.datasets)


class InMemoryEnvironment(TensorDataset):
    """One environment held in memory.

    Args:
        x: images (N, C, H, W), float32, or uint8 that is divided by 255 when it is read.
        y: labels (N,) int64 in [0, K).
        c: confounder values (N,) int64 in [0, V).
        units: (N,) which original an image was made from; images of one unit never part in a split.
    """

    def __init__(self, x: Tensor, y: Tensor, c: Tensor, units: Tensor | None = None):
        super().__init__(x, y.long())
        self.y: Integers = y.long().numpy()
        self.c: Integers = c.long().numpy()
        self.split_units: Integers | None = None if units is None else units.long().numpy()

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        """Images and labels at a position, a slice or a tensor of positions."""
        x, y = self.tensors[0][index], self.tensors[1][index]
        return (x.float() / 255 if x.dtype == torch.uint8 else x), y


def confounders(environment: Any) -> Integers:
    """The confounder values (N,); zeros where the environment knows none."""
    known = known_array(environment, "c")
    return np.zeros(len(environment), dtype=np.int64) if known is None else known


@dataclass(frozen=True)
class Split:
    """Some examples of one environment.

    Attributes:
        env: the environment's number e.
        kind: "in" (trained on, or tested), "out" (held out), "uda" (unlabelled).
        environment: the whole environment.
        keys: (N,) the examples' positions in it.
        number: the number in its record keys: e, but DomainBed counts the uda-splits from 0.
    """

    env: int
    kind: str
    environment: Any
    keys: Integers
    number: int

    def __len__(self) -> int:
        return len(self.keys)


def split_environments(
    dataset: MultipleDomainDataset,
    test_envs: Sequence[int],
    holdout_fraction: float,
    uda_holdout_fraction: float = 0,
    trial_seed: int = 0,
) -> list[Split]:
    """DomainBed's splits: all in-splits, then all non-empty out-splits, then the test environments' uda-splits.

    Environments with ``split_units`` are divided by unit. A dataset with official validation environments is not
    divided at all.

    Raises:
        ValueError: an environment number is out of range, a validation environment is asked for as test
            environment, or nothing is left to train on.
    """
    check_test_envs(dataset, test_envs)
    fraction = 0.0 if dataset.VALIDATION_ENVS else holdout_fraction
    ins: list[Split] = []
    outs: list[Split] = []
    udas: list[Split] = []
    for e, environment in enumerate(dataset):
        seed = misc.seed_hash(trial_seed, e)
        units = getattr(environment, "split_units", None)
        everything = np.arange(len(environment))
        out, rest = _divide(everything, int(len(environment) * fraction), seed, units)
        if e in test_envs:
            uda, rest = _divide(rest, int(len(rest) * uda_holdout_fraction), seed, units)
            if len(uda):
                udas.append(Split(e, "uda", environment, uda, number=len(udas)))
        ins.append(Split(e, "in", environment, rest, e))
        outs.append(Split(e, "out", environment, out, e))
    return [*ins, *filter(len, outs), *udas]


def _divide(keys: Integers, n: int, seed: int, units: Integers | None) -> tuple[Integers, Integers]:
    """The first n (about n, by unit) of the keys in DomainBed's permutation, and the rest."""
    first, second = misc.split_dataset(keys, n, seed, units=None if units is None else list(units[keys]))
    return keys[np.asarray(first.keys, dtype=np.int64)], keys[np.asarray(second.keys, dtype=np.int64)]


def check_test_envs(dataset: MultipleDomainDataset, test_envs: Sequence[int]) -> None:
    """Raises ValueError for test environments that the dataset lacks, or that leave the wrong ones to train on."""
    name, allowed = type(dataset).__name__, [e for e in range(len(dataset)) if e not in dataset.VALIDATION_ENVS]
    for e in test_envs:
        if e not in allowed:
            raise ValueError(f"--test_envs {e}: {name} has the test environments {allowed} ({dataset.ENVIRONMENTS})")
    official = set(dataset.TEST_ENVS or ()) if dataset.VALIDATION_ENVS else set()
    if not official <= set(test_envs):
        raise ValueError(f"--test_envs must contain {sorted(official)}, the official test set of {name}")
    if set(test_envs) >= set(allowed):
        raise ValueError(f"--test_envs {list(test_envs)} leaves no environment of {name} to train on; name fewer")


def training_splits(dataset: MultipleDomainDataset, splits: Sequence[Split], test_envs: Sequence[int]) -> list[Split]:
    """The in-splits of the environments that are trained on."""
    held_out = {*test_envs, *dataset.VALIDATION_ENVS}
    return [split for split in splits if split.kind == "in" and split.env not in held_out]


def validation_splits(dataset: MultipleDomainDataset, splits: Sequence[Split], test_envs: Sequence[int]) -> list[Split]:
    """What selection may look at: the official validation environments, else the training environments' out-splits."""
    if dataset.VALIDATION_ENVS:
        return [split for split in splits if split.kind == "in" and split.env in dataset.VALIDATION_ENVS]
    return [split for split in splits if split.kind == "out" and split.env not in test_envs]


def selection_splits(dataset: MultipleDomainDataset, splits: Sequence[Split], test_envs: Sequence[int]) -> list[Split]:
    """The splits that some selection method or table reads: all but the training environments' in-splits."""
    trained = {split.env for split in training_splits(dataset, splits, test_envs)}
    return [split for split in splits if split.kind != "in" or split.env not in trained]
