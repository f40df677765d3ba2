"""One way to write each thing, so that equal steps of a loop look equal.

Grad regions become `detach`es, multi-output splits become `select`s and `slice`s, each read
stands right before its reader, reads of what was just written become the written value, and
`view` becomes `reshape`, so that a later change of strides cannot break it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .builder import Builder, note_computed, placeholders, refresh
from .cells import CELLS
from .facts import (
    READS,
    SUPERSEDED,
    WASTED,
    WRITES,
    aten,
    is_op,
    is_pure,
    is_random,
    is_region_marker,
    is_tensor,
    is_view,
    outside_regions,
    shape,
    source_line,
    value,
)

FILLED_LIKE: dict[Any, int] = {
    aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.full_like.default: 0}
SMALL = 1 << 12  # elements of constant tensors that are compared
FEW = 3  # equal operations: two may be one step that begins with equal states
MOVES = (aten.unsqueeze.default, aten.squeeze.dim, aten.permute.default, aten.expand.default)
LONGEST_WALK = 64  # writes looked back through, one by one, for the one that a read sees


class UnsupportedRegion(Exception):
    """The graph holds a call that is neither an operator nor a known region marker."""


def normalize(graph_module: GraphModule, state_names: Sequence[str], mode: FakeTensorMode) -> None:
    """Bring a freshly traced graph into normal form, in place."""
    for node in graph_module.graph.nodes:
        note_computed(node)
    name_inputs(graph_module, state_names)
    detach_regions(graph_module, mode)
    mark_wasted(graph_module)
    simplify(graph_module, mode)
    remove_dead(graph_module)
    merge_equal(graph_module, FEW)
    sink_reads(graph_module)
    propagate(graph_module, mode)
    graph_module.recompile()


def mark_wasted(graph_module: GraphModule) -> None:
    """Mark what the model computes for nothing, where its line makes use of most it computes:
    in the last steps of loops, not in all but the last."""
    alike: dict[Any, list[Node]] = {}
    for node in filter(_is_plain, graph_module.graph.nodes):
        alike.setdefault((node.target, node.meta.get("stack_trace")), []).append(node)
    for nodes in alike.values():
        wasted = [n for n in nodes if not n.users]
        if 2 * len(wasted) < len(nodes):
            for node in wasted:
                node.meta[WASTED] = True


def _is_plain(node: Node) -> bool:
    """Whether a node computes a tensor whose size does not depend on numbers in others."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and is_pure(node) and is_tensor(node) \
        and torch.Tag.dynamic_output_shape not in target.tags


def name_inputs(graph_module: GraphModule, state_names: Sequence[str]) -> None:
    """Placeholders of the model's state carry its qualified names."""
    for position, node in enumerate(placeholders(graph_module)):
        if position < len(state_names):
            node.meta["state"] = state_names[position]
            wanted = re.sub(r"\W", "_", state_names[position])
        else:
            wanted = f"input_{position - len(state_names)}"
        node.name = graph_module.graph._graph_namespace.create_name(wanted, None)
        node.target = node.name


