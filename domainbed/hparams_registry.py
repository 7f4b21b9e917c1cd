"""Default and random hyperparameters of every pair of algorithm and dataset.

One table is shared by all; an algorithm's class adds to it (or overrides it) with its ``HPARAMS``, a dataset's class
fixes values with its own. Each hparam draws from a generator of its own, seeded with its name, so that adding one
never changes another's draws; equal names have equal draws in all algorithms.
"""

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainbed import algorithms, messages, registry
from domainbed.algorithms.base import HparamsEntry, batch_size, learning_rate, weight_decay
from domainbed.overrides import Draw
from domainbed.seeding import seed_hash

logger = logging.getLogger(__name__)

Pair = tuple[Any, Callable[[Any], Any]]  # default, draw(RandomState)

# Read where they are given, by networks, datasets, optimizers and the training loop; without a default in the table.
OPTIONAL: dict[str, Any] = {  # with what comes nearest to a default
    "backbone": "resnet50", "pretrained": True, "weights": "IMAGENET1K_V1", "channels_last": True, "image_size": 224,
    "mlp_width": 256, "mlp_depth": 3, "mlp_dropout": 0.0, "optimizer": "adam", "momentum": 0.9, "patience": 10,
    "min_delta": 1e-4,
}  # fmt: skip


@dataclass(frozen=True)
class DatasetTraits:
    """What an hparam's default and range may depend on.

    Attributes:
        name: of the dataset, known to the registry or not.
        small: its images are small (28 px or so), which takes larger learning rates and batches.
        optimizer: that the run takes, "adam" or "sgd", on which its learning rates depend.
    """

    name: str
    small: bool
    optimizer: str = "adam"

    @classmethod
    def of(cls, dataset_name: str, optimizer: str = "adam") -> "DatasetTraits":
        return cls(dataset_name, _dataset_attribute(dataset_name, "HPARAMS_SIZE", "large") == "small", optimizer)


def _constant(value: Any) -> Pair:
    return value, lambda r: value


SHARED: dict[str, HparamsEntry] = {
    "data_augmentation": _constant(True),
    "resnet18": _constant(False),
    "resnet50_augmix": _constant(True),
    "dinov2": _constant(False),
    "vit": _constant(False),
    "vit_attn_tune": _constant(False),
    "freeze_bn": _constant(False),
    "lars": _constant(False),
    "linear_steps": _constant(500),
    "resnet_dropout": (0.0, lambda r: r.choice([0.0, 0.1, 0.5])),
    "vit_dropout": (0.0, lambda r: r.choice([0.0, 0.1, 0.5])),
    "class_balanced": _constant(False),
    "nonlinear_classifier": _constant(False),
    "lr": learning_rate,
    "weight_decay": weight_decay,
    "batch_size": batch_size,
}


def default_hparams(algorithm: str, dataset: str, optimizer: str = "adam") -> dict[str, Any]:
    """The hparams of a run with ``--hparams_seed 0``; unknown names get the shared ones.

    Args:
        optimizer: the run's, for which learning rates have their defaults and ranges.
    """
    return {name: default for name, (default, _) in _table(_algorithm_class(algorithm), dataset, optimizer).items()}


def random_hparams(
    algorithm: str, dataset: str, seed: int, ranges: Mapping[str, Draw] | None = None, optimizer: str = "adam"
) -> dict[str, Any]:
    """One draw of all hparams; unknown names get the shared ones.

    Args:
        ranges: how to draw some of them, in place of the table's way; the draws of the others stay what they were.
        optimizer: the run's, for which learning rates have their defaults and ranges.

    Raises:
        ValueError: a range is for an hparam that the pair lacks, or draws values of another type than the default's.
    """
    check_ranges(algorithm, dataset, ranges or {})
    pairs = _hparams(algorithm, dataset, seed, ranges, optimizer)
    for name in ranges or {}:
        default, drawn = pairs[name]
        _check_type(name, drawn, default)
    return {name: drawn for name, (_, drawn) in pairs.items()}


