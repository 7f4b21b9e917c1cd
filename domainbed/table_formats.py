"""Tables as data, and how they are written: text, LaTeX, Markdown, CSV, JSON."""

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from domainbed.intervals import bootstrap_interval

MISSING = "X"
SUFFIXES = {"text": "txt", "latex": "tex", "markdown": "md", "csv": "csv", "json": "json"}  # of files, by format
LATEX_PLUS_MINUS = r"$\pm$"
LATEX_SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\~{}",
    "^": r"\^{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": LATEX_PLUS_MINUS,
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "≈": r"$\approx$",
    "≠": r"$\ne$",
    "·": r"$\cdot$",
    "→": r"$\to$",
    "←": r"$\leftarrow$",
    "∞": r"$\infty$",
    "√": r"$\surd$",
    "°": r"$^{\circ}$",
    "…": r"\dots{}",
    "“": "``",
    "”": "''",
    "ß": r"\ss{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": r"\textendash{}",
    "\N{EM DASH}": r"\textemdash{}",
    "\N{LEFT SINGLE QUOTATION MARK}": "`",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{MICRO SIGN}": r"$\mu$",
}
_SMALL = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon"
_SMALL += " phi chi psi omega"
_CAPITAL = "gamma delta theta lambda xi pi sigma upsilon phi psi omega"  # the others look like Latin ones
for _case, _names, _style in ("SMALL", _SMALL, str.lower), ("CAPITAL", _CAPITAL, str.title):
    for _name in _names.split():
        _letter = unicodedata.lookup(f"GREEK {_case} LETTER {_name.upper().replace('LAMBDA', 'LAMDA')}")
        LATEX_SPECIAL[_letter] = rf"$\{_style(_name)}$"
