"""A running sum → one sum, or one cumulative sum; any affine recurrence → all its steps at once.

Before:
    scan: total = total + term; the total before or after each step, or only the last one
    scan: h = a·h + b, for one or several carries, or with max, min or log-sum-exp in place of +
After:
    total + terms.sum(0), where only the end is used; total + terms.cumsum(0) else
    looplift.fused_scan(step's source, …), which runs an affine step in O(log T) operations
Wins:
    A few operations in place of some for each step, on every device. Affine recurrences stay for
    `fuse-recurrences` where it has a kernel: on two cores that took a 36th to a fifth of the time.
Sound if:
    the term is no function of the total, has its size and dtype, and is added once per step; the
    carries are combined element by element, with coefficients that are known without them.
    Sums have no order but their rounding; PyTorch's own are at least as accurate as adding one
    by one. Where a number is not finite, the loop itself runs.
Skips:
    steps that are not affine; terms that are broadcast to the total's size; loops too short, or
    with states too large, for O(log T) passes over them to win.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from ..optimizer.builder import Builder, output_node, placeholders
from ..optimizer.distribute import replacing
from ..optimizer.facts import Facts, aten, body_of, is_scan, shape, source_line, trips, value
from ..optimizer.fused import build_kernel, pays
from ..optimizer.fusible import Fusible, all_at_once, call, fusible
from ..optimizer.pointwise import Unsupported
from ..optimizer.rewrite import Rewrite, Skip
from ..optimizer.waste import wastes

COUNTED = (torch.int64, torch.float32, torch.float64)  # dtypes that hold many steps of a number


@dataclass(frozen=True)
class ParallelizeRecurrence:
    """Compute running sums at once; see the module's docstring."""

    name: ClassVar[str] = "parallelize-recurrence"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for scan in filter(is_scan, facts.operations):
            if facts.training and wastes(scan):  # which only a kernel's backward leaves out
                continue
            term = summed(scan)
            if term is None:
                yield from self._affine(scan)
                continue
            carry = value(cast(list[Node], scan.args[1])[0])
            if isinstance(term, Node) and _sort(value(term)) != _sort(carry):
                reason = f"its terms, {tuple(shape(term))}, are broadcast to the total's size"
                yield Skip(self.name, reason, source_line(scan))
                continue

            def make(build: Builder, scan: Node = scan, term: Any = term) -> Sequence[Node]:
                return at_once(build, scan, term)

            yield replacing(self.name, f"running sum of {trips(scan)} steps → one sum", scan, make)

    def _affine(self, scan: Node) -> Iterator[Rewrite | Skip]:
        if not pays(trips(scan), [value(n) for n in cast(list[Node], scan.args[1])]) \
                or isinstance(fusible(scan, build_kernel), Fusible):
            return
        found = fusible(scan, all_at_once)
        if isinstance(found, Unsupported):
            yield Skip(self.name, str(found), source_line(scan))
            return

        def make(build: Builder) -> Sequence[Node]:
            return call(build, found)

        yield replacing(self.name, f"affine recurrence of {trips(scan)} steps → all at once",
                        scan, make)


def _sort(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype


def summed(scan: Node) -> Node | int | float | None:
    """What a scan adds to its one carry, if it does nothing else: an input of its body, or a
    number, as a counter does."""
    body = body_of(scan)
    carries = cast(list[Node], scan.args[1])
    calls = [n for n in body.graph.nodes if n.op == "call_function"]
    if len(carries) != 1 or len(calls) != 1 or calls[0].target is not aten.add.Tensor:
        return None
    [add], heads = calls, placeholders(body)
    results = cast(tuple[Node, ...], output_node(body).args[0])
    others = [n for n in add.args if n is not heads[0]]
    dtype = value(carries[0]).dtype
    if add.kwargs or len(others) != 1 or dtype is torch.bool:
        return None
    if not isinstance(others[0], Node) and dtype not in COUNTED:
        return None
    if results[0] is not add or any(r not in (add, heads[0]) for r in results):
        return None
    return cast("Node | int | float", others[0])


def stacked(build: Builder, scan: Node, term: Node) -> Node:
    """The terms of all steps."""
    carries, slices, invariants = (cast(list[Node], scan.args[k]) for k in (1, 2, 3))
    place = placeholders(body_of(scan)).index(term) - 1
    if place < len(slices):
        return slices[place]
    same = build.call(aten.unsqueeze.default, invariants[place - len(slices)], 0)
    return build.call(aten.expand.default, same, [trips(scan), *shape(carries[0])])


def at_once(build: Builder, scan: Node, term: Node | int | float) -> Sequence[Node]:
    """The scan's results: the last total, then the totals before or after each step."""
    [start], steps = cast(list[Node], scan.args[1]), trips(scan)
    head = placeholders(body_of(scan))[0]
    outputs = cast(tuple[Node, ...], output_node(body_of(scan)).args[0])[1:]
    dtype = value(start).dtype  # small integers would be summed as int64
    kept = {} if dtype.is_floating_point or dtype.is_complex else {"dtype": dtype}
    if not outputs:
        total = term * steps if not isinstance(term, Node) else build.call(
            aten.sum.dim_IntList, stacked(build, scan, term), [0], **kept)
        return [build.call(aten.add.Tensor, start, total)]
    first = build.call(aten.unsqueeze.default, start, 0)
    if isinstance(term, Node):
        sums = build.call(aten.cumsum.default, stacked(build, scan, term), 0, **kept)
    else:
        counts = build.call(aten.arange.start, 1, steps + 1, dtype=dtype,
                            device=value(start).device)
        sums = build.call(aten.mul.Tensor, build.reshape(counts, [steps, *[1] * len(shape(start))]),
                          term)
    after = build.call(aten.add.Tensor, first, sums)
    before = build.call(aten.cat.default, [first, build.slice(after, 0, 0, steps - 1)], 0) \
        if head in outputs else after
    final = build.call(aten.select.int, after, 0, steps - 1)
    return [final, *(before if output is head else after for output in outputs)]
