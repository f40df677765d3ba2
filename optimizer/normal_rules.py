"""How one node is written in normal form: what takes its place, or None where it changes itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch.fx import Node

from .builder import Builder
from .cells import CELLS
from .facts import aten, is_op, shape, source_line, value

FILLED_LIKE: dict[Any, int] = {
    aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.full_like.default: 0}
NEUTRAL: dict[Any, int] = {aten.add.Tensor: 0, aten.mul.Tensor: 1}


def _select(node: Node, build: Builder) -> Node | None:
    source, axis, index = cast(tuple[Node, int, int], node.args)
    axis %= len(shape(source))
    index %= max(shape(source)[axis], 1)
    node.args = (source, axis, index)
    return None


def _slice(node: Node, build: Builder) -> Node | None:
    source = cast(Node, node.args[0])
    axis = cast(int, node.args[1] if len(node.args) > 1 else 0) % len(shape(source))
    start, stop, step = _slice_range(node.args[2:], shape(source)[axis])
    if (start, step) == (0, 1) and stop == shape(source)[axis]:
        return source
    node.args = (source, axis, start, stop, step)
    return None


def _slice_range(args: Sequence[Any], axis_size: int) -> tuple[int, int, int]:
    given = [*args, *[None, None, 1][len(args) :]]
    begin, end, stride = slice(*given).indices(axis_size)
    return begin, max(begin, end), stride


def _in_dtype(node: Node, like: Node, build: Builder) -> Node:
    dtype = value(like).dtype
    return node if value(node).dtype == dtype else build.call(
        aten._to_copy.default, node, dtype=dtype)


def _select_scatter(node: Node, build: Builder) -> Node | None:
    source, written, axis, index = cast(tuple[Node, Node, int, int], node.args)
    axis %= len(shape(source))
    index %= shape(source)[axis]
    if is_op(source, aten.select_scatter.default) and source.args[2:] == (axis, index):
        source = cast(Node, source.args[0])
    node.args = (source, _in_dtype(written, node, build), axis, index)
    return None


def _slice_scatter(node: Node, build: Builder) -> Node | None:
    source, written = cast(tuple[Node, Node], node.args[:2])
    axis = cast(int, node.args[2] if len(node.args) > 2 else 0) % len(shape(source))
    start, stop, step = _slice_range(node.args[3:], shape(source)[axis])
    written = _in_dtype(written, node, build)
    if (start, step) == (0, 1) and stop == shape(source)[axis]:
        return written
    place = (axis, start, stop, step)
    if is_op(source, aten.slice_scatter.default) and source.args[2:] == place:
        source = cast(Node, source.args[0])
    node.args = (source, written, *place)
    return None


def _copy(node: Node, build: Builder) -> Node | None:
    target, source = cast(tuple[Node, Node], node.args[:2])
    source = _in_dtype(source, target, build)
    if value(source).device != value(target).device:
        return None
    if shape(source) != shape(target):
        source = build.call(aten.expand.default, source, list(shape(target)))
    return source


def _reshape(node: Node, build: Builder) -> Node | None:
    source = cast(Node, node.args[0])
    while is_op(source, aten.reshape.default, aten.clone.default):
        source = cast(Node, source.args[0])  # a copy made only to be viewed, a view of a view
    if shape(source) == shape(node):
        return source
    if is_op(node, aten.reshape.default) and source is node.args[0]:
        node.args = (source, list(shape(node)))
        return None
    return build.call(aten.reshape.default, source, list(shape(node)))


def _unbind(node: Node, build: Builder) -> Node | None:
    source = cast(Node, node.args[0])
    axis = cast(int, node.args[1] if len(node.args) > 1 else 0) % len(shape(source))
    for item in list(node.users):
        build.at = item
        one = build.call(aten.select.int, source, axis, cast(int, item.args[1]))
        item.replace_all_uses_with(one)
        build.graph_module.graph.erase_node(item)
    return None


def _pieces(node: Node, build: Builder) -> Node | None:
    """`split`, `chunk` and `split_with_sizes` as slices, by the sizes of their results."""
    source = cast(Node, node.args[0])
    axis = cast(int, node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0))
    axis %= len(shape(source))
    starts = [0]
    for piece in node.meta["val"]:
        starts.append(starts[-1] + piece.shape[axis])
    for item in list(node.users):
        place = cast(int, item.args[1])
        build.at = item
        one = build.slice(source, axis, starts[place], starts[place + 1])
        item.replace_all_uses_with(one)
        build.graph_module.graph.erase_node(item)
    return None


def _same_if(unchanged: Callable[[Node], bool]) -> Callable[[Node, Builder], Node | None]:
    def rule(node: Node, build: Builder) -> Node | None:
        return cast(Node, node.args[0]) if unchanged(node) else None

    return rule


def _keeps_shape(node: Node) -> bool:
    return shape(cast(Node, node.args[0])) == shape(node)


def _permute(node: Node, build: Builder) -> Node | None:
    source = cast(Node, node.args[0])
    rank = len(shape(source))
    order = [d % rank for d in cast(list[int], node.args[1])]
    while is_op(source, aten.permute.default):
        inner = cast(list[int], source.args[1])
        order = [inner[d] for d in order]
        source = cast(Node, source.args[0])
    node.args = (source, order)
    return source if order == list(range(rank)) else None


def _transpose(node: Node, build: Builder) -> Node | None:
    source = cast(Node, node.args[0])
    rank = len(shape(source))
    if rank == 0:
        return source
    first, second = (cast(int, d) % rank for d in node.args[1:3])
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return build.call(aten.permute.default, source, order)


def _cat(node: Node, build: Builder) -> Node | None:
    """`cat([cat([a, b]), c])` as one, also what starts from an empty tensor and grows."""
    axis = cast(int, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))
    rank = len(shape(node))
    axis %= max(rank, 1)
    parts: list[Node] = []
    for part in cast(list[Node], node.args[0]):
        inner = cast(list[Node], part.args[0]) if is_op(part, aten.cat.default) else []
        if inner and part.args[1:] == (axis,) and len(part.users) == 1 \
                and {value(p).dtype for p in inner} == {value(part).dtype}:
            parts += inner
        elif shape(part) != (0,) or rank == 1:
            parts.append(part)
    parts = [p for p in parts if shape(p)[axis] > 0] or parts
    if reduce(torch.promote_types, [value(p).dtype for p in parts]) != value(node).dtype:
        parts = [_in_dtype(p, node, build) for p in parts]  # an empty part had a dtype too
    node.args, node.kwargs = (parts, axis), {}
    return None


def _t(node: Node, build: Builder) -> Node | None:
    source = cast(Node, node.args[0])
    if len(shape(source)) < 2:
        return source
    return build.call(aten.permute.default, source, [1, 0])


def _einsum(node: Node, build: Builder) -> Node | None:
    """Without the order of contraction, which whoever runs it finds again."""
    node.args, node.kwargs = node.args[:2], {}
    return None


def filled_with(target: Any, args: Sequence[Any]) -> Any:
    """The number that `zeros_like`, `ones_like` or `full_like` fills a tensor with."""
    return args[1] if len(args) > 1 else FILLED_LIKE[target]


def _filled_like(node: Node, build: Builder) -> Node | None:
    """What is filled like a tensor of the model's depends on its size alone: a state made anew."""
    source, made = cast(Node, node.args[0]), value(node)
    if "state" not in source.meta or "memory_format" in node.kwargs \
            or not value(source).is_contiguous():
        return None
    number = filled_with(node.target, node.args)
    return build.call(aten.full.default, list(made.shape), number, dtype=made.dtype,
                      device=made.device)


