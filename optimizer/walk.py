"""The backward of a fused scan, as it runs: a walk from the last step to the first.

The walk needs the carries that each step found. Those that an output shows are read from it, the
others computed again. Long walks go in chunks of steps, so that what is in memory beside the
gradients is that of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from operator import and_
from typing import Any

import torch
from torch import Tensor

from .backward import TINY, Backward, Term, backward_of
from .packing import step_sizes
from .step import (
    Counts,
    Sizes,
    differentiable,
    over_steps,
    reaching,
    remembered,
    step_function,
    traced,
)
from .unread import unread

CHUNK = 1 << 22  # bytes beside the gradients that one chunk may need
LEAST = 64  # steps of a chunk

Tensors = Sequence[Tensor]
# step, carries, slices, invariants, axes of outputs, reverse, slices that may be overwritten
Scan = Callable[[str, Tensors, Tensors, Tensors, Sequence[int], bool, frozenset[int]], list[Tensor]]


@remembered
def result_sizes(step: str, sizes: tuple[Sizes, ...]) -> list[Sizes]:
    """The sizes of what a step returns."""
    found: Any = traced(step, sizes).graph.output_node().args[0]
    return [tuple(n.meta["val"].shape) for n in found]


@remembered
def shown(step: str, sizes: tuple[Sizes, ...], held: int) -> dict[int, tuple[int, bool]]:
    """The carries that a step returns: by number the output, and if it is the carry after it."""
    graph = traced(step, sizes).graph
    results: Any = graph.output_node().args[0]
    heads = [n for n in graph.nodes if n.op == "placeholder"][:held]
    return {k: (j, after) for k in range(held) for j, node in enumerate(results[held:])
            for after in (False, True) if node is (results[k] if after else heads[k])}


def keep(ctx: Any, inputs: Any, output: Any) -> None:
    """What the backward needs of a call, and which of its results have none."""
    ctx.set_materialize_grads(False)
    ctx.step, carries, slices, invariants, ctx.axes, ctx.reverse = inputs
    held, _, _ = ctx.counts = len(carries), len(slices), len(invariants)
    given = (*carries, *slices, *invariants)
    ctx.sizes = step_sizes(carries, slices, invariants)
    ctx.wanted = tuple([t.requires_grad for t in given])
    have = differentiable(ctx.step, ctx.sizes, held, ctx.wanted,
                          min(slices[0].shape[0], held + 1))
    ctx.mark_non_differentiable(*(t for t, has in zip(output, have, strict=True) if not has))
    found = shown(ctx.step, ctx.sizes, held)
    ctx.save_for_backward(*given, *(output[held + number] for number, _ in found.values()))


def backward(
    scan: Scan, whole: bool, ctx: Any, saved: Tensors, grads: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """Gradients of the arguments of `fused_scan`; in one chunk if it is to be `whole`."""
    walk = _Walk(scan, ctx, saved, grads)
    to_carries, to_slices, to_invariants = walk.run(whole)
    # an empty list of numbers counts as one of tensors
    return None, to_carries, to_slices, to_invariants, None if ctx.axes else [], None


@dataclass(frozen=True)
class _Course:
    """What of a walk is the same whatever the numbers are.

    `shown`: the carries that the step returns; `hidden`: those to be computed again; `zeros`: the
    sizes of those whose last value has no gradient; `beside`: numbers of one step that are in
    memory beside the gradients; `has`: which carries have a gradient before the first step.
    """

    back: Backward
    shown: dict[int, tuple[int, bool]]
    hidden: tuple[int, ...]
    zeros: dict[int, Sizes]  # by number
    beside: int
    has: tuple[bool, ...]


@lru_cache(maxsize=512)
def _course(
    step: str, sizes: tuple[Sizes, ...], counts: Counts, wanted: tuple[bool, ...],
    given: tuple[bool, ...],
) -> _Course:
    """The course of a walk back that gives gradients to what is `wanted`; `given`: which of the
    results have some."""
    held = counts[0]
    there = shown(step, sizes, held)
    reached = reaching(step, sizes, held, given)
    wanted = tuple(map(and_, wanted, reached))
    without = frozenset(k for k, has in enumerate(given[held:]) if not has)
    updates = unread(step, sizes, counts, given)
    back = backward_of(step, sizes, counts, wanted, without, tuple(updates.items()))
    hidden = tuple(k for k in range(held) if k not in there) \
        if any(k not in there for k in back.histories) else ()
    zeros = {k: sizes[k] for k in range(held) if not given[k]}
    first = held + len(back.sums)
    beside = sum(math.prod(size) for size, name in zip(back.sizes[first:], back.slices,
                                                       strict=False) if name.startswith("before"))
    beside += sum(math.prod(sizes[k]) for k in (*back.histories, *hidden))
    beside += sum(math.prod(sizes[0]) for name in back.outputs if name.startswith("factor"))
    return _Course(back, there, hidden, zeros, beside, tuple(reached[:held]))


@dataclass(frozen=True)
class _Span:
    """Steps `start` to `stop`, of so many as there are; the carries with which the scan entered
    them, and those of each step that the scan returned, once they are looked up."""

    start: int
    stop: int
    steps: int
    carries: dict[int, Tensor]
    found: dict[int, Tensor] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that holds all steps."""
        whole = self.stop - self.start == self.steps
        return tensor if whole else tensor[self.start : self.stop]


