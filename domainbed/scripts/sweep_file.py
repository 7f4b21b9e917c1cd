"""Sweep files: TOML whose keys are the flags of the sweep script, with tables [[rows]].

Whatever is wrong with a file is said with the line where it stands.
"""

import argparse
import json
import os
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

from domainbed import jobs, messages, overrides, registry
from domainbed.scripts import toml_lines
from domainbed.sweep_rows import SweepRow, control_hparams, no_controls, parse_budget

_ON = ("hparams", "ranges")  # what a row says of a dataset
_KINDS: dict[str, tuple[type, str]] = {  # of a row's keys; the others are texts
    "hparams": (dict, "a table"),
    "ranges": (dict, "a table"),
    "on": (dict, "a table"),
    "control": (bool, "true or false"),
    "confounders": (list, "a list of texts"),
    "budgets": (list, "a list of shares"),
}
_TEXT = (str, "a text in quotes")
# By what a flag makes of "1": what it takes in a file.
_TAKES: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text in quotes"),
    list: ((int, list, str), "an environment or a list of them"),
    tuple: ((int, float, list, str), "a share, or a list of two: training, validation"),
}


def read_sweep_file(
    path: str, parser: argparse.ArgumentParser, left_out: Collection[str] = ()
) -> tuple[list[str], list[SweepRow]]:
    """A sweep file as command-line words and rows.

    Args:
        parser: its flags are the keys that are allowed beside ``rows``.
        left_out: flags that are no keys.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no TOML, or holds what means nothing; begins with ``path:line:``.
    """
    file, values = _open(path)
    rows = _rows(file, values.pop("rows", []))
    actions = {key: action for key, action in _actions(parser).items() if key not in left_out}
    for key, value in values.items():
        if key not in actions:
            file.refuse((key,), messages.not_found("key", key, [*actions, "rows"]))
        _check_flag(file, key, value, actions[key])
    _check_datasets(file, _listed(values.get("datasets", [])))
    _check_rows(file, _listed(values.get("algorithms", [])), rows)
    _check_together(file, jobs.given(values))
    _check_budgets(file, rows, values)
    return [word for key, value in values.items() for word in _as_words(key, value)], rows


@dataclass(frozen=True)
class _File:
    """A sweep file that is well-formed TOML, for messages about it."""

    path: str
    text: str

    def refuse(self, where: toml_lines.Path, message: str) -> NoReturn:
        """Raises ValueError about what stands there."""
        raise ValueError(f"{self.path}:{self.line(where)}: {message}")

    def line(self, where: toml_lines.Path) -> int:
        """The line of a place in the file, or of the nearest place around it."""
        lines = toml_lines.key_lines(self.text)
        return next((lines[where[:depth]] for depth in range(len(where), 0, -1) if where[:depth] in lines), 1)

    @contextmanager
    def at(self, *where: str | int) -> Iterator[None]:
        """Whatever is wrong inside is due to what stands there."""
        try:
            yield
        except (ValueError, NotImplementedError, argparse.ArgumentTypeError) as error:
            self.refuse(where, str(error))


def _open(path: str) -> tuple[_File, dict[str, Any]]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such sweep file; name a TOML file, or give the sweep as flags")
    with open(path, "rb") as file:
        content = file.read()
    try:
        text = content.decode()
        return _File(path, text), tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8, as TOML must be: {error.reason}") from error
    except tomllib.TOMLDecodeError as error:
        line, message = toml_lines.syntax_error(text, error)
        raise ValueError(f"{path}:{line}: {message}") from error


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    options = parser._option_string_actions.items()
    return {option[2:]: action for option, action in options if option.startswith("--") and option != "--help"}


def _check_flag(file: _File, key: str, value: Any, action: argparse.Action) -> None:
    if key in _ON and isinstance(value, dict):
        _check_table(file, (key,), value)
    elif action.nargs == 0:
        if not isinstance(value, bool):
            file.refuse((key,), f"{key} must be true or false; got {value!r}")
    elif action.nargs == "+" and isinstance(value, list):
        if not value:
            file.refuse((key,), f"{key} is empty; name one at least, or leave it out")
        for position, element in enumerate(value):
            with file.at(key, position):
                _check_value(key, element, action)
    else:
        with file.at(key):
            _check_value(key, value, action)
            if key in _ON:
                (overrides.parse_ranges if key == "ranges" else overrides.parse)(value)


