"""Which axes of a step's values are independent: no operation mixes what lies along them.

Every axis of every value is a product of parts; operations say which parts are the same. A view
that joins or divides axes divides the parts. What is reduced, contracted, cut or joined is
bound; the other parts are free, and a kernel may treat their elements one by one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

from torch import Tag, Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from .facts import aten, shape
from .pointwise import SAME, no_rule

Part = int
Axis = tuple[Part, ...]  # the slowest part first; () where the size is 1

REDUCTIONS = {aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default,
              aten.amax.default, aten.amin.default}
PRODUCTS = {aten.mm.default, aten.bmm.default}
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default,
            aten._reshape_alias.default, aten.squeeze.dim, aten.squeeze.dims,
            aten.squeeze.default, aten.unsqueeze.default}
PERMUTES = {aten.permute.default, aten.transpose.int, aten.t.default}
CUTS = {aten.slice.Tensor, aten.select.int, aten.cat.default, aten.split_with_sizes.default,
        aten.split.Tensor, aten.unbind.int}
SCATTERS = {aten.slice_scatter.default, aten.select_scatter.default}
MADE = {aten.full.default, aten.zeros.default, aten.ones.default, aten.scalar_tensor.default,
        aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
LIKE = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
PLAIN = SAME | LIKE | {aten.expand.default}


def reduced(node: Node) -> list[int]:
    """The axes that a reduction reduces, counted from the front."""
    source = node.args[0]
    rank = len(shape(source)) if isinstance(source, Node) else 0
    given: Any = node.args[1] if len(node.args) > 1 else None
    axes = range(rank) if given is None or given == [] else \
        [given] if isinstance(given, int) else given
    return sorted(axis % rank for axis in axes) if rank else []


def permutation(node: Node) -> list[int]:
    """Which axis of its source each axis of a permuted value is."""
    rank, args = len(shape(node)), cast(tuple[Any, ...], node.args)
    if node.target is aten.permute.default:
        return [axis % rank for axis in args[1]]
    order = list(range(rank))
    one, two = (0, rank - 1) if node.target is aten.t.default else args[1:3]
    order[one], order[two] = order[two], order[one]
    return order


class Axes:
    """The parts of all axes of a step's graph, and which of them are free."""

    def __init__(self, graph: Graph, carries: int) -> None:
        self.graph = graph  # the one whose nodes these are: a step that is traced again has others
        self.sizes: list[int] = []
        self._became: dict[Part, Axis] = {}
        self._bound: set[Part] = set()
        self._of: dict[Node, list[Axis]] = {}
        nodes = list(graph.nodes)
        heads = [n for n in nodes if n.op == "placeholder"]
        self.results: list[Node] = list(nodes[-1].args[0])
        for node in nodes:
            if isinstance(node.meta.get("val"), Tensor):
                self._of[node] = self._axes(node)
        for head, result in zip(heads[:carries], self.results, strict=False):
            self._same(self._of[head], self._of[result])
        given = [*heads, *self.results]
        self.free: tuple[Part, ...] = ()
        while True:
            before = len(self._bound)
            self._bind_what_is_mixed(given)
            found = self._in_all_results()
            self._bind([(p,) for node in self._of for axis in self.of(node) for p in axis
                        if p not in found])
            self.free = tuple(p for p in found if p not in self._bound)
            if len(self._bound) == before:
                return

    def _in_all_results(self) -> list[Part]:
        first, *rest = ([p for axis in self.of(r) for p in axis] for r in self.results)
        return [p for p in first if all(p in other for other in rest)]

    def _bind_what_is_mixed(self, given: Sequence[Node]) -> None:
        for node in self._of:
            flat = [part for axis in self.of(node) for part in axis]
            # the same part twice: a diagonal, or an outer product of a value with itself
            self._bind([(part,) for part in flat if flat.count(part) > 1])
            for axis in self.of(node):
                kinds = [part in self._bound for part in axis]
                changes = sum(a != b for a, b in pairwise(kinds))
                if changes > (0 if node in given else 1):  # else one stride leads along each kind
                    self._bind([axis])

    def of(self, node: Node) -> list[Axis]:
        """The parts of each of a value's axes."""
        return [self._roots(axis) for axis in self._of[node]]

    def inner(self, node: Node) -> tuple[int, ...]:
        """The sizes of a value for one element along each of the free axes."""
        return tuple(math.prod(self.sizes[p] for p in axis if p not in self.free)
                     for axis in self.of(node))

    def _axes(self, node: Node) -> list[Axis]:
        sizes, target = shape(node), node.target
        if target is operator.getitem:
            return self._cut(node, sizes)
        sources = [n for n in node.all_input_nodes if n in self._of]
        if node.op == "get_attr":  # a table has its own number for each element
            made = [self._new(size) for size in sizes]
            self._bind(made)
            return made
        if node.op != "call_function" or not sources or target in MADE:
            return [self._new(size) for size in sizes]
        first = self._of[sources[0]]
        if target in RESHAPES:
            return self._regrouped(first, sizes)
        if target in PERMUTES:
            return [first[axis] for axis in permutation(node)]
        if target in REDUCTIONS:
            gone = reduced(node)
            self._bind([first[axis] for axis in gone])
            kept = [axis for place, axis in enumerate(first) if place not in gone]
            return self._regrouped(kept, sizes)
        if target in PRODUCTS:
            left, right = first, self._of[node.args[1]]  # type: ignore[index]
            self._same(left[-1:], right[-2:-1])
            self._same(left[:-2], right[:-2])
            self._bind(left[-1:])
            return [*left[:-1], right[-1]]
        if target in SCATTERS:
            return self._scattered(node)
        if target in CUTS:
            return self._cut(node, sizes)
        if not isinstance(target, OpOverload) or not (
            target in PLAIN or Tag.pointwise in target.tags
        ):
            raise no_rule(target)
        made = [()] * len(sizes)
        for source in sources:  # pointwise: sizes are aligned at the end, ones are broadcast
            axes = self._of[source]
            for place in range(1, len(axes) + 1):
                if sizes[-place] > 1 and shape(source)[-place] > 1:
                    if made[-place]:
                        self._same([made[-place]], [axes[-place]])
                    else:
                        made[-place] = axes[-place]
        return [axis if axis else self._new(size) for axis, size in zip(made, sizes, strict=True)]

    def _cut(self, node: Node, sizes: Sequence[int]) -> list[Axis]:
        """Reads and joins of parts of an axis: that axis is bound, the others stay."""
        given: Any = node.args[0]
        whole = node
        if node.target is operator.getitem:
            whole = given
            if whole.target not in CUTS:
                return [self._new(size) for size in sizes]
            sources = [whole.args[0]]
        else:
            sources = list(given) if isinstance(given, (list, tuple)) else [given]
        sources = [s for s in sources if math.prod(shape(s))] or sources[:1]
        rank = len(shape(sources[0]))
        axis: Any = whole.args[1] if len(whole.args) > 1 else 0
        if whole.target in (aten.split_with_sizes.default, aten.split.Tensor):
            axis = whole.args[2] if len(whole.args) > 2 else 0
        cut = [a % rank for a in (axis if isinstance(axis, (list, tuple)) else [axis])]
        all_axes = [self._of[s] for s in sources]
        for axes in all_axes:
            self._bind([axes[a] for a in cut])
            self._same([x for a, x in enumerate(axes) if a not in cut],
                       [x for a, x in enumerate(all_axes[0]) if a not in cut])
        kept: list[Axis | None] = [None if a in cut else x for a, x in enumerate(all_axes[0])]
        if len(sizes) < rank:
            kept = [x for x in kept if x is not None]
        made = [self._new(size) if x is None else x for x, size in zip(kept, sizes, strict=True)]
        if len(sizes) == rank:
            self._bind([made[a] for a in cut])
        return made

    def _scattered(self, node: Node) -> list[Axis]:
        """A write to part of an axis: that axis is bound."""
        base, part, *rest = node.args
        into, source = list(self._of[base]), self._of[part]  # type: ignore[index]
        axis = cast(int, rest[0] if rest else 0) % len(into)
        written = source[:axis] + source[axis + (node.target is aten.slice_scatter.default) :]
        self._same([x for a, x in enumerate(into) if a != axis], written)
        self._bind([into[axis], *(source[axis : axis + 1] if len(source) == len(into) else [])])
        into[axis] = self._new(shape(node)[axis])
        self._bind([into[axis]])
        return into

    def _new(self, size: int) -> Axis:
        if size == 1:
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)

    def _roots(self, axis: Axis) -> Axis:
        return tuple(root for part in axis for root in
                     (self._roots(self._became[part]) if part in self._became else (part,)))

    def _bind(self, axes: Sequence[Axis]) -> None:
        for axis in axes:
            self._bound |= set(self._roots(axis))

    def _become(self, part: Part, axis: Axis) -> None:
        self._became[part] = axis
        if part in self._bound:
            self._bind([axis])

    def _divide(self, part: Part, low: int) -> tuple[Part, Part]:
        """Two parts for one, the faster of size `low`."""
        [high], [rest] = self._new(self.sizes[part] // low), self._new(low)
        self._become(part, (high, rest))
        return high, rest

    def _same(self, some: Sequence[Axis], others: Sequence[Axis]) -> None:
        for one, other in zip(some, others, strict=True):
            left, right = list(one), list(other)
            while left and right:
                left, right = list(self._roots(tuple(left))), list(self._roots(tuple(right)))
                a, b = left.pop(), right.pop()
                if self.sizes[a] < self.sizes[b]:
                    (left, a), (right, b) = (right, b), (left, a)
                if self.sizes[a] % self.sizes[b]:
                    self._bind([(*left, a), (*right, b)])
                    break
                if self.sizes[a] > self.sizes[b]:
                    high, a = self._divide(a, self.sizes[b])
                    left.append(high)
                if a != b:
                    self._become(b, (a,))

    def _regrouped(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
        """The parts of a view of other sizes."""
        flat = [part for axis in axes for part in self._roots(axis)]
        made: list[Axis] = []
        for size in reversed(sizes):
            taken: list[Part] = []
            while size > 1:
                part = flat.pop()
                if size % self.sizes[part] == 0:
                    size //= self.sizes[part]
                elif self.sizes[part] % size == 0:
                    high, part = self._divide(part, size)
                    flat.append(high)
                    size = 1
                else:  # it cuts across the axes
                    self._bind(axes)
                    made = [self._new(n) for n in sizes]
                    self._bind(made)
                    return made
                taken.insert(0, part)
            made.insert(0, tuple(taken))
        return made
