"""A model's own `autograd.Function`s as operators, so that graphs can hold them.

In a graph such a function is one operator. Where it runs it is the function itself, with its own
backward; where a kernel's step is traced, it is what its forward and its backward compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tag, Tensor
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from .axes import LIKE
from .composed import RULES
from .facts import aten
from .pointwise import SAME
from .step import aside

Function = type[torch.autograd.Function]

LIBRARY: Any = torch.library.Library("looplift_functions", "DEF")  # type: ignore[no-untyped-call]
TYPES = {bool: "bool", int: "int", float: "float", str: "str"}  # of arguments that are no tensors
_NUMBERS = count()
_apply: Any = vars(torch.autograd.Function)["apply"].__func__  # which a trace replaces


class NoOperator(Exception):
    """Why a function can be no operator."""


class _Like(NamedTuple):
    """What a tensor is like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        made = torch.full(self.shape, 0.5, device=self.device).to(self.dtype)
        return made.requires_grad_(made.is_floating_point() or made.is_complex())


class _Traits(NamedTuple):
    """What a function does: element by element, with random numbers, how many results."""

    pointwise: bool
    random: bool
    results: int  # 0: one that is in no tuple


def called(kind: Function, *args: Any, **kwargs: Any) -> Any:
    """What `kind.apply` returns, by the function's operator; raises `NoOperator`."""
    if kwargs:
        raise NoOperator("it takes named arguments")
    for arg in args:
        if not isinstance(arg, Tensor) and type(arg) not in TYPES:
            raise NoOperator(f"it takes an argument of type {type(arg).__name__}")
    types = tuple(TYPES.get(type(arg), "Tensor") for arg in args)
    like = tuple(_Like(tuple(arg.shape), arg.dtype, arg.device) if isinstance(arg, Tensor) else arg
                 for arg in args)
    return _operator(kind, types, _traits(kind, like))(*args)


@lru_cache(maxsize=256)
def _operator(kind: Function, types: tuple[str, ...], traits: _Traits) -> OpOverload:
    """The operator of a function for arguments of such types."""
    name = f"{kind.__name__}_{next(_NUMBERS)}"
    given = ", ".join(f"{held} a{k}" for k, held in enumerate(types))
    made = f"({', '.join(['Tensor'] * traits.results)})" if traits.results else "Tensor"
    tags = [tag for tag, holds in ((Tag.pointwise, traits.pointwise),
                                   (Tag.nondeterministic_seeded, traits.random)) if holds]
    LIBRARY.define(f"{name}({given}) -> {made}", tags=tags)
    forward = partial(_forward, kind)
    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(name, lambda *args: _apart(_apply(kind, *args), args), "Autograd")
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", forward, lib=LIBRARY)
    operator: OpOverload = getattr(torch.ops.looplift_functions, name).default
    RULES[operator] = forward
    return operator


class _Context:
    """What a forward is given where no backward follows."""

    def __getattr__(self, name: str) -> Any:
        if name == "needs_input_grad":
            return (False,) * 64
        return lambda *args, **kwargs: None  # save_for_backward, mark_non_differentiable, …


def _forward(kind: Function, *args: Any) -> Any:
    """A function's results, without its backward."""
    alone = kind.setup_context is not torch.autograd.Function.setup_context
    with torch.no_grad():
        made: Any = kind.forward(*args) if alone else kind.forward(_Context(), *args)
        return _apart(made, args)


def _apart(made: Any, args: Sequence[Any]) -> Any:
    """Results that share no memory with the arguments, as an operator's must not."""
    if isinstance(made, tuple):
        return tuple(_apart(one, args) for one in made)
    places = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
    return made.clone() if made.untyped_storage()._cdata in places else made


def _several(made: Any) -> tuple[Any, ...]:
    return made if isinstance(made, tuple) else (made,)


@lru_cache(maxsize=256)
def _traits(kind: Function, like: tuple[Any, ...]) -> _Traits:
    try:
        found: _Traits = aside(lambda: _observed(kind, like))
    except NoOperator:
        raise
    except Exception as error:  # the user's code
        raise NoOperator(f"alone it raises {type(error).__name__}: {error}") from error
    return found


def _observed(kind: Function, like: tuple[Any, ...]) -> _Traits:
    """A function's traits, from a trace of its forward and backward on such arguments."""
    args = [one.tensor() if isinstance(one, _Like) else one for one in like]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    before = [t._version for t in tensors]
    with torch.no_grad():
        made = _apply(kind, *args)
    if [t._version for t in tensors] != before:
        raise NoOperator("it writes to its arguments")
    several = _several(made)
    if not all(isinstance(one, Tensor) for one in several):
        raise NoOperator("it returns what is no tensor")

    def both(tensors: list[Tensor], grads: list[Tensor]) -> Any:
        rest = iter(tensors)
        found = _several(_apply(kind, *(next(rest) if isinstance(a, Tensor) else a
                                        for a in args)))
        pairs = [(r, g) for r, g in zip(found, grads, strict=True) if r.requires_grad]
        inputs = [t for t in tensors if t.requires_grad]
        if not pairs:
            return found
        return found, torch.autograd.grad([r for r, _ in pairs], inputs, [g for _, g in pairs],
                                          allow_unused=True)

    traced = make_fx(both)(tensors, [torch.ones_like(one) for one in several])
    calls = [n for n in traced.graph.nodes if n.op == "call_function"]
    tags = [getattr(n.target, "tags", ()) for n in calls]
    largest = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    pointwise = len(several) == 1 and several[0].shape == largest and all(
        Tag.pointwise in own or n.target in SAME or n.target in LIKE
        or (n.target is aten.view.default and n.args[0].meta["val"].shape == n.meta["val"].shape)
        for n, own in zip(calls, tags, strict=True))
    return _Traits(pointwise, any(Tag.nondeterministic_seeded in own for own in tags),
                   len(made) if isinstance(made, tuple) else 0)

