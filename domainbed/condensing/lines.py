"""A results file -> its records as tuples of values, parsed at once where all lines have the same keys, as mostly."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from domainbed.records import is_checkpoint, is_step

Keys = tuple[str, ...]
Values = Sequence[Any]
Line = tuple[int, Values]  # of a record: the number of its shape, and what stands under the shape's keys

SHARED = ("args", "hparams")


@dataclass
class Segment:
    """The lines of a file that have the same arguments and hparams, in order; mostly a whole file, and a run.

    Attributes:
        args, hparams: of all lines, in which anything may stand in their place.
        shapes: the keys of the records.
        lines: the records.
    """

    args: dict[str, Any]
    hparams: Any
    shapes: list[Keys]
    lines: list[Line]

    def records(self) -> list[dict[str, Any]]:
        """As ``records.read`` gives them, but that all have the same two objects as args and hparams."""
        shared = {"args": self.args, "hparams": self.hparams}
        found = [dict(zip(self.shapes[number], values, strict=True)) for number, values in self.lines]
        return [record | shared if "hparams" in record else record | {"args": self.args} for record in found]

    def column(self, key: str) -> list[Any]:
        """Each line's value of the key; None in lines without it."""
        places = [shape.index(key) if key in shape else None for shape in self.shapes]
        return [None if (place := places[number]) is None else values[place] for number, values in self.lines]


@functools.lru_cache(maxsize=1024)
def _decoder(shape: Keys) -> msgspec.json.Decoder[Any]:
    """For lines with exactly these keys."""
    types = [msgspec.Raw if key in SHARED else object for key in shape]
    fields = [(f"f{i}", kind, msgspec.field(name=shape[i])) for i, kind in enumerate(types)]
    return msgspec.json.Decoder(msgspec.defstruct("Line", fields, forbid_unknown_fields=True, gc=False))


def parse(data: bytes) -> tuple[list[Segment], int]:
    """The records in a file, and the number of lines that hold none (``records.read``).

    A record that does not say which run and step it is of counts as foreign, too.
    """
    try:
        segment = _regular(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        segment = None
    return ([segment], 0) if segment is not None else _irregular(data)


def _regular(data: bytes) -> Segment | None:
    """The one segment of a file whose lines have the same keys, arguments and hparams; None for any other file."""
    first = msgspec.json.decode(data[: data.find(b"\n") + 1])
    if not data.endswith(b"\n") or b"\r" in data or not is_checkpoint(first):
        return None
    shape = tuple(first)
    structs = _decoder(shape).decode_lines(data)
    lines = [msgspec.structs.astuple(struct) for struct in structs]
    if data.count(b"\n") != len(lines):
        return None
    shared = [i for i, key in enumerate(shape) if key in SHARED]
    if any([line[i] for line in lines].count(lines[0][i]) < len(lines) for i in shared):
        return None
    segment = Segment(first["args"], first.get("hparams"), [shape], [(0, line) for line in lines])
    return segment if all(map(is_step, segment.column("step"))) else None


def _irregular(data: bytes) -> tuple[list[Segment], int]:
    """Line by line."""
    segments: dict[str, Segment] = {}
    skipped = 0
    for line in data.splitlines():
        text = line.decode("utf-8", "replace")
        if not text.strip():
            continue
        record = _decoded(line, text)
        if not is_checkpoint(record):
            skipped += 1
            continue
        args, hparams = record["args"], record.get("hparams")
        written = json.dumps([args, hparams], sort_keys=True)  # NaN does not equal itself, but is written alike
        segment = segments.setdefault(written, Segment(args, hparams, [], []))
        shape = tuple(record)
        if shape not in segment.shapes:
            segment.shapes.append(shape)
        segment.lines.append((segment.shapes.index(shape), tuple(record.values())))
    return [*segments.values()], skipped


def _decoded(line: bytes, text: str) -> Any:
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # NaN, say, which msgspec refuses
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def numbers(values: Sequence[Any]) -> Sequence[float]:
    """Those of the values that are numbers."""
    return values if set(map(type, values)) <= {int, float} else [value for value in values if is_number(value)]
