"""What decides whether two calls of a model can run the same rewritten graph.

Looking at every tensor and setting of a model takes longer than a small model's operations, so
`Watched` first asks, in a few calls into C, whether anything at all has changed since the last
call, and only then looks closer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .capture import State, model_state

READ = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "training"}
BOOKKEEPING = set(vars(nn.Module())) - READ  # what no forward reads
PLAIN = (bool, int, float, str, type(None))


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Hashable]:
    """The leaves of a call's arguments, and their structure."""
    if not kwargs and all(isinstance(a, Tensor) for a in args):
        return list(args), len(args)  # the most common structure, without pytree's work
    return pytree.tree_flatten((args, kwargs))


def call_signature(leaves: Sequence[Any], structure: Hashable) -> Hashable:
    """What a call's inputs and surroundings fix: shapes, strides, dtypes, which share memory,
    grad mode, autocast."""
    inputs = tuple([
        (leaf.shape, _strides(leaf), leaf.dtype, leaf.device) if isinstance(leaf, Tensor)
        else (type(leaf), _hashable(leaf))
        for leaf in leaves
    ])
    shared: tuple[int, ...] = ()
    if len(leaves) > 1:
        storages = [leaf.untyped_storage()._cdata for leaf in leaves
                    if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
        shared = tuple(map(storages.index, storages))
    autocast = tuple([
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in ("cpu", "cuda")
    ])
    return structure, inputs, shared, torch.is_grad_enabled(), autocast


class Watched:
    """A model's modules, tensors and settings, and a number for each state they were seen in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.members: tuple[nn.Module, ...] = ()
        self.generation = 0
        self.versions: dict[Hashable, int] = {}
        self.current = -1
        self.look()

    def look(self) -> None:
        """Find the modules, tensors and settings anew."""
        members = tuple(self.model.modules())
        if members != self.members:
            self.members, self.generation = members, self.generation + 1
        self.state: tuple[State, ...] = model_state(self.model)
        self.ties = _ties(self.model)
        self.settings = tuple(map(_settings, members))
        self.glimpse: Glimpse | None = None

    def version(self) -> int:
        """A number that stands for the shapes, dtypes, ties and settings of the model as it is."""
        if self.glimpse is None or not self.glimpse.still_true():
            try:
                key = self._key()
            except (AttributeError, KeyError):  # a tensor or setting is gone
                self.look()
                key = self._key()
            self.current = self.versions.setdefault(key, len(self.versions))
            self.glimpse = glimpse(self.members)
        return self.current

    def _key(self) -> Hashable:
        places = [s.place() for s in self.state]
        state = tuple((h[name].shape, h[name].dtype, h[name].device, id(h)) for h, name in places)
        tied = tuple(one[key] is other[name] for one, key, other, name in self.ties)
        return self.generation, state, tied, tuple(read() for read in self.settings)


class Glimpse:
    """The very objects that a model's modules held at one time, and where its tensors lay.

    While each is still in its place, no module, tensor or setting has been exchanged; while
    each tensor has its size and its elements lie where they lay, none has another dtype or
    device.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.tables: list[Any] = []
        self.places: list[tuple[Any, Any]] = []
        for module in members:
            own = {n: x for n, x in vars(module).items() if n not in BOOKKEEPING}
            self.places += [(vars(module), name) for name in own]
            tables = [x for x in own.values() if isinstance(x, (dict, list))]
            self.places += [(table, name) for table in tables
                            for name in (table if isinstance(table, dict) else range(len(table)))]
            self.tables += [vars(module), *tables]
        self.lengths = list(map(len, self.tables))
        self.held = self._read()
        self.tensors = [h for h in self.held if isinstance(h, Tensor)]
        self.sizes = list(map(Tensor.size, self.tensors))
        self.pointers = list(map(Tensor.data_ptr, self.tensors))

    def _read(self) -> list[Any]:
        return list(starmap(operator.getitem, self.places))

    def still_true(self) -> bool:
        try:
            return (
                list(map(len, self.tables)) == self.lengths
                and all(map(operator.is_, self._read(), self.held))
                and list(map(Tensor.size, self.tensors)) == self.sizes
                and list(map(Tensor.data_ptr, self.tensors)) == self.pointers
            )
        except (KeyError, IndexError):
            return False


def glimpse(members: Sequence[nn.Module]) -> Glimpse | None:
    """A glimpse of `members`; None if one of their tensors has no place in memory (sparse)."""
    try:
        return Glimpse(members)
    except RuntimeError:
        return None


def _strides(tensor: Tensor) -> Hashable:
    return tensor.stride() if tensor.layout is torch.strided else tensor.layout


def _ties(model: nn.Module) -> tuple[tuple[dict[str, Any], str, dict[str, Any], str], ...]:
    """The places that hold one parameter, in pairs: whether they still do is to be seen."""
    first: dict[int, tuple[dict[str, Any], str]] = {}
    pairs = []
    for module in model.modules():
        held: dict[str, Any] = module._parameters
        for name, parameter in held.items():
            if parameter is not None and id(parameter) in first:
                pairs.append((*first[id(parameter)], held, name))
            elif parameter is not None:
                first[id(parameter)] = (held, name)
    return tuple(pairs)


def _settings(module: nn.Module) -> Callable[[], Hashable]:
    """Reads what forward may depend on besides tensors: numbers, texts, and which hooks exist."""
    held = vars(module)
    names = [n for n, x in held.items() if isinstance(x, PLAIN)]
    lists = [n for n, x in held.items() if isinstance(x, (list, tuple)) and not n.startswith("_")]

    def read() -> Hashable:
        return (
            *((type(held[n]), held[n]) for n in names),
            *(tuple(map(_hashable, held[n])) for n in lists), len(held),
            len(held["_forward_hooks"]), len(held["_forward_pre_hooks"]),
            *map(id, held["_modules"].values()),
        )

    return read


def _hashable(leaf: Any) -> Hashable:
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return leaf  # type: ignore[no-any-return]


