"""A tandem repeat of operations → a scan, or the argument that breaks the pattern.

Every argument of every operation of a trip is classed by where its value comes from; if each
one has the same class in all trips, the repeat is a loop, and the classes say what its scan
carries from step to step, reads at each step, and holds unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .affine import progression
from .builder import Builder
from .facts import aten, is_op, is_random, is_region_marker, is_tensor, shape, value
from .interleave import write_windows
from .reads import Link, lanes


@dataclass(frozen=True)
class Constant:
    """The same in every trip, and no tensor."""

    held: Any


@dataclass(frozen=True)
class Local:
    """The result of operation `place` of the same trip."""

    place: int


@dataclass(frozen=True)
class Carried:
    """The result of operation `place`, `len(start)` trips back; `start` before the first."""

    place: int
    start: tuple[Node, ...]  # start[m]: what stands for the result of trip m - len(start)


@dataclass(frozen=True)
class Invariant:
    """A value from before the loop, the same in every trip."""

    node: Node


@dataclass(frozen=True)
class Varying:
    """Numbers, or values from before the loop, that differ from trip to trip."""

    items: tuple[Any, ...]


NEVER = 1 << 20  # a crossing that no cut should have

Source = Constant | Local | Carried | Invariant | Varying


class Misfit(Exception):
    """A repeat is not a loop: the reason, and the node whose argument says so."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


