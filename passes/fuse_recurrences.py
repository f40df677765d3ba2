"""A recurrence of pointwise operations → one kernel that walks all its steps.

Before:
    scan(step, carries, slices, invariants)
After:
    looplift.fused_scan(step's source, carries, slices, invariants)
Wins:
    Each tensor is read and written once, with the carries in registers; a loop in Python runs
    every operation of every step, and so does its backward.
Sound if:
    every operation is pointwise, on one floating dtype. The kernel computes the very operations
    of the step, with the vector functions that eager operations use; its backward is the
    differentiated step, walked from the last to the first on carries that are computed again.
Skips:
    steps with a product, a reduction or a view; several dtypes or sizes; loops of few steps,
    which a kernel is not worth building for; other devices than the CPU; no compiler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tag
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ..optimizer.builder import Builder, duplicate, output_node, placeholders
from ..optimizer.distribute import replacing
from ..optimizer.emit import sourced
from ..optimizer.facts import Facts, aten, body_of, is_scan, is_tensor, source_line, trips, value
from ..optimizer.fused import KINDS, is_built
from ..optimizer.pointwise import Unsupported
from ..optimizer.rewrite import Rewrite, Skip

CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.other,
         aten.type_as.default)
FEW = 32  # steps: a kernel takes seconds to build


@dataclass(frozen=True)
class FuseRecurrences:
    """Run a recurrence of pointwise operations as one kernel; see the module's docstring."""

    name: ClassVar[str] = "fuse-recurrences"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for scan in facts.operations:
            if not is_scan(scan) or trips(scan) < FEW:
                continue
            try:
                step = fusible(scan)
            except Unsupported as reason:
                yield Skip(self.name, str(reason), source_line(scan))
                continue

            def make(build: Builder, scan: Node = scan, step: str = step) -> Sequence[Node]:
                return fused(build, scan, step)

            yield replacing(self.name, f"scan of {trips(scan)} steps → one kernel", scan, make)


def fused(build: Builder, scan: Node, step: str) -> Sequence[Node]:
    """The kernel's results; masks among its arguments count as 0 and 1."""
    carries, *given = (cast(list[Node], scan.args[k]) for k in (1, 2, 3))
    dtype = value(carries[0]).dtype
    slices, invariants = (
        [build.call(aten.to.dtype, n, dtype) if value(n).dtype is torch.bool else n for n in nodes]
        for nodes in given
    )
    results = cast(tuple[Node, ...], output_node(body_of(scan)).args[0])
    made = build.several(torch.ops.looplift.fused_scan.default, step, list(carries), slices,
                         invariants, len(results) - len(carries), False)
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


def fusible(scan: Node) -> str:
    """The source of a scan's step, if one kernel can run it; raises `Unsupported` with a reason."""
    body, (held, read, fixed) = body_of(scan), (len(cast(list[Node], scan.args[k]))
                                                for k in (1, 2, 3))
    heads = placeholders(body)
    if not held:
        raise Unsupported("it carries nothing from step to step")
    lanes = value(heads[0]).shape
    results = cast(tuple[Node, ...], output_node(body).args[0])
    for node in body.graph.nodes:
        if node.op == "call_function" and not _is_pointwise(node):
            name = getattr(node.target, "__name__", node.target)
            raise Unsupported(f"the loop computes {name}, which is not pointwise")
    tensors = [n for n in body.graph.nodes if is_tensor(n)]
    if any(value(n).shape != lanes for n in (*heads[:held], *results)) or not all(
        _broadcasts(value(n).shape, lanes) for n in tensors
    ):
        raise Unsupported("its values have several sizes")
    kinds = {(value(n).device.type, value(n).dtype) for n in tensors
             if value(n).dtype is not torch.bool or n in heads[:held] or n in results[:held]}
    if kinds not in KINDS:
        raise Unsupported("its values are not all of one floating dtype on the CPU")
    step, needs = sourced(in_numbers(body, held), "step")
    if needs:
        raise Unsupported("it reads a constant tensor")
    if not is_built(step, held, read, fixed, len(results) - held):
        raise Unsupported("there is no C++ compiler that builds the kernel")
    return step


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and (
        Tag.pointwise in node.target.tags or node.target in CASTS)


def _broadcasts(shape: Sequence[int], lanes: Sequence[int]) -> bool:
    """Whether `shape` is `lanes` with some axes of one, or without the first ones."""
    return len(shape) <= len(lanes) and all(
        n in (1, size) for n, size in zip(reversed(shape), reversed(lanes), strict=False))
