"""Tensors → what a kernel reads: addresses and strides; copies of what does not lie so."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Node

from .axes import PRODUCTS, Axes, Part
from .facts import is_tensor, is_view, shape, value
from .kernel import Kernel, Layout, free_parts, kernel, layout
from .kernel_loops import contiguous
from .kernel_source import AXES
from .pointwise import Unsupported
from .step import Counts, Sizes, moving, remembered

COPYING, ROWS = 0.4, 1.25  # what an element that is copied takes, and a row's vector: vectors
RECORD = 3 + AXES  # numbers of one argument: its address, step, pitch and strides


class Lie(NamedTuple):
    """Sizes and strides of a tensor."""

    sizes: Sizes
    strides: Sizes

    def of_step(self) -> Lie:
        """Those of one of its steps."""
        return Lie(self.sizes[1:], self.strides[1:])

    def with_steps_at(self, axis: int) -> Lie:
        """The same memory, its first axis at `axis`."""
        return Lie(*((*own[1 : axis + 1], *own[:1], *own[axis + 1 :]) for own in self))

    def empty(self, like: Tensor) -> Tensor:
        return torch.empty_strided(self.sizes, self.strides, dtype=like.dtype, device=like.device)


def step_sizes(
    carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor]
) -> tuple[Sizes, ...]:
    """The sizes of the arguments of one step."""
    shapes = (*(t.shape for t in carries), *(t.shape[1:] for t in slices),
              *(t.shape for t in invariants))
    return tuple(tuple(map(int, shape)) for shape in shapes)  # a step is of known sizes


def of_call(call: Node) -> tuple[str, tuple[Sizes, ...], Counts]:
    """The step that a call of `fused_scan` in a graph runs, its arguments' sizes, how many."""
    step, *given = cast(Any, call.args[:4])
    carries, slices, invariants = ([value(n) for n in nodes] for nodes in given)
    return step, step_sizes(carries, slices, invariants), (
        len(carries), len(slices), len(invariants))


@remembered
def kernel_for(
    step: str, given: tuple[Lie, ...], counts: Counts, spent: frozenset[int] = frozenset()
) -> Kernel:
    """The kernel for a step's arguments that lie so: of those possible, the one that computes the
    fewest vectors and copies the fewest elements.

    Raises `Unsupported` with a reason where there is none.
    """
    sizes = tuple(lie.sizes for lie in given)
    if not all(map(math.prod, sizes)):
        raise Unsupported("a value of it has no elements")
    axes, nodes = free_parts(step, sizes, counts[0])
    shapes = [tuple(n.meta["val"].shape) for n in nodes]
    lies = [*given, *(Lie(shape, contiguous(shape)) for shape in shapes[len(given):])]
    inner = max(math.prod(axes.inner(n)) for n in nodes)
    # where an axis is joined of two parts, only the faster can lie one element after the other
    slow = {part for node in nodes for axis in axes.of(node) for part in axis[:-1]}
    lanes: list[int | None] = [k for k, part in enumerate(axes.free) if part not in slow]
    if inner > 1 or not lanes:
        lanes.append(None)

    def cost(number: int | None) -> tuple[float, int]:
        lane = None if number is None else axes.free[number]
        copied = sum(math.prod(shapes[k]) for k in moving(counts, len(nodes))
                     if pitch(layout(axes, nodes[k], lane), lies[k], lane) is None)
        return COPYING * copied + vectors(axes, lane), 0 if lane is None else -axes.sizes[lane]

    reasons: list[Unsupported] = []
    for lane in sorted(lanes, key=cost):
        try:
            return kernel(step, sizes, counts, lane, spent)
        except Unsupported as reason:  # its values may be too large along so many lanes
            reasons.append(reason)
    raise reasons[0]


def vectors(axes: Axes, lane: Part | None) -> float:
    """How many vectors the operations of a step compute, which hold elements along the `lane`, or
    else along a value's last axis that is not free: of one row then, which takes longer."""
    count, most = 0, vector_width()
    for node in axes.graph.nodes:
        if node.op != "call_function" or is_view(node) or not is_tensor(node):
            continue
        widest = max((n for n in (node, *node.all_input_nodes) if is_tensor(n)),
                     key=lambda n: value(n).numel())
        inner = axes.inner(widest) or (1,)
        has_lane = any(lane in axis for axis in axes.of(widest))
        width = inner[-1] if lane is None else axes.sizes[lane] if has_lane else 1
        times = shape(cast(Node, node.args[0]))[-1] if node.target in PRODUCTS else 1
        elements = value(node if times > 1 else widest).numel() * times
        count += elements // max(width, 1) * -(-width // most)
    return count * ROWS if lane is None else count


