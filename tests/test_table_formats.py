"""Tables in each format, by hand and read back by what reads such files."""

import csv
import json

import pytest

from domainbed import table_formats
from domainbed.intervals import bootstrap_interval
from domainbed.table_formats import Cell, Table, marked, render, with_intervals

WGA = Cell("50.0 ± 1.0", {"mean": 0.5, "sd": 0.01, "n": 3}, "best", "[40.0, 60.0]")
FIRST = Table(
    "First | table",
    ["A note."],
    ["Row", "WGA", "Holm", "Words"],
    [["a|b_c", WGA, Cell("<0.001", {"value": 0.0004}), "better"], ["*", "X", "X", "X"]],
    ["It follows."],
)
SECOND = Table("Second", [], ["Row", "AA"], [["[x]", Cell("1", {"mean": float("nan"), "n": 0}, "second")]])


def test_text():
    assert render([FIRST, SECOND], "text").split("\n") == [
        "",
        "-------- First | table",
        "A note.",
        "*: the best of its column; +: the second best.",
        "Row    WGA           Holm    Words",
        "a|b_c  50.0 ± 1.0 *  <0.001  better",
        "*      X             X       X",
        "It follows.",
        "",
        "-------- Second",
        "*: the best of its column; +: the second best.",
        "Row  AA",
        "[x]  1 +",
        "",
    ]


def test_markdown():
    assert render([FIRST], "markdown").split("\n") == [
        "",
        r"### First \| table",
        "",
        "A note. Bold: the best of its column; underlined: the second best.",
        "",
        "| Row | WGA | Holm | Words |",
        "| --- | --- | --- | --- |",
        r"| a\|b\_c | **50.0 ± 1.0** | \<0.001 | better |",
        r"| \* | X | X | X |",
        "",
        "It follows.",
        "",
    ]
    assert "<u>1</u>" in render([SECOND], "markdown")


def test_latex():
    text = render([FIRST, SECOND], "latex", "All & everything", "Total records:\n3")
    assert text.startswith("\\documentclass{article}\n")
    assert text.endswith("\\end{document}\n")
    assert "\\section{All \\& everything}\n% Total records: 3\n" in text
    assert r"\textbf{50.0 $\pm$ 1.0}" in text
    assert r"\underline{1}" in text
    assert "\n{}* " in text  # not the option of the \\ before it
    assert "\n{}[x]" in text
    assert text.index(r"\end{tabular}}") < text.index("It follows.")
    assert text.isascii()
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_csv():
    first, last, second = csv.DictReader(render([FIRST, SECOND], "csv").splitlines())
    assert list(first) == ["table", "notes", "Row", "WGA mean", "WGA sd", "WGA n", "Holm", "Words", "AA mean", "AA n"]
    notes = f"A note. {table_formats.UNROUNDED_NOTE}"
    assert [*first.values()] == ["First | table", notes, "a|b_c", "0.5", "0.01", "3", "0.0004", "better", "", ""]
    assert [*last.values()] == ["First | table", "", "*", "", "", "", "", "", "", ""]
    assert (
        second["notes"]
        == table_formats.UNROUNDED_NOTE
        == ("Numbers beside text are unrounded; accuracies are fractions.")
    )
    assert (second["table"], second["Row"], second["AA mean"], second["AA n"]) == ("Second", "[x]", "", "0")


def test_trials_and_their_bootstrap_interval_are_for_machines():
    trials = [0.5, 0.75, 0.25, 0.625]
    table = Table("T", [], ["Name", "AA"], [["a", Cell("53.1", {"mean": 0.53125}, trials=trials)]])
    (row,) = json.loads(render([table], "json"))["tables"][0]["rows"]
    low, high = bootstrap_interval(trials)
    interval = {"bootstrap_low": low, "bootstrap_high": high}
    assert row["AA"] == {"text": "53.1", "mean": 0.53125, **interval, "trials": trials}
    assert f"a,0.53125,{low},{high}" in render([table], "csv")
    assert min(trials) <= low < 0.53125 < high <= max(trials)


def test_words_among_numbers_are_not_lost_in_csv():
    table = Table("t", [], ["n"], [[Cell("3", {"value": 3})], ["three"], ["X"]])
    assert render([table], "csv") == (f"table,notes,n,n text\nt,{table_formats.UNROUNDED_NOTE},3,\nt,,,three\nt,,,\n")


def test_json():
    found = json.loads(render([FIRST, SECOND], "json", "name", "comment"), parse_constant=pytest.fail)
    assert (found["name"], found["comment"], len(found["tables"])) == ("name", "comment", 2)
    first, second = found["tables"]
    notes = ["A note.", table_formats.UNROUNDED_NOTE]
    assert (first["title"], first["notes"], first["after"]) == (FIRST.title, notes, ["It follows."])
    assert first["columns"] == FIRST.header
    assert first["rows"][0]["WGA"] == {"text": "50.0 ± 1.0", "mean": 0.5, "sd": 0.01, "n": 3, "mark": "best"}
    assert first["rows"][1]["WGA"] == {"text": "X"}
    assert second["rows"][0]["AA"]["mean"] is None


@pytest.mark.parametrize("format", table_formats.SUFFIXES)
def test_nothing_of_no_tables(format):
    assert render([], format) == ""


def test_an_unknown_format_is_an_error():
    with pytest.raises(ValueError, match="format 'html' is unknown; choose among text, latex, markdown, csv, json"):
        render([FIRST], "html")


def test_intervals_on_request():
    plain, shown = render([FIRST], "text"), render(with_intervals([FIRST]), "text")
    assert "[40.0, 60.0]" not in plain
    assert "50.0 ± 1.0 [40.0, 60.0] *" in shown
    assert table_formats.INTERVALS_NOTE in shown
    assert with_intervals([SECOND]) == [SECOND]


class TestMarks:
    def marks(self, *means):
        cells = ["X" if mean is None else Cell(str(mean), {"mean": mean}) for mean in means]
        return [getattr(cell, "mark", None) for cell in marked(cells)]

    def test_the_two_best(self):
        assert self.marks(0.1, 0.4, None, 0.3) == ["", "best", None, "second"]

    def test_ties_share_despite_rounding(self):
        assert self.marks(0.3, 0.1 + 0.2, 0.2, 0.2, 0.1) == ["best", "best", "second", "second", ""]

    def test_nan_takes_no_part(self):
        nan = float("nan")
        assert self.marks(nan, 0.1, 0.4, nan, 0.3) == ["", "", "best", "", "second"]
        assert self.marks(0.4, nan, 0.3, 0.1) == ["best", "", "second", ""]
        assert self.marks(nan, 0.1) == ["", "best"]
        assert self.marks(nan) == [""]

    def test_too_few_for_both(self):
        assert self.marks(0.5) == ["best"]
        assert self.marks(None) == [None]
        assert marked([]) == []


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("λΩα", r"$\lambda$$\Omega$$\alpha$"),
        ("1 \N{EN DASH} 2 ± 3 ≤ 4 > 3 | --x", r"1 \textendash{} 2 $\pm$ 3 $\le$ 4 $>$ 3 $|$ -{}-x"),
        ("é ß ň", r"\'{e} \ss{} \v{n}"),
        ("a\tb", "a b"),
        ("\N{SNOWMAN}", "[U+2603]"),
    ],
)
def test_latex_of_what_is_not_plain(text, latex):
    assert table_formats.escape(text) == latex
