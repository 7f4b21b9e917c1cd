"""Names to classes: registration, explained misses, and class attributes read without an import."""

import ast
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from domainbed.messages import not_found
from domainbed.seeding import seed_hash

T = TypeVar("T", bound=Callable[..., Any])

PLUGINS_VARIABLE = "DOMAINBED_PLUGINS"
_ROOT = Path(__file__).parent


class Registry(Generic[T]):
    """Classes or functions by name, with a live list of the names.

    Args:
        kind: what is registered, for messages ("algorithm").
        order: names that come first, in this order; others follow as they are registered.
    """

    def __init__(self, kind: str, order: Sequence[str] = ()):
        self.kind = kind
        self.names: list[str] = []
        self._entries: dict[str, T] = {}
        self._order = {name: position for position, name in enumerate(order)}

    def register(self, entry: T) -> T:
        """Adds a class or function under its own name; usable as a decorator.

        Raises:
            ValueError: another entry has this name.
        """
        name = entry.__name__
        if name in self._entries:
            raise ValueError(f"{self.kind} registered twice: {name}; give one of them another name")
        self._entries[name] = entry
        self.names.append(name)
        self.names.sort(key=lambda n: self._order.get(n, len(self._order)))  # stable: the rest keep their order
        return entry

    def __getitem__(self, name: str) -> T:
        """The entry of that name.

        Raises:
            NotImplementedError: no such name (the type DomainBed raises).
        """
        if name not in self._entries:
            raise NotImplementedError(not_found(self.kind, name, self.names))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def items(self) -> Iterator[tuple[str, T]]:
        """What is registered; DomainBed's users also append names of their own to the list."""
        return ((name, self._entries[name]) for name in self.names if name in self._entries)


def load_plugins(package: str) -> None:
    """Imports the modules or ``.py`` files named in $DOMAINBED_PLUGINS (separated like $PATH).

    The variable is inherited by the jobs of a sweep, so a class registered there trains everywhere.

    Args:
        package: the module of this package that calls, mostly as the last act of its own import.

    Raises:
        ModuleNotFoundError, FileNotFoundError: a named module or file does not exist.
    """
    # Python sets this only after the import, too late for a plugin that says domainbed.algorithms.Mine = Mine.
    setattr(sys.modules["domainbed"], package, sys.modules[f"domainbed.{package}"])
    for plugin in filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep)):
        if not plugin.endswith(".py"):
            importlib.import_module(plugin)
            continue
        path = Path(plugin).resolve()
        if not path.exists():
            raise FileNotFoundError(
                f"${PLUGINS_VARIABLE} names {plugin}, which does not exist; several are separated by {os.pathsep!r}"
            )
        name = f"domainbed_plugin_{path.stem}_{seed_hash(str(path))}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])


def import_modules(package: str) -> dict[str, Any]:
    """Imports every module of a folder and those beside it that belong to it; returns the public names they define."""
    found: dict[str, Any] = {}
    for path in _sources(package):
        module = importlib.import_module(_module_name(path))
        own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__}
        found |= {k: v for k, v in own.items() if not k.startswith("_")}
    return found


def import_class(package: str, name: str) -> Any:
    """A class that a file of the folder defines, from that file; None if there is none.

    A new file in the folder may say ``from domainbed.algorithms import ERM`` before that folder is imported whole.
    """
    facts = _declared(package).get(name)
    return None if facts is None else getattr(importlib.import_module(facts.module), name)


# Reading the source instead of importing it keeps `sweep` and `collect_results` free of torch.


_CODE = object()  # stands for a value that only an import gives


