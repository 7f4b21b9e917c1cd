"""Q: a list that one can filter, group and summarise by the names of fields."""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import numpy as np

Selector = str | Callable[[Any], Any]


def make_selector_fn(selector: Selector) -> Callable[[Any], Any]:
    """A function that takes from an object what the selector names.

    Args:
        selector: ``"x"`` for ``obj["x"]``, ``"x.y"`` for ``obj["x"]["y"]``, ``"x, y.z"`` for the tuple of both;
            or a plain function, which is returned as it is.

    Raises:
        TypeError: neither a string nor a plain function (wrap partials and builtins in a lambda).
    """
    if isinstance(selector, FunctionType):
        return selector
    if not isinstance(selector, str):
        raise TypeError(f"a selector is a string or a function, not {type(selector).__name__}; wrap it in a lambda")
    paths = [[name.strip() for name in path.split(".")] for path in selector.split(",")]
    if len(paths) == 1:
        return lambda obj: _walk(obj, paths[0])
    return lambda obj: tuple(_walk(obj, path) for path in paths)


def _walk(obj: Any, path: list[str]) -> Any:
    for name in path:
        obj = obj[name]
    return obj


def hashable(obj: Any) -> Any:
    """The object itself if it has a hash, else its JSON, wrapped so that it can't equal a string of the data."""
    try:
        hash(obj)
    except TypeError:
        return json.dumps({"_": obj}, sort_keys=True)
    return obj


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | np.floating) and math.isnan(value)


def _takes_several(fn: Callable[..., Any]) -> bool:
    try:
        return len(inspect.signature(fn).parameters) > 1
    except ValueError:  # builtins without a signature
        return False


def _sorted_groups(groups: Iterable[tuple[Any, list[Any]]]) -> list[tuple[Any, list[Any]]]:
    try:
        return sorted(groups, key=lambda group: group[0])
    except TypeError:  # keys without an order among themselves: dicts, None beside numbers
        return sorted(groups, key=lambda group: json.dumps(group[0], sort_keys=True, default=str))


class Q:
    """A list of records with DomainBed's query methods; every method returns a new object.

    Selectors are those of ``make_selector_fn``.
    """

    def __init__(self, list_: Iterable[Any]):
        self._list = list(list_)

    def __len__(self) -> int:
        return len(self._list)

    def __getitem__(self, key: Any) -> Any:
        return self._list[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._list)

    def __eq__(self, other: object) -> bool:
        return self._list == (other._list if isinstance(other, Q) else other)

    __hash__ = None  # type: ignore[assignment]  # mutable through its elements, as a list

    def __str__(self) -> str:
        return str(self._list)

    def __repr__(self) -> str:
        return repr(self._list)

    def group(self, selector: Selector) -> "Q":
        """Q of pairs (key, Q of the elements with that key), sorted by key."""
        select = make_selector_fn(selector)
        groups: dict[Any, tuple[Any, list[Any]]] = {}
        for element in self._list:
            key = select(element)
            groups.setdefault(hashable(key), (key, []))[1].append(element)
        return Q((key, Q(members)) for key, members in _sorted_groups(groups.values()))

    def group_map(self, selector: Selector, fn: Callable[..., Any]) -> "Q":
        """``fn(key, Q of the group)`` for every group."""
        return self.group(selector).map(fn)

    def map(self, fn: Callable[..., Any]) -> "Q":
        """``fn(element)``, or ``fn(*element)`` if fn has several parameters."""
        return Q(fn(*element) for element in self._list) if _takes_several(fn) else Q(fn(x) for x in self._list)

    def select(self, selector: Selector) -> "Q":
        return Q(map(make_selector_fn(selector), self._list))

    def min(self) -> Any:
        return min(self._list)

    def max(self) -> Any:
        return max(self._list)

    def sum(self) -> Any:
        return sum(self._list)

    def len(self) -> int:
        return len(self._list)

    def mean(self) -> float:
        """The mean; NaN, without a warning, of nothing."""
        return float(np.mean(self._list)) if self._list else float("nan")

    def std(self) -> float:
        """The population's standard deviation (ddof 0); NaN, without a warning, of nothing."""
        return float(np.std(self._list)) if self._list else float("nan")

    def mean_std(self) -> tuple[float, float]:
        return self.mean(), self.std()

    def argmax(self, selector: Selector) -> Any:
        """The first element whose selected value is largest."""
        return max(self._list, key=make_selector_fn(selector))

    def filter(self, fn: Callable[[Any], Any]) -> "Q":
        return Q(filter(fn, self._list))

    def filter_equals(self, selector: Selector, value: Any) -> "Q":
        """The elements whose selected value equals ``value``."""
        select, wanted = make_selector_fn(selector), hashable(value)
        return Q(element for element in self._list if hashable(select(element)) == wanted)

    def filter_not_none(self) -> "Q":
        return Q(element for element in self._list if element is not None)

    def filter_not_nan(self) -> "Q":
        return Q(element for element in self._list if not _is_nan(element))

    def flatten(self) -> "Q":
        """The elements of the elements."""
        return Q(inner for element in self._list for inner in element)

    def unique(self) -> "Q":
        """Each element once, in order of first appearance."""
        first: dict[Any, Any] = {}
        for element in self._list:
            first.setdefault(hashable(element), element)
        return Q(first.values())

    def sorted(self, key: Callable[[Any], Any] | None = None) -> "Q":
        """Sorted ascending, stably; a NaN counts as -infinity."""

        def nan_first(element: Any) -> Any:
            value = element if key is None else key(element)
            return float("-inf") if _is_nan(value) else value

        return Q(sorted(self._list, key=nan_first))
