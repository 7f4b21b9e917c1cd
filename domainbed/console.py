"""What runs and collectors print: table rows in DomainBed's layout, and a stream that is also kept in a file."""

import io
import os
import sys
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TextIO


def _cell(value: object, width: int) -> str:
    is_float = isinstance(value, Real) and not isinstance(value, Integral)  # numpy's scalars too
    return (f"{value:.10f}" if is_float else str(value)).ljust(width)[:width]


def format_row(row: Iterable[object], colwidth: int = 10, latex: bool = False) -> str:
    """The line that ``print_row`` prints, without its newline."""
    separator, end = (" & ", "\\\\") if latex else ("  ", "")
    return f"{separator.join(_cell(value, colwidth) for value in row)} {end}"


def print_row(row: Iterable[object], colwidth: int = 10, latex: bool = False) -> None:
    r"""Prints one line of a table.

    Args:
        row: the cells; floats get ten decimals before every cell is padded and cut.
        colwidth: width of a cell in characters.
        latex: separate cells by ``&`` and end the line with ``\\``.
    """
    print(format_row(row, colwidth, latex))


def print_separator() -> None:
    """Prints a line across the console."""
    print("=" * 80)


class Tee(io.TextIOBase):
    """A stream that writes to the console and to a file; assign it to ``sys.stdout`` or ``sys.stderr``.

    Args:
        fname: the file, flushed after each write so that a killed run keeps its last words.
        mode: "a" to append, "w" to start anew.
        stream: the console stream; default is what ``sys.stdout`` is now.
    """

    def __init__(self, fname: str | os.PathLike[str], mode: str = "a", stream: TextIO | None = None):
        self.stdout = sys.stdout if stream is None else stream
        self.file = open(fname, mode, encoding="utf-8")  # noqa: SIM115 -- closed in close()

    def write(self, message: str) -> int:
        self.stdout.write(message)
        self.file.write(message)
        self.flush()
        return len(message)

    def flush(self) -> None:
        self.stdout.flush()
        self.file.flush()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """The console's, for those who write past Python (faulthandler)."""
        return self.stdout.fileno()

    def close(self) -> None:
        """Closes the file; the console stays open."""
        self.file.close()
