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
    """A step that computes what it read, and what it reads now."""

    scan: Node
    body: GraphModule
    slices: tuple[Operand, ...]  # none: a number per step says how many there are
    invariants: tuple[Operand, ...]

    def read(self, build: Builder) -> tuple[list[Node], list[Node]]:
        """The slices and invariants as a scan takes them."""
        first = self._first()
        count = [build.call(aten.zeros.default, [trips(self.scan)], dtype=first.dtype,
                            device=first.device)] if not self.slices else []
        slices, invariants = ([o.placed(build, o.node) for o in read]
                              for read in (self.slices, self.invariants))
        return [*count, *slices], invariants

    def values(self) -> list[list[Any]]:
        """Fake carries, slices and invariants."""
        count = [self._first().new_empty((trips(self.scan),))] if not self.slices else []
        return [[value(n) for n in cast(list[Node], self.scan.args[1])],
                [*count, *(value(o.node).movedim(cast(int, o.axis), 0) for o in self.slices)],
                [o.held for o in self.invariants]]

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
        self.costs: dict[Operand, int] = {}
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
        found: dict[Operand, None] = {}
        read = [k for k in range(len(slices)) if heads[len(carries) + k].users]
        for k in read:
            self._leaves(Operand(slices[k], 0), found)
        graph = Graph()

        def head(name: str, given: Any) -> Node:
            made = graph.placeholder(name)
            made.meta["val"] = given
            return made

        inner = {heads[k]: head(f"carry_{k}", value(heads[k])) for k in range(len(carries))}
        moving = [o for o in found if o.moves]
        known = {o: head(f"slice_{k}", o.held) for k, o in enumerate(moving)}
        if not moving:
            head("slice_0", value(carries[0]).new_empty(()))
        still = list[Operand]()
        for node, of_body in zip(fixed, heads[len(carries) + len(slices) :], strict=True):
            if of_body.users:
                inner[of_body] = head(f"invariant_{len(still)}", value(node))
                still.append(Operand(node, None, False))
        for operand in found:
            if not operand.moves:
                known[operand] = head(f"invariant_{len(still)}", operand.held)
                still.append(operand)
        for k in read:
            inner[heads[len(carries) + k]] = self._computed(Operand(slices[k], 0), graph, known)
        for node in body.graph.nodes:
            if node not in inner and node.op not in ("output", "placeholder"):
                inner[node] = graph.node_copy(node, inner.__getitem__)
        results = cast(Sequence[Node], output_node(body).args[0])
        graph.output(tuple(inner[n] for n in results))
        return Sunk(self.scan, GraphModule(body, graph), tuple(moving), tuple(still))

    def _operands(self, operand: Operand) -> list[Operand] | None:
        """What the steps read to compute a value of theirs; None if they can't."""
        if not operand.moves or operand.node not in self.inside:
            return None
        return operands(operand.node, cast(int, operand.axis))

    def _cost(self, operand: Operand) -> int:
        """Bytes that the steps read for a value."""
        if operand not in self.costs:
            read = self._operands(operand)
            own = bytes_of(operand.node)
            self.costs[operand] = own if read is None else min(own, self._read(read))
        return self.costs[operand]

    def _read(self, read: Sequence[Operand]) -> int:
        return sum(self._cost(o) for o in read if o.moves)

    def _computes(self, operand: Operand) -> list[Operand] | None:
        """What the steps read to compute a value, if they do."""
        read = self._operands(operand)
        if read is None or not any(o.moves for o in read):
            return None
        return read if self._read(read) <= bytes_of(operand.node) else None

    def _leaves(self, operand: Operand, found: dict[Operand, None]) -> None:
        """What the steps read for a value."""
        read = self._computes(operand)
        if read is None:
            found[operand] = None
        for below in read or ():
            self._leaves(below, found)

    def _computed(self, operand: Operand, graph: Graph, known: dict[Operand, Node]) -> Node:
        """The value of one step in the new body."""
        if operand not in known:
            read = self._computes(operand)
            assert read is not None
            sources = {o.node: self._computed(o, graph, known) for o in read}
            known[operand] = at_step(operand.node, cast(int, operand.axis), sources, graph)
        return known[operand]


def _is_outer(node: Node) -> bool:
    """Whether a product sums nothing: it broadcasts its factors as a multiplication does."""
    if node.target is not aten.matmul.default:
        return False
    sizes = [shape(n) for n in node.all_input_nodes]
    return all(len(size) > 1 for size in sizes) and sizes[0][-1] == 1