class Stretch:
    """`trips` runs of `period` operations, consecutive in program order."""

    def __init__(self, operations: Sequence[Node], period: int) -> None:
        self.operations = operations
        self.period = period
        self.trips = len(operations) // period
        self.place = {node: i for i, node in enumerate(operations)}

    def column(self, place: int) -> list[Node]:
        """Operation `place` of each trip."""
        return list(self.operations[place :: self.period])

    def sources(self, place: int) -> tuple[list[Source], pytree.TreeSpec]:
        """The class of each argument of operation `place`, flat, and how to unflatten them."""
        column = self.column(place)
        flat = [pytree.tree_flatten((node.args, dict(node.kwargs))) for node in column]
        spec = flat[0][1]
        if any(other != spec for _, other in flat):
            raise Misfit("the arguments differ in structure from trip to trip", column[0])
        slots = zip(*(leaves for leaves, _ in flat), strict=True)
        return [self._source(column, slot) for slot in slots], spec

    def _source(self, column: list[Node], slot: tuple[Any, ...]) -> Source:
        if not isinstance(slot[-1], Node):
            if any(isinstance(item, Node) for item in slot):
                raise Misfit("an argument is a number in some trips, a tensor in others", column[0])
            same = all(type(i) is type(slot[0]) and i == slot[0] for i in slot)
            return Constant(slot[0]) if same else Varying(slot)
        if any(not isinstance(item, Node) for item in slot):
            raise Misfit("an argument is a number in some trips, a tensor in others", column[0])
        if slot[-1] in self.place:
            return self._inside(column, slot)
        if any(item in self.place for item in slot):
            raise Misfit("an argument comes from another trip in some trips only", column[-1])
        return Invariant(slot[0]) if len(set(slot)) == 1 else Varying(slot)

    def _inside(self, column: list[Node], slot: tuple[Node, ...]) -> Source:
        trip, place = divmod(self.place[slot[-1]], self.period)
        distance = self.trips - 1 - trip
        for i, item in enumerate(slot):
            expected = i - distance
            if expected >= 0 and self.place.get(item) != expected * self.period + place:
                raise Misfit(
                    "an argument does not come from the same number of trips back in every trip",
                    column[i],
                )
            if expected < 0 and item in self.place:
                raise Misfit("the first trips read a value of the loop itself", column[i])
        if distance == 0:
            return Local(place)
        if distance >= self.trips - 1 and self.trips > 2:
            raise Misfit("every trip reads a result of the first", column[-1])
        return Carried(place, slot[:distance])

    def crossings(self) -> list[int]:
        """For a cut before each place of the period, how many values cross it per step."""
        change = [0] * (2 * self.period + 1)
        middle = self.period * (self.trips // 2)
        for made in range(middle, middle + self.period):
            uses = [self.place[u] for u in self.operations[made].users if u in self.place]
            span = max(uses, default=made) - made
            first = made % self.period + 1
            cost = 1 if is_tensor(self.operations[made]) else NEVER  # tuples can't be carried
            change[first] += cost
            change[first + span % self.period] -= cost
        counts, running = [0] * (2 * self.period), 0
        for place in range(2 * self.period):
            running += change[place]
            counts[place] = running
        return [counts[i] + counts[i + self.period] for i in range(self.period)]


@dataclass
class Write:
    """A per-step write into a buffer that the loop only passes on."""

    place: int
    start: Node
    source: Source
    axis: int
    begins: tuple[int, ...]
    width: int | None  # None: one index, its axis dropped
    step: int


@dataclass
class Loop:
    """A stretch that is a loop: what it carries, reads, holds, and writes."""

    stretch: Stretch
    sources: list[list[Source]]
    specs: list[pytree.TreeSpec]
    reads: dict[int, list[Link]] = field(default_factory=dict)
    fixed_reads: dict[int, list[Link]] = field(default_factory=dict)  # of the same place always
    read_base: dict[int, Node] = field(default_factory=dict)
    writes: dict[int, Write] = field(default_factory=dict)
    outside: dict[int, list[int]] = field(default_factory=dict)  # place → trips used outside

    @property
    def trips(self) -> int:
        return self.stretch.trips


def fold(operations: Sequence[Node], period: int) -> Loop:
    """The loop that `operations` are, `period` to a trip; raises `Misfit` if they are none."""
    stretch = Stretch(operations, period)
    for node in operations[:period]:
        if is_random(node):
            raise Misfit("a random operation runs in every trip: its order must be kept", node)
        if is_region_marker(node):
            raise Misfit("an autocast region begins or ends in every trip", node)
    classed = [stretch.sources(place) for place in range(period)]
    loop = Loop(stretch, [s for s, _ in classed], [spec for _, spec in classed])
    for place in range(period):
        column = stretch.column(place)
        used = [i for i, n in enumerate(column) if any(u not in stretch.place for u in n.users)]
        if used and not is_tensor(column[0]):
            raise Misfit("a tuple made in the loop is taken apart outside it", column[used[-1]])
        if used:
            loop.outside[place] = used
    for place in range(period):
        _find_read(loop, place)
        _find_write(loop, place)
    for place in range(period):
        if place not in loop.reads and place not in loop.writes:
            _check_arguments(loop, place)
    return loop


def _find_read(loop: Loop, place: int) -> None:
    """A `select` or `slice` of an outer value, or of such a read, at a place that varies."""
    node = loop.stretch.operations[place]
    if not is_op(node, aten.select.int, aten.slice.Tensor):
        return
    base, axis, *where = loop.sources[place]
    if not isinstance(axis, Constant):
        raise Misfit("the axis that is read varies from trip to trip", node)
    before: list[Link] | None = None
    if isinstance(base, Invariant):
        before, loop.read_base[place] = [], base.node
    elif isinstance(base, Local):
        before = loop.reads.get(base.place, loop.fixed_reads.get(base.place))
        if before is not None:
            loop.read_base[place] = loop.read_base[base.place]
    if before is None:
        return
    varies = any(isinstance(w, Varying) for w in where)
    if not varies and isinstance(base, Local) and base.place in loop.reads:
        return  # a fixed place of what is read: an operation of the body like any other
    found = loop.reads if varies else loop.fixed_reads
    found[place] = [*before, _link(node, axis.held, where, loop.trips)]


def _link(node: Node, axis: int, where: list[Source], trips: int) -> Link:
    begins = _numbers(where[0], trips)
    if is_op(node, aten.select.int):
        return Link(axis, begins, None, 1)
    ends, step = _numbers(where[1], trips), where[2]
    widths = {e - b for b, e in zip(begins, ends, strict=True)}
    if not isinstance(step, Constant) or len(widths) != 1:
        raise Misfit("the width of a slice varies from trip to trip (a triangular loop)", node)
    return Link(axis, begins, widths.pop(), step.held)


def _numbers(source: Source, trips: int) -> tuple[int, ...]:
    if isinstance(source, Varying):
        return cast(tuple[int, ...], source.items)
    assert isinstance(source, Constant)
    return (source.held,) * trips


def _find_write(loop: Loop, place: int) -> None:
    """A scatter into a buffer that the loop only writes, each step at another place."""
    node = loop.stretch.operations[place]
    if not is_op(node, aten.select_scatter.default, aten.slice_scatter.default):
        return
    base, source, axis, *where = loop.sources[place]
    if base != Carried(place, base.start if isinstance(base, Carried) else ()):
        return
    assert isinstance(base, Carried)
    if len(base.start) != 1 or not isinstance(axis, Constant):
        return
    if not isinstance(source, (Local, Carried, Invariant)):
        return
    if isinstance(source, Carried):
        _check_start(loop.stretch.operations[source.place], source, node)
    column = loop.stretch.column(place)
    follows = itertools.pairwise(column)
    if any(set(n.users) != {after} for n, after in follows):
        return
    begins = _numbers(where[0], loop.trips)
    width: int | None = None
    step = 1
    if is_op(node, aten.slice_scatter.default):
        widths = {e - b for b, e in zip(begins, _numbers(where[1], loop.trips), strict=True)}
        if len(widths) != 1 or where[2] != Constant(1):
            return
        width = widths.pop()
    gaps = [abs(b - a) for a, b in itertools.pairwise(begins)]
    if progression(begins) is None or min(gaps) < (width or 1):
        return
    loop.writes[place] = Write(place, base.start[0], source, axis.held, begins, width, step)


def _check_arguments(loop: Loop, place: int) -> None:
    node = loop.stretch.operations[place]
    for slot, source in enumerate(loop.sources[place]):
        if isinstance(source, Varying):
            _check_varying(node, source, slot)
        elif isinstance(source, Carried):
            if source.place in loop.writes:
                raise Misfit("a buffer is read at a place that earlier steps write to", node)
            _check_start(loop.stretch.operations[source.place], source, node)


def _check_varying(node: Node, source: Varying, slot: int) -> None:
    if isinstance(source.items[0], Node):
        if any(n.meta.get("state") for n in source.items):
            raise Misfit("each trip uses parameters of its own", node)
        if not all(is_tensor(n) for n in source.items):
            raise Misfit("each trip runs another loop, or reads another tuple", node)
        first, *others = (value(n) for n in source.items)
        if any((o.shape, o.dtype, o.device) != (first.shape, first.dtype, first.device)
               for o in others):
            raise Misfit("what each trip reads from before the loop differs in shape", node)
        return
    if any(not isinstance(item, (int, float)) for item in source.items):
        raise Misfit("an option of the operation varies from trip to trip", node)
    if slot != 1 or node.target not in WITH_TENSOR:
        raise Misfit(f"a number given to {node.target} varies from trip to trip", node)


# operations whose second argument may be a number, and the form that takes a tensor instead
WITH_TENSOR = {
    aten.add.Tensor: aten.add.Tensor, aten.sub.Tensor: aten.sub.Tensor,
    aten.mul.Tensor: aten.mul.Tensor, aten.div.Tensor: aten.div.Tensor,
    aten.add.Scalar: aten.add.Tensor, aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor, aten.div.Scalar: aten.div.Tensor,
    aten.rsub.Scalar: aten.rsub.Tensor, aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.gt.Scalar: aten.gt.Tensor, aten.ge.Scalar: aten.ge.Tensor,
    aten.lt.Scalar: aten.lt.Tensor, aten.le.Scalar: aten.le.Tensor,
    aten.eq.Scalar: aten.eq.Tensor, aten.ne.Scalar: aten.ne.Tensor,
    aten.remainder.Scalar: aten.remainder.Tensor,
    aten.floor_divide.Scalar: aten.floor_divide.default,
    aten.bitwise_right_shift.Tensor_Scalar: aten.bitwise_right_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar: aten.bitwise_left_shift.Tensor,
}


def _check_start(result: Node, source: Carried, node: Node) -> None:
    for start in source.start:
        if not is_tensor(start) or not is_tensor(result):
            raise Misfit("a value carried from step to step is no tensor", node)
        old, new = value(start), value(result)
        if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
            raise Misfit(
                f"a carried value starts as {_describe(old)} and goes on as {_describe(new)}", node
            )


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def build_scan(loop: Loop, build: Builder) -> dict[Node, Node]:
    """Insert the scan of `loop`; maps each node used outside the loop to what replaces it."""
    return _Assembly(loop, build).run()


class _Assembly:
    """Builds the body and the arguments of a loop's scan."""

    def __init__(self, loop: Loop, build: Builder) -> None:
        self.loop, self.build = loop, build
        self.graph, self.holder = Graph(), torch.nn.Module()
        self.heads: dict[str, list[tuple[Any, Node]]] = {"carry": [], "slice": [], "invariant": []}
        self.carries: dict[tuple[int, tuple[Node, ...]], Node] = {}
        self.known: dict[Any, Node] = {}
        self.made: dict[int, Node] = {}

    def run(self) -> dict[Node, Node]:
        loop, stretch = self.loop, self.loop.stretch
        self._declare_carries()
        for place in self._needed():
            node = stretch.operations[stretch.period + place]
            self.made[place] = (
                self._lane(place) if place in loop.reads else self._operation(place, node)
            )
        outputs = [self._next(place, start) for place, start in self.carries]
        finals, steps = self._results()
        if not self.heads["slice"]:
            index = self.build.call(
                aten.arange.default, loop.trips, dtype=torch.int64, device=self._device()
            )
            self._head("slice", index, torch.empty((), dtype=torch.int64), index)
        ordered = [n for kind in self.heads.values() for _, n in kind]
        body = self._finish(ordered, outputs + [self._step_value(s) for s in steps])
        results = self.build.scan(body, *[[a for a, _ in kind] for kind in self.heads.values()])
        lanes_at = dict(zip(steps, results[len(self.carries):], strict=True))
        return self._replacements(finals, lanes_at, results)

    def _device(self) -> torch.device:
        return next(value(n).device for n in self.loop.stretch.operations if is_tensor(n))

    def _head(self, kind: str, outer: Node, like: torch.Tensor, key: Any) -> Node:
        """A placeholder of the body, bound to the node `outer` of the graph around it."""
        if key not in self.known:
            node = self.graph.placeholder(f"{kind}_{len(self.heads[kind])}")
            node.meta["val"] = like
            self.known[key] = node
            self.heads[kind].append((outer, node))
        return self.known[key]

    def _needed(self) -> list[int]:
        """The places whose results the body must compute, in order."""
        loop = self.loop
        wanted = [w.source.place for w in loop.writes.values()
                  if isinstance(w.source, (Local, Carried))]
        wanted += [p for p in loop.outside if p not in loop.writes]
        wanted += [s.place for p in range(loop.stretch.period) if p not in loop.writes
                   for s in loop.sources[p] if isinstance(s, Carried)]
        needed: set[int] = set()
        while wanted:
            place = wanted.pop()
            if place in needed:
                continue
            needed.add(place)
            if place not in loop.reads:
                wanted += [s.place for s in loop.sources[place] if isinstance(s, (Local, Carried))]
        return sorted(needed)

    def _declare_carries(self) -> None:
        for place in self._needed():
            if place in self.loop.reads:
                continue
            for source in self.loop.sources[place]:
                if isinstance(source, Carried):
                    for distance in range(1, len(source.start) + 1):
                        self._carry(source.place, source.start[-distance:])
        for write in self.loop.writes.values():
            if isinstance(write.source, Carried):
                for distance in range(1, len(write.source.start) + 1):
                    self._carry(write.source.place, write.source.start[-distance:])

    def _carry(self, place: int, start: tuple[Node, ...]) -> Node:
        """The value of operation `place`, `len(start)` steps back."""
        key = (place, start)
        if key not in self.carries:
            node = self.graph.placeholder(f"carry_{len(self.carries)}")
            node.meta["val"] = value(start[0])
            self.carries[key] = node
            self.heads["carry"].append((start[0], node))
        return self.carries[key]

    def _next(self, place: int, start: tuple[Node, ...]) -> Node:
        """What the next step sees of a carry: the result itself, or the carry one step nearer."""
        return self.made[place] if len(start) == 1 else self.carries[(place, start[1:])]

    def _lane(self, place: int) -> Node:
        links, base = self.loop.reads[place], self.loop.read_base[place]
        key = (base, tuple(links))
        if key in self.known:
            return self.known[key]
        stacked = lanes(self.build, base, links)
        return self._head("slice", stacked, value(self.loop.stretch.operations[place]), key)

    def _operation(self, place: int, node: Node) -> Node:
        leaves = [self._argument(node, s) for s in self.loop.sources[place]]
        args, kwargs = pytree.tree_unflatten(leaves, self.loop.specs[place])
        target: Any = node.target
        if isinstance(dict(enumerate(self.loop.sources[place])).get(1), Varying):
            target = WITH_TENSOR.get(target, target)
        made = self.graph.call_function(target, args, kwargs)
        made.meta = dict(node.meta.items())
        return made

    def _argument(self, node: Node, source: Source) -> Any:
        match source:
            case Constant(held):
                return held
            case Local(place):
                return self.made[place]
            case Carried(place, start):
                return self._carry(place, start)
            case Invariant(outer) if not is_tensor(outer):
                return self._inner_body(outer)
            case Invariant(outer):
                return self._head("invariant", outer, value(outer), outer)
            case Varying(items):
                return self._table(node, items)

    def _inner_body(self, outer: Node) -> Node:
        """The body of a scan inside the loop, held by the loop's own body."""
        if outer not in self.known:
            held = self.build.graph_module.get_submodule(str(outer.target))
            self.holder.add_module(str(outer.target), held)
            self.known[outer] = self.graph.get_attr(str(outer.target))
        return self.known[outer]

    def _table(self, node: Node, items: tuple[Any, ...]) -> Node:
        """A schedule: one number, or one constant tensor, for each step."""
        key = ("table", items)
        if key in self.known:
            return self.known[key]
        if isinstance(items[0], Node):
            held = self.build.call(aten.stack.default, list(items))
            return self._head("slice", held, value(items[0]), key)
        # Python floats are doubles, and as 0-d tensors they promote nothing either
        floating = any(isinstance(i, float) for i in items)
        dtype = torch.float64 if floating else torch.int64
        held = self.build.table(items, value(node).device, dtype)
        return self._head("slice", held, value(held)[0], key)

    def _step_value(self, source: Local | Carried) -> Node:
        if isinstance(source, Local):
            return self.made[source.place]
        return self._carry(source.place, source.start)

    def _results(self) -> tuple[dict[int, Node], list[Local | Carried]]:
        """Which results leave the loop as final carries, and what leaves it for every step."""
        finals: dict[int, Node] = {}
        steps: list[Local | Carried] = []
        for place, used in self.loop.outside.items():
            if place in self.loop.writes:
                continue
            nearest = [k for k in self.carries if k[0] == place and len(k[1]) == 1]
            if used == [self.loop.trips - 1] and nearest:
                finals[place] = self.carries[nearest[0]]
            else:
                steps.append(Local(place))
        for write in self.loop.writes.values():
            if isinstance(write.source, (Local, Carried)) and write.source not in steps:
                steps.append(write.source)
        return finals, steps

    def _finish(self, heads: list[Node], outputs: list[Node]) -> GraphModule:
        """The body, its placeholders in the order carries, slices, invariants."""
        ordered = Graph()
        moved: dict[Node, Node] = {}
        for node in [*heads, *(n for n in self.graph.nodes if n.op != "placeholder")]:
            moved[node] = ordered.node_copy(node, moved.__getitem__)
        ordered.output(tuple(moved[n] for n in outputs))
        return GraphModule(self.holder, ordered)

    def _replacements(
        self, finals: dict[int, Node], lanes_at: dict[Local | Carried, Node], results: list[Node]
    ) -> dict[Node, Node]:
        loop, build = self.loop, self.build
        replaced: dict[Node, Node] = {}
        carry_order = list(self.carries.values())
        for place, used in loop.outside.items():
            column = loop.stretch.column(place)
            if place in loop.writes:
                replaced[column[-1]] = self._written(loop.writes[place], lanes_at)
            elif place in finals:
                replaced[column[-1]] = results[carry_order.index(finals[place])]
            else:
                for trip in used:
                    replaced[column[trip]] = build.call(
                        aten.select.int, lanes_at[Local(place)], 0, trip
                    )
        return replaced

    def _written(self, write: Write, lanes_at: dict[Local | Carried, Node]) -> Node:
        """The buffer after all steps, from the per-step values stacked on axis 0."""
        build, axis = self.build, write.axis
        stacked = self._all_steps(write, lanes_at)
        begins = list(write.begins)
        if begins[1] < begins[0]:
            stacked, begins = build.call(aten.flip.default, stacked, [0]), begins[::-1]
        moved = build.move(stacked, 0, axis)
        gap, width = begins[1] - begins[0], write.width or 1
        end = begins[-1] + width
        if write.width is not None:
            if gap > width:
                return build.call(write_windows, write.start, moved, axis, begins[0], gap)
            sizes = shape(moved)
            moved = build.reshape(
                moved, [*sizes[:axis], len(begins) * width, *sizes[axis + 2 :]]
            )
            gap = 1
        if (begins[0], gap, end) == (0, 1, shape(write.start)[axis]):
            return build.call(aten.contiguous.default, moved)
        return build.call(
            aten.slice_scatter.default, write.start, moved, axis, begins[0], end, gap
        )

    def _all_steps(self, write: Write, lanes_at: dict[Local | Carried, Node]) -> Node:
        match write.source:
            case Local() | Carried():
                return lanes_at[write.source]
            case Invariant(outer):
                sizes = [self.loop.trips, *shape(outer)]
                return self.build.call(aten.expand.default, outer, sizes)
            case _:
                raise AssertionError("`_find_write` takes no other source")
