"""CSV files that users or datasets bring: read tolerantly, checked before training, every bad row named at once."""

import csv
import io
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from domainbed.messages import listed

_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but the tab; lines hold no line ends
_WHOLE = re.compile(r"([+-]?[0-9]{1,18})(?:\.0*)?")
_CELL = re.compile(r"""\s*+ (?: "( (?:[^"]|"")*+ )"\s* | ([^,"][^,]*)? ) (,|\Z)""", re.VERBOSE)
_UNPLAIN = re.compile(
    r'[\x00-\x09\x0b-\x20"\x7f-\x9f]|[0-9]\.0*[,\n]|[0-9]\.0*\Z|\n,*\n'
)  # what plain_csv would change

PLAIN = (
    "give every row as many cells as the header, each on one line; a cell with a comma stands in quotes, and quotes in "
    "it are doubled"
)


class Problems:
    """What is wrong with a file, gathered so that the user sees all of it in one message.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.found: list[tuple[int, str]] = []

    def add(self, line: int, message: str) -> None:
        """One problem of a line; lines count from 1."""
        self.found.append((line, message))

    def raise_if_any(self, what_to_do: str) -> None:
        """Raises ValueError with the file, its first bad rows and what is wrong with each, their number, what to do."""
        if not self.found:
            return
        rows = defaultdict(list)
        for line, message in sorted(set(self.found)):  # a column may have been read twice
            rows[line].append(message)
        count = f"{len(rows)} bad row{'s' if len(rows) > 1 else ''}"
        bad = [f"line {line}: {'; '.join(messages)}" for line, messages in rows.items()]
        raise ValueError(listed(f"{self.path}: {count}; {what_to_do}", bad))


@dataclass
class Table:
    """The rows of a CSV file, column by column.

    Attributes:
        path: the file.
        lines: (N,) the line of the file on which each row begins, for messages.
        columns: name -> (N,) cells, without the blanks around them.
    """

    path: Path
    lines: list[int] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)

    def integers(self, column: str, allowed: Collection[int], problems: Problems) -> NDArray[np.int64]:
        """A column (N,) as whole numbers; a cell that is none, or not allowed, is a problem and reads 0."""
        values = np.zeros(len(self), dtype=np.int64)
        words = f"{min(allowed)} to {max(allowed)}" if len(allowed) > 2 else " or ".join(map(str, allowed))
        for row, (line, cell) in enumerate(zip(self.lines, self.columns[column], strict=True)):
            number = _whole_number(cell)
            if number is None or number not in allowed:
                problems.add(line, f"{column} is {cell!r}; allowed: {words}")
            else:
                values[row] = number
        return values

    def categories(
        self, column: str, problems: Problems, names: Sequence[str] | None = None, rows: Iterable[int] | None = None
    ) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """A column (N,) as positions in a list of names, and that list.

        Args:
            names: what is allowed; None: whatever occurs, sorted, by value where all are whole numbers.
            rows: those that are read; the others are -1. So are empty cells and others that are problems.
        """
        cells, values = self.columns[column], np.full(len(self), -1, dtype=np.int64)
        rows = range(len(self)) if rows is None else list(rows)
        names = in_order({cells[row] for row in rows} - {""}) if names is None else tuple(names)
        place = {name: position for position, name in enumerate(names)}
        for row in rows:
            values[row] = place.get(cells[row], -1)
            if not cells[row]:
                problems.add(self.lines[row], f"{column} is empty")
            elif values[row] < 0:
                problems.add(self.lines[row], f"{column} is {cells[row]!r}; allowed: {', '.join(names)}")
        return names, values

    def check_paths(self, column: str, root: Path, problems: Problems) -> None:
        """Adds a problem for each path that is empty, named twice, outside ``root`` or not a file there."""
        first: dict[str, int] = {}
        for line, name in zip(self.lines, self.columns[column], strict=True):
            if not name:
                problems.add(line, f"{column} is empty")
            elif escapes(name):
                problems.add(line, f"{column} {name!r} leads out of {root}")
            elif (plain := posixpath.normpath(name)) in first:
                problems.add(line, f"{column} {name!r} stands on line {first[plain]} already")
            else:
                first[plain] = line
        present = files_below(root, first)
        for name, line in first.items():
            if name not in present:
                problems.add(line, f"{column} {name!r}: no such file in {root}")


def _whole_number(cell: str) -> int | None:
    """7 for "7", "+7" and the "7.0" that spreadsheets write; None for anything else."""
    found = _WHOLE.fullmatch(cell)
    return int(found[1]) if found else None


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names sorted: by value if all are whole numbers, else as text."""
    names = sorted(names)
    numeric = all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in names)
    return tuple(sorted(names, key=int) if numeric else names)


