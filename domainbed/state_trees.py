"""The state of any object as a tree of tensors and plain values, and back into a freshly built object.

A module gives its parameters, their gradients, its buffers, its submodules and its other attributes; what has
``state_dict`` and ``load_state_dict`` (optimizers, schedulers) gives that; generators of random numbers give theirs;
containers and other objects give what they hold. What can't change (functions, classes, devices) is left out.

Restoring pours values into what the constructor built, so that whatever it tied together stays tied: an optimizer
keeps its parameters, two names of one list stay one list.
"""

import enum
import functools
import pathlib
import random
import re
import types
import weakref
from collections import OrderedDict, deque
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Node: TypeAlias = Any  # None, bool, int, float, str, or [kind, ...] of nodes and tensors

_PLAIN = (type(None), bool, int, float, str)
_CONSTANT = (
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, functools.partial,
    torch.device, torch.dtype, torch.layout, torch.memory_format, torch.Size, np.dtype, np.ufunc, enum.Enum,
    pathlib.PurePath, re.Pattern, weakref.ref, RemovableHandle, bytes, complex, range, slice, frozenset, type(...),
)  # fmt: skip
_PRINTED = (
    torch.device, torch.dtype, torch.layout, torch.memory_format, torch.Size, np.dtype, enum.Enum, pathlib.PurePath,
    bytes, complex, range, slice,
)  # fmt: skip
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}  # torch's own bookkeeping


class NotResumable(RuntimeError):
    """An object's state can't be kept, or doesn't fit what was freshly built."""


class Capture:
    """Turns one object into a tree; what occurs twice is kept once."""

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}
        self._held: list[Any] = []  # so that no id is used twice

    def node(self, value: Any, path: str = "") -> Node:
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
        if nn.parameter.is_lazy(value):
            raise NotResumable(f"{path} has no shape yet")
        if isinstance(value, nn.Parameter):
            grad = None if value.grad is None else value.grad.detach()
            return ["parameter", value.detach(), grad, value.requires_grad]
        if isinstance(value, Tensor):
            return ["tensor", value.detach(), value.requires_grad, value.device.type]
        if isinstance(value, nn.Module):
            return self._module(value, path)
        if isinstance(value, np.ndarray | np.generic):
            return self._numpy(value, path)
        if (state := _random_state(value)) is not None:
            return ["random", type(value).__name__, self.node(state, f"{path}.state")]
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            return ["stateful", _name(value), self.node(value.state_dict(), f"{path}.state_dict()")]
        return self._composed(value, path)

    def _module(self, module: nn.Module, path: str) -> Node:
        def nodes(values: dict[str, Any]) -> dict[str, Node]:
            return {name: self.node(value, f"{path}.{name}") for name, value in values.items()}

        attributes = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        tables = (module._parameters, module._buffers, module._modules, attributes)
        return ["module", _name(module), *(nodes(dict(table)) for table in tables)]

    def _numpy(self, value: Any, path: str) -> Node:
        if value.dtype.kind not in "biuf":
            raise NotResumable(f"{path} is a NumPy array of {value.dtype}; keep numbers")
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return [kind, str(value.dtype), torch.from_numpy(np.array(value, order="C", ndmin=1)), list(value.shape)]

    def _composed(self, value: Any, path: str) -> Node:
        if isinstance(value, dict):
            items = [
                [self.node(k, f"{path} key {i}"), self.node(v, f"{path}[{k!r}]")]
                for i, (k, v) in enumerate(value.items())
            ]
            return ["dict", _name(value), items]
        if isinstance(value, tuple | list | set | deque):
            kind = next(name for name in ("tuple", "list", "set", "deque") if isinstance(value, _TYPES[name]))
            return [kind, _name(value), [self.node(item, f"{path}[{i}]") for i, item in enumerate(value)]]
        if hasattr(value, "__next__") or not hasattr(value, "__dict__"):
            raise NotResumable(f"{path} is a {_name(value)}, whose state can't be kept")
        return ["object", _name(value), {name: self.node(part, f"{path}.{name}") for name, part in vars(value).items()}]


_TYPES: dict[str, type] = {"tuple": tuple, "list": list, "set": set, "deque": deque}


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _label(constant: Any) -> str:
    """What tells a constant from another one, in any process."""
    if isinstance(constant, _PRINTED):
        return repr(constant)
    return str(getattr(constant, "__qualname__", _name(constant)))