def vector_width() -> int:
    """How many numbers in single precision a vector holds on this machine."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def pitch(how: Layout, lie: Lie, lane: int | None) -> int | None:
    """From one inner element of an argument to the next; None if it has to be copied."""
    packed, found = contiguous(how.inner, how.order), 0
    for axis, (size, stride, parts) in enumerate(zip(*lie, how.free, strict=True)):
        if size > 1 and parts:
            if lane in parts and stride != 1:
                return None
        elif size > 1:
            found = found or stride // packed[axis]
            if not found or stride != packed[axis] * found:
                return None
    return found or 1 if how.lane or found < 2 else None


@dataclass(frozen=True)
class Plan:
    """How a kernel is called on arguments that lie in one way.

    `copied`: how arguments have to lie that don't, by number; `made`: the results, or the number
    of the argument that one is written over, and the axis of their steps; `numbers`: what the
    kernel reads, without addresses; `starts`: bytes from a tensor's address to its first step;
    `work`: the most elements that a tensor has, or a carry over time.
    """

    source: str
    copied: dict[int, Lie]
    made: tuple[tuple[Lie | int, int], ...]
    numbers: ctypes.Array[ctypes.c_int64]
    sizes: ctypes.Array[ctypes.c_int64]
    starts: tuple[int, ...]
    steps: int
    work: int

    def packed(
        self, given: Sequence[Tensor]
    ) -> tuple[ctypes.Array[ctypes.c_int64], list[Tensor], list[Tensor]]:
        """The kernel's arguments, its results, and all tensors that have to stay alive."""
        tensors = [self.copied[k].empty(t).copy_(t) if k in self.copied else t
                   for k, t in enumerate(given)]
        made = [tensors[lie].movedim(0, axis) if isinstance(lie, int) else lie.empty(given[0])
                for lie, axis in self.made]
        tensors += made
        numbers = type(self.numbers).from_buffer_copy(self.numbers)
        for k, start in enumerate(self.starts):
            numbers[k * RECORD] = tensors[k].data_ptr() + start
        return numbers, made, tensors


@remembered
def plan(
    step: str, shapes: tuple[tuple[Sizes, Sizes], ...], counts: Counts, itemsize: int,
    axes: tuple[int, ...], reverse: bool, spent: frozenset[int],
) -> Plan | None:
    """The plan for arguments of such sizes and strides; None where no kernel runs them.

    Outputs have their steps along `axes`, and lie contiguously so if the kernel can write so.
    """
    held, read, _ = counts
    given = [Lie(*shape) for shape in shapes]
    once = [lie.of_step() if held <= k < held + read else lie for k, lie in enumerate(given)]
    steps = given[held].sizes[0]
    try:
        chosen = kernel_for(step, tuple(once), counts, spent)
    except Unsupported:  # they may lie otherwise than those that one was built for
        return None
    if not steps:
        return None
    moves = moving(counts, len(chosen.layouts))
    copied = {k: _packed(chosen.layouts[k], lie.sizes, k in moves) for k, lie in enumerate(given)
              if pitch(chosen.layouts[k], once[k], chosen.lane) is None}
    lies = [copied.get(k, lie) for k, lie in enumerate(given)]
    made: list[tuple[Lie | int, int]] = []
    for k, how in enumerate(chosen.layouts[len(given) :], len(given)):
        sizes = tuple(math.prod([n, *(chosen.free[p] for p in parts)])
                      for n, parts in zip(how.inner, how.free, strict=True))
        axis = axes[k - len(given) - held] if k in moves else 0
        if k in moves:
            own = stacked((steps, *sizes), axis)
            if pitch(how, own.of_step(), chosen.lane) is None:
                own = _packed(how, (steps, *sizes), True)
        else:
            own = _packed(how, sizes, False)
        made.append((chosen.overwrites.get(k, own.with_steps_at(axis)), axis))
        lies.append(lies[chosen.overwrites[k]] if k in chosen.overwrites else own)
    once = [lie.of_step() if k in moves else lie for k, lie in enumerate(lies)]
    free, rows = _coalesced(chosen, [_free_strides(lie.strides, chosen, k)
                                     for k, lie in enumerate(once)])
    spare = [0] * (AXES - len(free))
    numbers: list[int] = []
    starts = []
    for k, (lie, row) in enumerate(zip(lies, rows, strict=True)):
        stride = lie.strides[0] if k in moves else 0
        starts.append((steps - 1) * stride * itemsize if reverse else 0)
        apart = pitch(chosen.layouts[k], once[k], chosen.lane)
        numbers += [0, -stride if reverse else stride, apart or 1, *spare, *row]
    all_sizes = [*[1] * len(spare), *free]
    work = max(*(math.prod(lie.sizes) for lie in lies),
               steps * max(math.prod(lie.sizes) for lie in given[:held]))
    return Plan(chosen.source, copied, tuple(made), (ctypes.c_int64 * len(numbers))(*numbers),
                (ctypes.c_int64 * AXES)(*all_sizes), tuple(starts), steps, work)


def stacked(sizes: Sizes, axis: int) -> Lie:
    """How a tensor lies whose first axis is to be at `axis` of a contiguous one."""
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(sizes))]
    return Lie(sizes, contiguous(sizes, order))


def _packed(how: Layout, sizes: Sizes, moves: bool) -> Lie:
    """How a tensor lies as a kernel reads it, without gaps."""
    order = [0, *(a + 1 for a in how.order)] if moves else how.order
    return Lie(sizes, contiguous(sizes, order))


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
