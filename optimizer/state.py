"""What hangs on a model: the tensors that a graph takes as inputs, and what forward assigns."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .cases import as_they_are, flat_outputs
from .held import Contents

PLAIN = (int, float, bool, complex, str, torch.Size, torch.dtype, torch.device, type(None))
TABLES = [name for name, held in vars(nn.Module()).items() if isinstance(held, dict)]
MISSING = object()  # in place of an attribute that is not there
EFFECT = (
    "an effect that a captured graph would not repeat; keep the value in a "
    "registered buffer and write to it in place"
)
# attributes that forward was seen to assign: the tensors in tables there are state, no constants
_assigned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class Effect(Exception):
    """What forward does to the model besides computing, and a graph could not repeat."""


@dataclass(frozen=True)
class State:
    """One tensor that a model holds: where it hangs, under which attribute, and where in the
    table or tuple that the attribute is, if it is none itself."""

    name: str  # qualified, as in state_dict
    owner: nn.Module
    attribute: str
    path: pytree.KeyPath = ()

    def get(self) -> Tensor:
        holder, name = self.place()
        return cast(Tensor, pytree.key_get(holder[name], self.path))

    @property
    def changes(self) -> bool:
        """Whether it is trained, or forward was seen to assign it."""
        return isinstance(self.get(), nn.Parameter) or self.attribute in assigned_by(self.owner)

    def place(self) -> tuple[dict[str, Any], str]:
        """The dictionary that holds the attribute, and its name there."""
        for held in (self.owner._parameters, self.owner._buffers, vars(self.owner)):
            if self.attribute in held and held[self.attribute] is not None:
                return held, self.attribute
        raise AttributeError(f"the model no longer has {self.name!r}")


def underlying(model: nn.Module) -> nn.Module:
    """The module whose parameters `model` runs on: itself, or the original of a rewritten one."""
    found = vars(model).get("original")
    return found if isinstance(found, nn.Module) else model


def model_state(model: nn.Module) -> tuple[State, ...]:
    """Parameters, buffers and plain tensor attributes, each tensor once.

    Also the tensors in tables and tuples under the attributes that forward assigns.
    """
    seen: set[int] = set()
    found = []
    for prefix, module in underlying(model).named_modules():
        held = {**module._parameters, **module._buffers, **vars(module)}
        assigned = assigned_by(module)
        for attribute, value in held.items():
            if isinstance(value, Tensor):
                places: Sequence[tuple[pytree.KeyPath, Any]] = [((), value)]
            elif attribute in assigned:
                places = pytree.tree_leaves_with_path(value)
            else:
                continue
            for path, tensor in places:
                if isinstance(tensor, Tensor) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    name = _named(prefix, attribute) + pytree.keystr(path)
                    found.append(State(name, module, attribute, path))
    return tuple(found)


def assigned_by(module: nn.Module) -> set[str]:
    """The names of the attributes that forward was seen to assign."""
    return _assigned.get(module, set())


def _named(prefix: str, attribute: str) -> str:
    return f"{prefix}.{attribute}" if prefix else attribute


@dataclass(frozen=True)
class Change:
    """What a call left otherwise than it was: an attribute, or an item of a table that is one.

    `holder[key]` was `before` and is `after`; an `item` if the holder is such a table. Without
    a holder, it lies deeper, or a list has grown or shrunk.
    """

    name: str
    owner: nn.Module
    attribute: str
    holder: Any = None
    key: Any = None
    before: Any = MISSING
    after: Any = MISSING
    item: bool = False

    def undo(self) -> None:
        if self.before is MISSING:
            self.holder.pop(self.key, None)
        else:
            self.holder[self.key] = self.before


@dataclass(frozen=True)
class Assigned:
    """One attribute, or item of a table there, that a call assigns: made of the outputs from
    `begin` on, as many as `spec` has leaves."""

    name: str
    owner: nn.Module
    attribute: str
    item: tuple[Any] | None  # its key, if it is an item
    spec: pytree.TreeSpec
    begin: int

    def assign(self, outputs: Sequence[Any]) -> None:
        leaves = outputs[self.begin : self.begin + self.spec.num_leaves]
        value, own = pytree.tree_unflatten(leaves, self.spec), vars(self.owner)
        holder = own["_buffers"] if self.attribute in own["_buffers"] else own
        if self.item is None:
            holder[self.attribute] = value
        else:
            holder[self.attribute][self.item[0]] = value


class Attributes:
    """The attributes of a model's modules at one time, to be compared with and put back.

    What torch's own modules assign is bookkeeping, and never a change.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(underlying(model).named_modules())
        self.holders: list[tuple[str, nn.Module, dict[str, Any], dict[str, Any]]] = [
            (prefix, module, cast(dict[str, Any], holder), dict(holder))
            for prefix, module in self.modules
            for holder in (vars(module), *(vars(module)[name] for name in TABLES))
        ]
        self.contents = Contents([module for _, module in self.modules])

    def changes(self) -> list[Change]:
        """What is not as it was."""
        found = []
        for prefix, module, holder, was in self.holders:
            own = vars(module)
            if type(module).__module__.startswith("torch.") \
                    and any(holder is h for h in (own, own["_parameters"], own["_buffers"])):
                continue
            for key in dict.fromkeys((*was, *holder)):
                before, after = was.get(key, MISSING), holder.get(key, MISSING)
                if before is not after and not _alike(before, after):
                    name = key if isinstance(key, str) else "a hook"
                    found.append(Change(_named(prefix, name), module, name, holder, key, before,
                                        after))
        return found + [c for changed in self.contents.changed() for c in self._inside(*changed)]

    def _inside(self, owner: nn.Module, attribute: str, table: Any, was: Any) -> list[Change]:
        """What changed in a table, or deeper, that hangs on a module under `attribute`."""
        name = _named(next(p for p, module in self.modules if module is owner), attribute)
        if vars(owner).get(attribute) is not table:
            items = None
        elif isinstance(table, dict) and was.keys() <= table.keys():
            items = [(key, was.get(key, MISSING), table[key]) for key in table]
        elif isinstance(table, list) and len(was) == len(table):
            items = list(zip(range(len(was)), was, table, strict=True))
        else:
            items = None
        if items is None:
            return [Change(name, owner, attribute)]
        return [Change(f"{name}[{key!r}]", owner, attribute, table, key, before, after, True)
                for key, before, after in items
                if before is not after and not _alike(before, after)]

    def put_back(self, changes: Sequence[Change] | None = None) -> None:
        """Undo these changes; without any, all that there may be."""
        if changes is not None and all(c.holder is not None for c in changes):
            for change in changes:
                change.undo()
            return
        for _, _, holder, was in self.holders:
            holder.clear()
            holder.update(was)
        self.contents.put_back()


