"""A step's graph → C++ that walks all steps with the carries in registers or in the cache.

The axes that are free are taken apart: each task runs a block of elements along one of them, and
all steps. Either that block is what vectors hold (the lane), and inner axes are loops around
vectors; or vectors hold the last axis of each value, and the block's elements are rows, so that
a matrix is read once for several of them.

Values are computed in loops over their inner axes. Operations on values of one size share a loop
and pass their values on in registers; what another loop reads lies in a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor
from torch.fx import Node

from .axes import RESHAPES, SCATTERS, Axes, Part, reduced
from .kernel_loops import (
    COMBINED,
    TABLE,
    Loop,
    Member,
    Place,
    Product,
    Read,
    contiguous,
    transfer,
)
from .kernel_source import AXES, COMMON, ENTRIES, LANES, ROWS
from .pointwise import CPP, Unsupported, is_mask
from .step import Counts, Sizes, moving, remembered, traced
from .writer import View, Writer

MOST_BYTES = 1 << 21  # of buffers in one task: a core's cache
ON_STACK = 1 << 18  # bytes of them that lie on a thread's stack


@dataclass(frozen=True)
class Layout:
    """How an argument has to lie: the free parts of each axis, the sizes of the others."""

    free: tuple[tuple[Part, ...], ...]
    inner: Sizes  # 1 for axes that are free
    order: tuple[int, ...]  # all axes, the slowest first
    lane: bool


@dataclass(frozen=True)
class Kernel:
    """C++ for a step, and what its arguments have to look like.

    `free`: sizes of the parts that are taken apart; `lane`: the one that vectors hold;
    `layouts`: of carries, slices, invariants, final carries and outputs, without their steps;
    `overwrites`: the arguments that outputs, by their numbers there, are written over.
    """

    source: str
    free: dict[Part, int]
    lane: Part | None
    layouts: tuple[Layout, ...]
    overwrites: dict[int, int]


@remembered
def kernel(
    source: str, sizes: tuple[Sizes, ...], counts: Counts, lane_number: int | None,
    spent: frozenset[int] = frozenset(),
) -> Kernel:
    """The kernel of a step on arguments of `sizes`; raises `Unsupported` with a reason.

    `lane_number`: which free part vectors hold; `spent`: slices that outputs may be written over.
    """
    axes, _ = free_parts(source, sizes, counts[0])
    if len(axes.free) > AXES:
        raise Unsupported(f"its values have {len(axes.free)} axes")
    lane = None if lane_number is None else axes.free[lane_number]
    orders: dict[str, tuple[int, ...]] = {}
    while True:
        made = _Kernel(axes, counts, lane, dict(orders), spent)
        if made.orders == orders:
            return made.finished()
        orders = made.orders  # a matrix is to lie the other way round


def layout(
    axes: Axes, node: Node, lane: Part | None, order: Sequence[int] | None = None
) -> Layout:
    """How an argument or a result has to lie."""
    parts = [tuple(p for p in axis if p in axes.free) for axis in axes.of(node)]
    free = [a for a, p in enumerate(parts) if p and lane not in p]
    last = [a for a, p in enumerate(parts) if lane in p]
    bound = [a for a in (range(len(parts)) if order is None else order) if not parts[a]]
    return Layout(tuple(parts), axes.inner(node), (*free, *bound, *last), bool(last))


@remembered
def free_parts(source: str, sizes: tuple[Sizes, ...], carries: int) -> tuple[Axes, list[Node]]:
    """The axes of a step's values, and the nodes of its arguments and results."""
    axes = Axes(traced(source, sizes).graph, carries)
    return axes, [n for n in axes.graph.nodes if n.op == "placeholder"] + axes.results