def detach_regions(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """Inside `no_grad`, every value that enters is detached; the region markers go."""
    enabled = True
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch._C._set_grad_enabled:
            if enabled and node.args[0]:
                raise UnsupportedRegion("forward enables gradients for a part of itself")
            enabled = bool(node.args[0])
            graph_module.graph.erase_node(node)
        elif is_region_marker(node):
            continue
        elif not isinstance(node.target, torch._ops.OpOverload) and (
            node.target is not operator.getitem
        ):
            raise UnsupportedRegion(f"the call {node.target} can't be kept in a graph")
        elif not enabled and node.target is not operator.getitem:
            build = Builder(graph_module, node, mode, {**node.meta})
            fresh = {
                n: build.call(aten.detach.default, n)
                for n in node.all_input_nodes
                if is_tensor(n) and not n.meta.get("no_grad")
            }
            for source, detached in fresh.items():
                node.replace_input_with(source, detached)
            node.meta["no_grad"] = True


def simplify(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """Apply the one-node rules of `RULES`, in program order; read behind writes elsewhere."""
    writes: dict[Node, Written] = {}
    for node in list(outside_regions(graph_module.graph.nodes)):
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is None:
            continue
        stamp = {k: v for k, v in node.meta.items() if k in ("stack_trace", "no_grad")}
        found = rule(node, Builder(graph_module, node, mode, stamp))
        if found is None and is_op(node, *WRITES):
            writes[node] = _written(node, writes)
        elif found is None and is_op(node, *READS):
            found = _behind_other_writes(node, writes)
        if found is not None and found is not node:
            if node.meta.get(WASTED):
                found.meta[WASTED] = True
            node.replace_all_uses_with(found)
            graph_module.graph.erase_node(node)


def remove_dead(graph_module: GraphModule) -> None:
    """Remove what nobody uses, except random operations: they advance the generator.

    What the model itself computes for nothing stays until loops are folded: without its last
    update of the state, which only a next step would read, a last step looks unlike the others.
    """
    for node in reversed(list(graph_module.graph.nodes)):
        wasted = node.meta.get(WASTED) and not node.meta.get(SUPERSEDED)
        if not node.users and is_pure(node) and not wasted:
            graph_module.graph.erase_node(node)


def merge_equal(graph_module: GraphModule, fewest: int = 2) -> None:
    """Compute once what at least `fewest` nodes compute alike: pure operations of equal arguments.
    Views are merged in any case.

    The one that stays moves up to its arguments: what every step of a loop computed from the
    same values is computed before the loop.
    """
    heads = placeholders(graph_module)
    seen: dict[Any, list[Node]] = {}
    first: dict[Node, Node] = {}  # of those that compute the same
    place = {node: (k, 0) for k, node in enumerate(graph_module.graph.nodes)}
    ends: dict[int, Node] = {}  # of what was moved behind a node, by that node's place
    merged: dict[Node, None] = {}
    outside = list(outside_regions(graph_module.graph.nodes))
    made = _made_alike(graph_module, outside) if fewest > 2 else {}
    for node in outside:
        if node.op not in ("call_function", "get_attr") or not is_pure(node):
            continue
        key = made.get(node) or _computed(graph_module, node, first)
        alike = seen.setdefault(key, [])
        alike.append(node)
        first[node] = alike[0]
    for kept, *others in seen.values():
        if others and (len(others) + 1 >= fewest or is_view(kept)):
            for node in others:
                node.replace_all_uses_with(kept)
                graph_module.graph.erase_node(node)
            merged[kept] = None
    movable = set(outside)
    for number, node in enumerate(sorted(merged, key=place.__getitem__), start=1):
        if node.all_input_nodes and movable.issuperset(node.all_input_nodes):
            last = max(node.all_input_nodes, key=place.__getitem__)
            anchor = last if last.op != "placeholder" else heads[-1]
            behind = place[anchor][0]
            ends.setdefault(behind, anchor).append(node)
            ends[behind], place[node] = node, (behind, number)


def _computed(graph_module: GraphModule, node: Node, first: dict[Node, Node]) -> Any:
    """What a node computes, of what; the `first` of equal nodes stands for all."""
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    target = node.target if node.op == "call_function" else _held(graph_module, node)
    return (node.op, target, repr(spec), tuple(
        first.get(n, n) if isinstance(n, Node) else (type(n).__name__, repr(n)) for n in leaves
    ))


def _made_alike(graph_module: GraphModule, nodes: Sequence[Node]) -> dict[Node, Any]:
    """What is made from nothing, by its line and what it is.

    Each by itself where a line makes one thing a few times and then another, as `torch.full((), t
    // 10)` does in a loop: merged, these would leave the first of some steps alone.
    """
    found: dict[Any, list[tuple[Node, Any]]] = {}
    for node in nodes:
        if node.op in ("call_function", "get_attr") and is_pure(node) and not node.all_input_nodes:
            line = source_line(next(iter(node.users), node))
            kind = line, node.target if node.op == "call_function" else "constant"
            found.setdefault(kind, []).append((node, (line, _computed(graph_module, node, {}))))
    alike: dict[Node, Any] = {}
    for pairs in found.values():
        period = len({what for _, what in pairs})
        regular = all(a[1] == b[1] for a, b in zip(pairs, pairs[period:], strict=False))
        alike |= {node: what if regular else node for node, what in pairs}
    return alike


def _held(graph_module: GraphModule, node: Node) -> Any:
    """What tells an attribute from others: a constant tensor's dtype, device, shape and bytes."""
    held = getattr(graph_module, str(node.target))
    if type(held) is not Tensor or held.numel() > SMALL or held.layout is not torch.strided:
        return node.target
    numbers = held.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (held.dtype, held.device, held.shape, held.requires_grad,
            numbers.view(torch.uint8).numpy().tobytes())


def sink_reads(graph_module: GraphModule) -> None:
    """Give each argument that is a `select` or `slice`, or a view of one, its own, right before
    its reader.

    They stand in the order of the arguments, so that it is the same in every step of a loop,
    whichever reads were written first or shared.
    """
    graph = graph_module.graph
    reads: set[Node] = set()
    for node in graph.nodes:
        if is_op(node, *READS) or (is_op(node, *MOVES) and node.args[0] in reads):
            reads.add(node)
    for user in list(graph.nodes):
        if user.op != "call_function" or user in reads:
            continue

        def own(node: Node, moved: bool = True, user: Node = user) -> Node:
            if node not in reads or not (moved or is_op(node, *READS)):
                return node  # what a step reads of may be a view that all steps share
            source = own(cast(Node, node.args[0]), moved and not is_op(node, *READS))
            with graph.inserting_before(user):
                copied = graph.create_node(node.op, node.target, (source, *node.args[1:]), {})
            copied.meta = dict(node.meta)
            return copied

        user.args = torch.fx.node.map_arg(user.args, own)
        user.kwargs = torch.fx.node.map_arg(user.kwargs, own)
    for node in reversed(list(graph.nodes)):
        if node in reads and not node.users:
            graph.erase_node(node)


def _select(node: Node, build: Builder) -> Node | None:
    source, axis, index = cast(tuple[Node, int, int], node.args)
    axis %= len(shape(source))
    index %= max(shape(source)[axis], 1)
    node.args = (source, axis, index)
    return None


def _slice_range(args: Sequence[Any], axis_size: int) -> tuple[int, int, int]:
    given = [*args, *[None, None, 1][len(args) :]]
    begin, end, stride = slice(*given).indices(axis_size)
    return begin, max(begin, end), stride


def _slice(node: Node, build: Builder) -> Node | None:
    source = cast(Node, node.args[0])
    axis = cast(int, node.args[1] if len(node.args) > 1 else 0) % len(shape(source))
    start, stop, step = _slice_range(node.args[2:], shape(source)[axis])
    if (start, step) == (0, 1) and stop == shape(source)[axis]:
        return source
    node.args = (source, axis, start, stop, step)
    return None


@dataclass(frozen=True)
class Written:
    """What a write and those right before it wrote: all of it lies in `begin:end` on `axis`."""

    axis: int
    begin: int
    end: int
    before: Node  # the buffer without these writes


def _place(node: Node) -> tuple[int, int, int]:
    """Axis, begin and end of a read or write (of normal arguments)."""
    axis, begin, *rest = cast(list[int], node.args[2 if is_op(node, *WRITES) else 1 :])
    return axis, begin, rest[0] if rest else begin + 1


def _written(node: Node, writes: Mapping[Node, Written]) -> Written:
    axis, begin, end = _place(node)
    base = cast(Node, node.args[0])
    earlier = writes.get(base)
    if earlier is None or earlier.axis != axis:
        return Written(axis, begin, end, base)
    return Written(axis, min(begin, earlier.begin), max(end, earlier.end), earlier.before)


def _behind_other_writes(node: Node, writes: Mapping[Node, Written]) -> Node | None:
    """Let a read skip the writes elsewhere; what was written if it reads all of one write."""
    axis, begin, end = _place(node)
    source = cast(Node, node.args[0])
    for _ in range(LONGEST_WALK):
        if source not in writes or (at := _place(source))[0] != axis:
            break
        if at[1] < end and begin < at[2]:
            same = is_op(node, aten.select.int) == is_op(source, aten.select_scatter.default)
            if same and node.args[1:] == source.args[2:]:
                return cast(Node, source.args[1])
            break
        all_before = writes[source]
        apart = all_before.end <= begin or end <= all_before.begin
        source = all_before.before if apart else cast(Node, source.args[0])
    else:
        return None
    node.args = (source, *node.args[1:])
    return None


def _select_scatter(node: Node, build: Builder) -> Node | None:
    source, written, axis, index = cast(tuple[Node, Node, int, int], node.args)
    axis %= len(shape(source))
    index %= shape(source)[axis]
    if is_op(source, aten.select_scatter.default) and source.args[2:] == (axis, index):
        source = cast(Node, source.args[0])
    node.args = (source, written, axis, index)
    return None


def _slice_scatter(node: Node, build: Builder) -> Node | None:
    source, written = cast(tuple[Node, Node], node.args[:2])
    axis = cast(int, node.args[2] if len(node.args) > 2 else 0) % len(shape(source))
    start, stop, step = _slice_range(node.args[3:], shape(source)[axis])
    if (start, step) == (0, 1) and stop == shape(source)[axis]:
        return written
    place = (axis, start, stop, step)
    if is_op(source, aten.slice_scatter.default) and source.args[2:] == place:
        source = cast(Node, source.args[0])
    node.args = (source, written, *place)
    return None


def _copy(node: Node, build: Builder) -> Node | None:
    target, source = cast(tuple[Node, Node], node.args[:2])
    if value(source).dtype != value(target).dtype:
        source = build.call(aten._to_copy.default, source, dtype=value(target).dtype)
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
        if is_op(part, aten.cat.default) and part.args[1:] == (axis,) and len(part.users) == 1:
            parts += cast(list[Node], part.args[0])
        elif shape(part) != (0,) or rank == 1:
            parts.append(part)
    parts = [p for p in parts if shape(p)[axis] > 0] or parts
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


def _filled_like(node: Node, build: Builder) -> Node | None:
    """What is filled like a tensor of the model's depends on its size alone: a state made anew."""
    source, made = cast(Node, node.args[0]), value(node)
    if "state" not in source.meta or "memory_format" in node.kwargs \
            or not value(source).is_contiguous():
        return None
    number = node.args[1] if len(node.args) > 1 else FILLED_LIKE[node.target]
    return build.call(aten.full.default, list(made.shape), number, dtype=made.dtype,
                      device=made.device)


RULES: dict[Any, Callable[[Node, Builder], Node | None]] = {
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


def propagate(graph_module: GraphModule, mode: FakeTensorMode, exact: bool = False) -> None:
    """Make every fake result true again, from the placeholders on; strides may have changed.

    The results of loops count as contiguous, unless `exact`. An operation that refuses its
    inputs' strides gets contiguous ones.
    """
    for node in list(outside_regions(graph_module.graph.nodes)):
        if node.op != "call_function":
            continue
        try:
            refresh(node, mode, exact)
        except RuntimeError:
            if is_random(node):
                raise
            build = Builder(graph_module, node, mode)
            for source in node.all_input_nodes:
                if is_tensor(source) and not value(source).is_contiguous():
                    node.replace_input_with(source, build.call(aten.contiguous.default, source))
            refresh(node, mode, exact)
