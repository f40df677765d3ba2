"""Results of a scan that are stacked or concatenated one by one: one view of its own stack."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from .batching import Batcher
from .builder import Builder, output_node
from .facts import aten, body_of, is_op, is_scan, is_view, shape, trips
from .lane import Lane


@dataclass(frozen=True)
class LaneOf:
    """An entry that is lane `index` of `stack`, seen through `views`, applied in order."""

    stack: Node
    index: int
    views: tuple[Node, ...] = ()

    def kind(self) -> tuple[Any, ...]:
        return (self.stack, *((v.target, str(v.args[1:])) for v in self.views))


@dataclass(frozen=True)
class Piece:
    """Consecutive entries: a run over the lanes of one or more stacks in turn, or one node.

    Entry k of the run is lane `begin + step · (k // len(firsts))` of the stack of
    `firsts[k % len(firsts)]`, each seen through the same views.
    """

    firsts: tuple[LaneOf | Node, ...]
    step: int = 1
    count: int = 0  # lanes of each stack; 0 for a single node that is no lane
    missing: int = 0  # entries of the last round that are not wanted, at its end

    def lanes(self, build: Builder, axis: int) -> list[Node]:
        """For each stack its lanes of the run, seen through the views, stacked at `axis`."""
        found = []
        for first in self.firsts:
            assert isinstance(first, LaneOf)
            last = first.index + self.step * (self.count - 1)
            low, high = min(first.index, last), max(first.index, last)
            node = build.slice(first.stack, 0, low, high + 1, abs(self.step))
            if self.step < 0:
                node = build.call(aten.flip.default, node, [0])
            found.append(self._viewed(build, node, first.views, axis))
        return found

    def _viewed(self, build: Builder, node: Node, views: Sequence[Node], axis: int) -> Node:
        batcher = Batcher(build, self.count, axis)
        lane = Lane(node, 0)
        for view in views:
            outcome = batcher.operation(view, {cast(Node, view.args[0]): lane})
            assert isinstance(outcome, Lane), f"{view.target} is a view"
            lane = outcome
        return batcher.at(lane, axis)


@dataclass(frozen=True)
class Collection:
    """A `stack` or `cat` whose entries are mostly lanes."""

    pieces: tuple[Piece, ...]
    axis: int
    joins: bool  # cat, not stack
    entries: int

    def build(self, build: Builder) -> Node:
        parts = [self._part(build, piece) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else build.call(aten.cat.default, parts, self.axis)

    def _part(self, build: Builder, piece: Piece) -> Node:
        if piece.count == 0:
            node = cast(Node, piece.firsts[0])
            return node if self.joins else build.call(aten.unsqueeze.default, node, self.axis)
        moved = piece.lanes(build, self.axis)
        if len(moved) == 1:
            return _merge(build, moved[0], self.axis) if self.joins else moved[0]
        join = aten.cat.default if self.joins else aten.stack.default
        merged = _merge(build, build.call(join, moved, self.axis + 1), self.axis)
        widths = [shape(m)[self.axis + 1] if self.joins else 1 for m in moved]
        gone = sum(widths[len(widths) - piece.missing :])
        return build.slice(merged, self.axis, 0, shape(merged)[self.axis] - gone)


def _merge(build: Builder, node: Node, axis: int) -> Node:
    sizes = shape(node)
    return build.reshape(node, [*sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2:]])


def collection(node: Node) -> Collection | None:
    """How `node`, a stack or cat, collects lanes; None if fewer than two follow one another."""
    entries = cast(list[Node], node.args[0])
    rank = len(shape(node))
    axis = cast(int, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank
    pieces = _pieces([_lane(entry) for entry in entries], entries)
    if not any(piece.count > 1 for piece in pieces):
        return None
    return Collection(tuple(pieces), axis, is_op(node, aten.cat.default), len(entries))


def before_each_step(stack: Node) -> tuple[Node, int, bool] | None:
    """The result of a scan, and the number of the carry, whose values before each step, and no
    others of the result, are stacked: the first that it is given, then those after each step;
    or, if it is turned, the other way round."""
    entries = cast(list[Node], stack.args[0])
    for turned in (False, True):
        first, *rest = entries[::-1] if turned else entries
        result = rest[0].args[0] if rest and is_op(rest[0], aten.select.int) else None
        if not isinstance(result, Node) or not is_op(result, operator.getitem) \
                or not is_scan(result.args[0]) or set(result.users) != set(rest):
            continue
        scan, place = cast(Node, result.args[0]), cast(int, result.args[1])
        carries = cast(list[Node], scan.args[1])
        steps = [(r.args[1], r.args[2]) if list(r.users) == [stack] else None for r in rest]
        if place < len(carries) or steps != [(0, t) for t in range(trips(scan) - 1)]:
            continue
        results = cast(tuple[Node, ...], output_node(body_of(scan)).args[0])
        for k, carry in enumerate(carries):
            if carry is first and results[k] is results[place]:
                return result, k, turned
    return None


def _lane(entry: Node) -> LaneOf | None:
    views: list[Node] = []
    while is_view(entry):
        source = cast(Node, entry.args[0])
        if is_op(entry, aten.select.int) and _is_stack(source) and entry.args[1] == 0:
            return LaneOf(source, cast(int, entry.args[2]), tuple(reversed(views)))
        if len(entry.all_input_nodes) != 1:
            return None
        views.append(entry)
        entry = source
    return None


def _is_stack(node: Node) -> bool:
    """Whether `node` is the result of a scan (through what it was batched to, if it was)."""
    return "rewritten_by" in node.meta or is_op(node, operator.getitem)


def _pieces(lanes: Sequence[LaneOf | None], entries: Sequence[Node]) -> list[Piece]:
    pieces: list[Piece] = []
    at = 0
    while at < len(entries):
        period, step, count = _longest(lanes, at)
        if count < 2:
            pieces.append(Piece((entries[at],)))
            at += 1
            continue
        firsts = tuple(cast(LaneOf, lane) for lane in lanes[at : at + period])
        over = _begun(lanes, at + period * count, period, step)
        more = over > 0 and all(0 <= f.index + step * count < shape(f.stack)[0] for f in firsts)
        missing = period - over if more else 0
        pieces.append(Piece(firsts, step, count + more, missing))
        at += period * (count + more) - missing
    return pieces


def _longest(lanes: Sequence[LaneOf | None], at: int) -> tuple[int, int, int]:
    """Period, step and number of rounds of the run of lanes that starts at `at`."""
    first = lanes[at]
    if first is None:
        return 1, 1, 0
    period = next((p for p in range(1, len(lanes) - at)
                   if (other := lanes[at + p]) is not None and other.kind() == first.kind()), 0)
    if period == 0 or any(lane is None for lane in lanes[at : at + period]):
        return 1, 1, 0
    step = cast(LaneOf, lanes[at + period]).index - first.index
    count = 1
    while _follows(lanes, at + count * period, period, step):
        count += 1
    return period, step, count if step else 0


def _follows(lanes: Sequence[LaneOf | None], at: int, period: int, step: int) -> bool:
    """Whether the round at `at` is the one after the round before it."""
    return _begun(lanes, at, period, step) == period


def _begun(lanes: Sequence[LaneOf | None], at: int, period: int, step: int) -> int:
    """How many entries from `at` on go on as the round before does, a round at most."""
    count = 0
    for now, before in zip(lanes[at : at + period], lanes[at - period : at], strict=False):
        if now is None or before is None:
            break
        if now.kind() != before.kind() or now.index != before.index + step:
            break
        count += 1
    return count