def escapes(path: str) -> bool:
    """Whether a path that should be relative is absolute or climbs out of its folder."""
    depth = 0
    for part in path.replace("\\", "/").split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return True
    return _ABSOLUTE.match(path) is not None


def files_below(root: Path, names: Iterable[str]) -> set[str]:
    """Those of the posix paths relative to ``root`` that are files there, by one listing per folder."""
    by_folder: dict[str, set[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        by_folder.setdefault(folder, set()).add(file)
    found: set[str] = set()
    for folder, files in by_folder.items():
        try:
            with os.scandir(root / folder) as entries:
                present = {entry.name for entry in entries if entry.name in files and entry.is_file()}
        except (OSError, ValueError):  # ValueError: a null character
            continue
        found |= {f"{folder}/{file}" if folder else file for file in present}
    return found


def read_csv(path: Path, required: Sequence[str]) -> Table:
    """The rows of a CSV file in UTF-8, with or without byte-order mark, CRLF, quotes and blanks around cells.

    Empty lines are skipped, and so are columns without a name. No cell goes over a line end: what looks like one is
    a quote that was left open, and would swallow rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, lacks a required column, names one twice, has no rows, rows of a wrong length,
            quotes that are not closed, or control characters.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it must be a CSV with the columns {', '.join(required)}")
    problems = Problems(path)
    rows = _rows(_text(path), problems)
    _, header = next(rows, (1, []))
    problems.raise_if_any(PLAIN)
    _check_header(path, header, required)
    table = _table(path, header, rows, problems)
    if not len(table):
        raise ValueError(f"{path} holds no rows below its header; add one per image")
    return table


def plain_csv(path: Path) -> io.StringIO:
    """The text of a file that ``read_csv`` reads, for readers that take cells as they are written.

    Without byte-order mark, empty lines, blanks around cells, quotes that are not needed and points of whole numbers.
    """
    text = _text(path)
    if not _UNPLAIN.search(text):  # seconds, of large files
        return io.StringIO(text)
    problems, plain = Problems(path), io.StringIO()
    rows = (cells for _, cells in _rows(text, problems) if any(cells))
    csv.writer(plain, lineterminator="\n").writerows([_unpointed(cell) for cell in cells] for cells in rows)
    problems.raise_if_any(PLAIN)
    plain.seek(0)
    return plain


def _unpointed(cell: str) -> str:
    found = _WHOLE.fullmatch(cell)
    return found[1] if found else cell


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file in that encoding") from error


def _rows(text: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """The number of each line, and its cells without the blanks around them; lines that hold none are problems."""
    for number, line in enumerate(re.split(r"\r\n|[\r\n]", text), 1):
        cells = _cells(line)
        if control := _CONTROL.search(line):
            problems.add(number, f"holds the control character {control[0]!r}")
        elif cells is None:
            problems.add(number, "a quote is left open on this line, or text follows the closing one")
        else:
            yield number, cells


def _cells(line: str) -> list[str] | None:
    """The cells of a line; None: its quotes don't enclose cells."""
    if '"' not in line:
        return [cell.strip() for cell in line.split(",")]
    cells, place, comma = [], 0, ","
    while comma:
        found = _CELL.match(line, place)
        if found is None:
            return None
        quoted, bare, comma = found.groups()
        cells.append(((bare or "") if quoted is None else quoted.replace('""', '"')).strip())
        place = found.end()
    return cells


def _check_header(path: Path, header: Sequence[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in header]
    if missing:
        raise ValueError(
            f"{path}, line 1: the header lacks {', '.join(missing)}; it has {', '.join(header) or 'nothing'}, "
            f"and must have {', '.join(required)}, separated by commas"
        )
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        raise ValueError(
            f"{path}, line 1: a column is named twice; the header is {', '.join(header)}; rename one of them"
        )


def _table(path: Path, header: Sequence[str], rows: Iterable[tuple[int, list[str]]], problems: Problems) -> Table:
    lines, columns = [], [[] for _ in header]  # type: list[int], list[list[str]]
    for line, cells in rows:
        if not any(cells):
            continue
        if len(cells) != len(header):
            problems.add(line, f"{len(cells)} cells, the header has {len(header)}")
            continue
        lines.append(line)
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell)
    problems.raise_if_any(PLAIN)
    return Table(path, lines, {name: column for name, column in zip(header, columns, strict=True) if name})
