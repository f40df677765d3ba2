"""What a scan reads, computed in its steps instead of before them, where that reads less.

`exp(dt·A)` of all steps may be sixteen times as large as `dt`. Pointwise operations, outer
products and views that nothing but the scan needs move into its body, as long as the step then
reads no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tag
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from .builder import Builder, output_node, placeholders
from .facts import aten, body_of, bytes_of, is_tensor, shape, trips, value
from .one_step import VIEWS, Operand, at_step, operands


@dataclass(frozen=True)
class Sunk:
    """A step that computes what it read, and what it reads now: along which axis, per step."""

    scan: Node
    body: GraphModule
    slices: tuple[tuple[Node, int], ...]  # none: a number per step says how many there are
    invariants: tuple[tuple[Node, int | None], ...]  # without their axis of one, if any

    def read(self, build: Builder) -> tuple[list[Node], list[Node]]:
        """The slices and invariants as a scan takes them."""
        first = self._first()
        count = [build.call(aten.zeros.default, [trips(self.scan)], dtype=first.dtype,
                            device=first.device)] if not self.slices else []
        return [*count, *(build.move(n, axis, 0) for n, axis in self.slices)], [
            n if axis is None else build.call(aten.select.int, n, axis, 0)
            for n, axis in self.invariants]

    def values(self) -> list[list[Any]]:
        """Fake carries, slices and invariants."""
        count = [self._first().new_empty((trips(self.scan),))] if not self.slices else []
        return [[value(n) for n in cast(list[Node], self.scan.args[1])],
                [*count, *(value(n).movedim(axis, 0) for n, axis in self.slices)],
                [value(n) if a is None else value(n).select(a, 0) for n, a in self.invariants]]

    def _first(self) -> Any:
        return value(cast(list[Node], self.scan.args[1])[0])


def sunk(scan: Node, producers: bool = True) -> Sunk:
    """The scan without slices that no step reads, and with the `producers` of the others in its
    steps, as far as that pays."""
    return _Sinking(scan, producers).run()


class _Sinking:
    """The producers of what a scan reads, from the scan upwards."""

    def __init__(self, scan: Node, producers: bool) -> None:
        self.scan = scan
        self.inside: set[Node] = {scan}  # what computes for the scan alone
        self.costs: dict[tuple[Node, int], int] = {}
        sources = set(cast(list[Node], scan.args[2])) if producers else set()
        for node in reversed(list(scan.graph.nodes)):
            if node in sources and self._is_simple(node) and self.inside.issuperset(node.users):
                self.inside.add(node)
                sources.update(n for n in node.all_input_nodes if is_tensor(n))

    @staticmethod
    def _is_simple(node: Node) -> bool:
        target = node.target
        pointwise = isinstance(target, OpOverload) and Tag.pointwise in target.tags
        return target in VIEWS or _is_outer(node) or (
            pointwise and is_tensor(node) and value(node).dtype.is_floating_point)

    def run(self) -> Sunk:
        body = body_of(self.scan)
        carries, slices, fixed = (cast(list[Node], self.scan.args[k]) for k in (1, 2, 3))
        heads = placeholders(body)
        moving: dict[tuple[Node, int], None] = {}
        still: dict[tuple[Node, int | None], None] = {}
        read = [k for k in range(len(slices)) if heads[len(carries) + k].users]
        for k in read:
            self._leaves(slices[k], 0, moving, still)
        graph = Graph()
        known: dict[Any, Node] = {}

        def head(name: str, given: Any) -> Node:
            made = graph.placeholder(name)
            made.meta["val"] = given
            return made

        inner = {heads[k]: head(f"carry_{k}", value(heads[k])) for k in range(len(carries))}
        for k, (node, axis) in enumerate(moving):
            known[node, axis] = head(f"slice_{k}", value(node).select(axis, 0))
        if not moving:
            head("slice_0", value(carries[0]).new_empty(()))
        given: list[tuple[Node, int | None]] = []
        for node, of_body in zip(fixed, heads[len(carries) + len(slices) :], strict=True):
            if of_body.users:
                inner[of_body] = head(f"invariant_{len(given)}", value(node))
                given.append((node, None))
        for node, place in still:
            gone = value(node) if place is None else value(node).select(place, 0)
            known[node, place] = head(f"invariant_{len(given)}", gone)
            given.append((node, place))
        for k in read:
            inner[heads[len(carries) + k]] = self._computed(slices[k], 0, graph, known)
        for node in body.graph.nodes:
            if node not in inner and node.op not in ("output", "placeholder"):
                inner[node] = graph.node_copy(node, inner.__getitem__)
        results = cast(Sequence[Node], output_node(body).args[0])
        graph.output(tuple(inner[n] for n in results))
        return Sunk(self.scan, GraphModule(body, graph), tuple(moving), tuple(given))

    def _operands(self, node: Node, axis: int) -> list[Operand] | None:
        """What the steps read to compute a value; None if they can't."""
        return operands(node, axis) if node in self.inside else None

    def _cost(self, node: Node, axis: int) -> int:
        """Bytes that the steps read for a value."""
        if (node, axis) not in self.costs:
            read = self._operands(node, axis)
            own = bytes_of(node)
            self.costs[node, axis] = own if read is None else min(own, self._read(read))
        return self.costs[node, axis]

    def _read(self, read: Sequence[Operand]) -> int:
        return sum(self._cost(o.node, cast(int, o.axis)) for o in read if o.moves)

    def _computes(self, node: Node, axis: int) -> list[Operand] | None:
        """What the steps read to compute a value, if they do."""
        read = self._operands(node, axis)
        if read is None or not any(o.moves for o in read):
            return None
        return read if self._read(read) <= bytes_of(node) else None

    def _leaves(
        self, node: Node, axis: int, moving: dict[tuple[Node, int], None],
        still: dict[tuple[Node, int | None], None],
    ) -> None:
        """What the steps read for a value, per step and for all steps the same."""
        read = self._computes(node, axis)
        if read is None:
            moving[node, axis] = None
            return
        for operand in read:
            if operand.moves:
                self._leaves(operand.node, cast(int, operand.axis), moving, still)
            else:
                still[operand.node, operand.axis] = None

    def _computed(
        self, node: Node, axis: int, graph: Graph, known: dict[Any, Node]
    ) -> Node:
        """The value of one step in the new body."""
        if (node, axis) not in known:
            read = self._computes(node, axis)
            assert read is not None
            known[node, axis] = at_step(node, axis, {
                o.node: self._computed(o.node, cast(int, o.axis), graph, known) if o.moves
                else known[o.node, o.axis] for o in read}, graph)
        return known[node, axis]


def _is_outer(node: Node) -> bool:
    """Whether a product sums nothing: it broadcasts its factors as a multiplication does."""
    if node.target is not aten.matmul.default:
        return False
    sizes = [shape(n) for n in node.all_input_nodes]
    return all(len(size) > 1 for size in sizes) and sizes[0][-1] == 1
