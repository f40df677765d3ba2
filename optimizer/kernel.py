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
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .axes import PERMUTES, PRODUCTS, REDUCTIONS, RESHAPES, SCATTERS, Axes, Part, reduced
from .facts import aten
from .kernel_source import AXES, COMMON, ENTRIES, LANES, ROWS
from .pointwise import SAME, Unsupported, constant, expression, is_mask, number
from .step import Sizes, traced

MOST_BYTES = 1 << 18  # of buffers in one task
COMBINED = {"sum": ("V(S(0))", "{0} + {1}"),
            "amax": ("V(-std::numeric_limits<S>::infinity())", "at::vec::maximum({0}, {1})"),
            "amin": ("V(std::numeric_limits<S>::infinity())", "at::vec::minimum({0}, {1})")}


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


@dataclass(frozen=True)
class Place:
    """Where a value's elements lie: [i, j] at offset + i · strides[0] + j · strides[1]."""

    buffer: str
    sizes: Sizes
    strides: Sizes
    lane: bool
    offset: int = 0
    extent: int = 0  # elements of a buffer of the kernel's own; 0: an argument's memory
    mask: bool = False  # whether its numbers, 0 and 1, are one

    def viewed(self, view: Callable[[Tensor], Tensor]) -> Place:
        """The place of a view; `view` makes it of a tensor that lies so."""
        made = view(torch.empty_strided(self.sizes, self.strides, device="meta"))
        return replace(self, sizes=tuple(made.shape), strides=tuple(made.stride()),
                       offset=self.offset + int(made.storage_offset()))


@dataclass(frozen=True)
class Read:
    """A place, and its strides along the axes of the loop that reads it."""

    place: Place
    strides: Sizes

    @property
    def key(self) -> tuple[str, Sizes, int]:
        return self.place.buffer, self.strides, self.place.offset


@dataclass
class Member:
    """One operation of a loop: `text` on registers, kept as `name`, or written `into` a place."""

    reads: list[Read]
    text: Callable[[list[str]], str]
    name: str = ""
    into: Read | None = None
    combine: str = ""  # of a reduction into `into`


@dataclass
class Group:
    """Operations in one loop over `sizes`, or one product."""

    sizes: Sizes
    lane: bool
    members: list[Member] = field(default_factory=list)
    product: list[Place] = field(default_factory=list)  # result, left, right


def contiguous(sizes: Sequence[int], order: Sequence[int] | None = None) -> Sizes:
    """Strides of packed elements; `order`: the axes, the slowest first."""
    strides, step = [0] * len(sizes), 1
    for axis in reversed(order if order is not None else range(len(sizes))):
        strides[axis], step = step, step * sizes[axis]
    return tuple(strides)


@lru_cache(maxsize=512)
def kernel(
    source: str, sizes: tuple[Sizes, ...], counts: tuple[int, int, int],
    lane_number: int | None, spent: frozenset[int] = frozenset(),
) -> Kernel:
    """The kernel of a step on arguments of `sizes`; raises `Unsupported` with a reason.

    `counts`: carries, slices and invariants. `lane_number`: which free part vectors hold.
    `spent`: slices that outputs may be written over.
    """
    graph = traced(source, sizes).graph
    axes = Axes(graph, counts[0])
    if len(axes.free) > AXES:
        raise Unsupported(f"its values have {len(axes.free)} axes")
    lane = None if lane_number is None else axes.free[lane_number]
    orders: dict[str, tuple[int, ...]] = {}
    while True:
        made = _Kernel(graph, axes, counts, lane, dict(orders), spent)
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


@lru_cache(maxsize=512)
def free_parts(source: str, sizes: tuple[Sizes, ...], carries: int) -> tuple[Axes, list[Node]]:
    """The axes of a step's values, and the nodes of its arguments and results."""
    graph = traced(source, sizes).graph
    axes = Axes(graph, carries)
    return axes, [n for n in graph.nodes if n.op == "placeholder"] + axes.results


