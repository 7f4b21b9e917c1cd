"""The ``wilds`` package, imported late and without its question to the network."""

import importlib
from types import ModuleType
from typing import Any


def import_wilds(module: str = "wilds") -> ModuleType:
    """Imports wilds or one of its modules.

    At its import wilds starts a thread that asks the package index for its newest release; here that question is
    answered on the spot, so that no job of a sweep touches the network or hangs where there is none.
    """
    outdated: Any = importlib.import_module("outdated")
    asks = outdated.check_outdated
    outdated.check_outdated = lambda package, version: (False, version)
    try:
        return importlib.import_module(module)
    finally:
        outdated.check_outdated = asks
