"""How families of operations run for all steps at once: each stays the operation that it is.

A rule makes a lane of an operation's result, or returns None where it can't.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any, cast

import torch
from torch.fx import Node

from .equation import spelled_out
from .facts import argument, aten, shape, value
from .lane import Lane, Lanes, Operand, Outcome, Rule


def _shifted(axis: int, lane: Lane) -> int:
    """Where axis `axis` of one step's value is in the lane."""
    axis %= max(lane.rank, 1)
    return axis + (axis >= lane.axis)


def pointwise(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    rank = len(shape(node))
    done = [b.aligned(a, rank) for a in args]
    named = {k: b.aligned(a, rank) for k, a in kwargs.items()}
    return Lane(b.call(node.target, *done, **named), b.place(rank))


def _fresh(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    named = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return Lane(b.call(node.target, args[0].node, **named), args[0].axis)


def _contiguous(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    return cast(Lane, args[0])


def _linear(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    source, *weights = args
    if any(isinstance(w, Lane) for w in weights):
        return _linear_of_own_weights(b, source, *weights)
    axis = min(b.place(source.rank), source.rank - 1)
    return Lane(b.call(node.target, b.at(source, axis), *weights), axis)


def _linear_of_own_weights(
    b: Lanes, source: Operand, weight: Operand, bias: Operand = None
) -> Outcome:
    """Each step has a weight: one product with all of them, or one for each, in a batch."""
    if not isinstance(weight, Lane) or isinstance(bias, Node):
        return None
    weights = b.at(weight, 0)
    steps, rows, columns = shape(weights)
    biases = b.at(bias, 0) if isinstance(bias, Lane) else None
    if not isinstance(source, Lane):
        joined = b.build.reshape(weights, [steps * rows, columns])
        flat = None if biases is None else b.build.reshape(biases, [steps * rows])
        made = b.call(aten.linear.default, source, joined, *([flat] if flat is not None else []))
        return Lane(b.build.reshape(made, [*shape(made)[:-1], steps, rows]), len(shape(made)) - 1)
    lanes = b.at(source, 0)
    before = shape(lanes)[1:-1]
    left = b.build.reshape(lanes, [steps, math.prod(before), columns])
    right = b.build.permute(weights, [0, 2, 1])
    made = b.call(aten.bmm.default, left, right) if biases is None else b.call(
        aten.baddbmm.default, b.call(aten.unsqueeze.default, biases, 1), left, right)
    return Lane(b.build.reshape(made, [steps, *before, rows]), 0)


def _matmul(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    left, right = args
    if isinstance(left, Lane) and not isinstance(right, Lane) and len(shape(right)) == 2:
        axis = min(b.place(left.rank), left.rank - 1)
        return Lane(b.call(aten.matmul.default, b.at(left, axis), right), axis)
    ranks = [o.rank if isinstance(o, Lane) else len(shape(o)) for o in (left, right)]
    if min(ranks) < 2:
        return None
    rank = max(ranks)
    padded = [_padded_front(b, o, rank) for o in (left, right)]
    return Lane(b.call(aten.matmul.default, *padded), 0)


def _padded_front(b: Lanes, operand: Operand, rank: int) -> Node:
    if not isinstance(operand, Lane):
        return cast(Node, operand)
    node = b.at(operand, 0)
    sizes = shape(node)
    return b.build.reshape(node, [sizes[0], *[1] * (rank - operand.rank), *sizes[1:]])


def _addmm(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        return None
    if not any(isinstance(a, Lane) for a in args[1:]):
        return None
    product = _matmul(b, node, args[1:], {})
    if not isinstance(product, Lane):
        return None
    rank = len(shape(node))
    return Lane(b.call(aten.add.Tensor, b.aligned(args[0], rank), b.aligned(product, rank)),
                b.place(rank))


def _einsum(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    if len(args) > 2:  # a path
        return None
    nodes = [o.node if isinstance(o, Lane) else o for o in args[1]]
    ranks = [o.rank if isinstance(o, Lane) else len(shape(o)) for o in args[1]]
    terms, out = spelled_out(cast(str, args[0]), ranks)
    letter = next(c for c in reversed(ascii_lowercase) if c not in "".join((out, *terms)))
    terms = [_inserted(term, letter, o.axis) if isinstance(o, Lane) else term
             for term, o in zip(terms, args[1], strict=True)]
    axis = b.place(len(out))
    equation = f"{','.join(terms)}->{_inserted(out, letter, axis)}"
    return Lane(b.call(node.target, equation, nodes), axis)


def _inserted(term: str, letter: str, place: int) -> str:
    return term[:place] + letter + term[place:]


def _along(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    """Operations along axes named `dim`: reductions (with or without keepdim), softmax, scans."""
    source = args[0]
    if not isinstance(source, Lane) or source.rank == 0:
        return None
    if any(isinstance(a, Lane) for a in (*args[1:], *kwargs.values())):
        return None
    declared = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    place = declared.index("dim")
    if place >= len(args):
        return None
    axes = [args[place]] if isinstance(args[place], int) else args[place]
    if not axes:
        axes = list(range(source.rank))
    moved = sorted({_shifted(axis, source) for axis in axes})
    given: Any = moved[0] if isinstance(args[place], int) else moved
    made = b.call(node.target, source.node, *args[1:place], given, *args[place + 1 :], **kwargs)
    kept = len(shape(made)) == source.rank + 1 if not isinstance(made.meta["val"], tuple) else None
    if kept is None:
        return None
    axis = source.axis if kept else source.axis - sum(m < source.axis for m in moved)
    return Lane(made, axis)


def _total(target: Any) -> Rule:
    """A reduction over everything, as the reduction over all axes but the lane's."""

    def rule(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
        source = args[0]
        if source.rank == 0:
            return None
        axes = [d for d in range(source.rank + 1) if d != source.axis]
        return Lane(b.call(target, source.node, axes, **kwargs), 0)

    return rule


def _layer_norm(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    source, sizes, *rest = args
    if not isinstance(source, Lane) or any(isinstance(r, Lane) for r in rest):
        return None
    axis = min(b.place(source.rank), source.rank - len(sizes))
    return Lane(b.call(node.target, b.at(source, axis), sizes, *rest, **kwargs), axis)


def _one_axis(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    """`slice`, `flip` and their kind: the same rank, an axis (or a list of them) as `args[1]`."""
    source = args[0]
    if not isinstance(source, Lane) or any(isinstance(a, Lane) for a in args[1:]):
        return None
    axes = args[1]
    moved: Any = (
        [_shifted(a, source) for a in axes] if isinstance(axes, (list, tuple))
        else _shifted(axes, source)
    )
    return Lane(b.call(node.target, source.node, moved, *args[2:], **kwargs), source.axis)


def _roll(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    """Of a single number, which vmap would roll along the lanes."""
    return args[0] if args[0].rank == 0 else None


def _select(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    source, axis, index = args
    moved = _shifted(axis, source)
    return Lane(b.call(node.target, source.node, moved, index), source.axis - (moved < source.axis))


def _unsqueeze(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    source, axis = args
    axis %= source.rank + 1
    if axis <= source.axis:
        return Lane(b.call(node.target, source.node, axis), source.axis + 1)
    return Lane(b.call(node.target, source.node, axis + 1), source.axis)


def _permute(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    source, order = args
    axis = b.place(source.rank)
    moved = [_shifted(d, source) for d in order]
    moved.insert(axis, source.axis)
    return Lane(b.build.permute(source.node, moved), axis)


def _reshape(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    source = args[0]
    sizes, now = shape(node), source.sizes
    axis = b.place(min(len(sizes), len(now)))
    while sizes[:axis] != now[:axis]:
        axis -= 1
    node_at = b.at(source, axis)
    return Lane(b.build.reshape(node_at, [*sizes[:axis], b.size, *sizes[axis:]]), axis)


def _scatter(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    """`select_scatter` and `slice_scatter` with the same place in every step."""
    base, source, axis, *where = args
    rank, inner = len(shape(node)), len(_step_shape(source))
    place = b.place(min(rank, inner))
    spread = [b.repeated(base, place), b.repeated(source, place)]
    axis %= rank
    if place > axis:  # the axis that is written would be cut off before the lanes
        place = 0
        spread = [b.repeated(base, 0), b.repeated(source, 0)]
    return Lane(b.call(node.target, *spread, axis + 1, *where), place)


def _step_shape(operand: Operand) -> tuple[int, ...]:
    if isinstance(operand, Lane):
        return operand.sizes
    return shape(cast(Node, operand))


def _expand(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    sizes = shape(node)
    axis = b.place(len(sizes))
    laid = b.aligned(args[0], len(sizes))
    return Lane(b.call(aten.expand.default, laid, [*sizes[:axis], b.size, *sizes[axis:]]), axis)


def _joined(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    """`cat` and `stack`: operands that are the same in all steps are repeated."""
    operands = args[0]
    axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    rank = len(shape(node))
    axis %= rank
    inner = rank - (node.target is aten.stack.default)
    place = b.place(inner)
    laid = [b.repeated(operand, place) for operand in operands]
    if node.target is aten.stack.default:
        at = axis if axis <= place else axis + 1
        return Lane(b.call(node.target, laid, at), place + (axis <= place))
    return Lane(b.call(node.target, laid, axis + (axis >= place)), place)


def _embedding(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    weight, index, *rest = args
    if isinstance(weight, Lane):  # one table of all tables' rows
        tables = b.at(weight, 0)
        steps, rows, columns = shape(tables)
        flat = b.build.reshape(tables, [steps * rows, columns])
        places = b.repeated(index, 0)
        begins = b.build.table(range(0, steps * rows, rows), value(places).device, torch.int64)
        begins = b.build.reshape(begins, [steps, *[1] * (len(shape(places)) - 1)])
        inside = b.call(aten.logical_and.default, b.call(aten.ge.Scalar, places, 0),
                        b.call(aten.lt.Scalar, places, rows))
        there = b.call(aten.add.Tensor, places, begins)  # no row of another table's
        there = b.call(aten.where.ScalarOther, inside, there, steps * rows)
        return Lane(b.call(node.target, flat, there), 0)
    if not isinstance(index, Lane):
        return None
    return Lane(b.call(node.target, weight, index.node, *rest, **kwargs), index.axis)


def _one_hot(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    """As one operation, which raises for a class out of range; `torch.vmap` compares instead."""
    lane, *classes = args
    index = lane.node
    if not value(index).is_contiguous():  # a fake tensor's result would lie in memory as it does
        index = b.call(aten.clone.default, index, memory_format=torch.contiguous_format)
    return Lane(b.call(node.target, index, *classes, **kwargs), lane.axis)


def _in_front(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    """Matrix operations that raise where they fail: all matrices' axes in front are theirs."""
    done = [b.repeated(a, 0) if isinstance(a, (Lane, Node)) else a for a in args]
    return Lane(b.call(node.target, *done, **kwargs), 0)


def _attention(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    if len(args) > 3 or argument(node, "attn_mask") is not None:
        return None
    if not all(isinstance(a, Lane) for a in args):
        return None
    return Lane(b.call(node.target, *[b.at(a, 0) for a in args], **kwargs), 0)


RULES: dict[Any, Rule] = {
    aten.clone.default: _fresh,
    aten._to_copy.default: _fresh,
    aten.lift_fresh_copy.default: _fresh,
    aten.detach.default: _fresh,
    aten.contiguous.default: _contiguous,
    aten.where.self: pointwise,
    aten.masked_fill.Scalar: pointwise,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.einsum.default: _einsum,
    aten.sum.default: _total(aten.sum.dim_IntList),
    aten.mean.default: _total(aten.mean.dim),
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _layer_norm,
    aten.roll.default: _roll,
    aten.select.int: _select,
    aten.unsqueeze.default: _unsqueeze,
    aten.permute.default: _permute,
    aten.reshape.default: _reshape,
    aten.expand.default: _expand,
    aten.cat.default: _joined,
    aten.stack.default: _joined,
    aten.embedding.default: _embedding,
    aten.one_hot.default: _one_hot,
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys((aten.linalg_cholesky.default, aten.linalg_inv.default, aten.inverse.default,
                     aten.linalg_solve.default), _in_front),
    aten.select_scatter.default: _scatter,
    aten.slice_scatter.default: _scatter,
    **dict.fromkeys((aten.slice.Tensor, aten.flip.default, aten.index_select.default), _one_axis),
    **dict.fromkeys(
        (
            aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default,
            aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten.logsumexp.default,
            aten.cumsum.default, aten.cumprod.default, aten.prod.dim_int, aten.argmax.default,
            aten.argmin.default, aten.any.dim, aten.all.dim, aten.squeeze.dim,
        ),
        _along,
    ),
}