class _Walk:
    """One backward."""

    def __init__(
        self, scan: Scan, ctx: Any, saved: Tensors, grads: Sequence[Tensor | None]
    ) -> None:
        self.scan, self.step, self.reverse, self.counts = scan, ctx.step, ctx.reverse, ctx.counts
        held, read, fixed = ctx.counts
        self.course = course = _course(ctx.step, ctx.sizes, ctx.counts, ctx.wanted,
                                       tuple([g is not None for g in grads]))
        self.carries, self.slices = saved[:held], saved[held : held + read]
        self.invariants = saved[held + read : held + read + fixed]
        self.steps: int = self.slices[0].shape[0]
        self.outputs = {k: _steps_first(output, ctx.axes[j]) for (k, (j, _)), output in
                        zip(course.shown.items(), saved[held + read + fixed :], strict=True)}
        # by their places: of the final carries, then of the outputs that have some
        self.grads = {k: g if k < held else _steps_first(g, ctx.axes[k - held])
                      for k, g in enumerate(grads) if g is not None}
        self.grads |= {k: self.carries[0].new_zeros(size) for k, size in course.zeros.items()}

    def run(self, whole: bool) -> tuple[list[Any], list[Any], list[Any]]:
        held, read, fixed = self.counts
        back, like = self.course.back, self.carries[0]
        most: int = CHUNK // max(self.course.beside * like.element_size(), 1)
        spans = self._spans(self.steps if whole else max(most, LEAST))
        carried = [self.grads[k] for k in range(held)]
        carried += [like.new_zeros(size) for size in back.sums]
        names = [f"to_slice_{k}" for k in range(read)]
        parts: dict[str, list[Tensor]] = {}
        totals: dict[int, Tensor] = {}

        def add(k: int, found: Tensor) -> None:
            totals[k] = totals[k] + found if k in totals else found

        for span in reversed(spans):
            carried, known = self._span_walked(span, carried)
            for name in filter(known.__contains__, names):
                parts.setdefault(name, []).append(known[name])
            for k, terms in back.to_invariants.items():
                for term in terms:
                    if term.factors:
                        add(k, _product(term, [self._factor(f.name, term.unread, span, known)
                                               for f in term.factors]))
        for k, terms in back.to_invariants.items():
            for term in terms:
                if not term.factors:
                    add(k, _chained(term, carried[held + term.carry]))
        order = 1 if self.reverse else -1
        joined = {name: found[0] if len(found) == 1 else torch.cat(found[::order])
                  for name, found in parts.items()}
        starts = [g if has else None for g, has in zip(carried, self.course.has, strict=False)]
        return starts, [joined.get(n) for n in names], \
            [totals.get(k) for k in range(fixed)]

    def _spans(self, chunk: int) -> list[_Span]:
        """The chunks in the order in which the scan ran through them, as even as can be."""
        count = max(round(self.steps / chunk), 1)
        bounds = [self.steps * k // count for k in range(count + 1)]
        order = list(pairwise(bounds))
        if self.reverse:
            order.reverse()
        held = dict(enumerate(self.carries))
        spans = []
        for number, (start, stop) in enumerate(order):
            spans.append(_Span(start, stop, self.steps, dict(held)))
            if number + 1 < len(order):
                if self.course.hidden:
                    _, ends = self._computed_again(spans[-1])
                    held |= ends
                last, following = (start, start - 1) if self.reverse else (stop - 1, stop)
                held |= {k: self.outputs[k][last if after else following]
                         for k, (_, after) in self.course.shown.items()}
        return spans

    def _computed_again(self, span: _Span) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """The hidden carries as each step of a span found them, and as it left them; the others
        are slices."""
        hidden = self.course.hidden
        step = _with_history(self.step, self.counts, tuple(self.outputs))
        slices = [*(self._shown(k, span) for k in self.outputs), *map(span.of, self.slices)]
        found = self.scan(step, [span.carries[k] for k in hidden], slices, self.invariants,
                          [0] * len(hidden), self.reverse, frozenset())
        histories = zip(hidden, found[len(hidden) :], strict=True)
        return {f"history_{k}": t for k, t in histories}, dict(zip(hidden, found, strict=False))

    def _shown(self, k: int, span: _Span) -> Tensor:
        """A carry as each step of a span found it, of what the steps returned of it."""
        if k not in span.found:
            span.found[k] = self._found(k, span)
        return span.found[k]

    def _found(self, k: int, span: _Span) -> Tensor:
        output: Tensor = self.outputs[k]
        after = self.course.shown[k][1]
        start, stop = span.start, span.stop
        if not after:
            return span.of(output)
        if self.reverse and stop < self.steps:
            return output[start + 1 : stop + 1]
        if not self.reverse and start > 0:
            return output[start - 1 : stop - 1]
        first = self.carries[k].unsqueeze(0)
        return torch.cat([output[start + 1 :], first] if self.reverse else
                         [first, output[: stop - 1]])

    def _known(self, name: str, span: _Span, made: dict[str, Tensor]) -> Tensor:
        """What a differentiated step reads, of all steps of a span; or what was `made` for it."""
        if name not in made:
            kind, k = _numbered(name)
            if kind == "slice":
                return span.of(self.slices[k])
            if kind == "grad":
                return span.of(self.grads[self.counts[0] + k])
            if kind == "history":
                return self._shown(k, span)
            if kind == "left":
                return self._left(span)
            held = self.invariants[k]
            return held.expand(span.stop - span.start, *held.shape)
        return made[name]

    def _left(self, span: _Span) -> Tensor:
        """How many steps come after each, as numbers of the dtype of the carries."""
        like, last = self.carries[0], self.steps - 1
        bounds = (span.start, span.stop) if self.reverse else (
            last - span.start, last - span.stop, -1)
        return torch.arange(*bounds, dtype=like.dtype, device=like.device)

    def _factor(
        self, name: str, unread: int, span: _Span, made: dict[str, Tensor]
    ) -> Tensor:
        """What a product multiplies, but in the last steps, as many as are `unread`."""
        known = self._known(name, span, made)
        if self.reverse:
            return known[max(unread - span.start, 0) :] if unread else known
        return known[: max(self.steps - unread - span.start, 0)] if unread else known

    def _span_walked(
        self, span: _Span, carried: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The walk's carries before a span, and what is made for all of its steps."""
        back = self.course.back
        made = self._computed_again(span)[0] if self.course.hidden else {}
        if back.before:
            per_step = [self._known(name, span, made) for name in back.before_slices]
            moves = [*[True] * len(per_step), *[False] * len(self.invariants)]
            products = over_steps(step_function(back.before), moves, (*per_step, *self.invariants))
            made |= {f"before_{k}": t for k, t in enumerate(products)}
        spent = frozenset([k for k, name in enumerate(back.slices)
                           if name in made and name not in back.factors])  # of this walk alone
        slices = [self._known(name, span, made) for name in back.slices]
        axes = [_axis_of_steps(self.slices[_numbered(name)[1]]) if name.startswith("to_slice_")
                else 0 for name in back.outputs]
        found = self.scan(back.step, carried, slices, [self.invariants[k] for k in back.invariants],
                          axes, not self.reverse, spent)
        made |= {name: _steps_first(t, axis) for name, axis, t in
                 zip(back.outputs, axes, found[len(carried) :], strict=True)}
        made |= {name: made[whole].narrow(axis + 1, start, size)
                 for name, (whole, axis, start, size) in back.pieces.items()}
        return found[: len(carried)], made


@lru_cache(maxsize=512)
def _numbered(name: str) -> tuple[str, int]:
    """A name of `Backward` as what it is and its number."""
    kind, _, number = name.rpartition("_")
    return kind, int(number)


def _steps_first(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0) if axis else tensor


def _axis_of_steps(tensor: Tensor) -> int:
    """Where in memory the first axis of a tensor lies among the others."""
    first, *others = tensor.stride()
    return sum(stride > first for stride, size in zip(others, tensor.shape[1:], strict=True)
               if size > 1)


@lru_cache(maxsize=256)
def _with_history(step: str, counts: Counts, there: tuple[int, ...]) -> str:
    """The step that returns the carries as it found them; those `there` are slices."""
    held, read, fixed = counts
    rest = [f"carry_{k}" for k in range(held) if k not in there]
    others = [*(f"slice_{k}" for k in range(read)), *(f"invariant_{k}" for k in range(fixed))]
    names = [*rest, *(f"carry_{k}" for k in there), *others]
    all_names = [*(f"carry_{k}" for k in range(held)), *others]
    indented = step.strip().replace("\n", "\n    ")
    nexts = ", ".join(f"results[{k}]" for k in range(held) if k not in there)
    return (f"def step({', '.join(names)}):\n    {indented}\n"
            f"    results = step({', '.join(all_names)})\n"
            f"    return [{nexts}, {', '.join(rest)}]\n")


def _product(term: Term, known: Tensors) -> Tensor:
    """A summand of an invariant's gradient, of its factors for all steps."""
    factors = [t.permute(f.order) for f, t in zip(term.factors, known, strict=True)]
    if len(factors) == 1:
        return _chained(term, factors[0].sum(0))
    left, right = factors[0].movedim(0, -2), factors[1].movedim(0, -3)
    rows, columns, summed = left.shape[:-2], right.shape[-1], math.prod(left.shape[-2:])
    right = right.reshape(*right.shape[:-3], summed, columns)
    left = left.reshape(*rows, summed)  # then summed over the steps
    if math.prod(rows) * columns > TINY:
        return _chained(term, left @ right)
    return _chained(term, (left.double() @ right.double()).to(left.dtype))  # terms may cancel out


def _chained(term: Term, total: Tensor) -> Tensor:
    return step_function(term.chain)(total)[0]
