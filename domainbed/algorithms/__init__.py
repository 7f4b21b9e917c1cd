"""Algorithms by name; every module of this folder is imported and its classes stand here, as DomainBed's users expect.

People paste class bodies written for DomainBed's single file, so the names that those bodies use stand here too.
"""

import copy
import importlib
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import autograd

from domainbed import networks, registry
from domainbed.algorithms.base import REGISTRY, Algorithm, register
from domainbed.lib.misc import (
    MovingAverage,
    ParamDict,
    l2_between_dicts,
    proj,
    random_pairs_of_minibatches,
    split_meta_train_test,
)

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "F",
    "MovingAverage",
    "OrderedDict",
    "ParamDict",
    "autograd",
    "copy",
    "find",
    "get_algorithm_class",
    "l2_between_dicts",
    "networks",
    "nn",
    "np",
    "proj",
    "random_pairs_of_minibatches",
    "register",
    "split_meta_train_test",
    "torch",
]

ALGORITHMS = REGISTRY.names  # live


def get_algorithm_class(algorithm_name: str) -> type[Algorithm]:
    """The algorithm class of that name: set on this module (also from outside), or registered.

    Raises:
        NotImplementedError: no such algorithm; a name of this module that can't update and predict is none.
    """
    found = globals().get(algorithm_name)
    if isinstance(found, type) and hasattr(found, "update") and hasattr(found, "predict"):
        return found
    algorithm: type[Algorithm] = REGISTRY[algorithm_name]
    return algorithm


find = get_algorithm_class  # the name under which registry.attribute asks


def __getattr__(name: str) -> Any:
    """Classes of algorithms_ex2l, of plugins, or registered later."""
    if name in REGISTRY:
        return REGISTRY[name]
    raise AttributeError(f"module 'domainbed.algorithms' has no attribute {name!r}; algorithms: {ALGORITHMS}")


globals().update(registry.import_modules("algorithms"))
importlib.import_module("domainbed.algorithms_ex2l")  # last: it builds on this folder
registry.load_plugins("algorithms")