def _check_value(key: str, value: Any, action: argparse.Action) -> None:
    """Raises ValueError or ArgumentTypeError if a flag does not take the value."""
    convert: Any = action.type or str
    allowed, wanted = _TAKES[type(convert("1"))]
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise ValueError(f"{key} must be {wanted}; got {_shown(value)}")
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{key} is {value!r}; allowed: {', '.join(map(str, action.choices))}")
    try:
        convert(_word(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{key}: {error}") from error


def _shown(value: Any) -> str:
    """A value about as TOML has it."""
    return str(value).lower() if isinstance(value, bool) else f"{value!r}"


def _check_table(file: _File, where: toml_lines.Path, table: Mapping[str, Any]) -> None:
    """Checks hparams, or how to draw them, as the last key of the place says."""
    for name, value in table.items():
        with file.at(*where, name):
            try:
                text = json.dumps({name: value})
            except TypeError:
                raise ValueError(f"{name} must be a number, text, true, false, or a list; got {value}") from None
            if where[-1] == "ranges":
                overrides.parse_ranges(text)


def _check_datasets(file: _File, names: Sequence[str]) -> None:
    for position, name in enumerate(names):
        with file.at("datasets", position):
            registry.attribute("datasets", name, "ENVIRONMENTS")
            if name in names[:position]:
                raise ValueError(f"dataset {name} is named twice; name each once")


def _check_rows(file: _File, algorithms: Sequence[str], rows: Sequence[SweepRow]) -> None:
    """Checks that the names in rows exist and that no row is there twice."""
    seen: list[tuple[SweepRow, toml_lines.Path]] = []
    of_the_flag = [(SweepRow.parse(name), ("algorithms", i)) for i, name in enumerate(algorithms)]
    for row, where in [*of_the_flag, *((row, ("rows", i)) for i, row in enumerate(rows))]:
        with file.at(*where, "algorithm"):
            own = row.own_partition
        with file.at(*where, "partition"):
            _check_partition(row.partition)
        if row.control and not control_hparams(row.algorithm):
            file.refuse((*where, "control"), str(no_controls([row.algorithm])))
        row = replace(row, partition=row.partition or own, control=None)
        for other, place in seen:
            if other == row:
                file.refuse(where, f"{row.name} is the same row as in line {file.line(place)}; leave out one of them")
        seen.append((row, where))


def _check_partition(name: str | None) -> None:
    if name is not None:
        from domainbed import partitions  # only files that name a partition pay for the import

        partitions.REGISTRY[name]


def _check_together(file: _File, given: Mapping[str, Any]) -> None:
    """Checks keys that answer one question, and that datasets have the test environments that are asked for."""
    for one, other in jobs.EXCLUSIVE:
        if one in given and other in given:
            file.refuse((other,), f"{other} and {one} (line {file.line((one,))}) exclude each other; leave one out")
    with file.at("test_envs_list"):
        words = map(_word, _listed(given.get("test_envs_list", [])))
        listed = [[int(env) for env in word.split(",")] for word in words] or None
    single, official = "single_test_envs" in given, "official_test_envs" in given
    for position, name in enumerate(_listed(given.get("datasets", []))):
        with file.at(*(("test_envs_list",) if listed else ("datasets", position))):
            jobs.dataset_test_envs(name, single, listed, official)


def _check_budgets(file: _File, rows: Sequence[SweepRow], given: Mapping[str, Any]) -> None:
    """Checks that no row has budgets beside one for all."""
    alone = [other for one, other in jobs.EXCLUSIVE if one == "budgets" and other in given]
    for position, row in enumerate(rows):
        if alone and row.budgets:
            said = f"budgets and {alone[0]} (line {file.line((alone[0],))}) exclude each other; leave one out"
            file.refuse(("rows", position, "budgets"), said)


def _rows(file: _File, entries: Any) -> list[SweepRow]:
    if not isinstance(entries, list):
        file.refuse(("rows",), f"each [[rows]] must be a table that names an algorithm; got {entries}")
    return [_row(file, ("rows", position), entry) for position, entry in enumerate(entries)]


def _row(file: _File, where: toml_lines.Path, entry: Any) -> SweepRow:
    if not isinstance(entry, dict) or "algorithm" not in entry:
        file.refuse(where, f"each [[rows]] must be a table that names an algorithm; got {entry}")
    known = [field.name for field in fields(SweepRow)]
    for key, value in entry.items():
        if key not in known:
            file.refuse((*where, key), messages.not_found("key of [[rows]]", key, known))
        kind, wanted = _KINDS.get(key, _TEXT)
        if not isinstance(value, kind) or value in ("", []):
            file.refuse((*where, key), f"{key} of a row must be {wanted}; got {_shown(value)}")
    for key in _ON:
        _check_table(file, (*where, key), entry.get(key, {}))
    for dataset, there in entry.get("on", {}).items():
        _check_on(file, (*where, "on", dataset), dataset, there)
    with file.at(*where, "budgets"):
        budgets = [parse_budget(_word(value)) for value in entry.get("budgets", [])]
    return SweepRow(**entry | {"budgets": budgets or None})


def _check_on(file: _File, where: toml_lines.Path, dataset: str, there: Any) -> None:
    """Checks what a row says of a dataset."""
    with file.at(*where):
        registry.attribute("datasets", dataset, "ENVIRONMENTS")
    if not isinstance(there, dict) or not all(key in _ON and isinstance(there[key], dict) for key in there):
        file.refuse(where, f"on.{dataset} of a row must hold tables {' or '.join(_ON)}; got {there}")
    for key, table in there.items():
        _check_table(file, (*where, key), table)


def _listed(value: Any) -> list[Any]:
    """A value of a flag that takes several; one may stand for a list of one."""
    return value if isinstance(value, list) else [value]


def _as_words(key: str, value: Any) -> list[str]:
    """A key of a sweep file as it would be typed."""
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    if isinstance(value, Mapping):
        return [f"--{key}={json.dumps(value, sort_keys=True)}"]
    if isinstance(value, list):
        return [f"--{key}", *map(_word, value)]
    return [f"--{key}={_word(value)}"]


def _word(value: Any) -> str:
    """A value that is no table as it would be typed."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
