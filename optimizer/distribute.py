"""Loop distribution: a scan → what runs once, before, between and after smaller scans.

The operations of the body that lie on a carry's own cycle (a strongly connected component of
its dependences) stay a scan; every other operation runs once, on all steps' values. This is
the loop distribution of Allen and Kennedy, "Optimizing Compilers for Modern Architectures"
(2001), section 6.2, on functional graphs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

from .batching import Batcher
from .builder import Builder, build_constant, output_node, placeholders
from .cycles import closure, reached_by
from .facts import (
    Facts,
    aten,
    body_of,
    is_op,
    is_random,
    is_scan,
    is_tensor,
    is_view,
    shape,
    source_line,
    spelled,
    trips,
    value,
)
from .lane import Lane
from .nested import batched_scan
from .rewrite import Rewrite

TAKEN_APART = "taken apart"  # marks a scan that is what could not be batched
JOINED = "joined"  # marks one that holds what reads its recurrence, too


@dataclass(frozen=True)
class Split:
    """A scan's body by what must stay in step: `cycles` in an order they can run in.

    Random operations that need no other, nor a carry, are a cycle of no carries: they draw their
    numbers in the order that they have. `reorders`: there are others as well.
    """

    scan: Node
    body: GraphModule
    carries: tuple[Node, ...]
    nexts: tuple[Node, ...]  # what each carry becomes
    slices: tuple[Node, ...]
    invariants: tuple[Node, ...]
    outputs: tuple[Node, ...]
    cycles: tuple[frozenset[int], ...]  # carries that depend on one another
    on_cycle: dict[Node, int]  # operation → its cycle
    reorders: bool
    joined: bool = False  # whether cycles hold what only reads them

    @property
    def operations(self) -> list[Node]:
        return [n for n in self.body.graph.nodes if n.op == "call_function"]


def split(scan: Node) -> Split:
    """Which operations of `scan`'s body lie on which cycle."""
    held, sliced = (len(cast(list[Node], scan.args[i])) for i in (1, 2))
    return split_body(scan, body_of(scan), held, sliced)


def split_body(scan: Node, body: GraphModule, held: int, sliced: int) -> Split:
    """The same for a body that `scan` could have, with so many carries and slices."""
    heads = placeholders(body)
    carries, slices = heads[:held], heads[held : held + sliced]
    results = cast(tuple[Node, ...], output_node(body).args[0])
    nexts = results[:held]
    reached = reached_by(body.graph, carries)
    direct = [set(reached.get(n, ())) for n in nexts]  # carry k's next needs these carries
    closed = closure(direct)
    recurrent = [k for k in range(held) if k in closed[k]]
    cycles: list[frozenset[int]] = []
    for k in recurrent:
        cycle = frozenset(m for m in recurrent if m in closed[k] and k in closed[m])
        if cycle not in cycles:
            cycles.append(cycle)
    needed = _needed_by(body, nexts)
    on_cycle = {
        node: number
        for node in body.graph.nodes
        if node.op == "call_function"
        for number, cycle in enumerate(cycles)
        if cycle & reached[node] and cycle & needed[node]
    }
    random = [n for n in body.graph.nodes if is_random(n)]
    reorders = len(random) > 1
    if reorders:
        before = reached_by(body.graph, [*carries, *random])
        reorders = any(before[source] for n in random for source in n.all_input_nodes)
        if not reorders:
            on_cycle |= dict.fromkeys(random, len(cycles))
            cycles.append(frozenset())
    for node in body.graph.nodes:  # an item stays with the operation whose result it is part of
        if is_op(node, operator.getitem) and node.args[0] in on_cycle:
            on_cycle[node] = on_cycle[node.args[0]]
    return Split(
        scan, body, tuple(carries), tuple(nexts), tuple(slices), tuple(heads[held + sliced :]),
        tuple(results[held:]), tuple(cycles), on_cycle, reorders,
    )