class _Kernel:
    """What is known while a kernel is written."""

    def __init__(
        self, graph: torch.fx.Graph, axes: Axes, counts: tuple[int, int, int], lane: Part | None,
        orders: dict[str, tuple[int, ...]], spent: frozenset[int],
    ) -> None:
        self.spent = [f"p{counts[0] + k}" for k in sorted(spent)]
        self.axes, self.counts, self.lane, self.orders = axes, counts, lane, orders
        self.places: dict[Node, Place] = {}
        self.constants: dict[Node, str] = {}
        self.groups: list[Group] = []
        self.made_in: dict[str, int] = {}  # buffer → its group, or the last of them
        self.indirect: set[str] = set()  # buffers that are complete only after their groups
        self.buffers: dict[str, Place] = {}
        self.names: dict[str, str] = {}  # of nodes in the kernel
        self.needed: set[str] = set()  # buffers that another loop reads
        self.last_reads: dict[str, int] = {}  # buffer → the first group that may change it
        self.heads = [n for n in graph.nodes if n.op == "placeholder"]
        for k, head in enumerate(self.heads):
            self._argument(k, head)
        for node in graph.nodes:
            if node.op == "call_function":
                self._operation(node)
            elif node.op == "get_attr":
                held = getattr(graph.owning_module, str(node.target))
                if not isinstance(held, Tensor) or held.numel() != 1:
                    raise Unsupported("it reads a constant tensor")
                self.constants[node] = number(held.item())
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

    def _operation(self, node: Node) -> None:
        target: Any = node.target
        fill = constant(node)
        if fill is not None:
            self.constants[node] = fill
            return
        sources = [n for n in node.all_input_nodes if n not in self.constants]
        if isinstance(node.meta.get("val"), Tensor):
            counts = target is aten.sum.dim_IntList and is_mask(node.args[0])
            if node.meta["val"].dtype not in (torch.float32, torch.bool) and not counts:
                raise Unsupported(f"the loop computes {node.meta['val'].dtype} numbers")
            if not sources:
                self.constants[node] = expression(node, self.constants.__getitem__)
                return
        if target in PRODUCTS:
            self._product(node)
        elif target in REDUCTIONS:
            self._reduction(node)
        elif target is aten.cat.default:
            self._cat(node)
        elif target in SCATTERS:
            self._scatter(node)
        elif target in (aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int):
            return  # its items are the views
        elif not isinstance(node.meta.get("val"), Tensor):
            name = getattr(target, "_opname", target)
            raise Unsupported(f"the loop computes {name}, which the kernel has no rule for")
        elif self._is_view(node):
            self._view(node)
        elif target in SAME and is_mask(node) == is_mask(node.args[0]):
            self.places[node] = self.places[cast(Node, node.args[0])]
        else:
            inner = self.axes.inner(node)
            reads = [(n, self._aligned(self.places[n], inner)) for n in sources]

            def text(names: list[str], node: Node = node) -> str:
                known = dict(zip(sources, names, strict=True))
                return expression(node, lambda n: known.get(n) or self.constants[n])

            text(["x"] * len(sources))  # says now what it has no rule for
            self.places[node] = self._buffer(node.name, inner, self._has_lane(node), is_mask(node))
            self._compute(node.name, [r for _, r in reads], text)

    def _is_view(self, node: Node) -> bool:
        return node.target in RESHAPES or node.target in PERMUTES or node.target in (
            aten.slice.Tensor, aten.select.int, aten.expand.default, operator.getitem)

    def _view(self, node: Node) -> None:
        target: Any = node.target
        source, *args = cast(tuple[Any, ...], node.args)
        sizes = self.axes.inner(node)
        if target is operator.getitem:
            whole, item = source, args[0]
            source = whole.args[0]
        if source in self.constants:
            self.constants[node] = self.constants[source]
            return
        place = self.places[source]
        if target is operator.getitem:
            self.places[node] = place.viewed(lambda x: whole.target(x, *whole.args[1:])[item])
        elif target is aten.expand.default:
            self.places[node] = place.viewed(lambda x: x.expand(sizes))
        elif target in RESHAPES:
            try:
                self.places[node] = place.viewed(lambda x: x.view(sizes))
            except RuntimeError:  # its elements lie in another order
                copied = self._copied(node.name, place)
                self.places[node] = copied.viewed(lambda x: x.view(sizes))
        else:
            self.places[node] = place.viewed(lambda x: target(x, *args))
        if self.places[node].sizes != sizes:
            raise Unsupported(f"{target} mixes axes that are apart elsewhere")

    def _reduction(self, node: Node) -> None:
        name = cast(Any, node.target)._schema.name.removeprefix("aten::")
        source = cast(Node, node.args[0])
        if name not in COMBINED or source in self.constants \
                or (is_mask(source) and name != "sum"):
            raise Unsupported(f"the loop computes {name}, which the kernel has no rule for")
        place, gone = self.places[source], reduced(node)
        kept = [1 if axis in gone else n for axis, n in enumerate(place.sizes)]
        into = self._buffer(node.name, tuple(kept), place.lane)
        self.indirect.add(into.buffer)
        self.needed.add(into.buffer)
        text = "V::blendv(V(S(0)), V(S(1)), {})" if is_mask(source) else "{}"
        member = Member([self._aligned(place, place.sizes)], lambda names: text.format(*names),
                        into=self._aligned(into, place.sizes), combine=name)
        self.made_in[into.buffer] = self._schedule(place.sizes, place.lane, member)
        self.places[node] = replace(into, sizes=self.axes.inner(node),
                                    strides=contiguous(self.axes.inner(node)))

    def _product(self, node: Node) -> None:
        left, right = (self._solid(cast(Node, n)) for n in node.args[:2])
        head = next((k for k in range(len(self.heads)) if f"p{k}" == right.buffer), None)
        if head is not None and not right.lane and self.lane is None \
                and right.strides[-1] != 1 and right.sizes[-1] > 1 and right.strides[-1] > 0:
            given = self.places[self.heads[head]]
            if right.buffer not in self.orders and right.strides[-1] in given.strides:
                last = given.strides.index(right.strides[-1])
                rest = [a for a in range(len(given.sizes)) if a != last]
                self.orders[right.buffer] = (*rest, last)
        lane = left.lane or right.lane
        made = self._buffer(node.name, self.axes.inner(node), lane)
        self.needed |= {made.buffer, left.buffer, right.buffer}
        self.indirect.add(made.buffer)
        for place in (left, right):
            self._noted(place, len(self.groups) + 1)
        self.groups.append(Group(made.sizes, lane, product=[made, left, right]))
        self.made_in[made.buffer] = len(self.groups) - 1
        self.places[node] = made

    def _solid(self, node: Node) -> Place:
        if node in self.constants:
            raise Unsupported("it multiplies a matrix of one constant")
        return self.places[node]

    def _cat(self, node: Node) -> None:
        parts = [n for n in cast(list[Node], node.args[0]) if n.meta["val"].numel()]
        axis = cast(int, node.args[1]) if len(node.args) > 1 else 0
        stops = list(accumulate(self.axes.inner(part)[axis] for part in parts))
        self._assembled(node, [
            (part, lambda x, stop=stop, part=part: x.narrow(
                axis, stop - self.axes.inner(part)[axis], self.axes.inner(part)[axis]))
            for part, stop in zip(parts, stops, strict=True)])

    def _scatter(self, node: Node) -> None:
        base, part, *where = cast(tuple[Any, ...], node.args)
        read = aten.slice.Tensor if node.target is aten.slice_scatter.default else aten.select.int
        self._assembled(node, [(base, lambda x: x), (part, lambda x: read(x, *where))])

    def _assembled(self, node: Node, parts: Sequence[tuple[Node, Any]]) -> None:
        """A buffer that several values are written to, one after the other."""
        into = self._buffer(node.name, self.axes.inner(node), self._has_lane(node), is_mask(node))
        self.indirect.add(into.buffer)
        self.needed.add(into.buffer)
        last = -1
        for part, view in parts:
            if not part.meta["val"].numel():
                continue
            place = into.viewed(view)
            member = self._moved(part, self._aligned(place, place.sizes))
            after = last + 1 if node.target in SCATTERS else 0  # what is written last, remains
            last = max(last, self._schedule(place.sizes, into.lane, member, after))
        self.made_in[into.buffer] = last
        self.places[node] = into

    def _moved(self, node: Node, into: Read) -> Member:
        """A member that writes a node's value `into` a place."""
        if node in self.constants:
            return Member([], lambda _: self.constants[node], into=into)
        read = self._aligned(self.places[node], into.place.sizes)
        return Member([read], lambda names: names[0], into=into)

    def _copied(self, name: str, place: Place) -> Place:
        """A place of its own, packed, for what lies elsewhere."""
        made = self._buffer(f"{name}_of", place.sizes, place.lane, place.mask)
        self._compute(f"{name}_of", [self._aligned(place, place.sizes)], lambda names: names[0])
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
            self._schedule(inner, into.lane, self._moved(node, self._aligned(into, inner)),
                           0 if k in given else last)
        stores: list[Member] = []
        for k, (head, node) in enumerate(zip(self.heads, nexts, strict=False)):
            into = self.places[head]
            moved = self._moved(node, self._aligned(into, into.sizes))
            carries = {self.places[h].buffer for h in self.heads[:held]}
            if moved.reads and moved.reads[0].place.buffer in carries:
                if moved.reads[0].key == cast(Read, moved.into).key:
                    continue
                copied = self._copied(f"next_{k}", self.places[node])
                moved.reads = [self._aligned(copied, into.sizes)]
            stores.append(moved)
        for member in stores:
            into = cast(Read, member.into).place
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

    @staticmethod
    def _aligned(place: Place, sizes: Sizes) -> Read:
        """The place along the axes of `sizes` that have more than one element."""
        spare = len(sizes) - len(place.sizes)
        strides = [0] * spare + [s if n > 1 else 0
                                 for n, s in zip(place.sizes, place.strides, strict=True)]
        return Read(place, tuple(s for s, n in zip(strides, sizes, strict=True) if n > 1))

    def _compute(self, name: str, reads: list[Read], text: Callable[[list[str]], str]) -> None:
        name = self.names[name]
        place = self.buffers[f"{name}_"]
        member = Member(reads, text, name)
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
        chosen = next((g for g in range(lowest, len(self.groups))
                       if (self.groups[g].sizes, self.groups[g].lane) == (loop, lane)
                       and not self.groups[g].product), len(self.groups))
        if chosen == len(self.groups):
            self.groups.append(Group(loop, lane))
        for read in member.reads:
            if self.made_in.get(read.place.buffer) != chosen:
                self.needed.add(read.place.buffer)
            whole = (read.strides, read.place.offset) == (direct, 0)
            self._noted(read.place, chosen if whole else chosen + 1)
        self.groups[chosen].members.append(member)
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
        rows = 1 if self.lane is not None or expected < 4 else 2 if expected < 8 else 4
        room = sum(p.extent * (256 if p.lane else 8 * rows) for p in local)
        if room > MOST_BYTES:
            raise Unsupported(f"its values need {room >> 10} KiB of a core's cache")
        source = COMMON + self._walk(local, layouts)
        source += f"constexpr int64_t COUNT = {len(nodes)}, EXPECTED = {expected};\n"
        source += (ROWS if self.lane is None else LANES) + ENTRIES
        return Kernel(source, {p: self.axes.sizes[p] for p in self.axes.free}, self.lane, layouts,
                      self._overwrites(layouts))

    def _walk(self, local: list[Place], layouts: Sequence[Layout]) -> str:
        held, read, fixed = self.counts
        given, count = held + read + fixed, len(layouts)
        moving = [*range(held, held + read), *range(given + held, count)]
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
        lines += [f"  const int64_t d{k} = a[{k}].step;" for k in moving]
        lines += [f"  {'V' if p.lane else 'alignas(64) S'} {p.buffer}"
                  f"[{p.extent} * {'N' if p.lane else 'R'}];" for p in local]
        for head in stored:
            lines += _transfer(self.places[head], self.heads.index(head), False)
        lines += ["  for (int64_t t = 0; t < steps; ++t) {"]
        for group in self.groups:
            lines += ["    " + line for line in self._loop(group)]
        lines += [f"    p{k} += d{k};" for k in moving] + ["  }"]
        for k, head in enumerate(self.heads[:held]):
            lines += _transfer(self.places[head], given + k, True)
        return "\n".join([*lines, "}", ""])

    def _loop(self, group: Group) -> list[str]:
        if group.product:
            return self._product_loop(group)
        sizes = group.sizes if group.lane else group.sizes[:-1]
        last = group.sizes[-1] if group.sizes and not group.lane else 1
        before: list[str] = []
        after: list[str] = []
        body: list[str] = []
        registers: dict[tuple[str, Sizes, int], str] = {}
        for member in group.members:
            names = [self._register(read, group, registers, body) for read in member.reads]
            text = member.text(names)
            if member.combine:
                self._accumulate(member, group, text, before, body, after)
            elif member.into is not None:
                body.append(_written(member.into, group, text))
            else:
                body.append(f"const V {member.name} = {text};")
                own = Read(self.buffers[f"{member.name}_"], contiguous(group.sizes))
                registers[own.key] = member.name
                if own.place.buffer in self.needed:
                    body.append(_written(own, group, member.name))
        heads = [f"for (int64_t i{a} = 0; i{a} < {n}; ++i{a})" for a, n in enumerate(sizes)]
        if group.lane:
            heads += ["_Pragma(\"GCC unroll 4\") for (int v = 0; v < N; ++v)"]
            inside = [f"  {line}" for line in body]
        else:
            heads = ["for (int r = 0; r < R; ++r)", *heads]
            inside = [f"  sweep<S, {last}>([&](auto kind, int64_t j, int64_t n) {{",
                      "    constexpr bool full = decltype(kind)::value;",
                      *(f"    {line}" for line in body), "  });"]
        return [*before, *heads[:-1], heads[-1] + " {", *inside, "}", *after]

    def _register(
        self, read: Read, group: Group, registers: dict[tuple[str, Sizes, int], str],
        body: list[str],
    ) -> str:
        if read.key not in registers:
            name = f"x{len(registers)}"
            registers[read.key] = name
            text = _loaded(read, group)
            body.append(f"const V {name} = {f'({text} != V(S(0)))' if read.place.mask else text};")
        return registers[read.key]

    def _accumulate(
        self, member: Member, group: Group, text: str, before: list[str], body: list[str],
        after: list[str],
    ) -> None:
        """A reduction: its result's buffer combines, or one of vectors if it is along them."""
        into = cast(Read, member.into)
        place = into.place
        start, combine = COMBINED[member.combine]
        along = not group.lane and (not into.strides or into.strides[-1] == 0)
        if not along:
            before += _filled(place, start)
            body.append(_written(into, group, combine.format(_loaded(into, group), text)))
            return
        index = _linear(into, range(len(group.sizes) - 1))
        own = f"{place.buffer}sums"
        before += [f"V {own}[{place.extent} * R];",
                   f"for (int64_t i = 0; i < {place.extent} * R; ++i) {own}[i] = {start};"]
        where = f"{own}[r * {place.extent} + {index}]"
        value = f"full ? {text} : V::set({start}, {text}, n)"
        body += [f"const V {place.buffer}in = {value};",
                 f"{where} = {combine.format(where, place.buffer + 'in')};"]
        after.append(f"for (int64_t i = 0; i < {place.extent} * R; ++i) {place.buffer}[i] = "
                     f"across({own}[i], [](V x, V y) {{ return {combine.format('x', 'y')}; }});")

    def _product_loop(self, group: Group) -> list[str]:
        made, left, right = group.product
        b, m, n = (1, *made.sizes)[-3:]
        k = left.sizes[-1]

        def strides(place: Place) -> list[int]:
            rank = len(place.sizes)
            return [0] * (3 - rank) + [s if size > 1 else 0 for s, size in
                                       zip(place.strides, place.sizes, strict=True)]

        (ab, am, ak), (bb, bk, bn) = strides(left), strides(right)
        if not group.lane:
            if n == 1:
                bn = 1 if k == 1 or bk != 1 or ak != 1 else 0
            shared = "true" if right.extent == 0 and self._is_shared(right) else "false"
            rows = [str(p.extent) if p.extent else f"q{p.buffer[1:]}" for p in (left, right)]
            return [f"product<S, R, {shared}, {b}, {m}, {n}, {k}, {ab}, {am}, {ak}, {bb}, {bk}, "
                    f"{bn}>({made.buffer}, {left.buffer} + {left.offset}, {rows[0]}, "
                    f"{right.buffer} + {right.offset}, {rows[1]});"]

        def element(place: Place, text: str) -> str:
            index = f"({place.offset} + {text})"
            if not place.lane:
                return f"V({place.buffer}[{index}])"
            if place.extent:
                return f"{place.buffer}[{index} * N + v]"
            return f"load<S, whole>({place.buffer} + {index} * m{place.buffer[1:]} + v * W, n)"

        one = element(left, f"b * {ab} + m * {am} + k * {ak}")
        two = element(right, f"b * {bb} + k * {bk} + n * {bn}")
        return [
            f"for (int64_t b = 0; b < {b}; ++b)", f"for (int64_t m = 0; m < {m}; ++m)",
            f"for (int64_t o = 0; o < {n}; ++o) {{",
            "  V sums[N];", "  for (int v = 0; v < N; ++v) sums[v] = V(S(0));",
            f"  for (int64_t k = 0; k < {k}; ++k)",
            "    _Pragma(\"GCC unroll 4\") for (int v = 0; v < N; ++v)",
            f"      sums[v] = at::vec::fmadd({one}, {two.replace('n * ', 'o * ')}, sums[v]);",
            f"  for (int v = 0; v < N; ++v) {made.buffer}[((b * {m} + m) * {n} + o) * N + v] = "
            "sums[v];", "}",
        ]

    def _is_shared(self, place: Place) -> bool:
        """Whether all rows read the same: an argument that no free axis belongs to."""
        head = self.heads[int(place.buffer[1:])]
        return not any(p in self.axes.free for axis in self.axes.of(head) for p in axis)


