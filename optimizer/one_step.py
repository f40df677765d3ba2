"""One step of an operation on all steps' values: what it reads, and what it computes of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tag, Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from .axes import reduced
from .builder import Builder
from .equation import spelled_out
from .facts import argument, aten, is_op, is_tensor, shape, value

VIEWS = (aten.permute.default, aten.unsqueeze.default, aten.expand.default, aten.select.int,
         aten.slice.Tensor, aten.reshape.default, aten.squeeze.dim)
REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
Places = Sequence[tuple[Node, int | None]]


@dataclass(frozen=True)
class Operand:
    """What a step reads of `node`: its own value along `axis`, or all of it if that is None.

    If it doesn't move, `axis` is of one, and repeats along the steps.
    """

    node: Node
    axis: int | None
    moves: bool = True

    @property
    def held(self) -> Tensor:
        """The fake value that a step is given."""
        given = value(self.node)
        return given if self.axis is None else given.select(self.axis, 0)

    def placed(self, build: Builder, node: Node) -> Node:
        """What a scan takes of `node`, which holds the operand's value: a slice or invariant."""
        if self.axis is None:
            return node
        return build.move(node, self.axis, 0) if self.moves \
            else build.call(aten.select.int, node, self.axis, 0)


def operands(node: Node, axis: int) -> list[Operand] | None:
    """What the steps of `node`, which `axis` counts, read; None where they can't be told apart."""
    if node.target in VIEWS:
        source = cast(Node, node.args[0])
        place = _before_view(node, source, axis)
        return None if place is None else [Operand(source, place)]
    found: dict[Node, Operand] = {}
    for source, place in _places(node, axis) or ():
        moves = place is not None and shape(source)[place] > 1
        given = Operand(source, place, moves)
        if found.setdefault(source, given) != given:
            return None
    return list(found.values()) or None


def _places(node: Node, axis: int) -> Places | None:
    """For each operand of what is no view, which of its axes counts the steps, if any."""
    rank = len(shape(node))
    if is_op(node, *REDUCTIONS):
        source = cast(Node, node.args[0])
        gone = reduced(node)
        left = [a for a in range(len(shape(source))) if a not in gone]
        place = axis if argument(node, "keepdim") else left[axis]
        return None if place in gone else [(source, place)]
    if is_op(node, aten.einsum.default):
        given = cast(list[Node], node.args[1])
        terms, out = _equation(node)
        alone = all(len(set(term)) == len(term) for term in terms)
        return [(n, term.index(out[axis]) if out[axis] in term else None)
                for n, term in zip(given, terms, strict=True)] if alone else None
    pointwise = isinstance(node.target, OpOverload) and Tag.pointwise in node.target.tags
    batched = is_op(node, aten.matmul.default) and axis < rank - 2
    if not (pointwise or batched or is_op(node, aten._to_copy.default)) \
            or not all(map(is_tensor, node.all_input_nodes)):
        return None
    aligned = [(n, axis - rank + len(shape(n))) for n in node.all_input_nodes]
    return [(n, place if place >= 0 else None) for n, place in aligned]


def at_step(node: Node, axis: int, sources: Mapping[Node, Node], graph: Graph) -> Node:
    """The operation in a step's graph, of what the step reads of the operands."""
    own: Any = node.args
    if node.target in VIEWS:
        place = cast(int, _before_view(node, own[0], axis))
        made = _viewed(node, axis, sources[own[0]], place, graph)
        if made is sources[own[0]]:
            return made
    elif is_op(node, *REDUCTIONS):
        [(_, was)] = cast(list[tuple[Node, int]], _places(node, axis))
        gone = [a - (a > was) for a in reduced(node)]
        made = graph.call_function(cast(OpOverload, node.target), (
            sources[own[0]], gone, argument(node, "keepdim")), dict(node.kwargs))
    elif is_op(node, aten.einsum.default):
        terms, out = _equation(node)
        left = ",".join(term.replace(out[axis], "") for term in terms)
        made = graph.call_function(aten.einsum.default, (
            f"{left}->{out.replace(out[axis], '')}", [sources[n] for n in own[1]]))
    else:
        made = graph.node_copy(node, sources.__getitem__)
    made.meta = {**node.meta, "val": value(node).select(axis, 0)}
    return made


def _equation(node: Node) -> tuple[list[str], str]:
    given = cast(list[Node], node.args[1])
    return spelled_out(str(node.args[0]), [len(shape(n)) for n in given])


def _before_view(node: Node, source: Node, axis: int) -> int | None:
    """Where a view's axis was before it, if it was there, undivided."""
    args: Any = node.args
    rank = len(shape(source))
    if node.target is aten.permute.default:
        return int(args[1][axis]) % rank
    if node.target is aten.expand.default:
        place = axis - len(shape(node)) + rank
        return place if place >= 0 and shape(source)[place] > 1 else None
    if node.target is aten.reshape.default:
        before = value(node).shape[:axis].numel()
        return next((k for k in range(rank) if shape(source)[k] == shape(node)[axis]
                     and value(source).shape[:k].numel() == before), None)
    where = int(args[1]) % (rank + (node.target is aten.unsqueeze.default))
    if node.target is aten.unsqueeze.default:
        return axis - (where < axis) if where != axis else None
    if node.target is aten.slice.Tensor or len(shape(node)) == rank:
        return None if where == axis else axis
    return axis + (where <= axis)  # select, squeeze


def _viewed(node: Node, axis: int, source: Node, was: int, graph: Graph) -> Node:
    """A view of one step's value."""
    args: Any = node.args
    sizes = [n for a, n in enumerate(shape(node)) if a != axis]
    if node.target is aten.permute.default:
        places = [p % len(args[1]) for p in args[1]]
        order = [p - (p > was) for p in places if p != was]
        if order == list(range(len(order))):
            return source
        return graph.call_function(aten.permute.default, (source, order))
    if node.target is aten.expand.default:
        return graph.call_function(aten.expand.default, (source, sizes))
    if node.target in (aten.slice.Tensor, aten.select.int):
        where = args[1] % len(shape(args[0]))
        moved = where - (where > was)
        return graph.call_function(node.target, (source, moved, *args[2:]))
    if sizes == [n for a, n in enumerate(shape(args[0])) if a != was]:
        return source
    return graph.call_function(aten.reshape.default, (source, sizes))