class _Kernel(Writer):
    """What is known while a kernel is written."""

    language, reductions = CPP, COMBINED

    def __init__(
        self, axes: Axes, counts: Counts, lane: Part | None, orders: dict[str, tuple[int, ...]],
        spent: frozenset[int],
    ) -> None:
        self.spent = [f"p{counts[0] + k}" for k in sorted(spent)]
        super().__init__(axes)
        self.counts, self.lane, self.orders = counts, lane, orders
        self.places: dict[Node, Place] = {}
        self.tables: list[str] = []  # their C++
        self.groups: list[Loop | Product] = []
        self.made_in: dict[str, int] = {}  # buffer → its group, or the last of them
        self.indirect: set[str] = set()  # buffers that are complete only after their groups
        self.buffers: dict[str, Place] = {}
        self.names: dict[str, str] = {}  # of nodes in the kernel
        self.needed: set[str] = set()  # buffers that another loop reads
        self.last_reads: dict[str, int] = {}  # buffer → the first group that may change it
        for k, head in enumerate(self.heads):
            self._argument(k, head)
        self.write()
        self._results()

    # what each node becomes

    def _argument(self, k: int, head: Node) -> None:
        inner, lane = self.axes.inner(head), self._has_lane(head)
        held, read, _ = self.counts
        strides = contiguous(inner, self.orders.get(f"p{k}"))
        place = Place(f"p{k}", inner, strides, lane)
        if k < held or (lane and k >= held + read):
            place = self._buffer(head.name, inner, lane)
        self.places[head] = place

    def table(self, node: Node, held: Tensor) -> None:
        name, sizes = f"{TABLE}{len(self.tables)}", tuple(held.shape)
        items = ", ".join(CPP.number(x).removeprefix("V") for x in held.reshape(-1).tolist())
        self.tables.append(f"  const S {name}[] = {{{items}}};")
        self.places[node] = Place(name, sizes, contiguous(sizes), False, 0, held.numel(),
                                  is_mask(node))

    def same(self, node: Node, source: Node) -> None:
        self.places[node] = self.places[source]

    def pointwise(self, node: Node, sources: list[Node], text: Callable[[list[str]], str]) -> None:
        inner = self.axes.inner(node)
        reads = [self.places[n].along(inner) for n in sources]
        self.places[node] = self._buffer(node.name, inner, self._has_lane(node), is_mask(node))
        self._compute(node.name, reads, text)

    def view(self, node: Node, source: Node, view: View) -> None:
        place = self.places[source]
        try:
            self.places[node] = place.viewed(view)
        except RuntimeError:
            if node.target not in RESHAPES:
                raise
            self.places[node] = self._copied(node.name, place).viewed(view)  # in its own order
        if self.places[node].sizes != self.axes.inner(node):
            raise Unsupported(f"{node.target} mixes axes that are apart elsewhere")

    def reduction(self, node: Node, name: str) -> None:
        source = cast(Node, node.args[0])
        place, gone = self.places[source], reduced(node)
        kept = [1 if axis in gone else n for axis, n in enumerate(place.sizes)]
        into = self._buffer(node.name, tuple(kept), place.lane)
        self.indirect.add(into.buffer)
        self.needed.add(into.buffer)
        text = CPP.counted("{}") if is_mask(source) else "{}"
        member = Member([place.along(place.sizes)], lambda names: text.format(*names),
                        into.along(place.sizes), combine=name)
        self.made_in[into.buffer] = self._schedule(place.sizes, place.lane, member)
        self.places[node] = replace(into, sizes=self.axes.inner(node),
                                    strides=contiguous(self.axes.inner(node)))

    def product(self, node: Node) -> None:
        left, right = (self.places[cast(Node, n)] for n in node.args[:2])
        lane = left.lane or right.lane
        head = next((h for k, h in enumerate(self.heads) if f"p{k}" == right.buffer), None)
        shared = head is not None and not any(
            part in self.axes.free for axis in self.axes.of(head) for part in axis)
        if head is not None and self.lane is None:
            self._turn(right, self.places[head])
        made = self._buffer(node.name, self.axes.inner(node), lane)
        self.needed |= {made.buffer, left.buffer, right.buffer}
        self.indirect.add(made.buffer)
        for place in (left, right):
            self._noted(place, len(self.groups) + 1)
        self.groups.append(Product(made, left, right, lane, shared))
        self.made_in[made.buffer] = len(self.groups) - 1
        self.places[node] = made

    def _turn(self, right: Place, given: Place) -> None:
        """A matrix that is an argument is to lie row by row, as the product reads it."""
        stride = right.strides[-1]
        if stride > 1 and right.sizes[-1] > 1 and right.buffer not in self.orders \
                and stride in given.strides:
            last = given.strides.index(stride)
            self.orders[right.buffer] = (*(a for a in range(len(given.sizes)) if a != last), last)

    def assembled(self, node: Node, parts: list[tuple[Node, View]]) -> None:
        into = self._buffer(node.name, self.axes.inner(node), self._has_lane(node), is_mask(node))
        self.indirect.add(into.buffer)
        self.needed.add(into.buffer)
        last = -1
        for part, view in parts:
            place = into.viewed(view)
            member = self._moved(part, place.along(place.sizes))
            after = last + 1 if node.target in SCATTERS else 0  # what is written last, remains
            last = max(last, self._schedule(place.sizes, into.lane, member, after))
        self.made_in[into.buffer] = last
        self.places[node] = into

    def _moved(self, node: Node, into: Read) -> Member:
        """A member that writes a node's value `into` a place."""
        if node in self.constants:
            return Member([], lambda _: self.constants[node], into)
        read = self.places[node].along(into.place.sizes)
        return Member([read], lambda names: names[0], into)

    def _copied(self, name: str, place: Place) -> Place:
        """A place of its own, packed, for what lies elsewhere."""
        made = self._buffer(f"{name}_of", place.sizes, place.lane, place.mask)
        self._compute(f"{name}_of", [place.along(place.sizes)], lambda names: names[0])
        return made

    def _results(self) -> None:
        held = self.counts[0]
        outputs, nexts = self.axes.results[held:], self.axes.results[:held]
        first = len(self.heads) + held
        given = [k for k, node in enumerate(outputs) if self._is_argument(node)]
        for k in (*given, *(k for k in range(len(outputs)) if k not in given)):
            node = outputs[k]
            inner = self.axes.inner(node)
            into = Place(f"p{first + k}", inner, contiguous(inner), self._has_lane(node))
            last = max((self.last_reads.get(name, 0) for name in self.spent), default=0)
            self._schedule(inner, into.lane, self._moved(node, into.along(inner)),
                           0 if k in given else last)
        stores: list[Member] = []
        for k, (head, node) in enumerate(zip(self.heads, nexts, strict=False)):
            into = self.places[head]
            moved = self._moved(node, into.along(into.sizes))
            carries = {self.places[h].buffer for h in self.heads[:held]}
            if moved.reads and moved.reads[0].place.buffer in carries:
                if moved.reads[0].key == moved.into.key:
                    continue
                copied = self._copied(f"next_{k}", self.places[node])
                moved.reads = [copied.along(into.sizes)]
            stores.append(moved)
        for member in stores:
            into = member.into.place
            self._schedule(into.sizes, into.lane, member, self.last_reads.get(into.buffer, 0))

    def _is_argument(self, node: Node) -> bool:
        return node in self.places and not self.places[node].extent

    def _overwrites(self, layouts: Sequence[Layout]) -> dict[int, int]:
        """Which outputs lie like a slice that is spent."""
        found: dict[int, int] = {}
        first = len(self.heads) + self.counts[0]
        sizes = [n.meta["val"].shape for n in (*self.heads, *self.axes.results)]
        for name in self.spent:
            head = int(name[1:])
            for k in range(first, len(layouts)):
                same = (layouts[k], sizes[k]) == (layouts[head], sizes[head])
                if same and k not in found and not self._is_argument(self.axes.results[k - first
                                                                     + self.counts[0]]):
                    found[k] = head
                    break
        return found

    # loops

    def _buffer(self, name: str, sizes: Sizes, lane: bool, mask: bool = False) -> Place:
        self.names[name] = f"v{len(self.names)}"  # the same kernel, whatever its values are called
        place = Place(f"{self.names[name]}_", sizes, contiguous(sizes), lane, 0, math.prod(sizes),
                      mask)
        self.buffers[place.buffer] = place
        return place

    def _has_lane(self, node: Node) -> bool:
        return self.lane is not None and any(self.lane in axis for axis in self.axes.of(node))

    def _compute(self, name: str, reads: list[Read], text: Callable[[list[str]], str]) -> None:
        name = self.names[name]
        place = self.buffers[f"{name}_"]
        member = Member(reads, text, place.along(place.sizes), name)
        self.made_in[place.buffer] = self._schedule(place.sizes, place.lane, member)

    def _schedule(self, sizes: Sizes, lane: bool, member: Member, lowest: int = 0) -> int:
        """The loop that a member joins: the first of its size after what it reads is there."""
        loop = tuple(n for n in sizes if n > 1)
        direct = contiguous(loop)

        def passes(read: Read, number: int) -> bool:  # in a register
            group, buffer = self.groups[number], read.place.buffer
            return (group.sizes, group.lane) == (loop, lane) and buffer not in self.indirect \
                and (read.strides, read.place.offset) == (direct, 0)

        for read in member.reads:
            if read.place.buffer in self.made_in:
                number = self.made_in[read.place.buffer]
                lowest = max(lowest, number if passes(read, number) else number + 1)
        chosen, group = next(
            ((g, group) for g, group in enumerate(self.groups) if g >= lowest
             and isinstance(group, Loop) and (group.sizes, group.lane) == (loop, lane)),
            (len(self.groups), Loop(loop, lane)))
        if chosen == len(self.groups):
            self.groups.append(group)
        for read in member.reads:
            if self.made_in.get(read.place.buffer) != chosen:
                self.needed.add(read.place.buffer)
            whole = (read.strides, read.place.offset) == (direct, 0)
            self._noted(read.place, chosen if whole else chosen + 1)
        group.members.append(member)
        return chosen

    def _noted(self, place: Place, number: int) -> None:
        before = self.last_reads.get(place.buffer, 0)
        self.last_reads[place.buffer] = max(before, number)

    # C++

    def finished(self) -> Kernel:
        nodes = [*self.heads, *self.axes.results]
        layouts = tuple(layout(self.axes, node, self.lane, self.orders.get(f"p{k}"))
                        for k, node in enumerate(nodes))
        expected = self.axes.sizes[self.lane] if self.lane is not None else 1
        if self.lane is None or all(math.prod(x.inner) == 1 for x in layouts):
            expected = math.prod(self.axes.sizes[p] for p in self.axes.free)
        local = [p for name, p in self.buffers.items()
                 if name in self.needed or name in {self.places[h].buffer for h in self.heads}]
        told = 1 << min(max(expected, 1).bit_length() - 1, 6)  # what a block's size is chosen by
        rows = 1 if self.lane is not None or expected < 4 else 2 if expected < 8 else 4
        lanes = min(max(8 * told, 64), 256)  # bytes of up to 4 vectors, no more than `told` fills
        room = sum(p.extent * (lanes if p.lane else 8 * rows) for p in local)
        if room > MOST_BYTES:
            raise Unsupported(f"its values need {room >> 10} KiB of a core's cache")
        source = COMMON + self._walk(local, layouts, room <= ON_STACK)
        source += f"constexpr int64_t COUNT = {len(nodes)}, EXPECTED = {told};\n"
        source += (ROWS if self.lane is None else LANES) + ENTRIES
        return Kernel(source, {p: self.axes.sizes[p] for p in self.axes.free}, self.lane, layouts,
                      self._overwrites(layouts))

    def _walk(self, local: list[Place], layouts: Sequence[Layout], on_stack: bool) -> str:
        held, read, fixed = self.counts
        given, count = held + read + fixed, len(layouts)
        moves = moving(self.counts, count)
        stored = [h for k, h in enumerate(self.heads)
                  if k < held or (k >= held + read and layouts[k].lane)]
        lines: list[str] = []
        if self.lane is None:
            lines += ["template <typename S, int R>",
                      "void walk(const Argument<S>* a, const int64_t* at, int64_t steps) {"]
            rest = ""
        else:
            lines += ["template <typename S, int N, bool whole>",
                      "void walk(const Argument<S>* a, const int64_t* at, int64_t steps, "
                      "int64_t lane, int64_t n) {", "  constexpr int R = 1;"]
            rest = " + lane * a[{0}].strides[AXES - 1]"
        lines += ["  using V = Vectorized<S>;", "  constexpr int64_t W = V::size();"]
        for k in range(count):
            lines += [f"  S* p{k} = a[{k}].data + at[{k}]{rest.format(k)};",
                      f"  const int64_t m{k} = a[{k}].pitch, q{k} = a[{k}].strides[AXES - 1];"]
        lines += [f"  const int64_t d{k} = a[{k}].step;" for k in moves] + self.tables
        for place in local:
            kind, size = ("V", "N") if place.lane else ("S", "R")
            size, name = f"{place.extent} * {size}", place.buffer
            lines += [f"  alignas(64) {kind} {name}[{size}];"] if on_stack else [
                f"  const std::unique_ptr<{kind}[]> {name}_room(new {kind}[{size}]);",
                f"  {kind}* const {name} = {name}_room.get();"]
        for head in stored:
            lines += transfer(self.places[head], self.heads.index(head), False)
        lines += ["  for (int64_t t = 0; t < steps; ++t) {"]
        for group in self.groups:
            lines += ["    " + line for line in group.lines(self.needed)]
        lines += [f"    p{k} += d{k};" for k in moves] + ["  }"]
        for k, head in enumerate(self.heads[:held]):
            lines += transfer(self.places[head], given + k, True)
        return "\n".join([*lines, "}", ""])