def _first_of_a_sum(node: Node, build: Builder) -> Node | None:
    """`total = 0`, to which a loop adds (or 1, by which it multiplies), as a tensor: the first
    step is then one like the others. Exact: 0 and 1 are the same number in every dtype."""
    term, start = node.args[0], node.args[1]
    if not isinstance(term, Node) or start != NEUTRAL[node.target] or node.kwargs:
        return None
    for user in node.users:
        if is_op(user, node.target) and source_line(user) == source_line(node) \
                and shape(user) == shape(node) and value(user).dtype == value(node).dtype \
                and all(isinstance(a, Node) for a in user.args):
            build.at = next(n for n in node.graph.nodes if n.op != "placeholder")
            begun = build.call(aten.full.default, list(shape(node)), start,
                               dtype=value(node).dtype, device=value(node).device)
            node.args = (begun, term) if user.args[0] is node else (term, begun)
            return None
    return None


RULES: dict[Any, Callable[[Node, Builder], Node | None]] = {
    **dict.fromkeys(NEUTRAL, _first_of_a_sum),
    **dict.fromkeys(FILLED_LIKE, _filled_like),
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.select_scatter.default: _select_scatter,
    aten.slice_scatter.default: _slice_scatter,
    aten.copy.default: _copy,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _pieces,
    aten.chunk.default: _pieces,
    aten.split_with_sizes.default: _pieces,
    aten.tensor_split.sections: _pieces,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.cat.default: _cat,
    aten.einsum.default: _einsum,
    aten.expand.default: _same_if(_keeps_shape),
    aten.alias.default: _same_if(lambda node: True),
    **CELLS,
    aten.pad.default: _same_if(lambda node: not any(cast(list[int], node.args[1]))),
}
