"""The backward of a fused scan, as it runs: a walk from the last step to the first.

The walk needs the carries that each step found. Those that an output shows are read from it, the
others computed again. Long walks go in chunks of steps, so that what is in memory beside the
gradients is that of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .backward import Backward, Term, backward_of
from .packing import step_sizes
from .step import (
    Counts,
    Sizes,
    differentiable,
    over_steps,
    remembered,
    step_function,
    traced,
)

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
    ctx.step, carries, slices, invariants, ctx.axes, ctx.reverse = inputs
    held, _, _ = ctx.counts = len(carries), len(slices), len(invariants)
    given, sizes = (*carries, *slices, *invariants), step_sizes(carries, slices, invariants)
    have = differentiable(ctx.step, sizes, held, tuple(t.requires_grad for t in given),
                          min(slices[0].shape[0], held + 1))
    ctx.mark_non_differentiable(*(t for t, has in zip(output, have, strict=True) if not has))
    found = shown(ctx.step, sizes, held)
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
class _Span:
    """Steps `start` to `stop`; the carries with which the scan entered them."""

    start: int
    stop: int
    carries: dict[int, Tensor]


class _Walk:
    """One backward."""

    def __init__(
        self, scan: Scan, ctx: Any, saved: Tensors, grads: Sequence[Tensor | None]
    ) -> None:
        self.scan, self.step, self.reverse, self.counts = scan, ctx.step, ctx.reverse, ctx.counts
        held, read, fixed = ctx.counts
        self.carries, self.slices = saved[:held], saved[held : held + read]
        self.invariants = saved[held + read : held + read + fixed]
        self.steps: int = self.slices[0].shape[0]
        arguments = (self.carries, self.slices, self.invariants)
        sizes = step_sizes(*arguments)
        self.shown = shown(ctx.step, sizes, held)
        self.outputs = {k: output.movedim(ctx.axes[j], 0) for (k, (j, _)), output in
                        zip(self.shown.items(), saved[held + read + fixed :], strict=True)}
        like = self.carries[0]
        stored = frozenset(j for j, after in self.shown.values()
                           if not after and grads[held + j] is None)
        # by their places: of the final carries, then of the outputs but those that are `stored`
        self.grads = {
            k: like.new_zeros([self.steps] * (k >= held) + list(size)) if g is None else
            g if k < held else g.movedim(ctx.axes[k - held], 0)
            for k, (g, size) in enumerate(zip(grads, result_sizes(ctx.step, sizes), strict=True))
            if k - held not in stored}
        wanted = tuple(t.requires_grad for ts in arguments for t in ts)
        self.back: Backward = backward_of(ctx.step, sizes, ctx.counts, wanted, stored)
        self.hidden = [k for k in range(held) if k not in self.outputs] \
            if any(k not in self.outputs for k in self.back.histories) else []

    def run(self, whole: bool) -> tuple[list[Tensor], list[Any], list[Any]]:
        held, read, fixed = self.counts
        back, like = self.back, self.carries[0]
        spans = self._spans(self.steps if whole else self._chunk())
        carried = [self.grads[k] for k in range(held)]
        carried += [like.new_zeros(size) for size in back.sums]
        names = [f"to_slice_{k}" for k in range(read)]
        parts: dict[str, list[Tensor]] = {}
        totals: dict[int, Tensor] = {}

        def add(k: int, found: Tensor) -> None:
            totals[k] = totals[k] + found if k in totals else found

        for span in reversed(spans):
            carried, known = self._chunk_walked(span, carried)
            for name in names:
                if name in known:
                    parts.setdefault(name, []).append(known[name])
            for k, terms in back.to_invariants.items():
                for term in terms:
                    if term.factors:
                        add(k, _product(term, known))
        for k, terms in back.to_invariants.items():
            for term in terms:
                if not term.factors:
                    add(k, _chained(term, carried[held + term.carry]))
        order = 1 if self.reverse else -1
        joined = {name: found[0] if len(found) == 1 else torch.cat(found[::order])
                  for name, found in parts.items()}
        return carried[:held], [joined.get(n) for n in names], \
            [totals.get(k) for k in range(fixed)]

    def _chunk(self) -> int:
        """Steps of a chunk: what it needs beside the gradients is no more than `CHUNK`."""
        back = self.back
        first = self.counts[0] + len(back.sums)
        own = [size for size, name in zip(back.sizes[first:], back.slices, strict=False)
               if name.startswith("before")]
        beside: int = sum(map(math.prod, own)) + sum(
            self.carries[k].numel() for k in (*back.histories, *self.hidden))
        beside += sum(self.carries[0].numel() for n in back.outputs if n.startswith("factor"))
        most: int = CHUNK // max(beside * self.carries[0].element_size(), 1)
        return max(most, LEAST)

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
            spans.append(_Span(start, stop, dict(held)))
            if number + 1 < len(order):
                if self.hidden:
                    _, ends = self._histories(spans[-1])
                    held |= ends
                last, following = (start, start - 1) if self.reverse else (stop - 1, stop)
                held |= {k: self.outputs[k][last if after else following]
                         for k, (_, after) in self.shown.items()}
        return spans

    def _histories(self, span: _Span) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """The carries as each step of a span found them, and those that no output shows after it;
        they are computed again, with the others as slices."""
        known = {f"history_{k}": self._shown(k, span) for k in self.outputs
                 if self.hidden or k in self.back.histories}
        if not self.hidden:
            return known, {}
        step = _with_history(self.step, self.counts, tuple(self.outputs))
        slices = [*(known[f"history_{k}"] for k in self.outputs),
                  *(s[span.start : span.stop] for s in self.slices)]
        count = len(self.hidden)
        found = self.scan(step, [span.carries[k] for k in self.hidden], slices, self.invariants,
                          [0] * count, self.reverse, frozenset())
        known |= {f"history_{k}": t for k, t in zip(self.hidden, found[count:], strict=True)}
        return known, dict(zip(self.hidden, found, strict=False))

    def _shown(self, k: int, span: _Span) -> Tensor:
        """A carry as each step of a span found it, of what the steps returned of it."""
        output: Tensor = self.outputs[k]
        after = self.shown[k][1]
        start, stop = span.start, span.stop
        if not after:
            return output[start:stop]
        if self.reverse and stop < self.steps:
            return output[start + 1 : stop + 1]
        if not self.reverse and start > 0:
            return output[start - 1 : stop - 1]
        first = self.carries[k].unsqueeze(0)
        return torch.cat([output[start + 1 :], first] if self.reverse else
                         [first, output[: stop - 1]])

    def _chunk_walked(
        self, span: _Span, carried: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The walk's carries before a span, and what is known for all of its steps."""
        back, held = self.back, self.counts[0]
        steps = span.stop - span.start
        known, _ = self._histories(span)
        own = {f"history_{k}" for k in self.hidden}
        known |= {f"slice_{k}": t[span.start : span.stop] for k, t in enumerate(self.slices)}
        known |= {f"grad_{k - held}": t[span.start : span.stop]
                  for k, t in self.grads.items() if k >= held}
        known |= {f"invariant_{k}": t.expand(steps, *t.shape)
                  for k, t in enumerate(self.invariants)}
        if back.before:
            per_step = [known[name] for name in back.before_slices]
            moves = [*[True] * len(per_step), *[False] * len(self.invariants)]
            made = over_steps(step_function(back.before), moves, (*per_step, *self.invariants))
            known |= {f"before_{k}": t for k, t in enumerate(made)}
            own |= {f"before_{k}" for k in range(len(made))}
        spent = frozenset(k for k, name in enumerate(back.slices) if name in own - back.factors)
        axes = [_axis_of_steps(self.slices[int(name.removeprefix("to_slice_"))])
                if name.startswith("to_slice_") else 0 for name in back.outputs]
        found = self.scan(back.step, carried, [known[name] for name in back.slices],
                          [self.invariants[k] for k in back.invariants], axes,
                          not self.reverse, spent)
        known |= {name: t.movedim(axis, 0) for name, axis, t in
                  zip(back.outputs, axes, found[len(carried) :], strict=True)}
        known |= {name: known[whole].narrow(axis + 1, start, size)
                  for name, (whole, axis, start, size) in back.pieces.items()}
        return found[: len(carried)], known


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


def _product(term: Term, known: dict[str, Tensor]) -> Tensor:
    """A summand of an invariant's gradient, of factors that are known for all steps."""
    factors = [known[f.name].permute(f.order) for f in term.factors]
    if len(factors) == 1:
        return _chained(term, factors[0].sum(0))
    left, right = factors[0].movedim(0, -2), factors[1].movedim(0, -3)
    rows, columns, summed = left.shape[:-2], right.shape[-1], math.prod(left.shape[-2:])
    right = right.reshape(*right.shape[:-3], summed, columns)
    return _chained(term, left.reshape(*rows, summed) @ right)  # summed over the steps


def _chained(term: Term, total: Tensor) -> Tensor:
    for node in term.chain:
        function: Any = node.target
        total = function(total, *node.args[1:], **node.kwargs)
    return total

