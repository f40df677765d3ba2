"""What a loop reads at each step, for all steps at once, stacked on axis 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from .affine import Digit, flat_codes, progression
from .builder import Builder
from .facts import aten, shape, value


@dataclass(frozen=True)
class Link:
    """One `select` (width None) or `slice` of a chain, and where each trip places it."""

    axis: int
    begins: tuple[int, ...]
    width: int | None
    step: int


def lanes(build: Builder, base: Node, links: Sequence[Link]) -> Node:
    """The values that the chain of reads `links` of `base` gives, one for each trip.

    Places that form a progression cost no copy: they are strided views (windows through
    `unfold`). The places of several links span a grid, as rows and columns do.
    """
    digits: list[Digit] = []
    node = base
    for link in links:
        axis = link.axis + len(digits)
        digit = Digit.of(link.begins)
        if len(digit.values) == 1:
            node = _once(build, node, axis, link)
            continue
        node = _all_places(build, node, axis, link, digit)
        node = build.move(node, axis, len(digits))
        digits.append(digit)
    if len(digits) > 1:
        node = _merged(build, node, len(digits), front=any(link.axis == 0 for link in links))
    return _in_order(build, node, flat_codes(digits))


def _merged(build: Builder, node: Node, count: int, front: bool) -> Node:
    """The first `count` axes as one; it is copied to lie after the batch axis, if there is one.

    Merging the axes of a grid copies; most models want their batch in front afterwards.
    """
    sizes = shape(node)
    place = 0 if front or len(sizes) <= count + 1 else 1
    order = [*range(count, count + place), *range(count), *range(count + place, len(sizes))]
    moved = build.permute(node, order)
    ahead, behind = shape(moved)[:place], shape(moved)[place + count :]
    merged = build.reshape(moved, [*ahead, torch.Size(sizes[:count]).numel(), *behind])
    return build.move(merged, place, 0)


def _once(build: Builder, node: Node, axis: int, link: Link) -> Node:
    begin = link.begins[0]
    if link.width is None:
        return build.call(aten.select.int, node, axis, begin)
    return build.slice(node, axis, begin, begin + link.width, link.step)


def _all_places(build: Builder, node: Node, axis: int, link: Link, digit: Digit) -> Node:
    """`node` with `axis` running over the distinct places, and the window, if any, after it."""
    places = progression(digit.values)
    if link.width is None:
        if places is None:
            table = build.table(digit.values, value(node).device, torch.int64)
            return build.call(aten.index_select.default, node, axis, table)
        return build.slice(node, axis, places.start, places.last + 1, places.step)
    if places is None:
        numbers = [v + k for v in digit.values for k in range(0, link.width, link.step)]
        table = build.table(numbers, value(node).device, torch.int64)
        flat = build.call(aten.index_select.default, node, axis, table)
        sizes = shape(flat)
        windows = [len(digit.values), sizes[axis] // len(digit.values)]
        return build.reshape(flat, [*sizes[:axis], *windows, *sizes[axis + 1:]])
    spanned = build.slice(node, axis, places.start, places.last + link.width)
    if places.step == link.width and link.step == 1:
        sizes = shape(spanned)
        return build.reshape(spanned, [*sizes[:axis], places.length, link.width, *sizes[axis + 1:]])
    windows_last = build.call(aten.unfold.default, spanned, axis, link.width, places.step)
    last = len(shape(windows_last)) - 1
    thinned = build.slice(windows_last, last, 0, link.width, link.step)
    return build.move(thinned, last, axis + 1)


def _in_order(build: Builder, node: Node, codes: list[int]) -> Node:
    """`node`, a lane for each place of the grid, as a lane for each trip."""
    steps = progression(codes)
    if steps is not None and steps.length == shape(node)[0] and abs(steps.step) == 1:
        return node if steps.step == 1 else build.call(aten.flip.default, node, [0])
    table = build.table(codes, value(node).device, torch.int64)
    return build.call(aten.index_select.default, node, 0, table)
