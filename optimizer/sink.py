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

VIEWS = (aten.permute.default, aten.unsqueeze.default, aten.expand.default, aten.select.int,
         aten.slice.Tensor, aten.reshape.default, aten.squeeze.dim)


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

    def _operands(self, node: Node, axis: int) -> list[tuple[Node, int | None]] | None:
        """What a value is computed from, and along which axis, None for all steps the same;
        None if the step can't compute it."""
        if node not in self.inside:
            return None
        if node.target in VIEWS:
            source = cast(Node, node.args[0])
            place = self._before_view(node, source, axis)
            return None if place is None else [(source, place)]
        if _is_outer(node) and axis >= len(shape(node)) - 2:
            return None
        found: list[tuple[Node, int | None]] = []
        for source in node.all_input_nodes:
            if not is_tensor(source):
                return None
            place = axis - len(shape(node)) + len(shape(source))
            there = place >= 0 and shape(source)[place] > 1
            found.append((source, place if there else None))
        return found

    def _before_view(self, node: Node, source: Node, axis: int) -> int | None:
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

    def _cost(self, node: Node, axis: int) -> int:
        """Bytes that the steps read for a value."""
        if (node, axis) not in self.costs:
            operands = self._operands(node, axis)
            own = bytes_of(node)
            inside = own + 1 if operands is None else sum(
                self._cost(n, a) for n, a in operands if a is not None)
            self.costs[node, axis] = min(own, inside)
        return self.costs[node, axis]

    def _computes(self, node: Node, axis: int) -> list[tuple[Node, int | None]] | None:
        """The operands, if the steps compute a value."""
        operands = self._operands(node, axis)
        if operands is None or all(a is None for _, a in operands):
            return None
        read = sum(self._cost(n, a) for n, a in operands if a is not None)
        return operands if read <= bytes_of(node) else None

    def _leaves(
        self, node: Node, axis: int, moving: dict[tuple[Node, int], None],
        still: dict[tuple[Node, int | None], None],
    ) -> None:
        """What the steps read for a value, per step and for all steps the same."""
        operands = self._computes(node, axis)
        if operands is None:
            moving[node, axis] = None
            return
        for source, place in operands:
            if place is None:
                still[source, self._single(node, source, axis)] = None
            else:
                self._leaves(source, place, moving, still)

    @staticmethod
    def _single(node: Node, source: Node, axis: int) -> int | None:
        """The operand's axis of one that is broadcast along the steps, if it has it."""
        place = axis - len(shape(node)) + len(shape(source))
        return place if place >= 0 else None

    def _computed(
        self, node: Node, axis: int, graph: Graph, known: dict[Any, Node]
    ) -> Node:
        """The value of one step in the new body."""
        if (node, axis) in known:
            return known[node, axis]
        operands = self._computes(node, axis)
        assert operands is not None
        there = {source: known[source, self._single(node, source, axis)] if place is None
                 else self._computed(source, place, graph, known) for source, place in operands}
        if node.target in VIEWS:
            source, place = operands[0]
            made = self._viewed(node, axis, there[source], cast(int, place), graph)
        else:
            made = graph.node_copy(node, there.__getitem__)
        made.meta.setdefault("val", value(node).select(axis, 0))
        known[node, axis] = made
        return made

    @staticmethod
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


def _is_outer(node: Node) -> bool:
    """Whether a product sums nothing: it broadcasts its factors as a multiplication does."""
    if node.target is not aten.matmul.default:
        return False
    sizes = [shape(n) for n in node.all_input_nodes]
    return all(len(size) > 1 for size in sizes) and sizes[0][-1] == 1
