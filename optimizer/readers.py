"""What reads a recurrence's stacked values behind its loop, in its steps.

`torch.stack(hs, 1) @ C` reads a state of each step, which the loop wrote for it alone. Operations
that compute each step's value from values of that step can be in the loop's body, where
`together` tells which of them move less through memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import cast

from torch.fx import Node

from .builder import Builder, duplicate, output_node, placeholders
from .distribute import Split, counted, split_body
from .facts import (
    Facts,
    body_of,
    is_pure,
    is_tensor,
    is_view,
    shape,
    source_line,
    trips,
    value,
)
from .hoist import can_be_early, hoisted
from .one_step import Operand, at_step, operands
from .rewrite import Rewrite
from .together import together


def with_readers(pass_name: str, parts: Split, facts: Facts) -> Rewrite | None:
    """The rewrite, in the name of a pass, that takes into a scan's body what reads its results and
    is to stay with its recurrences; None if nothing is."""
    if not (found := _readers(parts.scan, facts)):
        return None
    longer = _Longer(parts.scan, found)
    if (joined := together(longer.split())) is None:
        return None
    inside, stay = {*joined.carries, *joined.on_cycle}, dict[Node, int]()
    for node, axis in found.items():
        if longer.known[node] in inside \
                and not any(n in found and n not in stay for n in node.all_input_nodes):
            stay[node] = axis
    return None if all(map(is_view, stay)) else _Longer(parts.scan, stay).rewrite(pass_name, facts)


def _readers(scan: Node, facts: Facts) -> dict[Node, int]:
    """The operations whose value at each step depends on the scan's results of that step, and on
    nothing else behind it; by the axis that counts the steps."""
    held = len(cast(list[Node], scan.args[1]))
    results = {result: 0 for result in scan.users if cast(int, result.args[1]) >= held}
    dtype = value(cast(list[Node], scan.args[1])[0]).dtype  # a kernel computes in one
    known = dict(results)

    @cache
    def is_early(node: Node) -> bool:
        return can_be_early([node], scan, facts)

    def fits(read: Operand) -> bool:
        if read.node in known:
            return read.moves and read.axis == known[read.node]
        return value(read.node).dtype == dtype and is_early(read.node)

    for node in facts.operations[facts.operations.index(scan) :]:
        if is_tensor(node) and value(node).dtype == dtype and is_pure(node) \
                and any(n in known for n in node.all_input_nodes):
            axis = next((axis for axis, size in enumerate(shape(node)) if size == trips(scan)
                         and (read := operands(node, axis)) and all(map(fits, read))), None)
            known |= {} if axis is None else {node: axis}
    return {node: axis for node, axis in known.items() if node not in results}


class _Longer:
    """A scan whose steps compute what is `found` behind it, too."""

    def __init__(self, scan: Node, found: Mapping[Node, int]) -> None:
        self.scan, self.found, self.body = scan, found, duplicate(body_of(scan))
        graph, heads, end = self.body.graph, placeholders(self.body), output_node(self.body)
        self.held, sliced, _ = (len(cast(list[Node], given)) for given in scan.args[1:4])
        ends = cast(tuple[Node, ...], end.args[0])
        self.known = {r: ends[cast(int, r.args[1])] for r in scan.users}
        read = {node: operands(node, axis) or [] for node, axis in found.items()}
        new = dict.fromkeys(o for of_one in read.values() for o in of_one
                            if o.node not in found and o.node not in self.known)
        self.slices = [o for o in new if o.moves]
        self.invariants = [o for o in new if not o.moves]
        behind = (*heads, heads[-1].next)
        inner = {o: self._head(o, "slice_0", behind[self.held + sliced]) for o in self.slices}
        inner |= {o: self._head(o, "invariant_0", behind[-1]) for o in self.invariants}
        for node, axis in found.items():
            sources = {o.node: self.known.get(o.node) or inner[o] for o in read[node]}
            with graph.inserting_before(end):
                self.known[node] = at_step(node, axis, sources, graph)
        self.finals = [r for r in scan.users if cast(int, r.args[1]) < self.held]
        self.stacked = [n for n in (*scan.users, *found) if n not in self.finals
                        and any(user not in found for user in n.users)]
        end.args = ((*ends[: self.held], *(self.known[n] for n in self.stacked)),)
        self.body.recompile()

    def _head(self, read: Operand, name: str, before: Node) -> Node:
        """What a step is given of what it reads."""
        with self.body.graph.inserting_before(before):
            head = self.body.graph.placeholder(name)
        head.target = head.name  # which is free
        head.meta["val"] = read.held
        return head

    def split(self) -> Split:
        """What lies on which cycle of the body."""
        sliced = len(cast(list[Node], self.scan.args[2])) + len(self.slices)
        return split_body(self.scan, self.body, self.held, sliced)

    def rewrite(self, pass_name: str, facts: Facts) -> Rewrite:
        """The rewrite to this scan, in the name of a pass."""
        gone = counted([n for n in self.found if not is_view(n)])
        return Rewrite(pass_name, f"{gone} behind a loop of {trips(self.scan)} steps → in it",
                       source_line(self.scan), self.scan, (*self.finals, *self.stacked),
                       partial(self._build, facts), supersedes=(self.scan,))

    def _build(self, facts: Facts, build: Builder) -> Sequence[Node]:
        early = hoisted(build, [o.node for o in (*self.slices, *self.invariants)], facts)

        def given(read: Operand) -> Node:
            return read.placed(build, early.get(read.node, read.node))

        carries, slices, invariants = (cast(list[Node], a) for a in self.scan.args[1:4])
        made = build.scan(self.body, carries, [*slices, *map(given, self.slices)],
                          [*invariants, *map(given, self.invariants)])
        stacked = zip(self.stacked, made[self.held :], strict=True)
        return [*(made[cast(int, r.args[1])] for r in self.finals),
                *(build.move(new, 0, self.found.get(old, 0)) for old, new in stacked)]
