"""What decides whether two calls of a model can run the same rewritten graph.

Looking at every tensor and setting of a model takes longer than a small model's operations, so
`Watched` first asks, in a few calls into C, whether anything at all has changed since the last
call, and only then looks closer.
"""

from __future__ import annotations

import collections
import enum
import functools
import math
import operator
import types
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .builder import storage
from .facts import AUTOCAST
from .refused import has_global_hooks
from .state import assigned_by, model_state

REQUIRES_GRAD = operator.attrgetter("requires_grad")

READ = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks",
        "_backward_hooks", "_backward_pre_hooks", "training"}
BOOKKEEPING = set(vars(nn.Module())) - READ  # what no forward reads
HOOKS = sorted(name for name in READ if name.endswith("_hooks"))
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout,
         torch.memory_format, torch.Size, enum.Enum, type, types.FunctionType,
         types.BuiltinFunctionType, types.MethodType, range)
TABLES = (dict, list, tuple, set, frozenset, collections.deque)
DEEPEST = 4  # settings in tables in tables
LARGE = 1 << 14  # bytes of an array


class OpaqueArgument(Exception):
    """An argument holds something whose contents a signature does not see; says what."""


@dataclass(frozen=True)
class _Same:
    """Stands for one object, which it keeps alive so that no other has its id."""

    held: Any

    def __hash__(self) -> int:
        return id(self.held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Hashable]:
    """The leaves of a call's arguments, and their structure."""
    if not kwargs and all(isinstance(a, Tensor) for a in args):
        return list(args), len(args)  # the most common structure, without pytree's work
    return pytree.tree_flatten((args, kwargs))