def _needed_by(body: GraphModule, nexts: Sequence[Node]) -> dict[Node, set[int]]:
    """For each node, the carries whose next value depends on it."""
    needed: dict[Node, set[int]] = {n: set() for n in body.graph.nodes}
    for k, node in enumerate(nexts):
        needed[node].add(k)
    for node in reversed(list(body.graph.nodes)):
        if node.op != "output":
            for source in node.all_input_nodes:
                needed[source] |= needed[node]
    return needed


class Distribution:
    """Builds the parts of a split scan in the graph around it."""

    def __init__(self, parts: Split, build: Builder) -> None:
        self.scan, self.parts, self.build = parts.scan, parts, build
        self.size = trips(self.scan)
        self.batcher = Batcher(build, self.size, preferred_axis(self.scan))
        self.known: dict[Node, Any] = {}  # body node → Lane, node around the scan, or tuple
        self.finals: dict[int, Node] = {}

    def run(self) -> list[Node]:
        """The scan's results: final carries, then per-step outputs stacked on axis 0."""
        starts, sources, outer = (cast(list[Node], self.scan.args[i]) for i in (1, 2, 3))
        self.starts = starts
        parts = self.parts
        self.known.update(zip(parts.invariants, outer, strict=True))
        for head, source in zip(parts.slices, sources, strict=True):
            self.known[head] = Lane(source, 0)
        for node in parts.body.graph.nodes:
            if node.op == "get_attr" and is_tensor(node):
                self.known[node] = build_constant(self.build, parts.body, node)
        for unit in self._units():
            self._unit(unit)
        return [self.finals[k] for k in range(len(parts.carries))] + [
            self._lane_at_front(node) for node in parts.outputs
        ]

    def _units(self) -> list[int | Node]:
        """Cycles (by number), other carries and operations, each after what it needs."""
        parts, order, done = self.parts, [], set()
        recurrent = {k: number for number, c in enumerate(parts.cycles) for k in c}
        unit_of: dict[Node, int | Node] = {n: n for n in parts.operations}
        unit_of |= parts.on_cycle
        unit_of |= {c: recurrent.get(k, c) for k, c in enumerate(parts.carries)}
        members: dict[int | Node, list[Node]] = {}
        for node, unit in unit_of.items():
            members.setdefault(unit, []).append(node)
        for node, k in ((c, k) for k, c in enumerate(parts.carries)):
            if unit_of[node] is node:
                members[node].append(parts.nexts[k])

        def sources(unit: int | Node) -> list[int | Node]:
            found = []
            for node in members[unit]:
                inputs = list(node.all_input_nodes)
                if node.op == "placeholder" and node in parts.carries:
                    inputs = [parts.nexts[parts.carries.index(node)]]
                found += [unit_of[n] for n in inputs if n in unit_of and unit_of[n] != unit]
            return found

        for root in members:
            stack: list[tuple[int | Node, bool]] = [(root, False)]
            while stack:
                unit, ready = stack.pop()
                if ready:
                    if unit not in done:
                        done.add(unit)
                        order.append(unit)
                elif unit not in done:
                    stack.append((unit, True))
                    stack += [(s, False) for s in sources(unit) if s not in done]
        return order

    def _unit(self, unit: int | Node) -> None:
        if isinstance(unit, int):
            self._cycle(unit)
        elif unit in self.known:
            return  # an item that came with the operation it is part of
        elif unit.op == "placeholder":
            self._shifted(unit)
        elif not any(self._varies(n) for n in unit.all_input_nodes) and not is_random(unit):
            self._invariant(unit)
        else:
            outcome = (batched_scan(self.batcher, unit, self.known) if is_scan(unit)
                       else self.batcher.operation(unit, self.known))
            if outcome is None:
                items = [u for u in unit.users if is_op(u, operator.getitem)]
                self._small_scan([unit, *items], [])
            else:
                self.known[unit] = outcome

    def _varies(self, node: Node) -> bool:
        """Whether `node` may differ from step to step (the body of an inner scan never does)."""
        is_body = node.op == "get_attr" and not is_tensor(node)
        return not is_body and not isinstance(self.known[node], Node)

    def _invariant(self, node: Node) -> None:
        if is_scan(node):
            known = {n: cast(Node, self.known[n]) for n in node.all_input_nodes if n in self.known}
            known[cast(Node, node.args[0])] = self.build.attribute("body", body_of(node))
            self.known[node] = self.build.copy(node, known)
            return
        self.known[node] = self.build.copy(node, {n: self.known[n] for n in node.all_input_nodes})

    def _shifted(self, carry: Node) -> None:
        """A carry off every cycle: at each step, what its source was one step before."""
        k = self.parts.carries.index(carry)
        source = self._lane_at_front(self.parts.nexts[k])
        first = self.build.call(aten.unsqueeze.default, self.starts[k], 0)
        earlier = self.build.slice(source, 0, 0, self.size - 1)
        lane = Lane(self.build.call(aten.cat.default, [first, earlier], 0), 0)
        place = self.batcher.place(lane.rank)
        self.known[carry] = Lane(self.batcher.at(lane, place), place)
        self.finals[k] = self.build.call(aten.select.int, source, 0, self.size - 1)

    def _lane_at_front(self, node: Node) -> Node:
        found = self.known[node]
        if isinstance(found, Lane):
            return self.batcher.at(found, 0)
        return self.build.call(aten.expand.default, found, [self.size, *shape(found)])

    def _cycle(self, number: int) -> None:
        carries = sorted(self.parts.cycles[number])
        operations = [n for n in self.parts.operations if self.parts.on_cycle.get(n) == number]
        self._small_scan(operations, carries)

    def _small_scan(self, operations: list[Node], carries: list[int]) -> None:
        """A scan of just these operations and carries; their results become lanes."""
        parts, graph = self.parts, Graph()
        inner: dict[Node, Node] = {}

        def head(name: str, node: Node) -> None:
            inner[node] = graph.placeholder(name)
            inner[node].meta["val"] = value(node)

        for k in carries:
            head(f"carry_{k}", parts.carries[k])
        outside = [
            n for n in dict.fromkeys(s for op in operations for s in op.all_input_nodes)
            if n not in operations and n not in inner
        ]
        nexts = [parts.nexts[k] for k in carries]
        outside += [n for n in nexts if n not in operations and n not in inner and n not in outside]
        bodies = [n for n in outside if n.op == "get_attr" and not is_tensor(n)]
        lanes = [n for n in outside if n not in bodies and self._varies(n)]
        fixed = [n for n in outside if n not in bodies and not self._varies(n)]
        for i, node in enumerate(lanes):
            head(f"slice_{i}", node)
        index = None
        if not lanes:
            index = graph.placeholder("slice_0")
        for i, node in enumerate(fixed):
            head(f"invariant_{i}", node)
        holder = Module()
        for node in bodies:
            holder.add_module(str(node.target), parts.body.get_submodule(str(node.target)))
            inner[node] = graph.get_attr(str(node.target))
        for op in operations:
            inner[op] = graph.node_copy(op, inner.__getitem__)
        wanted = [n for n in operations if is_tensor(n) and self._leaves(n, operations)]
        used_carries = [
            k for k in carries
            if self._leaves(parts.carries[k], operations) and parts.carries[k] not in wanted
        ]
        results = [inner[n] for n in nexts] + [inner[n] for n in wanted]
        results += [inner[parts.carries[k]] for k in used_carries]
        graph.output(tuple(results))
        slices = [self._lane_at_front(n) for n in lanes]
        if index is not None:
            device = next(value(op).device for op in operations if is_tensor(op))
            slices = [self.build.call(aten.arange.default, self.size, device=device)]
            index.meta["val"] = value(slices[0])[0]
        made = self.build.scan(
            GraphModule(holder, graph), [self.starts[k] for k in carries], slices,
            [self.known[n] for n in fixed],
        )
        cast(Node, made[0].args[0]).meta[JOINED if parts.joined else TAKEN_APART] = True
        for k, node in zip(carries, made, strict=False):
            self.finals[k] = node
        for node, lane in zip(
            [*wanted, *(parts.carries[k] for k in used_carries)], made[len(carries):], strict=True
        ):
            place = self.batcher.place(len(shape(lane)) - 1)
            self.known[node] = Lane(self.build.move(lane, 0, place), place)

    def _leaves(self, node: Node, operations: list[Node]) -> bool:
        """Whether a value of a small scan is used outside it, for every step."""
        if node in self.parts.outputs:
            return True
        for k, following in enumerate(self.parts.nexts):
            if following is node and self.parts.carries[k] not in self._own(operations):
                return True
        return any(u.op != "output" and u not in operations for u in node.users)

    def _own(self, operations: list[Node]) -> set[Node]:
        numbers = {self.parts.on_cycle.get(op) for op in operations}
        return {
            self.parts.carries[k] for n in numbers if n is not None for k in self.parts.cycles[n]
        }


