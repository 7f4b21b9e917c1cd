"""The index's database: what was read of each results file, sealed by checksums."""

import os
import sqlite3
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from domainbed.condensing import Summary
from domainbed.condensing.lines import SHARED, Segment
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


# What is stored, and what it was made by; an index of another version is made anew.
VERSION = zlib.crc32(repr((1, TABLES, Entry.__struct_fields__, Summary.__struct_fields__, sorted(NOT_ROW))).encode())


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


_ENCODER = msgspec.msgpack.Encoder()
_ENTRY = msgspec.msgpack.Decoder(Entry)
_KEPT = msgspec.msgpack.Decoder(list[Kept])


class Damaged(Exception):
    """The index does not hold what was put in."""


def _sealed(value: Any) -> tuple[int, bytes]:
    data = _ENCODER.encode(value)
    return zlib.crc32(data), data


def _opened(seal: int, data: bytes, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    if zlib.crc32(data) != seal:
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
        (version,) = found.database.execute("PRAGMA user_version").fetchone()
        if version != VERSION & 0x7FFFFFFF:
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
            database.executescript(f"{TABLES} PRAGMA user_version = {VERSION & 0x7FFFFFFF}")
        return cls(database)

    def entries(self) -> dict[str, Entry]:
        rows = self.database.execute("SELECT name, seal, entry FROM entries")
        return {os.fsdecode(name): _opened(seal, data, _ENTRY) for name, seal, data in rows}

    def kept(self, name: str) -> list[Kept]:
        found = self.database.execute("SELECT seal, kept FROM kept WHERE name = ?", (os.fsencode(name),)).fetchone()
        if found is None:
            raise Damaged
        seal, data = found
        kept: list[Kept] = _opened(seal, data, _KEPT)
        return kept

    def official(self) -> dict[str, tuple[int, ...]]:
        """The datasets' validation environments when the index was made."""
        rows = self.database.execute("SELECT dataset, environments FROM official")
        return {dataset: tuple(msgspec.json.decode(text)) for dataset, text in rows}

    def put(self, name: str, entry: Entry, kept: list[Kept]) -> None:
        """Raises OverflowError or UnicodeEncodeError for numbers and texts that can't be stored."""
        row = os.fsencode(name)
        self.database.execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", (row, *_sealed(kept)))
        self.database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", (row, *_sealed(entry)))

    def forget(self, names: Iterable[str]) -> None:
        rows = [(os.fsencode(name),) for name in names]
        self.database.executemany("DELETE FROM entries WHERE name = ?", rows)
        self.database.executemany("DELETE FROM kept WHERE name = ?", rows)