def _literals(body: Iterable[ast.stmt]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            target, value = node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            target, value = node.target.id, node.value
        else:
            continue
        try:
            found[target] = ast.literal_eval(value)
        except ValueError:
            found[target] = _CODE
    return found


def _sources(package: str) -> list[Path]:
    """The folder's modules, then the modules beside it that belong to it (algorithms_ex2l.py)."""
    return [*sorted((_ROOT / package).glob("[!_]*.py")), *sorted(_ROOT.glob(f"{package}_*.py"))]


def _module_name(path: Path) -> str:
    return ".".join(["domainbed", *path.relative_to(_ROOT).with_suffix("").parts])


@dataclass(frozen=True)
class _Facts:
    """What the source says of a class: where it is, its bases' names, its own literal attributes, its decorator."""

    module: str
    bases: tuple[str, ...]
    literals: dict[str, Any]
    registered: bool


@functools.cache
def _declared(package: str) -> dict[str, _Facts]:
    """Every class that the folder's files define."""
    found = {}
    for path in _sources(package):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                registered = any(isinstance(d, ast.Name) and d.id == "register" for d in node.decorator_list)
                bases = tuple(ast.unparse(base) for base in node.bases)
                found[node.name] = _Facts(_module_name(path), bases, _literals(node.body), registered)
    return found


def _inherited(package: str, name: str) -> dict[str, Any] | None:
    """The literal attributes of a class and its bases; None if a base is not in the folder's files."""
    declared = _declared(package)
    facts = declared.get(name)
    if facts is None:
        return None
    if facts.module == f"domainbed.{package}.base":
        return facts.literals  # what the bases themselves derive from has no attributes of ours
    found: dict[str, Any] = {}
    for base in reversed(facts.bases):
        attributes = _inherited(package, base)
        if attributes is None:
            return None
        found |= attributes
    return found | facts.literals


@functools.cache
def _base_literals(package: str) -> dict[str, Any]:
    return _literals(ast.parse((_ROOT / package / "base.py").read_text(encoding="utf-8")).body)


def order(package: str) -> tuple[str, ...]:
    """DomainBed's names in its order: the literal ``DOMAINBED_ORDER`` of a folder's base module."""
    return tuple(_base_literals(package)["DOMAINBED_ORDER"])


def domainbed_environments(dataset: str) -> tuple[str, ...] | None:
    """The environments of a dataset of DomainBed, whether or not its class is here; None for another dataset."""
    found: tuple[str, ...] | None = _base_literals("datasets")["DOMAINBED_ORDER"].get(dataset)
    return found


def names(package: str) -> list[str]:
    """The registered names of a folder ("algorithms", "datasets"), DomainBed's first, without importing it."""
    literals = _base_literals(package)
    ranks = {name: rank for rank, name in enumerate([*literals["DOMAINBED_ORDER"], *literals["OWN_ORDER"]])}
    registered = [name for name, facts in _declared(package).items() if facts.registered]
    return sorted(registered, key=lambda name: ranks.get(name, len(ranks)))


def is_file(dataset: str) -> bool:
    """Whether a dataset's name is the path of a CSV file that lists its images, or of a file of their features."""
    return Path(dataset).suffix.lower() in (".csv", ".npz")


def _of_file(path: str) -> dict[str, Any]:
    """The attributes that a file gives the class that is made of it; reading it takes no torch.

    Raises:
        NotImplementedError: the file is gone, or holds no dataset.
    """
    from domainbed import feature_files, manifests  # only sweeps over files pay for numpy

    read: Callable[[str], Any] = {".csv": manifests.read, ".npz": feature_files.read}[Path(path).suffix.lower()]
    try:
        found: dict[str, Any] = read(path).class_attributes
    except (OSError, ValueError) as error:
        raise NotImplementedError(str(error)) from error
    return found


def attribute(package: str, name: str, attribute: str, default: Any = None) -> Any:
    """A class attribute of a registered class; what is no literal, or not settled by the files, is really imported.

    Raises:
        NotImplementedError: no class of that name, imported or not; or no dataset in the file of that name.
    """
    if package == "datasets" and is_file(name):
        return _of_file(name).get(attribute, default)
    facts = _declared(package).get(name)
    literals = _inherited(package, name) if facts and facts.registered else None
    if literals is not None and literals.get(attribute) is not _CODE:
        return literals.get(attribute, default)
    module = f"domainbed.{package}"
    if facts is None and module not in sys.modules and not os.environ.get(PLUGINS_VARIABLE):
        raise NotImplementedError(not_found(package[:-1], name, names(package)))  # only an import could have brought it
    return getattr(importlib.import_module(module).find(name), attribute, default)
