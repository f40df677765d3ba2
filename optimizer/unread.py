"""What the last steps of a loop compute for nobody, and its gradient: none.

A loop that shows its state before the update ends with an update that nobody reads. In a walk
back over steps that are all alike its gradient would be zero times what it computes from, which
is NaN where that is NaN or infinite. `Unread` leaves such products out of the sums they join.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from .facts import aten, behind, is_view
from .step import Counts, Sizes, remembered, traced

LEFT = "left_0"  # what a walk back reads: how many steps are left after each


@remembered
def unread(
    step: str, sizes: tuple[Sizes, ...], counts: Counts, read: tuple[bool, ...]
) -> dict[int, int]:
    """By carry, how many of the last steps update it for nobody, where those are `read` of the
    last carries and of the outputs; {} where every operation of the last step has a reader."""
    graph = traced(step, sizes).graph
    heads = [n for n in graph.nodes if n.op == "placeholder"][: counts[0]]
    results: Any = graph.output_node().args[0]
    needed = behind(r for r, is_read in zip(results, read, strict=True) if is_read)
    if all(n in needed or is_view(n) for n in graph.nodes if n.op == "call_function"):
        return {}
    found = {k: 0 for k in range(len(heads)) if read[k]}
    steps = 0
    while needed:
        steps += 1
        reached = [k for k, head in enumerate(heads) if head in needed and k not in found]
        found |= dict.fromkeys(reached, steps)
        needed = behind(results[k] for k in reached)
    never = torch.iinfo(torch.int32).max  # the loop is not so long
    return {k: found.get(k, never) for k in range(len(heads)) if found.get(k) != 0}


class Unread:
    """Which values of a differentiated step are gradients of updates that nobody reads.

    `steps`: by the carry whose gradient a value is part of alone, in how many of the last steps;
    0 for parts of other gradients.
    """

    def __init__(self, graph: Graph, steps: Mapping[int, int]) -> None:
        self.graph, self.steps = graph, dict[Node, int]()
        self.left: Node | None = None
        self.kept: dict[Node, Node] = {}
        if steps:
            self._follow(steps)

    def _follow(self, steps: Mapping[int, int]) -> None:
        heads = [n for n in self.graph.nodes if n.op == "placeholder"]
        with self.graph.inserting_after(heads[-1]):
            self.left = self.graph.placeholder(LEFT)
        self.left.meta["val"] = heads[0].meta["val"].new_zeros(())
        for node in self.graph.nodes:
            kind, _, number = node.name.rpartition("_")
            if node.op == "placeholder" and kind in ("carry", "grad"):
                self.steps[node] = steps.get(int(number), 0) if kind == "carry" else 0
            elif node.op == "call_function":
                joined = [self.steps[n] for n in node.all_input_nodes if n in self.steps]
                if joined:
                    self.steps[node] = min(joined)
        for node in [n for n in self.graph.nodes if n in self.steps]:
            for source in node.all_input_nodes:
                if self.steps.get(source, 0) > self.steps[node]:
                    node.replace_input_with(source, self.read(source))

    def read(self, node: Node) -> Node:
        """A gradient that is zero, whatever it is computed from, where nobody reads the update."""
        if not self.steps.get(node):
            return node
        if node not in self.kept:
            assert self.left is not None
            with self.graph.inserting_after(self.left if node.op == "placeholder" else node):
                mask = self.graph.call_function(aten.lt.Scalar, (self.left, self.steps[node]))
            with self.graph.inserting_after(mask):
                made = self.graph.call_function(aten.masked_fill.Scalar, (node, mask, 0))
            mask.meta["val"] = self.left.meta["val"] < 0
            made.meta["val"] = node.meta["val"]
            self.kept[node] = made
        return self.kept[node]
