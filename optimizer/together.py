"""What reads a recurrence's values and stays in its loop, where that moves less through memory.

A state of 32 × 32 numbers at each of 4,096 steps, of which each step returns 32: a loop that
computes these itself writes 32 times less. Which operations stay is a minimum cut: each operation
that depends on a recurrence either runs in its loop, or once for all steps, and then reads its
operands of all steps and writes its results; what the loop computes and others read, it writes.
Products with weights never stay: they are faster as one product. Recurrences that read one
another's values, or are read by one operation that stays, share a loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from torch import Tag
from torch._ops import OpOverload
from torch.fx import Node

from .builder import output_node
from .cycles import reached_by
from .distribute import Split
from .equation import longest, spelled_out
from .facts import aten, bytes_of, is_op, is_random, is_tensor, is_view, shape, value
from .one_step import REDUCTIONS

ENOUGH = 0.8  # of the bytes that are moved otherwise: with more, nothing stays
WIDE = 2  # multiplications for each element that a product reads: with more, it is faster as one
SIMPLE = (aten._to_copy.default, *REDUCTIONS)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)


def together(parts: Split) -> Split | None:
    """The split with what stays on the cycles that it reads; None where too little is gained."""
    found = _Together(parts)
    if not found.free and len(parts.cycles) < 2:
        return None
    kept = found.kept()
    return None if kept is None else found.joined(kept)


class _Together:
    """The operations beside a loop's cycles.

    `level`: how many operations that can't stay lie before a value. Only values of one level can
    be computed in one loop.
    """

    def __init__(self, parts: Split) -> None:
        self.parts = parts
        self.nodes = [n for n in parts.body.graph.nodes if n.op in ("placeholder", "call_function")]
        self.cycle = {parts.carries[k]: c for c, cycle in enumerate(parts.cycles) for k in cycle}
        self.cycle |= {n: c for n, c in parts.on_cycle.items() if parts.cycles[c]}
        self.varying = reached_by(parts.body.graph, [*parts.carries, *parts.slices])
        self.late = reached_by(parts.body.graph, [c for c in parts.carries if c in self.cycle])
        self.level = self._levels()
        before, after = set(self.cycle), set(self.cycle)  # of, or after, a cycle of its level
        for node in self.nodes:
            if any(n in before for n in self._beside(node)):
                before.add(node)
        for node in reversed(self.nodes):
            if node in after:
                after.update(self._beside(node))
        self.free = dict.fromkeys(n for n in self.nodes if n not in self.cycle and n in before
                                  and self._may_stay(n))
        self.needed = after  # by a cycle of its level

    def _beside(self, node: Node) -> Iterator[Node]:
        """Operands of the same level."""
        return (n for n in node.all_input_nodes if self.level.get(n) == self.level[node])

    def _levels(self) -> dict[Node, int]:
        level = dict.fromkeys(self.nodes, 0)
        follows = dict(zip(self.parts.carries, self.parts.nexts, strict=True))
        of_cycle = [0] * len(self.parts.cycles)
        while True:
            known = dict(level)
            for node in self.nodes:
                most = max((level[n] for n in node.all_input_nodes if n in level), default=0)
                if node in self.cycle:
                    number = self.cycle[node]
                    most = of_cycle[number] = max(most, of_cycle[number])
                elif node in follows:  # what a value was one step before
                    most = level.get(follows[node], -1) + 1
                elif self.late[node] and not self._may_stay(node):
                    most += 1
                level[node] = most
            if level == known:
                return level

    def _may_stay(self, node: Node) -> bool:
        if not isinstance(node.target, OpOverload) or not is_tensor(node) or is_random(node) \
                or node.target is aten.detach.default:  # in a kernel, zeros would be gradients
            return False
        return is_view(node) or Tag.pointwise in node.target.tags or node.target in SIMPLE \
            or (node.target in PRODUCTS and self._is_narrow(node))

    def _is_narrow(self, node: Node) -> bool:
        """Whether a product of values of the step multiplies hardly more than it reads."""
        operands = node.all_input_nodes
        if not all(map(self.varying.__getitem__, operands)):
            return False
        if is_op(node, aten.einsum.default):
            given = cast(list[Node], node.args[1])
            terms, _ = spelled_out(str(node.args[0]), [len(shape(n)) for n in given])
            count = math.prod(longest(terms, map(shape, given)).values())
        else:
            count = value(node).numel() * shape(operands[0])[-1]
        return count <= WIDE * max(value(n).numel() for n in operands)

    def kept(self) -> set[Node] | None:
        """What stays beside the cycles: a minimum cut. None where that moves hardly less."""
        import networkx as nx  # takes a third of a second

        graph, otherwise = nx.DiGraph(), 0
        graph.add_nodes_from(("loop", "memory"))
        for node in self.free:
            read = [n for n in node.all_input_nodes if n in self.cycle or n in self.free]
            cost = 0 if is_view(node) else sum(bytes_of(n) for n in (node, *read))
            graph.add_edge("loop", node, **{} if node in self.needed else {"capacity": cost})
            graph.add_edges_from((node, n) for n in self._beside(node) if n in self.free)
            otherwise += cost
        for node in filter(is_tensor, (*self.cycle, *self.free)):
            readers = [n for n in self._readers(node)
                       if self.cycle.get(n, -1) != self.cycle.get(node)]
            if not readers:
                continue
            if node in self.cycle:
                graph.add_edge("loop", node)
                otherwise += bytes_of(node)
            graph.add_edge(node, ("written", node), capacity=bytes_of(node))
            for reader in readers:
                if reader not in self.cycle or self.level[reader] != self.level[node]:
                    beside = reader in self.free and self.level[reader] == self.level[node]
                    graph.add_edge(("written", node), reader if beside else "memory")
        moved, (inside, _) = nx.minimum_cut(graph, "loop", "memory")
        return None if moved > ENOUGH * otherwise else inside.intersection(self.free)

    def _readers(self, node: Node) -> Iterator[Node]:
        """Who reads a value in its own step; the body's output where all steps' are returned, or
        the next step reads it that is on no cycle."""
        yield from (u for u in node.users if u.op != "output")
        lasting = (n for c, n in zip(self.parts.carries, self.parts.nexts, strict=True)
                   if c not in self.cycle)
        if node in self.parts.outputs or node in lasting:
            yield output_node(self.parts.body)

    def joined(self, kept: set[Node]) -> Split | None:
        """The split whose cycles are those that `kept` operations join; None if it is the same."""
        import networkx as nx

        graph, cycles, on_cycle = nx.Graph(), list(self.parts.cycles), dict(self.parts.on_cycle)
        for node in (*self.cycle, *kept):
            if node in self.cycle:
                graph.add_edge(node, self.cycle[node])
            graph.add_edges_from((node, n) for n in self._beside(node)
                                 if n in self.cycle or n in kept)
        for part in nx.connected_components(graph):
            first, *others = sorted(n for n in part if isinstance(n, int))
            if all(map(self._is_sum, (first, *others))):
                continue
            for number in others:
                cycles[first], cycles[number] = cycles[first] | cycles[number], frozenset()
            on_cycle |= dict.fromkeys((n for n in part if isinstance(n, Node)
                                       and n.op == "call_function"), first)
        if on_cycle == self.parts.on_cycle:
            return None
        return replace(self.parts, cycles=tuple(cycles), on_cycle=on_cycle, joined=True)

    def _is_sum(self, number: int) -> bool:
        """Whether a cycle is a running sum, which one operation computes for all steps."""
        own = [n for n, c in self.parts.on_cycle.items() if c == number]
        return len(own) == 1 and is_op(own[0], aten.add.Tensor)
