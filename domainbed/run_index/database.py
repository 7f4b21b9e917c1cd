"""The index's database: what was read of each results file, sealed by checksums."""

import os
import sqlite3
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from domainbed.condensing import Judged, Summary, Timing
from domainbed.condensing.lines import SHARED, Segment
from domainbed.model_selection import CRITERIA
from domainbed.rows import NOT_ROW

INDEX_FILE = ".collected.sqlite"
TABLES = """
CREATE TABLE entries (name BLOB PRIMARY KEY, seal INTEGER, entry BLOB);
CREATE TABLE kept (name BLOB PRIMARY KEY, seal INTEGER, kept BLOB);
CREATE TABLE official (dataset TEXT PRIMARY KEY, environments TEXT);
"""

Stamp = tuple[int, int, int, int]  # size, modification and change time in ns, inode


class Entry(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What the index knows of a results file.

    Attributes:
        stamp: of the file as it was read; None if it was too young to be trusted.
        explained: the steps that were kept because they are explained.
        skipped: lines that hold no record.
        summaries: of its segments.
    """

    stamp: Stamp | None
    explained: tuple[Any, ...]
    skipped: int
    summaries: list[Summary]


class Kept(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A ``condensing.lines.Segment`` as it is stored, with None for what its lines share."""

    args: dict[str, Any]
    hparams: Any
    shapes: list[tuple[str, ...]]
    lines: list[tuple[int, list[Any]]]

    @classmethod
    def of(cls, segment: Segment) -> "Kept":
        shared = [[i for i, key in enumerate(shape) if key in SHARED] for shape in segment.shapes]
        lines = []
        for number, values in segment.lines:
            own = list(values)
            for i in shared[number]:
                own[i] = None
            lines.append((number, own))
        return cls(segment.args, segment.hparams, segment.shapes, lines)

    def records(self) -> list[dict[str, Any]]:
        return Segment(self.args, self.hparams, self.shapes, [*self.lines]).records()


def version() -> int:
    """Of what is stored, and what it was made by, now: criteria may be added; an index of another is made anew."""
    fields = [kind.__struct_fields__ for kind in (Entry, Summary, Judged, Timing, Kept)]
    return zlib.crc32(repr((2, TABLES, fields, sorted(NOT_ROW), sorted(CRITERIA))).encode()) & 0x7FFFFFFF


_ENCODER = msgspec.msgpack.Encoder()
_ENTRY = msgspec.msgpack.Decoder(Entry)
_KEPT = msgspec.msgpack.Decoder(list[Kept])


class Damaged(Exception):
    """The index does not hold what was put in."""


def _sealed(name: bytes, value: Any) -> tuple[int, bytes]:
    """What is stored under a name: nothing else passes for it, another name's value included."""
    data = _ENCODER.encode(value)
    return zlib.crc32(data, zlib.crc32(name)), data


def _opened(name: Any, seal: Any, data: Any, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    if not (isinstance(name, bytes) and isinstance(data, bytes)) or zlib.crc32(data, zlib.crc32(name)) != seal:
        raise Damaged
    try:
        return decoder.decode(data)
    except msgspec.DecodeError:
        raise Damaged from None


class Index:
    """The database: read from the sweep's directory, or new, on disk or in memory."""

    def __init__(self, database: sqlite3.Connection):
        self.database = database

    @classmethod
    def stored(cls, directory: Path) -> "Index":
        """The index beside the runs.

        Raises:
            sqlite3.Error, Damaged: there is none, or none that can be used.
        """
        uri = f"{(directory / INDEX_FILE).resolve().as_uri()}?mode=ro&immutable=1"
        found = cls(sqlite3.connect(uri, uri=True))
        (stored,) = found.database.execute("PRAGMA user_version").fetchone()
        if stored != version():
            raise Damaged
        return found

    @classmethod
    def new(cls, path: Path | None, old: "Index | None") -> "Index":
        """A copy of an index, or an empty one, in a file that nobody else knows, or in memory."""
        place = f"{path.resolve().as_uri()}?nolock=1" if path else ":memory:"
        database = sqlite3.connect(place, uri=True, isolation_level=None)
        database.execute("PRAGMA synchronous = OFF")
        if old is not None:
            old.database.backup(database)
        database.execute("PRAGMA journal_mode = OFF")  # the file is thrown away unless it is finished
        if old is None:
            database.executescript(f"{TABLES} PRAGMA user_version = {version()}")
        return cls(database)

    def entries(self) -> dict[str, Entry]:
        rows = self.database.execute("SELECT name, seal, entry FROM entries")
        opened = ((name, _opened(name, seal, data, _ENTRY)) for name, seal, data in rows)
        return {os.fsdecode(name): entry for name, entry in opened}

    def kept(self, name: str) -> list[Kept]:
        row = os.fsencode(name)
        found = self.database.execute("SELECT seal, kept FROM kept WHERE name = ?", (row,)).fetchone()
        if found is None:
            raise Damaged
        seal, data = found
        kept: list[Kept] = _opened(row, seal, data, _KEPT)
        return kept

    def official(self) -> dict[str, tuple[int, ...]]:
        """The datasets' validation environments when the index was made."""
        rows = self.database.execute("SELECT dataset, environments FROM official")
        try:
            return {dataset: tuple(msgspec.json.decode(text)) for dataset, text in rows}
        except (msgspec.DecodeError, TypeError):
            raise Damaged from None

    def put(self, name: str, entry: Entry, kept: list[Kept]) -> None:
        """Raises OverflowError or UnicodeEncodeError for numbers and texts that can't be stored."""
        row = os.fsencode(name)
        self.database.execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", (row, *_sealed(row, kept)))
        self.database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", (row, *_sealed(row, entry)))

    def forget(self, names: Iterable[str]) -> None:
        rows = [(os.fsencode(name),) for name in names]
        self.database.executemany("DELETE FROM entries WHERE name = ?", rows)
        self.database.executemany("DELETE FROM kept WHERE name = ?", rows)
