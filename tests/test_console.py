"""Table rows against lines written out by hand; the tee against its two ends."""

import io
import sys

import numpy as np
import pytest

from domainbed.console import Tee, print_row, print_separator


@pytest.mark.parametrize(
    ("row", "options", "line"),
    [
        (["a", "b"], {}, f"a{11 * ' '}b{10 * ' '}\n"),
        ([0.5, 3], {}, f"0.50000000  3{10 * ' '}\n"),
        ([np.float32(0.5), np.float64(0.25), np.int64(7)], {"colwidth": 4}, "0.50  0.25  7    \n"),
        (["averylongcell", True], {"colwidth": 5}, "avery  True  \n"),
        (["a", 1.5], {"colwidth": 3, "latex": True}, "a   & 1.5 \\\\\n"),
    ],
)
def test_print_row(capsys, row, options, line):
    print_row(row, **options)
    assert capsys.readouterr().out == line


def test_print_row_gives_floats_ten_decimals(capsys):
    print_row([1 / 3], colwidth=20)
    assert capsys.readouterr().out == "0.3333333333         \n"


def test_print_separator_is_one_line(capsys):
    print_separator()
    out = capsys.readouterr().out
    assert set(out[:-1]) == {"="}
    assert out.endswith("=\n")


def test_tee_writes_to_console_and_file_at_once(tmp_path, capsys, monkeypatch):
    tee = Tee(tmp_path / "out.txt")
    monkeypatch.setattr(sys, "stdout", tee)
    print("first")
    assert (tmp_path / "out.txt").read_text() == "first\n"
    assert capsys.readouterr().out == "first\n"
    tee.close()


def test_tee_appends_or_starts_anew(tmp_path):
    path, console = tmp_path / "err.txt", io.StringIO()
    for mode, word in (("a", "one"), ("a", "two")):
        with Tee(path, mode, console) as tee:
            tee.write(word)
    assert path.read_text() == "onetwo"
    with Tee(path, "w", console) as tee:
        tee.write("new")
    assert path.read_text() == "new"
    assert console.getvalue() == "onetwonew"
    assert not console.closed
