"""Windows written into a buffer at regular distances, by one loop or by several in turn.

Two loops that write their patches alternately, `out[:, 12·i : 12·i+8]` and then
`out[:, 12·i+8 : 12·i+12]`, are one concatenation and one reshape, not two scatters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from .builder import Builder
from .facts import aten, shape

MADE = "interleaved"  # under this name a node keeps what it was made from


@dataclass(frozen=True)
class Window:
    """`count` windows, `width` wide, the first at `begin`; `values` has them on an axis of their
    own, right before the axis that is written."""

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


def interleaved(build: Builder, buffer: Node, axis: int, gap: int, window: Window) -> Node:
    """`buffer` with `window` written over it; what was written before is taken apart again."""
    whole = Interleaved(buffer, axis, gap, (window,))
    earlier = buffer.meta.get(MADE)
    if isinstance(earlier, Interleaved) and (earlier.axis, earlier.gap) == (axis, gap):
        both = tuple(sorted((*earlier.windows, window), key=lambda w: w.begin))
        if fits(both, gap):
            whole = Interleaved(earlier.base, axis, gap, both)
    made = _built(build, whole)
    made.meta[MADE] = whole
    return made


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