def _random_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
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
    """Pours a tree into a freshly built object."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def value(self, node: Node, fresh: Any = None, path: str = "") -> Any:
        """The value of a node: ``fresh`` itself, changed, where it can take the state in, else a new one.

        Raises:
            NotResumable: the tree has something that ``fresh`` lacks and that can't be made anew.
        """
        if not isinstance(node, list):
            return node
        kind, *rest = node
        if kind == "constant":
            return _unchanged(fresh, path, rest[0])
        if kind == "same":
            return self._made[rest[0]]
        self._made[path] = fresh  # for what points back at it from within
        made = getattr(self, f"_{kind}")(fresh, path, *rest)
        self._made[path] = made
        return made

    def _parameter(self, fresh: Any, path: str, data: Tensor, grad: Tensor | None, requires_grad: bool) -> Any:
        if not isinstance(fresh, nn.Parameter) or fresh.shape != data.shape or fresh.dtype != data.dtype:
            raise NotResumable(f"{path} is another parameter than it was when the snapshot was taken")
        fresh.data.copy_(data)
        fresh.requires_grad_(requires_grad)
        fresh.grad = None if grad is None else grad.to(fresh.device)
        return fresh

    def _tensor(self, fresh: Any, path: str, data: Tensor, requires_grad: bool, device: str) -> Tensor:
        data = data.to(device if device == "cpu" or torch.cuda.is_available() else "cpu")
        alike = isinstance(fresh, Tensor) and (fresh.shape, fresh.dtype) == (data.shape, data.dtype)
        if alike and fresh.is_contiguous() and fresh.device == data.device:
            fresh.detach().copy_(data)
            return fresh
        return data.requires_grad_(requires_grad)

    def _module(self, fresh: Any, path: str, name: str, *tables: dict[str, Node]) -> Any:
        _check_type(fresh, path, name)
        parameters, buffers, modules, attributes = tables
        own = {"_parameters": parameters, "_buffers": buffers, "_modules": modules}
        for table, nodes in own.items():
            there = getattr(fresh, table)
            for key, node in nodes.items():
                there[key] = self.value(node, there.get(key), f"{path}.{key}")
        for key, node in attributes.items():
            vars(fresh)[key] = self.value(node, vars(fresh).get(key), f"{path}.{key}")
        return fresh

    def _array(self, fresh: Any, path: str, dtype: str, data: Tensor, shape: list[int]) -> Any:
        values = data.numpy().astype(dtype, copy=False).reshape(shape)
        if isinstance(fresh, np.ndarray) and fresh.shape == values.shape and fresh.dtype == values.dtype:
            fresh[...] = values
            return fresh
        return values

    def _number(self, fresh: Any, path: str, dtype: str, data: Tensor, shape: list[int]) -> Any:
        return data.numpy().astype(dtype, copy=False)[0]

    def _random(self, fresh: Any, path: str, name: str, state: Node) -> Any:
        if type(fresh).__name__ != name:
            raise NotResumable(f"{path} was a {name} and is a {type(fresh).__name__} when built afresh")
        _set_random_state(fresh, self.value(state, path=f"{path}.state"))
        return fresh

    def _stateful(self, fresh: Any, path: str, name: str, state: Node) -> Any:
        _check_type(fresh, path, name)
        fresh.load_state_dict(self.value(state, fresh.state_dict(), f"{path}.state_dict()"))
        return fresh

    def _dict(self, fresh: Any, path: str, name: str, items: list[list[Node]]) -> Any:
        if fresh is None or _name(fresh) != name:
            if name not in ("builtins.dict", "collections.OrderedDict"):
                raise NotResumable(f"{path} was a {name}, which can't be made anew")
            fresh = {} if name == "builtins.dict" else OrderedDict()
        old = dict(fresh)
        fresh.clear()
        for i, (key_node, node) in enumerate(items):
            key = self.value(key_node, path=f"{path} key {i}")
            fresh[key] = self.value(node, old.get(key), f"{path}[{key!r}]")
        return fresh

    def _items(self, fresh: Any, path: str, items: list[Node]) -> list[Any]:
        old = list(fresh) if isinstance(fresh, tuple | list | deque) else []
        old += [None] * (len(items) - len(old))
        return [self.value(item, old[i], f"{path}[{i}]") for i, item in enumerate(items)]

    def _tuple(self, fresh: Any, path: str, name: str, items: list[Node]) -> Any:
        values = self._items(fresh, path, items)
        if name == "builtins.tuple":
            return tuple(values)
        _check_type(fresh, path, name)
        return type(fresh)(*values)  # a named tuple

    def _list(self, fresh: Any, path: str, name: str, items: list[Node]) -> Any:
        return self._filled(fresh, path, name, items, list)

    def _set(self, fresh: Any, path: str, name: str, items: list[Node]) -> Any:
        return self._filled(fresh, path, name, items, set)

    def _deque(self, fresh: Any, path: str, name: str, items: list[Node]) -> Any:
        return self._filled(fresh, path, name, items, deque)

    def _filled(self, fresh: Any, path: str, name: str, items: list[Node], kind: type) -> Any:
        values = self._items(fresh, path, items)
        if fresh is None and name == f"{kind.__module__}.{kind.__qualname__}":
            return kind(values)
        _check_type(fresh, path, name)
        fresh.clear()
        (fresh.update if isinstance(fresh, set) else fresh.extend)(values)
        return fresh

    def _object(self, fresh: Any, path: str, name: str, attributes: dict[str, Node]) -> Any:
        _check_type(fresh, path, name)
        for key, node in attributes.items():
            vars(fresh)[key] = self.value(node, vars(fresh).get(key), f"{path}.{key}")
        return fresh


def _unchanged(fresh: Any, path: str, label: str) -> Any:
    if fresh is None or _label(fresh) != label:
        raise NotResumable(f"{path} was {label} and is {fresh!r} when built afresh")
    return fresh


def _check_type(fresh: Any, path: str, name: str) -> None:
    if _name(fresh) != name:
        raise NotResumable(f"{path} was a {name} and is a {_name(fresh)} when built afresh")


def capture(value: Any, name: str = "") -> Node:
    """The tree of a value; its tensors are the value's own, so write it before anything changes.

    Raises:
        NotResumable: see ``Capture.node``.
    """
    return Capture().node(value, name)


def restore(node: Node, fresh: Any = None, name: str = "") -> Any:
    """The value of a tree, poured into ``fresh`` where that can take it.

    Raises:
        NotResumable: see ``Restore.value``.
    """
    with torch.no_grad():
        return Restore().value(node, fresh, name)
