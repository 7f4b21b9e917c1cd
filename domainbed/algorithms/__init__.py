"""Algorithms by name; every module of this folder is imported and its classes stand here, as DomainBed's users expect.

People paste class bodies written for DomainBed's single file, so the names that those bodies use stand here too.
"""

import copy
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import autograd

from domainbed import messages, networks, registry
from domainbed.algorithms.base import REGISTRY, Algorithm, register
from domainbed.lib.misc import (
    LARS,
    ErmPlusPlusMovingAvg,
    MovingAverage,
    Nonparametric,
    ParamDict,
    SupConLossLambda,
    l2_between_dicts,
    proj,
    random_pairs_of_minibatches,
    split_meta_train_test,
)

ALGORITHMS = REGISTRY.names  # live


def get_algorithm_class(algorithm_name: str) -> type[Algorithm]:
    """The algorithm class of that name: set on this module (also from outside), or registered.

    Raises:
        NotImplementedError: no such algorithm; a mere base of registered algorithms is none.
    """
    found = globals().get(algorithm_name)
    if not (isinstance(found, type) and hasattr(found, "update") and hasattr(found, "predict")):
        found = REGISTRY[algorithm_name]
    if algorithm_name not in REGISTRY and any(issubclass(cls, found) for _, cls in REGISTRY.items()):
        raise NotImplementedError(messages.not_found("algorithm", algorithm_name, ALGORITHMS))
    return found


find = get_algorithm_class  # the name under which registry.attribute asks


def __getattr__(name: str) -> Any:
    """Classes of files that are still to be imported, and what is registered later."""
    found = REGISTRY[name] if name in REGISTRY else registry.import_class("algorithms", name)
    if found is None:
        raise AttributeError(f"module 'domainbed.algorithms' has no attribute {name!r}; {', '.join(ALGORITHMS)}")
    return found


globals().update(registry.import_modules("algorithms"))  # algorithms_ex2l too, last
registry.load_plugins("algorithms")
