"""What decides whether two calls of a model can run the same rewritten graph.

Looking at every tensor and setting of a model takes longer than a small model's operations, so
`Watched` first asks, in a few calls into C, whether anything at all has changed since the last
call, and only then looks closer.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .capture import model_state

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
        self.glimpse: Glimpse | None = None

    def version(self) -> int:
        """A number that stands for the shapes, dtypes, ties and settings of the model as it is."""
        if self.glimpse is None or not self.glimpse.still_true():
            key = self._key()
            self.current = self.versions.setdefault(key, len(self.versions))
            self.glimpse = glimpse(self.members)
        return self.current

    def _key(self) -> Hashable:
        members = tuple(self.model.modules())
        if members != self.members:
            self.members, self.generation = members, self.generation + 1
        state = []
        for held in model_state(self.model):
            tensor, (holder, _) = held.get(), held.place()
            state.append((held.name, tensor.shape, tensor.dtype, tensor.device, id(holder)))
        return self.generation, tuple(state), _ties(members), tuple(map(_settings, members))


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


def _ties(members: Sequence[nn.Module]) -> tuple[int, ...]:
    """For each place that holds a parameter, the first that holds the same one."""
    first: dict[int, int] = {}
    slots = [p for module in members for p in module._parameters.values() if p is not None]
    return tuple(first.setdefault(id(p), number) for number, p in enumerate(slots))


def _settings(module: nn.Module) -> Hashable:
    """What forward may depend on besides tensors: numbers, texts, and which hooks exist."""
    held = vars(module)
    own = {n: x for n, x in held.items() if n not in BOOKKEEPING}
    return (
        *((n, type(x), x) for n, x in own.items() if isinstance(x, PLAIN)),
        *((n, *map(_hashable, x)) for n, x in own.items() if isinstance(x, (list, tuple))),
        *((n, *((k, _hashable(v)) for k, v in x.items())) for n, x in own.items()
          if isinstance(x, dict) and n not in READ),
        len(held), len(held["_forward_hooks"]), len(held["_forward_pre_hooks"]),
        *map(id, held["_modules"].values()),
    )


def _hashable(leaf: Any) -> Hashable:
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return leaf  # type: ignore[no-any-return]


