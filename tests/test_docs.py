"""What `make docs` writes into the pages."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
assert SPEC is not None
assert SPEC.loader is not None
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)

TEXT = "\n-------- First, a\nnote\nA  1\n\n-------- Second\nB  2\n"


def test_a_block_is_written_anew_and_the_page_around_it_stays():
    page = "before\n<!-- made by make docs: docs/groups.txt Second -->\nold\n<!-- end -->\nafter"
    filled = make.filled(page, lambda *_: TEXT)
    assert filled == page.replace("old\n", "\n```\n-------- Second\nB  2\n```\n\n")
    assert make.filled(filled, lambda *_: TEXT) == filled


def test_markdown_gets_no_headings_of_its_own():
    page = "<!-- made by make docs: docs/paper.md -->\n<!-- end -->"
    assert "\n**A title**\n\nnote\n" in make.filled(page, lambda *_: "\n### A title\n\nnote\n")


def test_a_table_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="no table begins with 'Third'"):
        make.tables_of(TEXT, "Third")


@pytest.mark.parametrize("page", make.PAGES)
def test_every_block_of_the_pages_is_filled_and_every_picture_is_there(page):
    text = (ROOT / page).read_text("utf-8")
    blocks = make.BLOCK.findall(text)
    assert len(blocks) == text.count("<!-- made by make docs:") == text.count("<!-- end -->") > 0
    assert {sweep for _, sweep, *_ in blocks} <= {"quickstart", "docs"}
    assert make.BLOCK.sub("", text).count("```") % 2 == 0
    for name in make.FIGURES:
        assert (make.IMAGES / name).exists()
