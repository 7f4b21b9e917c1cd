"""Tables as data, and how they are written: text, LaTeX, Markdown, CSV, JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MISSING = "X"

Number = float | int | str | None


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Attributes:
        text: as the text table shows it.
        values: the numbers behind it, unrounded, by name ("mean", "sd", "n", "low", "high" ...); accuracies are
            fractions. For formats that machines read. Empty: the text is all there is.
        mark: whether it is the best or the second best of its column.
    """

    text: str
    values: Mapping[str, Number] = field(default_factory=dict)
    mark: Literal["", "best", "second"] = ""


@dataclass(frozen=True)
class Table:
    """A table with everything that one needs to read it.

    Attributes:
        title: what it shows, and how what it shows was selected.
        notes: sentences on what its numbers are.
        header: of each column.
        rows: the cells of each line, as many as the header; a plain string is a cell without numbers.
        after: sentences that follow from the table.
    """

    title: str
    notes: Sequence[str]
    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    after: Sequence[str] = ()
