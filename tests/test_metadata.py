"""CSV files as people's programs write them, and what is said of bad ones."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest

from domainbed.metadata import Problems, Table, _cells, escapes, files_below, in_order, plain_csv, read_csv


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.jpg,cat\nb.jpg,dog\n",
        "path,label\na.jpg,cat\nb.jpg,dog",
        "\ufeffpath,label\r\na.jpg,cat\r\nb.jpg,dog\r\n",
        '\ufeff"path","label"\r\n"a.jpg","cat"\r\n"b.jpg","dog"\r\n',
        "path,label\ra.jpg,cat\rb.jpg,dog\r",
        " path , label \n a.jpg , cat \n\n  b.jpg,\tdog \n , \n",
        ",path,label,\n0,a.jpg,cat,\n1,b.jpg,dog,\n",  # an index without a name, and what spreadsheets append
    ],
)
def test_ways_to_write_the_same_table(tmp_path: Path, text: str) -> None:
    table = read_csv(written(tmp_path, text), ["path", "label"])
    assert table.columns == {"path": ["a.jpg", "b.jpg"], "label": ["cat", "dog"]}


def test_quotes_hold_commas_and_quotes_and_lines_are_counted_in_the_file(tmp_path: Path) -> None:
    text = 'path,label\n"a, b.jpg" , "the ""big"" cat"\n\n 5" disk.jpg,"dog"\t\n"",dog\n'
    table = read_csv(written(tmp_path, text), ["label"])
    assert table.columns == {"path": ["a, b.jpg", '5" disk.jpg', ""], "label": ['the "big" cat', "dog", "dog"]}
    assert table.lines == [2, 4, 5]


def test_what_the_csv_module_writes_is_read_as_it_was() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        row = ["".join(rng.choice(list('ab", '), rng.integers(6))).strip() for _ in range(rng.integers(2, 5))]
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(row)
        assert _cells(text.getvalue()) == row


@pytest.mark.parametrize(
    ("rows", "bad"),
    [
        (['a,"cat', "b,dog", "c,dog"], [2]),  # the last column swallowed all that follows
        (["a,cat", 'b,"dog', "c,dog", 'd,"cat', "e,cat"], [3, 5]),  # and here all up to the next one
        (['a,"cat', 'b",cat', "c,dog"], [2]),
        (['a,"cat"s', "b,dog"], [2]),
        (['"a,cat', "b,dog"], [2]),
        (["a\0,cat", "b,dog", "c,d\x07og"], [2, 4]),
    ],
)
def test_no_row_is_swallowed(tmp_path: Path, rows: list[str], bad: list[int]) -> None:
    path = written(tmp_path, "\n".join(["path,label", *rows]))
    with pytest.raises(ValueError, match=rf"table\.csv: {len(bad)} bad rows?; give every row") as caught:
        read_csv(path, ["path", "label"])
    assert re.findall(r"\n  line (\d+): ", str(caught.value)) == [str(line) for line in bad]
    with pytest.raises(ValueError, match=f"{len(bad)} bad row"):
        plain_csv(path)


def test_a_damaged_header_is_line_1(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 bad row; .*\n  line 1: a quote is left open"):
        read_csv(written(tmp_path, 'path,"label\na,b\n'), ["path", "label"])


@pytest.mark.parametrize(
    "text",
    [
        ",path,label\n0,a.jpg,1\n1,b.jpg,2\n",
        "\ufeff,path,label\r\n0,a.jpg,1\r\n1,b.jpg,2\r\n",
        ", path ,label\n\n0 ,a.jpg, 1\n,,\n1, b.jpg,2\n",
        ',"path",label\n0,"a.jpg",1.0\n"1",b.jpg,2.00\n',
        ",path,label\n0,a.jpg,1\n\n1,b.jpg,2.",
    ],
)
def test_plain_text_for_other_readers(tmp_path: Path, text: str) -> None:
    assert plain_csv(written(tmp_path, text)).read() == ",path,label\n0,a.jpg,1\n1,b.jpg,2\n"


def test_plain_text_keeps_what_needs_quotes_and_other_numbers(tmp_path: Path) -> None:
    text = 'a,b\n"x, y", 004.0\n1.50,"say ""x"""\n'
    assert plain_csv(written(tmp_path, text)).read() == 'a,b\n"x, y",004\n1.50,"say ""x"""\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,labels\na,b\n",
            r"table\.csv, line 1: the header lacks label, place; it has path, labels, and must have",
        ),
        ("path;label;place\na;b;c\n", "it has path;label;place, and must have path, label, place, separated by commas"),
        ("", "it has nothing"),
        ("path,label,place,label\n", r"line 1: a column is named twice; the header is path, label, place, label"),
        ("path,label,place\n\n", "holds no rows below its header"),
        (
            "path,label,place\na,b,c\na,b\n\na,b,c,d\n",
            "2 bad rows; give .* as many cells.*\n  line 3: 2.*\n  line 5: 4",
        ),
        ("path,label,place\na,b,c\nd,caf\xe9,e\n".encode("latin-1"), "table.csv, line 3: not UTF-8"),
        ("path,label,place\na,b,c\n" + '"' + "x" * 200_000, "line 3: a quote is left open"),
    ],
)
def test_files_that_are_no_such_table(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_csv(written(tmp_path, text), ["path", "label", "place"])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file; it must be a CSV with the columns a, b"):
        read_csv(tmp_path / "none.csv", ["a", "b"])


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    problems = Problems(Path("x.csv"))
    problems.raise_if_any("do nothing")
    for line in range(30, 2, -1):
        problems.add(line, f"wrong {line}")
    problems.add(3, "late")
    with pytest.raises(ValueError, match=r"x\.csv") as caught:
        problems.raise_if_any("mend them")
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["x.csv: 28 bad rows; mend them", "  line 3: late; wrong 3"]
    assert lines[-2:] == ["  line 22: wrong 22", "  ... and 8 more"]
    assert len(lines) == 22


def test_integers() -> None:
    cells = ["0", "2.0", "+1", "3", "-1", "cat", "", "1_0", "1e0", "1.5", "inf", "\u0661", "9" * 5000]
    table = Table(Path("x.csv"), list(range(2, 2 + len(cells))), {"y": cells})
    problems = Problems(table.path)
    assert table.integers("y", range(11), problems).tolist() == [0, 2, 1, 3] + [0] * 9
    problems = Problems(table.path)
    assert table.integers("y", range(3), problems).tolist() == [0, 2, 1] + [0] * 10
    assert [line for line, _ in problems.found] == list(range(5, 15))
    assert problems.found[0][1] == "y is '3'; allowed: 0 to 2"
    two = Problems(table.path)
    table.integers("y", (-1, 1), two)
    assert two.found[0][1] == "y is '0'; allowed: -1 or 1"


def test_categories() -> None:
    table = Table(Path("x.csv"), [2, 3, 4, 5], {"y": ["10", "9", "", "10"], "z": ["b", "a", "c", "b"]})
    problems = Problems(table.path)
    names, values = table.categories("y", problems)
    assert (names, values.tolist()) == (("9", "10"), [1, 0, -1, 1])
    assert problems.found == [(4, "y is empty")]
    names, values = table.categories("z", problems, names=["b", "a"])
    assert (names, values.tolist()) == (("b", "a"), [0, 1, -1, 0])
    assert problems.found[1:] == [(4, "z is 'c'; allowed: b, a")]
    names, values = table.categories("z", problems, rows=[1, 2])
    assert (names, values.tolist()) == (("a", "c"), [-1, 0, 1, -1])
    assert values.dtype == np.int64


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["1", "01"], ("01", "1")),
        (["\u00b2", "1"], ("1", "\u00b2")),  # a digit that is no whole number
    ],
)
def test_order_of_names(names: list[str], expected: tuple[str, ...]) -> None:
    assert in_order(set(names)) == expected


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/a", "\\a", "C:\\a", "c:/a", "a\\..\\..\\b", "./../a"])
def test_paths_that_escape(path: str) -> None:
    assert escapes(path)


