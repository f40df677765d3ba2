"""Results of a scan that are stacked or concatenated one by one: one view of its own stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch.fx import Node

from .builder import Builder
from .facts import aten, is_op, shape


@dataclass(frozen=True)
class Piece:
    """Consecutive entries: a run over the lanes of one or more stacks in turn, or one node.

    Entry k of the run is lane `begin + k // len(stacks)` of stack `k % len(stacks)`.
    """

    stacks: tuple[Node, ...]
    begin: int
    count: int  # lanes of each stack; 0 for a single node that is no lane


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
            node = piece.stacks[0]
            return node if self.joins else build.call(aten.unsqueeze.default, node, self.axis)
        sliced = [build.slice(s, 0, piece.begin, piece.begin + piece.count) for s in piece.stacks]
        if self.joins:
            moved = [build.move(s, 0, self.axis) for s in sliced]
            one = moved[0] if len(moved) == 1 else build.call(
                aten.cat.default, moved, self.axis + 1
            )
            return _merge(build, one, self.axis)
        moved = [build.move(s, 0, self.axis) for s in sliced]
        if len(moved) == 1:
            return moved[0]
        return _merge(build, build.call(aten.stack.default, moved, self.axis + 1), self.axis)


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


def _lane(entry: Node) -> tuple[Node, int] | None:
    if is_op(entry, aten.select.int) and entry.args[1] == 0 and isinstance(entry.args[2], int):
        return cast(Node, entry.args[0]), entry.args[2]
    return None


def _pieces(lanes: Sequence[tuple[Node, int] | None], entries: Sequence[Node]) -> list[Piece]:
    pieces: list[Piece] = []
    at = 0
    while at < len(entries):
        period, count = _longest(lanes, at)
        if count < 2:
            pieces.append(Piece((entries[at],), 0, 0))
            at += 1
            continue
        stacks = tuple(cast(tuple[Node, int], lanes[at + j])[0] for j in range(period))
        pieces.append(Piece(stacks, cast(tuple[Node, int], lanes[at])[1], count))
        at += period * count
    return pieces


def _longest(lanes: Sequence[tuple[Node, int] | None], at: int) -> tuple[int, int]:
    """The period and number of rounds of the run of lanes that starts at `at`."""
    first = lanes[at]
    if first is None:
        return 1, 0
    period = next(
        (p for p in range(1, len(lanes) - at) if lanes[at + p] == (first[0], first[1] + 1)), 0
    )
    if period == 0 or any(
        lane is None or lane[1] != first[1] for lane in lanes[at : at + period]
    ):
        return 1, 0
    count = 1
    while _follows(lanes, at + count * period, period):
        count += 1
    return period, count


def _follows(lanes: Sequence[tuple[Node, int] | None], at: int, period: int) -> bool:
    """Whether the round at `at` is the one after the round before it."""
    if at + period > len(lanes):
        return False
    for now, before in zip(lanes[at : at + period], lanes[at - period : at], strict=True):
        if now is None or before is None or now != (before[0], before[1] + 1):
            return False
    return True