def preferred_axis(scan: Node) -> int:
    """Where the loop's results, or else its reads, have their axis of steps.

    The axis along which the stacked results are moved by those who use them; for a loop whose
    results stay stacked in front, the axis that the largest read was taken from.
    """
    votes: list[int] = []
    for result in scan.users:
        for user in result.users:
            if is_op(user, aten.permute.default):
                votes.append(list(cast(list[int], user.args[1])).index(0))
    if not votes:
        for source in cast(list[Node], scan.args[2]):
            if is_op(source, aten.permute.default):
                votes.append(cast(list[int], source.args[1])[0])
    return max(set(votes), key=votes.count) if votes else 0


def batchable(parts: Split) -> list[Node]:
    """The operations off every cycle that do more than make a value, unless by chance, or view
    one."""
    return [n for n in parts.operations if n not in parts.on_cycle and not is_view(n)
            and (n.all_input_nodes or is_random(n))]


def splits(facts: Facts) -> Iterator[Split]:
    """The scans of a graph that were not taken apart yet, each split by its cycles."""
    for node in facts.operations:
        if is_scan(node) and not node.meta.get(TAKEN_APART):
            yield split(node)


def distribution(pass_name: str, parts: Split) -> Rewrite:
    """The rewrite that distributes a scan, in the name of a pass."""
    gone = batchable(parts)
    summary = f"{trips(parts.scan)} × ({counted(gone)}) → 1" if gone else \
        f"a loop of {trips(parts.scan)} steps, taken apart"
    made = replacing(pass_name, summary, parts.scan, lambda b: Distribution(parts, b).run())
    return replace(made, reorders_random=parts.reorders)


def replacing(
    pass_name: str, summary: str, scan: Node, make: Callable[[Builder], Sequence[Node]]
) -> Rewrite:
    """The rewrite of a scan to what `make` makes: its final carries, then its stacked outputs."""
    results = tuple(scan.users)

    def build(builder: Builder) -> Sequence[Node]:
        made = make(builder)
        return [made[cast(int, result.args[1])] for result in results]

    return Rewrite(pass_name, summary, source_line(scan), scan, results, build,
                   supersedes=(scan,))


def counted(nodes: Sequence[Node]) -> str:
    """`2 linear, gelu`: the operations, those most costly to repeat first."""
    names = [spelled(n.target) for n in nodes]
    order = sorted(set(names), key=lambda name: (name not in HEAVY, names.index(name)))
    shown = [f"{names.count(n)} {n}" if names.count(n) > 1 else n for n in order]
    return ", ".join(shown[:4]) + (", …" if len(shown) > 4 else "")


HEAVY = ("linear", "matmul", "mm", "bmm", "addmm", "einsum", "convolution", "conv2d",
         "scaled_dot_product_attention")