@pytest.mark.parametrize("path", ["a", "a/b", "a/../b", "./a", "a..b", "..a/b", "a/..b"])
def test_paths_that_stay(path: str) -> None:
    assert not escapes(path)


def test_paths_are_checked_together(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "in/b.jpg"):
        (tmp_path / name).touch()
    names = [
        "a.jpg",
        "in/b.jpg",
        "",
        "../a.jpg",
        "/a.jpg",
        "in//b.jpg",
        "in/../a.jpg",
        "c.jpg",
        "in",
        "no/a.jpg",
        "a\0",
    ]
    table = Table(tmp_path / "x.csv", list(range(2, 2 + len(names))), {"path": names})
    problems = Problems(table.path)
    table.check_paths("path", tmp_path, problems)
    assert sorted(problems.found) == [
        (4, "path is empty"),
        (5, f"path '../a.jpg' leads out of {tmp_path}"),
        (6, f"path '/a.jpg' leads out of {tmp_path}"),
        (7, "path 'in//b.jpg' stands on line 3 already"),
        (8, "path 'in/../a.jpg' stands on line 2 already"),
        (9, f"path 'c.jpg': no such file in {tmp_path}"),
        (10, f"path 'in': no such file in {tmp_path}"),
        (11, f"path 'no/a.jpg': no such file in {tmp_path}"),
        (12, f"path 'a\\x00': no such file in {tmp_path}"),
    ]


def test_files_below(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").touch()
    assert files_below(tmp_path, ["d/a", "d/b", "d", "e/a", "d\0/a"]) == {"d/a"}
