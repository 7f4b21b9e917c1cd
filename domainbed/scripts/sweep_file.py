"""Sweep files: TOML whose keys are the flags of the sweep script, with tables [[rows]]."""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from domainbed import messages
from domainbed.sweep_rows import SweepRow

_TABLES = ("hparams", "ranges", "on")  # keys of a row
_ON = ("hparams", "ranges")  # what a row says of a dataset


def read_sweep_file(path: str, flags: Sequence[str]) -> tuple[list[str], list[SweepRow]]:
    """A sweep file as command-line words and rows.

    Args:
        flags: the keys that are allowed beside ``rows``.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no TOML, or holds a key or row that means nothing.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such sweep file; name a TOML file, or give the sweep as flags")
    with open(path, "rb") as file:
        try:
            values = tomllib.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    rows = [_row(path, entry) for entry in values.pop("rows", [])]
    for key in values:
        if key not in flags:
            raise ValueError(f"{path}: {messages.not_found('key', key, [*flags, 'rows'])}")
    return [word for key, value in values.items() for word in _as_words(key, value)], rows


def _row(path: str, entry: Any) -> SweepRow:
    if not isinstance(entry, dict) or not isinstance(entry.get("algorithm"), str):
        raise ValueError(f"{path}: each [[rows]] must be a table that names an algorithm; got {entry}")
    known = [field.name for field in fields(SweepRow)]
    for key in entry:
        if key not in known:
            raise ValueError(f"{path}: {messages.not_found('key of [[rows]]', key, known)}")
    for key in _TABLES:
        if not isinstance(entry.get(key, {}), dict):
            raise ValueError(f"{path}: {key} of a row must be a table; got {entry[key]}")
    if not isinstance(entry.get("control", True), bool):
        raise ValueError(f"{path}: control of a row must be true or false; got {entry['control']}")
    for dataset, there in entry.get("on", {}).items():
        if not isinstance(there, dict) or not all(key in _ON and isinstance(there[key], dict) for key in there):
            raise ValueError(f"{path}: on.{dataset} of a row must hold tables {' or '.join(_ON)}; got {there}")
    return SweepRow(**entry)


def _as_words(key: str, value: Any) -> list[str]:
    """A key of a sweep file as it would be typed."""
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    if isinstance(value, Mapping):
        return [f"--{key}={json.dumps(value, sort_keys=True)}"]
    if isinstance(value, list):
        return [f"--{key}", *(",".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)]
    return [f"--{key}={value}"]