WIDE_PAGE = r"\usepackage[a4paper, landscape, margin=1.5cm]{geometry}"
ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0304\u0308\u030a\u030c\u0327", "`'^~=\"rvc", strict=True))

Number = float | int | str | None


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Attributes:
        text: as the text table shows it.
        values: the numbers behind it, unrounded, by name ("mean", "sd", "n", "low", "high" ...); accuracies are
            fractions. For formats that machines read; "value" is a number that needs no other name than its column's.
            Empty: the text is all there is.
        mark: whether it is the best or the second best of its column.
        interval: the interval from low to high as text, which ``with_intervals`` shows.
        trials: what the mean is of, one number per seed.
    """

    text: str
    values: Mapping[str, Number] = field(default_factory=dict)
    mark: Literal["", "best", "second"] = ""
    interval: str = ""
    trials: Sequence[float] = ()

    @property
    def numbers(self) -> dict[str, Number]:
        """The values, and low and high of the bootstrap interval of the mean where there are trials to draw from."""
        bootstrap = bootstrap_interval(self.trials) or (None, None)
        named = dict(zip(("bootstrap_low", "bootstrap_high"), bootstrap, strict=True)) if self.trials else {}
        return {key: _finite(value) for key, value in {**self.values, **named}.items()}


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


INTERVALS_NOTE = "[...]: 95% t interval of the mean over seeds; of few seeds it may reach beyond 0 or 100."
UNROUNDED_NOTE = "Numbers beside text are unrounded; accuracies are fractions."  # in formats that machines read
MARKS_NOTE = {
    "text": "*: the best of its column; +: the second best.",
    "markdown": "Bold: the best of its column; underlined: the second best.",
}
MARKS = {
    "text": {"best": "{} *", "second": "{} +"},
    "latex": {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"},
    "markdown": {"best": "**{}**", "second": "<u>{}</u>"},
}
MARKS_NOTE["latex"] = MARKS_NOTE["markdown"]


def marked(column: Sequence[Cell | str]) -> list[Cell | str]:
    """The cells of a column with marks on the largest mean and on the one after it; equal means share a mark.

    NaN gets none.
    """
    means = [_mean(_cell(cell)) for cell in column]
    best, second, *_ = [*sorted({mean for mean in means if mean is not None}, reverse=True), None, None]

    def mark(cell: Cell | str, mean: float | None) -> Cell | str:
        if mean is None or mean not in (best, second):
            return cell
        return replace(_cell(cell), mark="best" if mean == best else "second")

    return [mark(cell, mean) for cell, mean in zip(column, means, strict=True)]


def _mean(cell: Cell) -> float | None:
    """What marks go by; None for NaN, which has no place in an order."""
    mean = cell.values.get("mean")
    return None if mean is None or math.isnan(float(mean)) else round(float(mean), 12)


def with_intervals(tables: Iterable[Table]) -> list[Table]:
    """The tables with the interval of each cell that has one in its text."""
    found = []
    for table in tables:
        rows = [[_with_interval(cell) for cell in row] for row in table.rows]
        some = any(_cell(cell).interval for row in table.rows for cell in row)
        found.append(replace(table, rows=rows, notes=[*table.notes, INTERVALS_NOTE] if some else table.notes))
    return found


def _with_interval(cell: Cell | str) -> Cell | str:
    if isinstance(cell, str) or not cell.interval:
        return cell
    return replace(cell, text=f"{cell.text} {cell.interval}")


def render(tables: Sequence[Table], format: str, name: str = "", comment: str = "") -> str:
    """The content of a file with all these tables; empty without tables.

    LaTeX is one document that compiles as it is. CSV has one line for each line of a table, which the first column
    names, and a column for each number of a cell ("WGA mean", "WGA sd", ...); a table's first line has its notes. JSON
    is what ``as_data`` returns.

    Args:
        format: a name in SUFFIXES.
        name: title of the whole, where the format has a place for it.
        comment: what it was made from, likewise.

    Raises:
        ValueError: no such format.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format {format!r} is unknown; choose among {', '.join(SUFFIXES)}")
    if not tables:
        return ""
    if format == "json":
        return json.dumps(as_data(tables, name, comment), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if format == "csv":
        return _csv(tables)
    if format == "latex":
        return document("".join(map(_latex, tables)), escape(name), " ".join(comment.split()), [WIDE_PAGE])
    return "".join(map(_markdown if format == "markdown" else _text, tables))


def _cell(cell: Cell | str) -> Cell:
    return Cell(cell) if isinstance(cell, str) else cell


def _shown(table: Table, format: str, escaped: Callable[[str], str]) -> list[list[str]]:
    """The text of all cells, escaped and with their marks."""
    marks = {"": "{}"} | MARKS[format]
    return [[marks[cell.mark].format(escaped(cell.text)) for cell in map(_cell, row)] for row in table.rows]


def _notes(table: Table, format: str) -> list[str]:
    marks = any(_cell(cell).mark for row in table.rows for cell in row)
    return [*table.notes, *([MARKS_NOTE[format]] if marks else [])]


def _text(table: Table) -> str:
    rows = [list(table.header), *_shown(table, "text", str)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(["", f"-------- {table.title}", *_notes(table, "text"), *lines, *table.after, ""])


def escape(text: object) -> str:
    """The text as LaTeX shows it, in ASCII; characters that it can't show by their code points."""
    return "".join(map(_latex_character, str(text))).replace("--", "-{}-")


def _latex_character(character: str) -> str:
    if character in LATEX_SPECIAL:
        return LATEX_SPECIAL[character]
    if character.isascii():
        return character if character.isprintable() else " "
    decomposed = unicodedata.normalize("NFKD", character)
    base, accents = decomposed[0], decomposed[1:]
    if base.isascii() and base.isprintable() and all(accent in ACCENTS for accent in accents):
        letter = LATEX_SPECIAL.get(base, base)
        for accent in accents:
            letter = rf"\{ACCENTS[accent]}{{{letter}}}"
        return letter
    return f"[U+{ord(character):04X}]"


def document(body: str, title: str, comment: str, packages: Iterable[str] = ()) -> str:
    """A LaTeX file that compiles as it is."""
    head = [r"\documentclass{article}", r"\usepackage{booktabs}", r"\usepackage{adjustbox}"]
    return "\n".join(
        [*head, *packages, r"\begin{document}", rf"\section{{{title}}}", f"% {comment}", body + r"\end{document}", ""]
    )


def _latex_line(cells: Iterable[object], colwidth: int) -> str:
    """As ``console.format_row``, but no cell is cut, which could lose a brace."""
    return " & ".join(str(cell).ljust(colwidth) for cell in cells) + " \\\\"


def tabular(
    header: Sequence[str], body: Sequence[Sequence[str]], colwidth: int, box: str = r"max width=\textwidth"
) -> list[str]:
    """A LaTeX table scaled to the page; the body's first column holds plain text, the others LaTeX."""
    return [
        r"\begin{center}",
        rf"\adjustbox{{{box}}}{{%",
        rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}",
        r"\toprule",
        _latex_line([rf"\textbf{{{escape(label)}}}" for label in header], colwidth),
        r"\midrule",
        *(_latex_line([_line_start(label), *cells], colwidth) for label, *cells in body),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{center}",
    ]


def _line_start(label: str) -> str:
    """The label, which the end of the line before it must not take for its own option (``\\\\[...]``, ``\\\\*``)."""
    return ("{}" if label.startswith(("[", "*")) else "") + escape(label)


def _latex(table: Table) -> str:
    marks = {"": "{}"} | MARKS["latex"]
    body = [
        [_cell(row[0]).text, *(marks[cell.mark].format(escape(cell.text)) for cell in map(_cell, row[1:]))]
        for row in table.rows
    ]
    width = max(map(len, [*table.header, *(cell for row in body for cell in row)]))
    about = rf"\noindent\textbf{{{escape(table.title)}.}} {escape(' '.join(_notes(table, 'latex')))}".rstrip()
    box = r"max width=\textwidth, max totalheight=.85\textheight"
    after = [f"\n\\noindent {escape(sentence)}" for sentence in table.after]
    return "\n".join(["", about, *tabular(table.header, body, width, box), *after, ""])


def _markdown(table: Table) -> str:
    rows = [[_markdown_escape(label) for label in table.header], *_shown(table, "markdown", _markdown_escape)]
    rule = ["---"] * len(table.header)
    lines = ["| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]]]
    sentences = [_markdown_escape(sentence) for sentence in _notes(table, "markdown")]
    after = [f"\n{_markdown_escape(sentence)}" for sentence in table.after]
    return "\n".join([f"\n### {_markdown_escape(table.title)}\n", " ".join(sentences), "", *lines, *after, ""])


def _markdown_escape(text: str) -> str:
    """Plain text in Markdown, on one line; in GitHub's tables a pipe is escaped, too."""
    return re.sub(r"([\\`*_{}\[\]<>|~$])", r"\\\1", " ".join(text.split()))