def _linear(read: Read, axes: Sequence[int]) -> str:
    terms = [f"i{a} * {read.strides[a]}" for a in axes if a < len(read.strides)
             and read.strides[a]]
    return " + ".join([str(read.place.offset), *terms])


def _loaded(read: Read, group: Group) -> str:
    """An operand as a vector."""
    place = read.place
    if group.lane:
        index = f"({_linear(read, range(len(group.sizes)))})"
        if not place.lane:
            return f"V({place.buffer}[{index}])"
        if place.extent:
            return f"{place.buffer}[{index} * N + v]"
        return f"load<S, whole>({place.buffer} + {index} * m{place.buffer[1:]} + v * W, n)"
    pointer, stride = _pointer(read, group)
    if stride == 1:
        return f"load<S, full>({pointer}, n)"
    return f"V(*({pointer}))" if stride == 0 else f"gather<S>({pointer}, {stride}, n)"


def _pointer(read: Read, group: Group) -> tuple[str, int]:
    """Where a vector of rows begins, and the stride of its elements."""
    place = read.place
    if place.lane:
        raise Unsupported("it mixes what lies along an axis of its own")
    row = str(place.extent) if place.extent else f"q{place.buffer[1:]}"
    stride = read.strides[-1] if group.sizes else 0
    index = _linear(read, range(len(group.sizes) - 1))
    moved = f" + j * {stride}" if stride else ""
    return f"{place.buffer} + r * {row} + {index}{moved}", stride