def _alike(before: Any, after: Any) -> bool:
    """Whether both are the same number or name."""
    return type(before) is type(after) and isinstance(after, PLAIN) and repr(before) == repr(after)


def note_assigned(changes: Sequence[Change]) -> None:
    """Remember which attributes forward assigns."""
    for change in changes:
        if change.holder is not None:
            _assigned.setdefault(change.owner, set()).add(change.attribute)


def assignments(changes: Sequence[Change], begin: int) -> tuple[list[Assigned], list[Any]]:
    """What a graph returns so that `changes` can be made after a call, as outputs from `begin` on.

    Raises `Effect` where one is no tensors and numbers, or a number that differs from the last,
    as of a counter.
    """
    found, outputs = [], list[Any]()
    for change in changes:
        leaves, spec = flat_outputs(change.after)
        counts = any(map(_counts, flat_outputs(change.before)[0], leaves))
        plain = all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves)
        parameter = change.holder is change.owner._parameters
        if change.holder is None:
            kind = "attribute" if change.attribute in vars(change.owner) else \
                "class" if change.attribute in {k.__name__ for k in type(change.owner).__mro__} \
                else "global or enclosed"
            raise Effect(f"forward changes what the {kind} {change.name!r} holds, {EFFECT}")
        if counts or not plain or parameter or change.after is MISSING:
            raise Effect(f"forward assigns the attribute {change.name!r}, {EFFECT}")
        found.append(Assigned(change.name, change.owner, change.attribute,
                              (change.key,) if change.item else None, spec, begin + len(outputs)))
        outputs += leaves
    return found, outputs


