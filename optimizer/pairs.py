"""Complex numbers as pairs of real ones: what a step does to them, in real operations.

A real operand counts as a complex one whose imaginary part is zero, as it does for PyTorch: zero
times infinity is to be NaN here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .builder import output_node, placeholders
from .facts import apart, aten, is_tensor, spelled, value
from .pointwise import SAME, Unsupported, tracing_a_step


class Pair(NamedTuple):
    """Real and imaginary part; tensors, or numbers."""

    real: Any
    imaginary: Any


class Both(NamedTuple):
    """What `view_as_real` shows of a pair."""

    pair: Pair


def is_complex(node: Node) -> bool:
    return is_tensor(node) and value(node).dtype.is_complex


def in_pairs(body: GraphModule) -> GraphModule:
    """The body with two arguments or results, both real, in place of each complex one.

    Raises `Unsupported` where an operation has no rule.
    """
    heads = placeholders(body)
    results = cast(tuple[Node, ...], output_node(body).args[0])
    if not any(map(is_complex, body.graph.nodes)):
        return body
    parts = [parted(given) for given in apart(heads)]

    def real(*given: Tensor) -> list[Tensor]:
        rest = iter(given)
        arguments = [Pair(next(rest), next(rest)) if len(p) > 1 else next(rest) for p in parts]
        known = dict(zip(heads, arguments, strict=True))
        for node in body.graph.nodes:
            if node.op == "call_function":
                known[node] = _computed(node, known)
        return [part for node in results
                for part in (_pair(known[node]) if is_complex(node) else (_shown(known[node]),))]

    with tracing_a_step():
        return make_fx(real)(*(part for p in parts for part in p))


def parted(tensor: Tensor) -> tuple[Tensor, ...]:
    """The two parts of a complex tensor; a real one as it is."""
    if not tensor.is_complex():
        return (tensor,)
    both = torch.view_as_real(tensor.resolve_conj())
    return both[..., 0], both[..., 1]


def _computed(node: Node, known: Mapping[Node, Any]) -> Any:
    """The value of an operation, of those that are known."""
    args: Any = map_arg(node.args, known.__getitem__)
    kwargs: Any = map_arg(node.kwargs, known.__getitem__)
    target: Any = node.target
    if target is not aten.select.int:
        args = tuple(map(_shown, args))
    dtype = kwargs.get("dtype")
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda a: isinstance(a, (Pair, Both)))
    if not any(isinstance(a, (Pair, Both, complex)) for a in leaves) \
            and not (dtype and dtype.is_complex) and target not in MADE:
        return target(*args, **kwargs)
    if target in SAME and dtype is not None:
        return _cast(args[0], dtype)
    if target not in RULES:
        raise Unsupported(f"the loop computes {spelled(target)} of complex numbers")
    return RULES[target](*args, **kwargs)


def _cast(given: Any, dtype: torch.dtype) -> Any:
    if not dtype.is_complex:
        raise Unsupported("the loop drops an imaginary part")
    if _is_real(given):
        return given.to(dtype.to_real())
    return Pair(*(part.to(dtype.to_real()) for part in given))


def _pair(given: Any) -> Pair:
    if isinstance(given, Pair):
        return given
    if isinstance(given, Tensor):
        return Pair(given, torch.zeros_like(given))
    return Pair(complex(given).real, complex(given).imag)


def _shown(given: Any) -> Any:
    """What `view_as_real` shows, as a tensor."""
    return torch.stack(given.pair, -1) if isinstance(given, Both) else given


def _is_real(given: Any) -> bool:
    return not isinstance(given, (Pair, complex))


def _add(a: Any, b: Any, *, alpha: Any = 1) -> Pair:
    (ar, ai), (br, bi) = _pair(a), _mul(b, complex(alpha))  # which is NaN where b is infinite
    return Pair(ar + br, ai + bi)


def _sub(a: Any, b: Any, *, alpha: Any = 1) -> Pair:
    return _add(a, b, alpha=-alpha)


def _mul(a: Any, b: Any) -> Any:
    if _is_real(a) and _is_real(b):
        return a * b
    (ar, ai), (br, bi) = _pair(a), _pair(b)
    return Pair(ar * br - ai * bi, ar * bi + ai * br)


def _div(a: Any, b: Any) -> Pair:
    if not _is_real(b):
        raise Unsupported("the loop divides by complex numbers")
    real, imaginary = _pair(a)
    return Pair((real + imaginary * 0) / b, (imaginary - real * 0) / b)


def _matmul(a: Any, b: Any) -> Pair:
    (ar, ai), (br, bi) = _pair(a), _pair(b)
    return Pair(ar @ br - ai @ bi, ar @ bi + ai @ br)


def _exp(a: Pair) -> Pair:
    size, angle = torch.exp(a.real), a.imaginary
    wide, lost = (torch.logical_not(part.abs() < math.inf) for part in a)
    real = (a.real == -math.inf) | (wide & (angle == 0))  # as in C, whatever the sine
    return Pair(torch.where(real | ((a.real == math.inf) & lost), size, size * torch.cos(angle)),
                (size * torch.sin(angle)).masked_fill(real, 0.0))


def _polar(size: Tensor, angle: Tensor) -> Pair:
    return Pair(size * torch.cos(angle), size * torch.sin(angle))


def _where(mask: Tensor, a: Any, b: Any) -> Pair:
    return Pair(*(torch.where(mask, x, y) for x, y in zip(_pair(a), _pair(b), strict=True)))


def _select(given: Any, axis: int, index: int) -> Any:
    if isinstance(given, Both):
        if axis % (given.pair.real.dim() + 1) != given.pair.real.dim():
            raise Unsupported("the loop reads parts of complex numbers along another axis")
        return given.pair[index]
    return Pair(*(aten.select.int(part, axis, index) for part in given))


def _as_complex(given: Tensor) -> Pair:
    return Pair(given[..., 0], given[..., 1])


def _full_like(given: Any, number: complex, **_: Any) -> Pair:
    real = _pair(given).real
    return Pair(torch.full_like(real, complex(number).real),
                torch.full_like(real, complex(number).imag))


def _each(target: Any) -> Callable[..., Pair]:
    """The rule of an operation that does the same to both parts."""
    return lambda given, *args, **kwargs: Pair(*(target(part, *args, **kwargs) for part in given))


MADE = {aten.complex.default, aten.polar.default, aten.view_as_complex.default}  # of real ones
PARTWISE: Sequence[Any] = (
    aten.reshape.default, aten.view.default, aten.permute.default, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.sum.dim_IntList,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.neg.default,
    aten.transpose.int,
)
RULES: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add, aten.sub.Tensor: _sub, aten.mul.Tensor: _mul, aten.div.Tensor: _div,
    aten.matmul.default: _matmul, aten.mm.default: _matmul, aten.bmm.default: _matmul,
    aten.rsub.Scalar: lambda a, b: _sub(b, a), aten.exp.default: _exp,
    aten.polar.default: _polar, aten.complex.default: Pair,
    aten.where.self: _where, aten.select.int: _select,
    aten.view_as_complex.default: _as_complex, aten.view_as_real.default: Both,
    aten._conj.default: lambda a: Pair(a.real, -a.imaginary),
    aten.conj_physical.default: lambda a: Pair(a.real, -a.imaginary),
    aten.resolve_conj.default: lambda a: a,
    aten.full_like.default: _full_like,
    aten.zeros_like.default: lambda a, **kwargs: _full_like(a, 0),
    aten.ones_like.default: lambda a, **kwargs: _full_like(a, 1),
    **{target: _each(target) for target in PARTWISE},
}
