"""Where the keys of a TOML file stand, which tomllib does not tell."""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]  # keys and positions in arrays, from the outside to the inside

_SYNTAX = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$")


def key_lines(text: str) -> dict[Path, int]:
    """The line, from 1, of every table, key and element of a TOML document that is well-formed.

    ``("rows", 1)`` has the line of the second ``[[rows]]``, an element of an array that spans lines the one where it
    ends; what is within such an element has the statement's first.
    """
    found: dict[Path, int] = {}
    lengths: Counter[Path] = Counter()  # of arrays of tables, so far
    table: Path = ()
    for line, statement in _statements(text):
        parsed = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            table = _table(parsed, lengths)
            paths = [table[:depth] for depth in range(1, len(table) + 1)]
        else:
            paths = list(_paths(parsed, table))
        for path in paths:
            found.setdefault(path, line)
        for path, later in _elements(statement, parsed, table):
            found[path] = line + later
    return found


def _elements(statement: str, parsed: dict[str, Any], table: Path) -> Iterator[tuple[Path, int]]:
    """The elements of an array that spans lines, and how many lines after its first each one ends."""
    lines, (key, value) = statement.rstrip().split("\n"), next(iter(parsed.items()))
    if len(lines) == 1 or not isinstance(value, list):
        return
    seen = 0
    for number in range(len(lines)):
        so_far = "\n".join(lines[: number + 1])
        text = so_far if number == len(lines) - 1 else f"{so_far}\n]"
        there = len(tomllib.loads(text)[key]) if _is_toml(text) else seen
        yield from (((*table, key, position), number) for position in range(seen, there))
        seen = max(seen, there)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """The first line and the text of each statement: the fewest lines that are TOML by themselves.

    A value that goes on in the next line is none without it, whatever is inside, so that strings fool nobody.
    """
    lines, start = text.split("\n"), 0
    for end in range(1, len(lines) + 1):
        statement = "\n".join(lines[start:end])
        if _is_toml(statement + "\n"):
            if statement.strip() and not statement.lstrip().startswith("#"):
                yield start + 1, statement + "\n"
            start = end


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _table(header: dict[str, Any], lengths: Counter[Path]) -> Path:
    """The table that a header opens; counts it if it is an array's next one."""
    path: Path = ()
    inside: Any = header
    while inside:
        if isinstance(inside, list):
            lengths[path] += 1
            return (*path, lengths[path] - 1)
        ((key, inside),) = inside.items()
        path = (*path, key)
        if inside and not isinstance(inside, list) and path in lengths:
            path = (*path, lengths[path] - 1)
    return path


def _paths(value: Any, path: Path) -> Iterator[Path]:
    """The path of everything within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield (*path, key)
        yield from _paths(inside, (*path, key))


def syntax_error(text: str, error: tomllib.TOMLDecodeError) -> tuple[int, str]:
    """The line of what tomllib refuses, and its words without the place."""
    message = str(error)
    place = _SYNTAX.search(message)
    if place is None:
        return 1, message
    line = int(place[1]) if place[1] else len(text.rstrip("\n").split("\n"))
    return line, message[: place.start()]
