"""Tensors → what a kernel reads: addresses and strides; copies of what does not lie so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from .kernel import Kernel, Layout, free_parts, kernel, layout
from .kernel_loops import contiguous
from .kernel_source import AXES
from .pointwise import Unsupported
from .step import Counts, Sizes


def step_sizes(
    carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor]
) -> tuple[Sizes, ...]:
    """The sizes of the arguments of one step."""
    shapes = (*(t.shape for t in carries), *(t.shape[1:] for t in slices),
              *(t.shape for t in invariants))
    return tuple(tuple(map(int, shape)) for shape in shapes)  # a step is of known sizes


def step_strides(
    carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor]
) -> tuple[Sizes, ...]:
    """How the arguments of one step lie."""
    return (*(t.stride() for t in carries), *(t.stride()[1:] for t in slices),
            *(t.stride() for t in invariants))


@lru_cache(maxsize=512)
def kernel_for(
    step: str, sizes: tuple[Sizes, ...], counts: Counts, strides: tuple[Sizes, ...],
    spent: frozenset[int] = frozenset(),
) -> Kernel:
    """The kernel for arguments that lie so: of those possible, the one that copies least.

    Raises `Unsupported` with a reason where there is none.
    """
    if not all(map(math.prod, sizes)):
        raise Unsupported("a value of it has no elements")
    axes, nodes = free_parts(step, sizes, counts[0])
    shapes = [tuple(n.meta["val"].shape) for n in nodes]
    lies = [*strides, *map(contiguous, shapes[len(strides):])]
    held, read, _ = counts
    moving = [*range(held, held + read), *range(len(strides) + held, len(nodes))]
    inner = max(math.prod(axes.inner(n)) for n in nodes)
    # where an axis is joined of two parts, only the faster can lie one element after the other
    slow = {part for node in nodes for axis in axes.of(node) for part in axis[:-1]}
    lanes: list[int | None] = [k for k, part in enumerate(axes.free) if part not in slow]
    if inner > 1 or not lanes:
        lanes.append(None)

    def cost(number: int | None) -> tuple[int, bool, int]:
        lane = None if number is None else axes.free[number]
        size = 0 if lane is None else axes.sizes[lane]
        copied = sum(math.prod(shapes[k]) for k in moving
                     if pitch(layout(axes, nodes[k], lane), shapes[k], lies[k], lane) is None)
        return copied, size < 8, -size

    return kernel(step, sizes, counts, min(lanes, key=cost), spent)


def pitch(how: Layout, sizes: Sizes, strides: Sizes, lane: int | None) -> int | None:
    """From one inner element of an argument to the next; None if it has to be copied."""
    packed, found = contiguous(how.inner, how.order), 0
    for axis, (size, stride, parts) in enumerate(zip(sizes, strides, how.free, strict=True)):
        if size > 1 and parts:
            if lane in parts and stride != 1:
                return None
        elif size > 1:
            found = found or stride // packed[axis]
            if not found or stride != packed[axis] * found:
                return None
    return found or 1 if how.lane or found < 2 else None


def packed(
    chosen: Kernel, given: Sequence[Tensor], moving: set[int], steps: int, reverse: bool
) -> tuple[list[int], list[int], list[Tensor], list[Tensor]]:
    """The kernel's arguments and sizes as numbers, its results, and what has to stay alive."""
    tensors = [_laid(t, chosen, k, k in moving) for k, t in enumerate(given)]
    made = [tensors[chosen.overwrites[k]] if k in chosen.overwrites else
            _empty(how, steps if k in moving else None, chosen, given[0])
            for k, how in enumerate(chosen.layouts) if k >= len(given)]
    tensors += made
    sizes, rows = _coalesced(chosen, [
        _free_strides(t.stride()[k in moving :], chosen, k) for k, t in enumerate(tensors)])
    spare = AXES - len(sizes)
    numbers: list[int] = []
    for k, (tensor, row) in enumerate(zip(tensors, rows, strict=True)):
        stride = tensor.stride(0) if k in moving else 0
        first = tensor.data_ptr()
        if reverse:
            first += (steps - 1) * stride * tensor.element_size()
            stride = -stride
        step = pitch(chosen.layouts[k], tuple(tensor.shape[k in moving :]),
                     tensor.stride()[k in moving :], chosen.lane)
        numbers += [first, stride, step or 1, *[0] * spare, *row]
    return numbers, [*[1] * spare, *sizes], made, tensors


def _laid(tensor: Tensor, chosen: Kernel, k: int, moves: bool) -> Tensor:
    how = chosen.layouts[k]
    if pitch(how, tuple(tensor.shape[moves:]), tensor.stride()[moves:], chosen.lane) is not None:
        return tensor
    order = [0, *(a + 1 for a in how.order)] if moves else list(how.order)
    return tensor.permute(order).contiguous().permute(_inverse(order))


def _empty(how: Layout, steps: int | None, chosen: Kernel, like: Tensor) -> Tensor:
    sizes = [math.prod([n, *(chosen.free[p] for p in parts)])
             for n, parts in zip(how.inner, how.free, strict=True)]
    order = list(how.order)
    if steps is not None:
        sizes, order = [steps, *sizes], [0, *(a + 1 for a in order)]
    return like.new_empty([sizes[a] for a in order]).permute(_inverse(order))


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(a) for a in range(len(order))]


def _free_strides(strides: Sequence[int], chosen: Kernel, k: int) -> dict[int, int]:
    """The stride of each part that is taken apart; 0 where the argument does not have it."""
    found = dict.fromkeys(chosen.free, 0)
    for stride, parts in zip(strides, chosen.layouts[k].free, strict=True):
        for part in reversed(parts):
            found[part] = stride
            stride *= chosen.free[part]
    return found


def _coalesced(
    chosen: Kernel, rows: Sequence[dict[int, int]]
) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides of axes, those joined that are one in all arguments; the lane last."""
    order = sorted(chosen.free, key=lambda part: part == chosen.lane)
    sizes: list[int] = []
    made: list[list[int]] = [[] for _ in rows]
    for part in order:
        size, strides = chosen.free[part], [row[part] for row in rows]
        if sizes and all(row[-1] == s * size for row, s in zip(made, strides, strict=True)):
            sizes[-1] *= size
            for row, stride in zip(made, strides, strict=True):
                row[-1] = stride
        else:
            sizes.append(size)
            for row, stride in zip(made, strides, strict=True):
                row.append(stride)
    return sizes, made
