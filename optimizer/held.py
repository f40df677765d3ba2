"""What a model holds besides its registered tensors: lists, tables and objects, however nested.

Also the lists and tables that forward knows by a global name, or closes over, and what hangs on
the classes.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import inspect
import types
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

OWN = frozenset(vars(nn.Module()))  # the attributes that every module has, by name
MOST = 20_000  # containers looked at: what hangs on a model may be anything
OPAQUE = (
    Tensor, nn.Module, str, bytes, int, float, complex, type, type(None), types.ModuleType,
    types.FunctionType, types.MethodType, types.BuiltinFunctionType,
)


def containers(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Each list, table, set or object's attributes, with the module and attribute it hangs on.

    Then those that are no attributes, under the names that forward has for them, and the classes.
    """
    stack = [(module, key, held) for module in modules for key, held in vars(module).items()
             if key not in OWN]
    seen: set[int] = set()
    while stack and len(seen) < MOST:
        owner, key, held = stack.pop()
        if isinstance(held, OPAQUE) or id(held) in seen:
            continue
        seen.add(id(held))
        inside = held if isinstance(held, (list, dict, set, tuple, collections.deque)) \
            else getattr(held, "__dict__", None)
        if inside is None or isinstance(inside, types.MappingProxyType):
            continue
        if not isinstance(inside, tuple):
            yield owner, key, inside
        items = inside.values() if isinstance(inside, dict) else inside
        stack += [(owner, key, item) for item in items]
    for module in modules:
        for key, held in _named(module):
            if id(held) not in seen:
                seen.add(id(held))
                yield module, key, held
    for kind, module in {k: m for m in modules for k in type(m).__mro__}.items():
        if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
            yield module, kind.__name__, OfClass(kind)


class OfClass(MutableMapping[str, Any]):
    """What a class holds for all its instances, but for functions and what Python keeps there."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[str]:
        return (name for name, held in list(vars(self.kind).items())
                if not name.startswith("__") and not hasattr(type(held), "__get__"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        return vars(self.kind)[name]

    def __setitem__(self, name: str, held: Any) -> None:
        setattr(self.kind, name, held)

    def __delitem__(self, name: str) -> None:
        delattr(self.kind, name)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)


def _named(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The lists, tables and sets that forward, or a function of its file or on the module that it
    names, knows by a global name or closes over."""
    if type(module).__module__.startswith("torch."):
        return
    todo: list[Any] = [inspect.unwrap(type(module).forward)]
    seen: set[types.CodeType] = set()
    while todo:
        function = todo.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        known: list[tuple[str, Any]] = []
        for name in _names(code):
            known += [(name, function.__globals__.get(name)),
                      (name, getattr(type(module), name, None))]
            todo.append(vars(module).get(name))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # it is empty
                known.append((name, cell.cell_contents))
        for name, held in known:
            if isinstance(held, (list, dict, set, collections.deque)):
                yield name, held
            elif isinstance(held, types.FunctionType) \
                    and held.__globals__ is function.__globals__:
                todo.append(held)


@lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names in a function and those defined in it."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(dict.fromkeys((*code.co_names, *(n for c in inner for n in _names(c)))))


class Contents:
    """The contents of all containers of some modules, to be compared with and put back."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.kept = [(*found, copy.copy(found[-1])) for found in containers(modules)]

    def changed(self) -> list[tuple[nn.Module, str, Any, Any]]:
        """What is not as it was: the module and attribute it hangs on, and how it was."""
        return [kept for kept in self.kept if not _same(*kept[2:])]

    def swap(self, tensors: Mapping[int, Tensor]) -> None:
        """Replace each tensor by that of the same id."""
        for _, _, held, _ in self.kept:
            places = held.items() if isinstance(held, Mapping) else enumerate(held)
            for place, item in list(places) if not isinstance(held, set) else ():
                if isinstance(item, Tensor) and id(item) in tensors:
                    held[place] = tensors[id(item)]

    def put_back(self) -> None:
        for _, _, held, was in self.kept:
            if not _same(held, was):
                held.clear()
                (held.extend if isinstance(held, (list, collections.deque)) else held.update)(was)

    def new_tensors(self) -> Iterator[Tensor]:
        """The tensors in containers that were not there."""
        for _, _, held, was in self.kept:
            before = set(map(id, _items(was)))
            yield from (i for i in _items(held) if isinstance(i, Tensor) and id(i) not in before)


def _items(held: Any) -> Sequence[Any]:
    return list(held.values() if isinstance(held, Mapping) else held)


def _same(held: Any, was: Any) -> bool:
    if len(held) != len(was):
        return False
    if isinstance(held, Mapping):
        return all(a is b for a, b in zip(held, was, strict=True)) and all(
            a is b for a, b in zip(held.values(), was.values(), strict=True))
    if isinstance(held, set):
        return bool(held == was)
    return all(a is b for a, b in zip(held, was, strict=True))
