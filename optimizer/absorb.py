"""A last, incomplete trip that was computed by itself → one more step of the loop's scan.

`[f(x[0:8]), g(x[8:12]), f(x[12:20]), g(x[20:24]), f(pad(x[24:]))]`: what the last trip computes
is what the scan's body computes from another slice. The slices are small beside what they
become, so that adding one to them is cheaper than adding its result to the results.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch.fx import Node
from torch.fx.node import map_arg

from .builder import Builder, output_node, placeholders
from .collect import Collection, LaneOf
from .facts import (
    Facts,
    aten,
    body_of,
    bytes_of,
    is_op,
    is_random,
    is_scan,
    is_tensor,
    trips,
    value,
)
from .hoist import can_be_early, hoisted


@dataclass
class Absorption:
    """A scan without carries, and the slices that its missing step would read."""

    scan: Node
    facts: Facts
    slices: dict[int, Node] = field(default_factory=dict)  # place → what the step reads there
    entries: dict[Node, tuple[int, Sequence[Node]]] = field(default_factory=dict)  # → place, views

    @property
    def replaces(self) -> tuple[Node, ...]:
        return (*self.entries, *self._lanes(), *self.scan.users)

    def _lanes(self) -> list[Node]:
        """The reads of single steps of the scan's results."""
        return [u for result in self.scan.users for u in result.users
                if is_op(u, aten.select.int) and u.args[1] == 0]

    def build(self, build: Builder) -> list[Node]:
        """What replaces the entries, the reads of single steps, and the scan's results."""
        moved = hoisted(build, self.slices.values(), self.facts)
        given, fixed = cast(tuple[list[Node], list[Node]], self.scan.args[2:])
        longer = []
        for place, lanes in enumerate(given):
            if place in self.slices:
                read = self.slices[place]
                extra = build.call(aten.unsqueeze.default, moved.get(read, read), 0)
            else:  # its results are not used
                extra = build.slice(lanes, 0, trips(self.scan) - 1, trips(self.scan))
            longer.append(_joined(build, lanes, extra))
        results = build.scan(body_of(self.scan), [], longer, fixed)
        made = []
        for place, views in self.entries.values():
            node = build.call(aten.select.int, results[place], 0, trips(self.scan))
            for view in views:
                node = build.call(view.target, node, *view.args[1:], **view.kwargs)
            made.append(node)
        for lane in self._lanes():
            source, _, step = cast(tuple[Node, int, int], lane.args)
            made.append(build.call(aten.select.int, results[cast(int, source.args[1])], 0, step))
        return made + [build.slice(results[cast(int, r.args[1])], 0, 0, trips(self.scan))
                       for r in self.scan.users]


def _joined(build: Builder, lanes: Node, extra: Node) -> Node:
    """`lanes`, then `extra`, along axis 0; in memory they lie as before, or behind the batch."""
    strides = value(lanes).stride()
    place = 0 if len(strides) < 3 or strides[0] == max(strides) else 1
    parts = [build.move(node, 0, place) for node in (lanes, extra)]
    return build.move(build.call(aten.cat.default, parts, place), place, 0)


def absorption(node: Node, collected: Collection, facts: Facts) -> Absorption | None:
    """The missing step among the entries of `node`, a stack or cat, if it pays to absorb it."""
    for number, piece in enumerate(collected.pieces):
        lanes = [f for f in piece.firsts if isinstance(f, LaneOf) and f.index == 0]
        scan = _scan_of(lanes)
        if scan is None or (piece.step, piece.count) != (1, trips(scan)):
            continue
        if len(lanes) < len(piece.firsts):
            continue
        following = itertools.takewhile(lambda p: not p.count, collected.pieces[number + 1 :])
        found = Absorption(scan, facts)
        for lane, rest in zip(lanes, following, strict=False):
            entry = rest.firsts[0]
            if not isinstance(entry, Node) or not _absorb(found, lane, entry):
                break
        copied = sum(bytes_of(lanes) for lanes in cast(list[Node], scan.args[2]))
        early = can_be_early(found.slices.values(), scan, facts)
        if found.entries and early and copied < bytes_of(node):
            return found
    return None


def _scan_of(lanes: Sequence[LaneOf]) -> Node | None:
    """The scan whose results all `lanes` are of, if it carries nothing and is not random."""
    scans = {lane.stack.args[0] for lane in lanes if is_op(lane.stack, operator.getitem)}
    scan = next(iter(scans), None)
    if len(scans) != 1 or not isinstance(scan, Node) or not is_scan(scan):
        return None
    return None if scan.args[1] or is_random(scan) else scan


def _absorb(found: Absorption, lane: LaneOf, entry: Node) -> bool:
    """Add `entry` to `found` if it is what `lane` is, of a step after the last."""
    node = entry
    for view in reversed(lane.views):
        if node.target is not view.target or node.args[1:] != view.args[1:]:
            return False
        node = cast(Node, node.args[0])
    body = body_of(found.scan)
    place = cast(int, lane.stack.args[1])
    slices = dict(found.slices)
    if not _same(cast(tuple[Node, ...], output_node(body).args[0])[place], node, found.scan,
                 placeholders(body), slices):
        return False
    found.slices = slices
    found.entries[entry] = (place, lane.views)
    return True


def _same(
    inner: Node, outer: Node, scan: Node, heads: list[Node], slices: dict[int, Node]
) -> bool:
    """Whether `outer` computes what `inner` of the scan's body does; notes what stands for its
    slices."""
    if inner.op == "placeholder":
        place, held = heads.index(inner), len(cast(list[Node], scan.args[2]))
        if place >= held:
            return cast(list[Node], scan.args[3])[place - held] is outer
        if not is_tensor(outer):
            return False
        like, read = value(inner), value(outer)
        if (read.shape, read.dtype, read.device) != (like.shape, like.dtype, like.device):
            return False
        return slices.setdefault(place, outer) is outer
    if inner.op != "call_function" or inner.target is not outer.target:
        return False
    pairs = list(zip(inner.all_input_nodes, outer.all_input_nodes, strict=False))
    return _arguments(inner) == _arguments(outer) and all(
        _same(a, b, scan, heads, slices) for a, b in pairs
    )


def _arguments(node: Node) -> str:
    """The arguments of `node`, its inputs numbered."""
    numbers = {source: f"%{k}" for k, source in enumerate(node.all_input_nodes)}
    return repr(map_arg((node.args, dict(node.kwargs)), numbers.__getitem__))
