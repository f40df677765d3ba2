"""A kernel whose backward computes its carries once more → one that stores them.

Before:
    looplift.fused_scan(step, …)   # its backward walks forward again, for carries it needs
After:
    looplift.fused_scan(the same, which also returns each such carry of each step, …)
Wins:
    In training, where computing a carry costs more than writing it to memory and reading it: by
    a matrix product (LSTM cells) or functions such as tanh, in loops of which the end alone is
    used. In inference, and where the backward finds what it reads among the outputs, there is
    nothing to store.
Sound if:
    always: the other results are as they were, and nobody but the backward reads the new ones.
Skips:
    steps of few operations for each number that they carry.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tag
from torch._ops import OpOverload
from torch.fx import Node

from ..optimizer.axes import PERMUTES, PRODUCTS, RESHAPES
from ..optimizer.backward import backward_of
from ..optimizer.builder import Builder
from ..optimizer.distribute import replacing
from ..optimizer.facts import Facts, aten, behind, is_kernel, is_tensor, shape, source_line
from ..optimizer.packing import of_call
from ..optimizer.pointwise import SAME
from ..optimizer.rewrite import Rewrite, Skip
from ..optimizer.step import Sizes, step_function, traced
from ..optimizer.walk import shown

ENOUGH = 8  # operations for each carried number: from about as many on, storing is faster
FUNCTION = 10  # operations that a function such as exp or tanh counts for
SIMPLE = {aten.add, aten.sub, aten.mul, aten.rsub, aten.neg, aten.where, aten.abs, aten.maximum,
          aten.minimum, aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne}
FREE = RESHAPES | PERMUTES | SAME | {aten.select.int, aten.slice.Tensor, aten.expand.default}


@dataclass(frozen=True)
class StoreCarries:
    """Store the carries that a kernel's backward reads; see the module's docstring."""

    name: ClassVar[str] = "store-carries"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for node in filter(is_kernel, facts.operations if facts.training else ()):
            step, sizes, counts = of_call(node)
            back = backward_of(step, sizes, counts, (True,) * len(sizes))
            hidden = [k for k in range(counts[0]) if k not in shown(step, sizes, counts[0])]
            read = [k for k in hidden if k in back.histories]
            if not read:
                continue
            if (count := work(step, sizes, hidden)) < ENOUGH:
                reason = f"{count:.0f} operations for each number that is carried: computing " \
                    "them again costs less than storing them"
                yield Skip(self.name, reason, source_line(node))
                continue
            yield stored(self.name, node, read)


def stored(pass_name: str, kernel: Node, read: Sequence[int]) -> Rewrite:
    """The kernel as one that also returns each of the carries that the backward reads."""
    step, carries, slices, invariants, axes, reverse = cast(Any, kernel.args)

    def make(build: Builder) -> list[Node]:
        return build.several(kernel.target, storing(step, read), carries, slices, invariants,
                             [*axes, *[0] * len(read)], reverse)

    summary = f"{len(read)} of {len(carries)} carries are stored for the backward"
    return replacing(pass_name, summary, kernel, make)


def work(step: str, sizes: tuple[Sizes, ...], carries: Sequence[int]) -> float:
    """About how many operations some of a step's next carries take, for each number of them."""
    results: Any = traced(step, sizes).graph.output_node().args[0]
    nexts = [results[k] for k in carries]
    return sum(map(operations, behind(nexts))) / max(sum(math.prod(shape(n)) for n in nexts), 1)


def operations(node: Node) -> int:
    """About how many operations on numbers a node of a step is."""
    if not isinstance(node.target, OpOverload) or node.target in FREE or not is_tensor(node):
        return 0
    count = math.prod(shape(node))
    if node.target in PRODUCTS:
        return count * shape(node.all_input_nodes[0])[-1]
    is_function = Tag.pointwise in node.target.tags \
        and node.target.overloadpacket not in SIMPLE
    return count * (FUNCTION if is_function else 1)


def storing(step: str, read: Sequence[int]) -> str:
    """The step that also returns some of its carries, by their numbers, as it found them.

    >>> print(storing("def step(h, x):\\n    h_1 = h * x\\n    return [h_1]", [0]))
    def step(h, x):
        h_1 = h * x
        return [h_1, h]
    """
    names = list(inspect.signature(step_function(step)).parameters)
    before, end, after = step.rpartition("]")
    return "".join([before, *(f", {names[k]}" for k in read), end, after])