def _hparams(
    algorithm: str,
    dataset: str,
    random_seed: int,
    ranges: Mapping[str, Draw] | None = None,
    optimizer: str = "adam",
) -> dict[str, tuple[Any, Any]]:
    """name -> (default, drawn value), plain Python scalars."""
    table = _table(_algorithm_class(algorithm), dataset, optimizer)
    draws = {name: draw for name, (_, draw) in table.items()} | dict(ranges or {})
    generator, pairs = np.random.RandomState(), {}
    for name, (default, _) in table.items():
        generator.seed(seed_hash(random_seed, name))  # a new generator with this seed takes 50 times as long
        pairs[name] = default, _plain(draws[name](generator))
    return pairs


def _define_hparam(
    hparams: dict[str, Any], hparam_name: str, default_val: Any, random_val_fn: Callable[..., Any]
) -> None:
    """Adds one hparam to a table such as ``SHARED``: its default and how to draw it from a RandomState."""
    hparams[hparam_name] = (default_val, random_val_fn)


def check_ranges(algorithm: str, dataset: str, ranges: Iterable[str]) -> None:
    """Raises ValueError if there is a range for an hparam that the pair of algorithm and dataset lacks."""
    known = sorted(_table(_algorithm_class(algorithm), dataset))
    for name in ranges:
        if name not in known:
            raise ValueError(messages.not_found(f"hparam of {algorithm} on {dataset} to draw", name, known))


def check_given(algorithm_class: type, dataset_name: str, given: Mapping[str, Any]) -> None:
    """Looks for misspelt keys, values of the wrong type and hparams without effect among those that a user gave.

    A class that declares ``HPARAMS`` is taken at its word; of others we can't know what they read, so that only a
    likely slip is warned of.

    Raises:
        ValueError: the class body declares ``HPARAMS`` and neither it nor the shared table has the key; or a value is
            not of its default's type.
    """
    unread = [name for name in given if name in getattr(algorithm_class, "UNREAD_HPARAMS", ())]
    if unread:
        logger.warning(
            "%s does not read %s; its docstring names what it reads", algorithm_class.__name__, ", ".join(unread)
        )
    table = _table(algorithm_class, dataset_name)
    optional = OPTIONAL | dict(getattr(algorithm_class, "OPTIONAL_HPARAMS", {}))
    for name, value in given.items():
        if name in table:
            _check_type(name, value, table[name][0])
        elif name in optional:
            _check_type(name, value, optional[name])
        else:
            _check_name(algorithm_class, name, sorted({*table, *optional}))


def _check_name(algorithm_class: type, name: str, known: list[str]) -> None:
    if "HPARAMS" in vars(algorithm_class):
        raise ValueError(messages.not_found(f"hparam of {algorithm_class.__name__}", name, known))
    for close in difflib.get_close_matches(name, known, n=1):
        logger.warning("hparam %s is passed on to %s; did you mean %s?", name, algorithm_class.__name__, close)


def _check_type(name: str, value: Any, default: Any) -> None:
    """Numbers for floats, whole numbers for ints; true is no number."""
    wanted = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ValueError(f"hparam {name} is {value!r}; give a value like its default, {default!r}")


def _table(algorithm_class: type | None, dataset_name: str, optimizer: str = "adam") -> dict[str, Pair]:
    """name -> (default, draw): shared, the dataset's pairs, the algorithm's (bases first), what the dataset fixes."""
    traits, own = DatasetTraits.of(dataset_name, optimizer), _dataset_attribute(dataset_name, "HPARAMS", {})
    table = SHARED | {name: value for name, value in own.items() if _is_pair(value)}
    for cls in reversed(algorithm_class.__mro__ if algorithm_class else ()):
        table |= vars(cls).get("HPARAMS", {})
    pairs = {name: entry(traits) if callable(entry) else entry for name, entry in table.items()}
    return pairs | {name: _constant(value) for name, value in own.items() if not _is_pair(value)}


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and callable(value[1])


def _algorithm_class(name: str) -> type | None:
    try:
        return algorithms.get_algorithm_class(name)
    except NotImplementedError:
        return None


def _dataset_attribute(name: str, attribute: str, default: Any) -> Any:
    try:
        return registry.attribute("datasets", name, attribute, default)
    except NotImplementedError:
        return default


def _plain(value: Any) -> Any:
    """Python's scalar for a numpy one, which JSON and safe pickles refuse."""
    return value.item() if isinstance(value, np.generic) else value