def as_data(tables: Iterable[Table], name: str = "", comment: str = "") -> dict[str, Any]:
    """The tables as JSON has them: each row by column, each cell with its text and numbers; NaN and infinity: null."""
    return {"name": name, "comment": comment, "tables": [_table_data(table) for table in tables]}


def _table_data(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "notes": _data_notes(table),
        "columns": list(table.header),
        "rows": [dict(zip(table.header, map(_cell_data, row), strict=True)) for row in table.rows],
        "after": list(table.after),
    }


def _data_notes(table: Table) -> list[str]:
    return [*table.notes, UNROUNDED_NOTE]


def _cell_data(cell: Cell | str) -> dict[str, Any]:
    cell = _cell(cell)
    mark = {"mark": cell.mark} if cell.mark else {}
    trials = {"trials": [_finite(value) for value in cell.trials]} if cell.trials else {}
    return {"text": cell.text, **cell.numbers, **trials, **mark}


def _finite(value: Number) -> Number:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(tables: Sequence[Table]) -> str:
    rows = []
    for table in tables:
        numbers = {name: any(_cell(row[i]).values for row in table.rows) for i, name in enumerate(table.header)}
        for i, row in enumerate(table.rows):
            notes = "" if i else " ".join(_data_notes(table))
            rows.append({"table": table.title, "notes": notes, **_csv_row(table.header, row, numbers)})
    columns = dict.fromkeys(column for row in rows for column in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _csv_row(header: Sequence[str], row: Sequence[Cell | str], numbers: Mapping[str, bool]) -> dict[str, Number]:
    """The fields of a line; a plain cell in a column of numbers is in a field of its own, and MISSING is empty."""
    found: dict[str, Number] = {}
    for name, cell in zip(header, map(_cell, row), strict=True):
        for key, value in cell.numbers.items():
            found[name if key == "value" else f"{name} {key}"] = value
        if not numbers[name]:
            found[name] = "" if cell.text == MISSING else cell.text
        elif not cell.values and cell.text != MISSING:
            found[f"{name} text"] = cell.text
    return found