def _counts(before: Any, after: Any) -> bool:
    """Whether a number has become another."""
    numbers = isinstance(before, (int, float, complex)) and isinstance(after, (int, float, complex))
    return numbers and not isinstance(after, bool) and before != after


def fresh_state(
    model: nn.Module, source: nn.Module | None = None,
    parameter: Callable[[Tensor], Tensor] = as_they_are,
    buffer: Callable[[Tensor], Tensor] = as_they_are,
) -> dict[int, Tensor]:
    """Copies of `model`'s tensors by the ids of the originals, for `swapped`.

    Their contents are those of `source` where name and shape agree, converted.
    """
    given = {s.name: s.get() for s in model_state(source or model)}
    replaced: dict[int, Tensor] = {}
    for state in model_state(model):
        own = state.get()
        contents = given.get(state.name, own)
        contents = contents if contents.shape == own.shape else own
        made = (parameter if isinstance(own, nn.Parameter) else buffer)(contents.detach())
        made = made.detach().clone(memory_format=torch.preserve_format)
        replaced[id(own)] = made.requires_grad_(own.requires_grad)
    return replaced


@contextlib.contextmanager
def swapped(
    model: nn.Module, tensors: dict[int, Tensor], restore: bool = True
) -> Iterator[Attributes]:
    """The model with each of its tensors, shared ones too, replaced by that of the same id.

    Gives the attributes as they are then. On the way out everything is put back, also what
    forward assigned meanwhile. Without `restore`, what lists, tables and objects of the model
    hold stays as forward left it.
    """
    before = Attributes(model)
    originals = {} if restore else {
        id(tensors[id(t)]): t for t in map(State.get, model_state(model)) if id(t) in tensors}
    try:
        before.contents.swap(tensors)
        for _, module, holder, was in before.holders:
            assigned = assigned_by(module)
            for key, held in was.items():
                if isinstance(held, Tensor) and id(held) in tensors:
                    holder[key] = tensors[id(held)]
                elif key == "_flat_weights":  # of nn.RNN and its kind
                    holder[key] = [tensors.get(id(weight), weight) for weight in held]
                elif key in assigned:
                    holder[key] = _swapped_in(held, tensors)
        yield Attributes(model)
    finally:
        for _, _, holder, was in before.holders:
            holder.clear()
            holder.update(was)
        if restore:
            before.contents.put_back()
        else:
            Attributes(model).contents.swap(originals)


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Put back what calls of the model write to meanwhile: all its tensors but those trained."""
    held = [t for t in map(State.get, model_state(model)) if not t.requires_grad]
    before = [(t, t.detach().clone()) for t in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, contents in before:
                if tensor.layout is not torch.strided or not torch.equal(tensor, contents):
                    tensor.copy_(contents)


def python_generators() -> tuple[Any, bytes | None]:
    """The states of Python's generator and of NumPy's, where somebody has imported it."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else pickle.dumps(numpy.random.get_state())


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Runs of a model that its caller does not notice: the random generators of PyTorch, Python
    and NumPy are put back. Nor do they follow the caller's inference mode, anomaly mode and hooks
    on saved tensors (`torch.utils.checkpoint` counts what is saved)."""
    python, numpy = python_generators()
    autograd: Any = torch._C._autograd
    hooks = []
    while (top := autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        with torch.random.fork_rng(), torch.inference_mode(False), \
                torch.autograd.set_detect_anomaly(False):
            yield
    finally:
        for pair in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(*pair)
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(pickle.loads(numpy))


@contextlib.contextmanager
def graphs_cut_off(model: nn.Module) -> Iterator[None]:
    """The model with leaves in place of what earlier calls computed and left in its attributes."""
    held = [s.get() for s in model_state(model)]
    leaves = {id(t): t.detach().requires_grad_() for t in held if t.grad_fn is not None}
    with swapped(model, leaves) if leaves else contextlib.nullcontext():
        yield


def _swapped_in(held: Any, tensors: dict[int, Tensor]) -> Any:
    """What an attribute holds with its tensors replaced: tables themselves, tuples anew."""
    if isinstance(held, (dict, list)):
        for key, item in list(held.items() if isinstance(held, dict) else enumerate(held)):
            held[key] = _swapped_in(item, tensors)
        return held
    return pytree.tree_map_only(Tensor, lambda t: tensors.get(id(t), t), held)
