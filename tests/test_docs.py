"""What `make docs` writes into the pages, and the README's tables of what is registered."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from domainbed import algorithms, datasets
from domainbed.scripts.train_building import build_dataset

ROOT = Path(__file__).parent.parent


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make, registry_tables = script("make"), script("registry_tables")

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


def test_the_readmes_tables_are_those_of_the_registries():
    text = registry_tables.README.read_text("utf-8")
    assert [name for _, name, _ in registry_tables.BLOCK.findall(text)] == list(registry_tables.TABLES)
    assert registry_tables.filled(text) == text, f"README.md is behind the classes; run: {registry_tables.COMMAND}"


@pytest.mark.parametrize(("kind", "registry"), [("algorithms", algorithms.REGISTRY), ("datasets", datasets.REGISTRY)])
def test_every_registered_class_is_in_its_table(kind, registry):
    table = registry_tables.TABLES[kind]()
    assert [name for name, cls in registry.items() if registry_tables.own(cls) and f"`{name}`" not in table] == []
    assert all(line.count(" | ") == table.splitlines()[0].count(" | ") for line in table.splitlines()[2:])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Ada B. One and Bo Two, A Title, ICML 2021, https://a.org/1.", "[One and Two 2021](https://a.org/1)"),
        ("Ada One, Bo Two and Cy Three, Title: A Word, 2020,\n    https://a.org/x2019, Alg. 1.", "[One et al. 2020](https://a.org/x2019)"),
        ("Ada One, A Title, 2020, https://a.org/2.", "[One 2020](https://a.org/2)"),
        ("One, Two 2022, \"Title\", https://a.org/2.", "[One et al. 2022](https://a.org/2)"),
        ("Ada One, A Book, 1998; as used: Bo Two et al., A Title, ICML 2021, https://a.org/3.", "[Two et al. 2021](https://a.org/3)"),
        ("as IRM; the rest is ours.", "[Arjovsky et al. 2019](https://arxiv.org/abs/1907.02893)"),
        ("the base's, equation 3.", "[Base 2001](https://a.org/base)"),
    ],
)  # fmt: skip
def test_papers_are_read_from_docstrings(source, expected):
    base = type(
        "Base", (), {"__doc__": "X.\n\n    Source: Carl Base, Title, 2001, https://a.org/base.\n    Differs: no."}
    )
    cls = type("Mine", (base,), {"__doc__": f"X.\n\n    Source: {source}\n    Differs: no.\n"})
    assert registry_tables.paper(cls) == expected


def test_a_class_without_a_paper_names_its_source():
    assert registry_tables.paper(type("Mine", (), {"__doc__": "X.\n\nSource: myself.\nDiffers: no."})) == "myself"


@pytest.mark.parametrize("name", ["Debug28", "ColoredDigits", "DigitsO2O", "DigitsM2M", "DigitsSubpop"])
def test_what_the_table_says_of_a_dataset_is_so(name):
    cls = datasets.get_dataset_class(name)
    args = {"dataset": name, "data_dir": None, "test_envs": list(cls.TEST_ENVS or [0]), "confounders": None}
    dataset = build_dataset(args, {"data_augmentation": False})
    environments, classes, groups, size, *_ = registry_tables.dataset_cells(cls)
    assert environments.startswith(f"{len(dataset)}: ")
    assert classes == str(dataset.num_classes)
    assert groups == f"{dataset.num_confounders}, {dataset.num_confounders * dataset.num_classes}"
    assert size == " x ".join(map(str, dataset.input_shape))


def test_a_new_class_changes_the_table(monkeypatch):
    added = type(
        "Added", (algorithms.ERM,), {"__doc__": "X.", "__module__": "domainbed.algorithms.added", "MIN_PARTS": 3}
    )
    monkeypatch.setattr(algorithms.REGISTRY, "names", [*algorithms.ALGORITHMS, "Added"])
    monkeypatch.setitem(algorithms.REGISTRY._entries, "Added", added)
    last = registry_tables.algorithms().splitlines()[-1]
    assert last == f"| `Added` | {registry_tables.paper(algorithms.ERM)} | ≥ 3 minibatches | `environment` |"