def call_signature(leaves: Sequence[Any], structure: Hashable) -> Hashable:
    """What a call's inputs and surroundings fix: shapes, strides, dtypes, which share memory,
    grad mode, autocast, the default dtype. Raises `OpaqueArgument`, for sparse tensors too."""
    inputs = tuple([
        (leaf.shape, _strides(leaf), leaf.dtype, leaf.device) if isinstance(leaf, Tensor)
        else (type(leaf), _plain(leaf))
        for leaf in leaves
    ])
    shared: tuple[int, ...] = ()
    if len(leaves) > 1:
        storages = [storage(leaf) for leaf in leaves
                    if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
        shared = tuple(map(storages.index, storages))
    autocast = tuple([
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in AUTOCAST
    ])
    return (structure, inputs, shared, torch.is_grad_enabled(), autocast,
            torch.get_default_dtype())


class Watched:
    """A model's modules, tensors and settings, and a number for each state they were seen in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.members: tuple[nn.Module, ...] = ()
        self.generation = 0
        self.versions: dict[Hashable, int] = {}
        self.current = -1
        self.glimpse: Glimpse | None = None
        self.names: set[str] = set()  # of tensors of the model whose values forward asked for
        self.others: dict[int, Tensor] = {}  # such tensors that hang on its objects, by their ids

    def ask(self, tensors: Iterable[Tensor]) -> None:
        """Look at the values of more tensors."""
        own = {id(held.get()): held.name for held in model_state(self.model)}
        self.names |= {own[id(t)] for t in tensors if id(t) in own}
        self.others |= {id(t): t for t in tensors if id(t) not in own}
        self.glimpse = None

    def _asked(self) -> list[Tensor]:
        states = model_state(self.model) if self.names else ()
        own = [held.get() for held in states if held.name in self.names]
        return [*own, *self.others.values()]

    def version(self) -> int:
        """A number that stands for the shapes, dtypes, ties and settings of the model as it is."""
        if self.glimpse is None or not self.glimpse.still_true():
            key = self._key()
            self.current = self.versions.setdefault(key, len(self.versions))
            self.glimpse = glimpse(self.members, self._asked())
        return self.current

    def _key(self) -> Hashable:
        members = tuple(self.model.modules())
        if members != self.members:
            self.members, self.generation = members, self.generation + 1
        state = []
        for held in model_state(self.model):
            tensor, (holder, _) = held.get(), held.place()
            state.append((held.name, tensor.shape, tensor.dtype, tensor.device,
                          tensor.requires_grad, id(holder)))
        settings = tuple(map(_settings, members))
        of_classes = tuple((kind, name, _setting(vars(kind)[name]))
                           for kind, name in _class_settings(members))
        return (self.generation, tuple(state), _ties(members), settings, of_classes,
                has_global_hooks(), *(repr(t.tolist()) for t in self._asked()))


class Glimpse:
    """The very objects that a model's modules held at one time, and where its tensors lay.

    While each is still in its place, no module, tensor or setting has been exchanged; while
    each tensor has its size and its elements lie where they lay, none has another dtype or
    device. What forward assigns is another tensor after each call, of the same kind.
    """

    def __init__(self, members: Sequence[nn.Module], asked: Sequence[Tensor]) -> None:
        self.tables: list[Any] = []
        self.places: list[tuple[Any, Any]] = []
        self.sets: list[tuple[set[Any], set[Any]]] = []
        self.assigned: list[tuple[Any, Any]] = []
        self.places += [(vars(kind), name) for kind, name in _class_settings(members)]
        for module in members:
            own = {n: x for n, x in vars(module).items() if n not in BOOKKEEPING}
            assigned = {n for n in assigned_by(module) if isinstance(own.get(n), Tensor)}
            self.assigned += [(vars(module), name) for name in assigned]
            self.places += [(vars(module), name) for name in own if name not in assigned]
            tables = [t for name, x in own.items() for t in (
                [x] if name in READ and isinstance(x, dict) else _tables(x))]
            if any(isinstance(t, Slots) for t in tables):
                raise RuntimeError("a slot can't be read without its object")
            self.places += [(t, name) for t in tables
                            if isinstance(t, (dict, list, collections.deque))
                            for name in (t if isinstance(t, dict) else range(len(t)))]
            self.tables += [vars(module), *tables]
            self.sets += [(t, set(t)) for t in tables if isinstance(t, set)]
        self.lengths = list(map(len, self.tables))
        self.hooks = has_global_hooks()
        self.kinds = self._kinds()
        self.held = self._read()
        self.tensors = [h for h in self.held if isinstance(h, Tensor)]
        self.arrays = [(h.tobytes, h.tobytes()) for h in self.held if _is_array(h)]
        self.sizes = list(map(Tensor.size, self.tensors))
        self.pointers = list(map(Tensor.data_ptr, self.tensors))
        self.wanted = list(map(REQUIRES_GRAD, self.tensors))
        self.asked = [(t, t.clone()) for t in asked]

    def _read(self) -> list[Any]:
        return list(starmap(operator.getitem, self.places))

    def _kinds(self) -> list[Any]:
        tensors: list[Any] = [table[name] for table, name in self.assigned]
        return [(type(x), x.shape, x.dtype, x.device, x.requires_grad) for x in tensors]

    def still_true(self) -> bool:
        try:
            return (
                list(map(len, self.tables)) == self.lengths
                and all(map(operator.is_, self._read(), self.held))
                and self._kinds() == self.kinds
                and list(map(Tensor.size, self.tensors)) == self.sizes
                and list(map(Tensor.data_ptr, self.tensors)) == self.pointers
                and list(map(REQUIRES_GRAD, self.tensors)) == self.wanted
                and all(starmap(operator.eq, self.sets))
                and all(starmap(torch.equal, self.asked))
                and all(read() == was for read, was in self.arrays)
                and has_global_hooks() == self.hooks
            )
        except (AttributeError, KeyError, IndexError):  # AttributeError: no tensor any more
            return False


def glimpse(members: Sequence[nn.Module], asked: Sequence[Tensor]) -> Glimpse | None:
    """A glimpse of `members` and the values `asked` for; None if one of their tensors has no place
    in memory (sparse)."""
    try:
        return Glimpse(members, asked)
    except RuntimeError:
        return None


def _strides(tensor: Tensor) -> Hashable:
    if tensor.layout is not torch.strided:
        raise OpaqueArgument(f"an argument is a tensor of the layout {tensor.layout}, of which no "
                             "others like it can be made to verify on")
    return tensor.stride()


def _ties(members: Sequence[nn.Module]) -> tuple[int, ...]:
    """For each place that holds a parameter, the first that holds the same one."""
    first: dict[int, int] = {}
    slots = [p for module in members for p in module._parameters.values() if p is not None]
    return tuple(first.setdefault(id(p), number) for number, p in enumerate(slots))


def _settings(module: nn.Module) -> Hashable:
    """What forward may depend on besides tensors: what is plain, however deep in tables and
    objects that hold settings, and which hooks exist."""
    held = vars(module)
    own = {n: x for n, x in held.items() if n not in BOOKKEEPING and n not in READ}
    for name in assigned_by(module) & own.keys():  # whose tensors are state
        own[name] = pytree.tree_map_only(Tensor, type, own[name])
    return (
        held["training"], *((n, _setting(x)) for n, x in own.items() if not isinstance(x, Tensor)),
        len(held), *(len(held[name]) for name in HOOKS), *map(id, held["_modules"].values()),
    )


def _class_settings(members: Sequence[nn.Module]) -> list[tuple[type, str]]:
    """What the classes of modules hold for all their instances, but for methods: class and name."""
    kinds = dict.fromkeys(kind for module in members for kind in type(module).__mro__)
    return [
        (kind, name) for kind in kinds
        if kind.__module__.partition(".")[0] not in ("torch", "builtins")
        for name, x in vars(kind).items()
        if not name.startswith("__") and isinstance(x, (Tensor, *PLAIN, *TABLES))
        and not isinstance(x, (types.FunctionType, type))]


def _setting(held: Any, depth: int = DEEPEST) -> Hashable:
    """A value of a signature for what hangs on a model; tensors are looked at elsewhere."""
    if isinstance(held, (Tensor, nn.Module)):
        return id(held)
    if isinstance(held, PLAIN):
        return type(held), _signed(held)
    if _is_array(held):
        return held.shape, str(held.dtype), held.tobytes()
    inside = _inside(held, depth)
    if inside is None:
        return _Same(held)
    keys = [(type(k), k) for k in inside] if isinstance(inside, dict) else ()
    items = inside.values() if isinstance(inside, dict) else inside
    made = [_setting(item, depth - 1) for item in items]
    return type(held), tuple(keys), frozenset(made) if isinstance(inside, (set, frozenset)) \
        else tuple(made)


def _tables(held: Any, depth: int = DEEPEST) -> Iterator[Any]:
    """The tables that what hangs on a model is, or holds."""
    inside = _inside(held, depth)
    if inside is not None:
        yield inside
        for item in inside.values() if isinstance(inside, dict) else inside:
            yield from _tables(item, depth - 1)


def _inside(held: Any, depth: int) -> Any:
    """The table that something is, or that holds its attributes; None if it is no settings."""
    if depth == 0 or isinstance(held, (Tensor, nn.Module, *PLAIN)) or _is_array(held):
        return None
    if isinstance(held, TABLES):
        return held
    if isinstance(held, functools.partial):
        return held.func, held.args, held.keywords
    slots = [n for c in type(held).__mro__ for n in _names(vars(c).get("__slots__", ()))]
    inside = getattr(held, "__dict__", None)
    if slots and not inside:
        inside = Slots((name, getattr(held, name)) for name in slots if hasattr(held, name))
    plain = isinstance(inside, dict) and inside and all(
        isinstance(item, (Tensor, *PLAIN, *TABLES)) or _is_array(item)
        or _inside(item, depth - 1) is not None for item in inside.values())
    return inside if plain else None


class Slots(dict[str, Any]):
    """What an object held in its slots when it was looked at."""


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _signed(held: Any) -> Any:
    """A setting, zeros by their signs: 0.0 == -0.0."""
    return (held, math.copysign(1.0, held)) if type(held) is float else held


def _is_array(held: Any) -> bool:
    """Whether it is a NumPy array, small enough to look at in every call."""
    return type(held).__module__ == "numpy" and getattr(held, "nbytes", LARGE) < LARGE


def _plain(leaf: Any) -> Hashable:
    number = type(leaf).__module__ == "numpy" and type(leaf).__hash__ is not None
    if number or isinstance(leaf, PLAIN):
        return _signed(leaf)  # type: ignore[no-any-return]
    raise OpaqueArgument(f"an argument is, or holds, an object of the type {type(leaf).__name__}, "
                         "whose contents can't be watched; pass tensors and numbers, in lists, "
                         "tuples or tables")


