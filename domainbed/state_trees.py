"""The state of any object as a tree of tensors and plain values, and back into a freshly built object.

A module gives its parameters, their gradients, its buffers, its submodules and its other attributes, an optimizer or a
scheduler whatever it holds, a function its closure, a generator of random numbers its state; containers and other
objects give what is in them. What is met again is named, so that what was one object becomes one object again, and
tensors that shared their memory share it.

Restoring changes what the constructor built where that is needed (a module, an optimizer, a closure) and makes the rest
anew. What can be neither is ``NotResumable``. What hangs on a class or a module of Python is not seen.
"""

import enum
import functools
import math
import pathlib
import random
import re
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Node: TypeAlias = Any  # None, bool, int, float, str, or [kind, ...] of nodes and tensors

_PLAIN = (type(None), bool, int, float, str)
# Told by their names; these don't change.
_CONSTANT = (
    types.BuiltinFunctionType, types.ModuleType, type, np.ufunc, re.Pattern, weakref.ref, RemovableHandle,
    torch.layout, torch.memory_format, type(...),
)  # fmt: skip
# Values: how each is written in plain values, and made of them.
_VALUES: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    torch.device: (str, torch.device),
    torch.dtype: (lambda dtype: str(dtype).removeprefix("torch."), lambda name: getattr(torch, name)),
    torch.Size: (list, torch.Size),
    np.dtype: (lambda dtype: dtype.str, np.dtype),
    bytes: (lambda text: text.decode("latin-1"), lambda text: text.encode("latin-1")),
    complex: (lambda number: [number.real, number.imag], lambda parts: complex(*parts)),
    range: (lambda numbers: [numbers.start, numbers.stop, numbers.step], lambda parts: range(*parts)),
    pathlib.PurePath: (str, pathlib.Path),
}
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "list": list, "set": set, "frozenset": frozenset, "deque": deque}
_OF_MODULES = frozenset(vars(nn.Module())) - {"training", "_non_persistent_buffers_set"}  # torch's own bookkeeping
_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "functools")  # whose functions keep nothing of ours


class NotResumable(RuntimeError):
    """An object's state can't be kept, or doesn't fit what was freshly built."""


class Capture:
    """Turns one object into a tree; what occurs twice is kept once."""

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}
        self._held: list[Any] = []  # so that no id is used twice

    def node(self, value: Any, path: str) -> Node:
        """The tree of a value; ``path`` is its name, for messages and repetitions.

        Raises:
            NotResumable: some part of it is of a kind that can't be kept.
        """
        if type(value) in _PLAIN:
            return value
        if isinstance(value, _CONSTANT):
            return ["constant", _label(value)]
        if id(value) in self._seen:
            return ["same", self._seen[id(value)]]
        self._seen[id(value)] = path
        self._held.append(value)
        return self._new(value, path)

    def _new(self, value: Any, path: str) -> Node:
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, nn.Module):
            own = {name: part for name, part in vars(value).items() if name not in _OF_MODULES}
            tables = (value._parameters, value._buffers, value._modules, own)
            return ["module", _name(value), *(self._nodes(dict(table), path) for table in tables)]
        if isinstance(value, np.ndarray | np.generic):
            return self._numpy(value, path)
        if (state := _random_state(value)) is not None:
            return ["random", _name(value), self.node(state, f"{path}.state")]
        if isinstance(value, enum.Enum):
            return ["enum", _name(value), value.name]
        for kind, (plain, _) in _VALUES.items():
            if isinstance(value, kind):
                return ["value", f"{kind.__module__}.{kind.__name__}", plain(value)]
        return self._code(value, path) or self._composed(value, path)

    def _code(self, value: Any, path: str) -> Node:
        """The tree of a function, by its closure; of a partial, by its arguments; of a method, by its object."""
        if isinstance(value, types.FunctionType):
            ours = not (value.__module__ or "").startswith(_LIBRARIES)
            cells = [self.node(cell, f"{path} holds {i}") for i, cell in enumerate(_cells(value))] if ours else []
            return ["function", _label(value), cells]
        if isinstance(value, functools.partial):
            parts = {"func": value.func, "args": list(value.args), "keywords": dict(value.keywords)}
            return ["partial", *self._nodes(parts, path).values()]
        if isinstance(value, types.MethodType):
            return ["method", value.__name__, self.node(value.__self__, f"{path}.__self__")]
        return None

    def _nodes(self, values: dict[str, Any], path: str) -> dict[str, Node]:
        return {name: self.node(value, f"{path}.{name}") for name, value in values.items()}

    def _tensor(self, value: Tensor, path: str) -> Node:
        if nn.parameter.is_lazy(value):
            raise NotResumable(f"{path} has no shape yet")
        kind = "parameter" if isinstance(value, nn.Parameter) else "tensor"
        grad = value.grad.detach() if value.is_leaf and value.grad is not None else None
        return [kind, value.detach(), grad, value.requires_grad]

    def _numpy(self, value: Any, path: str) -> Node:
        if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
            raise NotResumable(f"{path} is a NumPy array of {value.dtype}; keep numbers of 64 bits at most")
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return [kind, str(value.dtype), torch.from_numpy(np.array(value, order="C", ndmin=1)), list(value.shape)]

    def _composed(self, value: Any, path: str) -> Node:
        attributes = vars(value) if hasattr(value, "__dict__") else {}
        if isinstance(value, dict):
            items = [
                [self.node(k, f"{path} key {i}"), self.node(v, f"{path}[{k!r}]")]
                for i, (k, v) in enumerate(value.items())
            ]
            return ["dict", _name(value), items, self._nodes(attributes, path)]
        for kind, type_ in _SEQUENCES.items():
            if isinstance(value, type_):
                items = [self.node(item, f"{path}[{i}]") for i, item in enumerate(value)]
                return [kind, _name(value), items, getattr(value, "maxlen", None), self._nodes(attributes, path)]
        slots = any(getattr(base, "__slots__", ()) for base in type(value).__mro__)
        if isinstance(value, _PLAIN) or slots or hasattr(value, "__next__") or not hasattr(value, "__dict__"):
            raise NotResumable(f"{path} is a {_name(value)}, whose state can't be kept")
        return ["object", _name(value), self._nodes(attributes, path)]


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _label(constant: Any) -> str:
    """What tells a constant from another one, in any process."""
    return str(getattr(constant, "__qualname__", _name(constant)))