def _written(into: Read, group: Group, value: str) -> str:
    place = into.place
    if place.mask:
        value = f"V::blendv(V(S(0)), V(S(1)), {value})"
    if group.lane:
        index = f"({_linear(into, range(len(group.sizes)))})"
        if place.extent:
            return f"{place.buffer}[{index} * N + v] = {value};"
        return f"store<S, whole>({value}, {place.buffer} + {index} * m{place.buffer[1:]} + " \
            "v * W, n);"
    pointer, stride = _pointer(into, group)
    if not group.sizes or stride == 1:
        return f"store<S, full>({value}, {pointer}, n);"
    return f"scatter<S>({value}, {pointer}, {stride}, n);"


def _filled(place: Place, start: str) -> list[str]:
    if place.lane:
        return [f"for (int64_t i = 0; i < {place.extent} * N; ++i) {place.buffer}[i] = {start};"]
    one = start.replace("V(", "(", 1)
    return [f"for (int64_t i = 0; i < {place.extent} * R; ++i) {place.buffer}[i] = {one};"]


def _transfer(place: Place, k: int, out: bool) -> list[str]:
    """All elements from an argument's memory to a buffer, or back."""
    if place.lane:
        head = f"  for (int64_t i = 0; i < {place.extent}; ++i) for (int v = 0; v < N; ++v)"
        there, here = f"p{k} + i * m{k} + v * W", f"{place.buffer}[i * N + v]"
        move = f"store<S, whole>({here}, {there}, n);" if out \
            else f"{here} = load<S, whole>({there}, n);"
        return [head, f"    {move}"]
    head = f"  for (int r = 0; r < R; ++r) for (int64_t i = 0; i < {place.extent}; ++i)"
    there, here = f"p{k}[r * q{k} + i]", f"{place.buffer}[r * {place.extent} + i]"
    return [head, f"    {there} = {here};" if out else f"    {here} = {there};"]
