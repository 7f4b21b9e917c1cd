"""Tables as HTML: sortable, filterable, best and second best also for those who hear the page."""

from collections.abc import Sequence
from html import escape

from domainbed.table_formats import INTERVALS_NOTE, MISSING, Cell, Table

ORACLE_NOTE = "Oracle selection: it looks at the test environment, so it bounds what choosing can do and is no method."
FILTER_FROM = 4  # rows: fewer are seen at once
_MARKS = {"best": ("strong", "best"), "second": ("em", "second best")}


def table_html(table: Table, key: str) -> str:
    """A table in a container that scrolls on its own.

    Args:
        key: an id that no other part of the page has.
    """
    head = "".join(_head_cell(text) for text in table.header)
    body = "".join(f"<tr>{_row(cells)}</tr>" for cells in table.rows)
    return (
        f'<div class="table-block" id="{key}">{_filter(table, key)}'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{key}-title">'
        f'<table class="sortable"><caption id="{key}-title">{escape(table.title)}{oracle_badge(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{_notes(table)}</div>"
    )


def is_oracle(text: str) -> bool:
    """Whether a title or name speaks of a choice that looks at the test environment."""
    return "oracle" in text.lower()


def oracle_badge(text: str) -> str:
    return f' <span class="badge oracle" title="{escape(ORACLE_NOTE)}">oracle</span>' if is_oracle(text) else ""


def _filter(table: Table, key: str) -> str:
    if len(table.rows) < FILTER_FROM:
        return ""
    return (
        f'<p class="filter needs-js"><label for="{key}-filter">Filter rows</label> '
        f'<input id="{key}-filter" type="search" autocomplete="off" data-table="{key}"> '
        f'<span class="count" role="status"></span></p>'
    )


def _head_cell(text: str) -> str:
    return (
        f'<th scope="col"><button type="button" class="sort">{escape(text)}'
        '<span class="arrow" aria-hidden="true"></span></button></th>'
    )


def _row(cells: Sequence[Cell | str]) -> str:
    first, *others = (cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)
    return f'<th scope="row"{_value(first)}>{_content(first)}</th>' + "".join(
        f"<td{_value(cell)}>{_content(cell)}</td>" for cell in others
    )


def _value(cell: Cell) -> str:
    """The number that sorts the cell, where one is known."""
    value = cell.values.get("mean", cell.values.get("value"))
    return f' data-v="{value:.6g}"' if isinstance(value, int | float) else ""


def _content(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.text == MISSING:
        return '<span class="missing">X<span class="sr"> (none)</span></span>'
    if cell.mark:
        tag, words = _MARKS[cell.mark]
        text = f'<{tag} class="{cell.mark}">{text}</{tag}><span class="sr"> ({words})</span>'
    interval = f' <span class="interval">{escape(cell.interval)}</span>' if cell.interval else ""
    return text + oracle_badge(cell.text) + interval


def _notes(table: Table) -> str:
    sentences = [*table.notes, *table.after]
    if any(isinstance(cell, Cell) and cell.interval for row in table.rows for cell in row):
        sentences.append(INTERVALS_NOTE)
    if is_oracle(table.title):
        sentences.append(ORACLE_NOTE)
    return "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in sentences)
