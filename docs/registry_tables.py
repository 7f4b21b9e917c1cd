"""Writes README.md's tables of algorithms and datasets: ``python docs/registry_tables.py``.

What they say stands in the classes: attributes, and ``Source:``, ``Licence:`` and ``Layout:`` of their docstrings.
Names in a row whose other cells are equal share a line.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from domainbed.algorithms.base import REGISTRY as ALGORITHMS
from domainbed.datasets.archives import ARCHIVES
from domainbed.datasets.base import REGISTRY as DATASETS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
COMMAND = "python docs/registry_tables.py"
BLOCK = re.compile(
    r"(<!-- made by docs/registry_tables\.py: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL
)  # an end of its own, for make docs has blocks on the same page
_URL = re.compile(r"https?://[^\s;,]+")
_HEADINGS = "Source|Differs|Licence|Layout|Environments|Args|Attributes|Hparams|Raises"
_SECTION = rf"(?:^|(?<=\. )){{}}:(.*?)(?=\n\n|\n(?:{_HEADINGS})\b|\. (?:{_HEADINGS}):|\Z)"


def own(cls: type) -> bool:
    """Whether the class is the package's and not a user's."""
    return cls.__module__.startswith("domainbed.")


def sections(cls: type, name: str) -> list[str]:
    """What the class and its bases say under a heading of their docstrings, the class first."""
    docs = [inspect.cleandoc(vars(base).get("__doc__") or "") for base in cls.__mro__]
    found = [re.search(_SECTION.format(name), doc, re.DOTALL | re.MULTILINE) for doc in docs]
    return [" ".join(match[1].split()).rstrip(".") for match in found if match]


def lines(rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """Markdown lines of (name, other cells); names of equal cells that follow each other share one."""
    shared: list[tuple[list[str], Sequence[str]]] = []
    for name, cells in rows:
        if shared and shared[-1][1] == cells:
            shared[-1][0].append(name)
        else:
            shared.append(([name], cells))
    return [f"| {', '.join(f'`{name}`' for name in names)} | {' | '.join(cells)} |" for names, cells in shared]


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A Markdown table."""
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines(rows)])


def paper(cls: type) -> str:
    """Link to the first paper that the class names with an address, or else to that of a base: "[Li et al. 2018](...)".

    Without any it is what the class says of its source.
    """
    for source in sections(cls, "Source"):
        if (other := re.match(r"(?:as )?(\w+)[,;]", source)) and other[1] in ALGORITHMS:
            return paper(ALGORITHMS[other[1]])
        for clause in re.split(r"; ", source):
            url, year = _URL.search(clause), re.search(r"\b(19|20)\d\d\b", _URL.sub("", clause))
            if url and year:
                return f"[{authors(clause)} {year[0]}]({url[0].rstrip('.')})"
    return sections(cls, "Source")[0]


def authors(clause: str) -> str:
    """The surnames of one or two authors, or the first one's and "et al."."""
    text = re.sub(r"^[^,:]+: ", "", clause)  # "the distance: ..."
    first, comma, second = re.match(r"(.+?)(,| and |$)([^,]*)", text).groups()  # type: ignore[union-attr]
    name = first.partition(" et al")[0].split()[-1]
    if comma == " and ":
        return f"{name} and {second.split()[-1]}"
    one = " " in first and " and " not in text and " et al" not in text  # by forename and surname
    return name if one else f"{name} et al."


def algorithm_cells(cls: Any) -> list[str]:
    """What the table says of an algorithm."""
    needs = [f"≥ {cls.MIN_PARTS} minibatches"] * (cls.MIN_PARTS > 1)
    needs += ["confounders"] * cls.NEEDS_CONFOUNDERS + ["masks"] * cls.NEEDS_MASKS
    return [paper(cls), ", ".join(needs), f"`{cls.PARTITION}`"]


def dataset_cells(cls: Any) -> list[str]:
    """What the table says of a dataset."""
    classes = len(cls.CLASSES or getattr(cls, "WHOLE", cls).CLASSES) or cls.NUM_CLASSES
    confounders = len(cls.CONFOUNDERS)
    groups = f"{confounders}, {classes * confounders}" if confounders else ""
    size = " x ".join(map(str, cls.INPUT_SHAPE or (3, 224, 224)))
    return [environments(cls), str(classes), groups, size, official(cls), *files_and_licence(cls)]


def environments(cls: Any) -> str:
    """How many there are, and their names."""
    separator = "; " if any("," in name for name in cls.ENVIRONMENTS) else ", "
    return f"{len(cls.ENVIRONMENTS)}: {separator.join(cls.ENVIRONMENTS)}"


def official(cls: Any) -> str:
    """The environments that validate and test by the dataset's own rule."""
    roles = {"validation": cls.VALIDATION_ENVS, "test": cls.TEST_ENVS or ()}
    named = {role: ", ".join(cls.ENVIRONMENTS[e] for e in envs) for role, envs in roles.items() if envs}
    return "; ".join(role if role == names else f"{role}: {names}" for role, names in named.items())


def files_and_licence(cls: Any) -> list[str]:
    """Where its files are, and under which licence they are given."""
    if cls.__name__ in ARCHIVES:
        release = ARCHIVES[cls.__name__]
        return [f"`{release.folder}`, by `download`", release.licence]
    return [sections(cls, "Layout")[0], sections(cls, "Licence")[0]]


def algorithms() -> str:
    """The table of algorithms."""
    rows = ((name, algorithm_cells(cls)) for name, cls in ALGORITHMS.items() if own(cls))
    return table(("name", "paper", "needs", "minibatches by"), rows)


def datasets() -> str:
    """The table of datasets."""
    head = ("name", "environments", "classes", "confounder values, groups", "image", "official splits", "files")
    rows = ((name, dataset_cells(cls)) for name, cls in DATASETS.items() if own(cls))
    return table((*head, "licence"), rows)


TABLES: dict[str, Callable[[], str]] = {"algorithms": algorithms, "datasets": datasets}


def filled(page: str) -> str:
    """The page with its blocks written anew."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def main() -> None:
    """Fills README.md in."""
    import domainbed.algorithms
    import domainbed.datasets  # noqa: F401 -- they fill the registries

    README.write_text(filled(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
