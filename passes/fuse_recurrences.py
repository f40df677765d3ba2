"""A recurrence of small steps → one kernel that walks all of them.

Before:
    scan(step, carries, slices, invariants)
After:
    looplift.fused_scan(step's source, carries, slices, invariants)
Wins:
    Each tensor is read and written once, with the carries in registers or in the cache; a loop
    in Python runs every operation of every step, and so does its backward.
Sound if:
    every operation is pointwise, a view, a sum, a largest or smallest value, a matrix product,
    or composed of these, on one floating dtype. The kernel computes these operations, with the
    vector functions that eager operations use; its backward is the differentiated step, walked
    from the last to the first, with products of all steps at once where they are off its cycle.
Skips:
    other operations; several dtypes; values too large for a core's cache; loops of few steps,
    which a kernel is not worth building for; other devices than the CPU; no compiler.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ..optimizer.builder import Builder, duplicate, output_node, placeholders
from ..optimizer.distribute import replacing
from ..optimizer.emit import sourced
from ..optimizer.facts import (
    Facts,
    aten,
    body_of,
    is_scan,
    is_tensor,
    source_line,
    stacked_as,
    trips,
    value,
)
from ..optimizer.fused import KINDS, is_built
from ..optimizer.pointwise import Unsupported, no_rule
from ..optimizer.rewrite import Rewrite, Skip
from ..optimizer.sink import Sunk, sunk

CPU = torch.device("cpu")
SCALED = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
FEW = 16  # steps: a kernel takes seconds to build
FEWEST = 5  # iterations on one value: Newton–Schulz has no more


@dataclass(frozen=True)
class FuseRecurrences:
    """Run a recurrence of small steps as one kernel; see the module's docstring."""

    name: ClassVar[str] = "fuse-recurrences"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for scan in facts.operations:
            if not is_scan(scan) or trips(scan) < (FEWEST if only_iterates(scan) else FEW):
                continue
            found = best(scan)
            if isinstance(found, Unsupported):
                yield Skip(self.name, str(found), source_line(scan))
                continue
            given, kernel = found

            def make(
                build: Builder, scan: Node = scan, given: Sunk = given, kernel: Fusible = kernel
            ) -> Sequence[Node]:
                return fused(build, scan, given, kernel)

            yield replacing(self.name, f"scan of {trips(scan)} steps → one kernel", scan, make)


def only_iterates(scan: Node) -> bool:
    """Whether its steps read nothing of their own."""
    carries, slices = (len(cast(list[Node], scan.args[k])) for k in (1, 2))
    return not any(h.users for h in placeholders(body_of(scan))[carries : carries + slices])


@dataclass(frozen=True)
class Fusible:
    """A step that a kernel can run: its source, and numbers that are its last invariants."""

    step: str
    numbers: tuple[float, ...]


def best(scan: Node) -> tuple[Sunk, Fusible] | Unsupported:
    """The scan with its producers in its steps, or without them if it has no kernel so."""
    if not cast(list[Node], scan.args[1]):
        return Unsupported("it carries nothing from step to step")
    for producers in (True, False):
        try:
            given = sunk(scan, producers)
            return given, fusible(given.body, given.values())
        except Unsupported as error:
            reason = error
    return reason


def fused(build: Builder, scan: Node, given: Sunk, kernel: Fusible) -> Sequence[Node]:
    """The kernel's results; masks among its arguments count as 0 and 1."""
    carries = cast(list[Node], scan.args[1])
    dtype = value(carries[0]).dtype
    slices, invariants = (
        [build.call(aten.to.dtype, n, dtype) if value(n).dtype is torch.bool else n for n in nodes]
        for nodes in given.read(build)
    )
    results = cast(tuple[Node, ...], output_node(given.body).args[0])
    invariants += [build.call(aten.full.default, [], number, dtype=dtype, device=CPU)
                   for number in kernel.numbers]
    stacked = {int(cast(int, r.args[1])): stacked_as(r)[1] for r in scan.users}
    axes = [stacked.get(k, 0) for k in range(len(carries), len(results))]
    made = build.several(torch.ops.looplift.fused_scan.default, kernel.step, list(carries), slices,
                         invariants, axes, False)
    made[len(carries) :] = [build.move(n, axis, 0)
                            for n, axis in zip(made[len(carries) :], axes, strict=True)]
    return [build.call(aten.ne.Scalar, n, 0) if value(result).dtype is torch.bool else n
            for n, result in zip(made, results, strict=True)]


def in_numbers(body: GraphModule, held: int) -> GraphModule:
    """The body with numbers, 0 and 1, in place of the masks among its arguments and outputs."""
    made = duplicate(body)
    first, *_ = heads = placeholders(made)
    end = output_node(made)
    for head in heads:
        if value(head).dtype is torch.bool:
            with made.graph.inserting_after(heads[-1]):
                mask = made.graph.call_function(aten.ne.Scalar, (head, 0))
            for user in [u for u in head.users if u is not mask]:
                user.replace_input_with(head, mask)
    results = list(cast(tuple[Node, ...], end.args[0]))
    were = cast(tuple[Node, ...], output_node(body).args[0])
    with made.graph.inserting_before(end):
        for k in range(held, len(results)):
            if value(were[k]).dtype is torch.bool:
                results[k] = made.graph.call_function(aten.type_as.default, (results[k], first))
    end.args = (tuple(results),)
    return made


def with_arguments(body: GraphModule) -> tuple[GraphModule, tuple[float, ...]]:
    """The body with its fractions as its last arguments, and those numbers: a step of 1 / T is
    then one kernel for all lengths."""
    made = duplicate(body)
    found: dict[float, Node] = {}
    for node in made.graph.nodes:
        for number in node.args if node.target in SCALED else ():
            if isinstance(number, float) and not number.is_integer():
                if number not in found:
                    heads = placeholders(made)
                    with made.graph.inserting_after(heads[-1]):
                        found[number] = made.graph.placeholder(f"number_{len(found)}")
                node.args = tuple(found[number] if a is number else a for a in node.args)
    return made, tuple(found)


def fusible(body: GraphModule, given: Sequence[Sequence[Tensor]]) -> Fusible:
    """The kernel that runs a step on the `given` carries, slices and invariants; raises
    `Unsupported` with a reason where there is none."""
    heads, held = placeholders(body), len(given[0])
    results = cast(tuple[Node, ...], output_node(body).args[0])
    for node in body.graph.nodes:
        if node.op == "call_function" and not isinstance(node.target, OpOverload) \
                and node.target is not operator.getitem:
            raise no_rule(node.target)
    tensors = [n for n in body.graph.nodes if is_tensor(n)]
    kinds = {(value(n).device.type, value(n).dtype) for n in tensors
             if value(n).dtype is not torch.bool or n in heads[:held] or n in results[:held]}
    if len(kinds) != 1 or not kinds <= KINDS:
        raise Unsupported("its values are not all of one floating dtype on the CPU")
    body, numbers = with_arguments(in_numbers(body, held))
    step, needs = sourced(body, "step")
    if needs:
        raise Unsupported("it reads a constant tensor")
    carries, slices, invariants = given
    scalars = [carries[0].new_empty(()) for _ in numbers]
    if not is_built(step, carries, slices, [*invariants, *scalars]):
        raise Unsupported("there is no C++ compiler that builds the kernel")
    return Fusible(step, numbers)