def _cells(function: types.FunctionType) -> list[Any]:
    """What a function's closure holds."""
    return [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]


def _random_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        if getattr(value.bit_generator.seed_seq, "n_children_spawned", 0):
            raise NotResumable("a NumPy generator that has spawned others does not tell how many")
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    return value.getstate() if isinstance(value, random.Random) else None


def _set_random_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


class Restore:
    """Makes the value of a tree, of freshly built objects where it needs some."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._used: set[int] = set()  # what was tied when built may have been separate since

    def value(self, node: Node, fresh: Any, path: str) -> Any:
        """The value of a node; ``fresh`` is what the constructor put in its place, None if nothing.

        Raises:
            NotResumable: the tree has something that ``fresh`` lacks and that can't be made anew.
        """
        if not isinstance(node, list):
            return node
        kind, *rest = node
        if kind == "same":
            return self._made[rest[0]]
        if id(fresh) in self._used:
            fresh = None
        self._used.add(id(fresh) if fresh is not None else 0)
        self._made[path] = fresh  # for what points back at it from within
        made = self._made[path] = getattr(self, f"_{kind}")(fresh, path, *rest)
        return made

    def _constant(self, fresh: Any, path: str, label: str) -> Any:
        if fresh is None or _label(fresh) != label:
            raise NotResumable(f"{path} was {label} and is {fresh!r} when built afresh")
        self._used.discard(id(fresh))  # many may share it
        return fresh

    def _value(self, fresh: Any, path: str, kind: str, plain: Any) -> Any:
        return next(make(plain) for it, (_, make) in _VALUES.items() if f"{it.__module__}.{it.__name__}" == kind)

    def _enum(self, fresh: Any, path: str, name: str, member: str) -> Any:
        _check_type(fresh, path, name)
        self._used.discard(id(fresh))
        return type(fresh)[member]

    def _function(self, fresh: Any, path: str, label: str, cells: list[Node]) -> Any:
        self._constant(fresh, path, label)
        if cells and len(_cells(fresh)) != len(cells):
            raise NotResumable(f"{path} holds something else than it did")
        for i, (node, old) in enumerate(zip(cells, _cells(fresh), strict=False)):
            fresh.__closure__[i].cell_contents = self.value(node, old, f"{path} holds {i}")
        return fresh

    def _partial(self, fresh: Any, path: str, function: Node, args: Node, keywords: Node) -> Any:
        known = fresh if isinstance(fresh, functools.partial) else functools.partial(_nothing)
        made = self.value(function, known.func, f"{path}.func")
        given = self.value(args, list(known.args), f"{path}.args")
        return functools.partial(made, *given, **self.value(keywords, dict(known.keywords), f"{path}.keywords"))

    def _method(self, fresh: Any, path: str, name: str, owner: Node) -> Any:
        return getattr(self.value(owner, getattr(fresh, "__self__", None), f"{path}.__self__"), name)

    def _parameter(self, fresh: Any, path: str, data: Tensor, grad: Tensor | None, requires_grad: bool) -> Any:
        if not isinstance(fresh, nn.Parameter) or nn.parameter.is_lazy(fresh):
            raise NotResumable(f"{path} is a parameter that is not there when built afresh")
        if (fresh.shape, fresh.dtype, fresh.device.type) != (data.shape, data.dtype, data.device.type):
            raise NotResumable(f"{path} is another parameter than it was when the snapshot was taken")
        fresh.data = data
        fresh.requires_grad_(requires_grad)
        fresh.grad = grad
        return fresh

    def _tensor(self, fresh: Any, path: str, data: Tensor, grad: Tensor | None, requires_grad: bool) -> Tensor:
        data.requires_grad_(requires_grad)
        data.grad = grad
        return data

    def _module(self, fresh: Any, path: str, name: str, *tables: dict[str, Node]) -> Any:
        _check_type(fresh, path, name)
        *of_torch, attributes = tables
        for there, nodes in zip((fresh._parameters, fresh._buffers, fresh._modules), of_torch, strict=True):
            self._fill(there, nodes, path)
        self._fill(vars(fresh), attributes, path, keep=_OF_MODULES)
        return fresh

    def _fill(
        self, there: dict[str, Any], nodes: dict[str, Node], path: str, keep: frozenset[str] = frozenset()
    ) -> None:
        """Gives a table of attributes the values of the nodes, and nothing else."""
        old = {key: there.pop(key) for key in list(there) if key not in keep}
        for key, node in nodes.items():
            there[key] = self.value(node, old.get(key), f"{path}.{key}")

    def _array(self, fresh: Any, path: str, dtype: str, data: Tensor, shape: list[int]) -> Any:
        return data.numpy().astype(dtype, copy=False).reshape(shape)

    def _number(self, fresh: Any, path: str, dtype: str, data: Tensor, shape: list[int]) -> Any:
        return data.numpy().astype(dtype, copy=False)[0]

    def _random(self, fresh: Any, path: str, name: str, state: Node) -> Any:
        _check_type(fresh, path, name)
        _set_random_state(fresh, self.value(state, None, f"{path}.state"))
        return fresh

    def _dict(self, fresh: Any, path: str, name: str, items: list[list[Node]], attributes: dict[str, Node]) -> Any:
        if fresh is None:
            fresh = {"builtins.dict": {}, "collections.OrderedDict": OrderedDict()}.get(name)
        _check_type(fresh, path, name)
        self._made[path] = fresh
        old, keys = dict(fresh), list(fresh)
        fresh.clear()
        for i, (key_node, node) in enumerate(items):
            key = self.value(key_node, keys[i] if i < len(keys) else None, f"{path} key {i}")
            fresh[key] = self.value(node, old.get(key), f"{path}[{key!r}]")
        self._fill(getattr(fresh, "__dict__", {}), attributes, path)
        return fresh

    def _sequence(
        self, fresh: Any, path: str, name: str, items: list[Node], maxlen: int | None, attributes: dict[str, Node]
    ) -> Any:
        old = list(fresh) if isinstance(fresh, tuple | list | deque) else []
        old += [None] * (len(items) - len(old))
        made = fresh
        if _name(fresh) != name or getattr(fresh, "maxlen", None) != maxlen:
            kind = next((it for it in _SEQUENCES.values() if f"{it.__module__}.{it.__name__}" == name), None)
            if kind is None:
                raise NotResumable(f"{path} was a {name} and is a {_name(fresh)} when built afresh")
            made = deque(maxlen=maxlen) if kind is deque else kind()
        self._made[path] = made
        values = [self.value(item, old[i], f"{path}[{i}]") for i, item in enumerate(items)]
        if isinstance(made, tuple | frozenset):
            return type(made)(*values) if hasattr(made, "_fields") else type(made)(values)
        made.clear()
        (made.update if isinstance(made, set) else made.extend)(values)
        self._fill(getattr(made, "__dict__", {}), attributes, path)
        return made

    _tuple = _list = _set = _frozenset = _deque = _sequence

    def _object(self, fresh: Any, path: str, name: str, attributes: dict[str, Node]) -> Any:
        _check_type(fresh, path, name)
        self._fill(vars(fresh), attributes, path)
        return fresh


def _nothing() -> None:
    """Stands for the function of a partial that is not there."""


def _check_type(fresh: Any, path: str, name: str) -> None:
    if _name(fresh) != name:
        raise NotResumable(f"{path} was a {name} and is a {_name(fresh)} when built afresh")


def equal(one: Node, other: Node) -> bool:
    """Whether two trees say the same, to the bit; NaN is NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.shape, one.dtype, one.stride(), one.device) != (other.shape, other.dtype, other.stride(), other.device):
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return [*one] == [*other] and all(equal(one[key], other[key]) for key in one)
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def capture(value: Any, name: str = "") -> Node:
    """The tree of a value; its tensors are the value's own, so write it before anything changes.

    Raises:
        NotResumable: see ``Capture.node``.
    """
    try:
        return Capture().node(value, name)
    except NotResumable:
        raise
    except Exception as error:
        raise NotResumable(f"the state of {name} can't be kept: {type(error).__name__}: {error}") from error


def restore(node: Node, fresh: Any = None, name: str = "") -> Any:
    """The value of a tree, made of ``fresh``; of no use afterwards if this fails.

    Raises:
        NotResumable: see ``Restore.value``; or what was made is not what the tree says.
    """
    with torch.no_grad():
        try:
            made = Restore().value(node, fresh, name)
        except NotResumable:
            raise
        except Exception as error:
            raise NotResumable(f"{name} can't go on: {type(error).__name__}: {error}") from error
        if not equal(capture(made, name), node):
            raise NotResumable(f"{name} is not what it was when built afresh and filled")
    return made
