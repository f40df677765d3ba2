"""Windows written into a buffer at regular distances, by one loop or by several in turn.

Two loops that write their patches alternately, `out[:, 12·i : 12·i+8]` and then
`out[:, 12·i+8 : 12·i+12]`, are one concatenation and one reshape, not two scatters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from .builder import Builder
from .facts import aten, is_op, shape


def write_windows(base: Tensor, values: Tensor, axis: int, begin: int, gap: int) -> Tensor:
    """`base` with windows written over it, the first at `begin`, `gap` apart, along `axis`.

    `values` has the windows on an axis of their own, right before the one that is written.
    Stands in a graph only until all loops are folded, and what several of them wrote alternately
    can be written at once.
    """
    width = values.shape[axis + 1]
    for number, window in enumerate(values.unbind(axis)):
        start = begin + number * gap
        base = torch.slice_scatter(base, window, axis, start, start + width)
    return base


@dataclass(frozen=True)
class Window:
    """`count` windows of `values`, `width` wide, the first at `begin`."""

    begin: int
    width: int
    count: int
    values: Node


@dataclass(frozen=True)
class Interleaved:
    """What a buffer holds: `base`, and windows at distances of `gap` along `axis` over it."""

    base: Node
    axis: int
    gap: int
    windows: tuple[Window, ...]

    def build(self, build: Builder) -> Node:
        return _built(build, self)


def last_write(node: Node) -> Interleaved | None:
    """All that a chain of `write_windows`, of which `node` is the last, writes; else None."""
    if not is_op(node, write_windows) or any(_continues(user, node) for user in node.users):
        return None
    base, _, axis, _, gap = cast(tuple[Node, Node, int, int, int], node.args)
    windows = [_window(node)]
    while is_op(base, write_windows) and base.args[2] == axis and base.args[4] == gap:
        both = sorted([*windows, _window(base)], key=lambda w: w.begin)
        if not fits(both, gap) or len(base.users) > 1:
            break
        windows, base = both, cast(Node, base.args[0])
    return Interleaved(base, axis, gap, tuple(windows))


def _continues(user: Node, node: Node) -> bool:
    same = is_op(user, write_windows) and user.args[2] == node.args[2]
    return same and user.args[0] is node and user.args[4] == node.args[4] and len(node.users) == 1


def _window(node: Node) -> Window:
    _, values, axis, begin, _ = cast(tuple[Node, Node, int, int, int], node.args)
    return Window(begin, shape(values)[axis + 1], shape(values)[axis], values)


def fits(windows: Sequence[Window], gap: int) -> bool:
    """Whether the windows lie one after another within one distance, none over another."""
    ends = [w.begin + w.width for w in windows]
    return ends[-1] <= windows[0].begin + gap and all(
        end <= after.begin for end, after in zip(ends, windows[1:], strict=False)
    )


def _built(build: Builder, whole: Interleaved) -> Node:
    base, axis, gap, windows = whole.base, whole.axis, whole.gap, whole.windows
    size, start = shape(base)[axis], windows[0].begin
    rounds = min(w.count for w in windows)
    if start + rounds * gap > size:
        rounds -= 1  # the last round ends with its last window
    parts = [build.slice(base, axis, 0, start)]
    if rounds > 0:
        row = _round(build, whole, rounds)
        joined = row[0] if len(row) == 1 else build.call(aten.cat.default, row, axis + 1)
        sizes = shape(joined)
        parts.append(build.reshape(joined, [*sizes[:axis], rounds * gap, *sizes[axis + 2 :]]))
    place = start + rounds * gap
    for number in range(rounds, max(w.count for w in windows)):
        for window in windows:
            if number < window.count:
                begin = window.begin + number * gap
                parts.append(build.slice(base, axis, place, begin))
                parts.append(build.call(aten.select.int, window.values, axis, number))
                place = begin + window.width
    parts.append(build.slice(base, axis, place, size))
    parts = [p for p in parts if shape(p)[axis] > 0]
    return build.call(aten.cat.default, parts, axis)


def _round(build: Builder, whole: Interleaved, rounds: int) -> list[Node]:
    """The pieces of one round, `rounds` of each: windows, and between them what the base has."""
    axis, gap, start = whole.axis, whole.gap, whole.windows[0].begin
    pieces, place = [], start
    for window in whole.windows:
        if window.begin > place:
            pieces.append(_between(build, whole, place, window.begin, rounds))
        pieces.append(build.slice(window.values, axis, 0, rounds))
        place = window.begin + window.width
    if place < start + gap:
        pieces.append(_between(build, whole, place, start + gap, rounds))
    return pieces


def _between(build: Builder, whole: Interleaved, begin: int, end: int, rounds: int) -> Node:
    """The base's own values from `begin` to `end` of each round."""
    axis, gap = whole.axis, whole.gap
    stretch = build.slice(whole.base, axis, begin, end + (rounds - 1) * gap)
    windows = build.call(aten.unfold.default, stretch, axis, end - begin, gap)
    return build.move(windows, len(shape(windows)) - 1, axis + 1)
