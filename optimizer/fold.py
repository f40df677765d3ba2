"""A tandem repeat of operations → a scan, or the argument that breaks the pattern.

Every argument of every operation of a trip is classed by where its value comes from; if each
one has the same class in all trips, the repeat is a loop, and the classes say what its scan
carries from step to step, reads at each step, and holds unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch.fx import Node

from .affine import progression
from .facts import READS, WRITES, aten, is_inexact, is_op, is_tensor, value
from .reads import Link
from .schedules import filled, scheduled
from .stretch import Carried, Constant, Invariant, Local, Misfit, Source, Stretch, Varying


@dataclass
class Write:
    """A per-step write into a buffer that the loop only passes on (or adds to)."""

    place: int
    start: Node
    source: Source
    axis: int
    begins: tuple[int, ...]
    width: int | None  # None: one index, its axis dropped
    after: Write | None = None  # the write before it in the same trip
    added: tuple[int, ...] | None = None  # the shape of windows that are added to, and overlap


@dataclass
class Loop:
    """A stretch that is a loop: what it carries, reads, holds, and writes."""

    stretch: Stretch
    sources: list[list[Source]]
    forms: list[Any]  # what holds the arguments of each place
    reads: dict[int, list[Link]] = field(default_factory=dict)
    fixed_reads: dict[int, list[Link]] = field(default_factory=dict)  # of the same place always
    read_base: dict[int, Node] = field(default_factory=dict)
    writes: dict[int, Write] = field(default_factory=dict)
    sums: set[int] = field(default_factory=set)  # reads and additions that became such writes
    outside: dict[int, list[int]] = field(default_factory=dict)  # place → trips used outside

    @property
    def trips(self) -> int:
        return self.stretch.trips

    @cached_property
    def late(self) -> set[int]:
        """The places that need a result of an earlier trip. (Asked when the writes are known.)"""
        found: set[int] = set()
        for place, sources in enumerate(self.sources):
            if place not in self.writes and any(
                isinstance(s, Carried) or (isinstance(s, Local) and s.place in found)
                for s in sources
            ):
                found.add(place)
        return found


def fold(operations: Sequence[Node], period: int) -> Loop:
    """The loop that `operations` are, `period` to a trip; raises `Misfit` if they are none."""
    stretch = Stretch(operations, period)
    for node in operations:
        for user in node.users:
            if user not in stretch.place and user < operations[-1]:  # and nothing moves across it
                raise Misfit("an autocast region begins or ends in every trip", user)
    classed = [stretch.sources(place) for place in range(period)]
    loop = Loop(stretch, [s for s, _ in classed], [form for _, form in classed])
    for place in range(period):
        column = stretch.column(place)
        used = [i for i, n in enumerate(column) if any(u not in stretch.place for u in n.users)]
        if used and not is_tensor(column[0]):
            raise Misfit("a tuple made in the loop is taken apart outside it", column[used[-1]])
        if used:
            loop.outside[place] = used
    for place in range(period):
        _find_read(loop, place)
    for place in range(period):
        _find_writes(loop, place)
        _find_sum(loop, place)
    for place in range(period):
        if place not in loop.reads and place not in loop.writes and place not in loop.sums:
            _check_arguments(loop, place)
    return loop


def _find_read(loop: Loop, place: int) -> None:
    """A `select` or `slice` of an outer value, or of such a read, at a place that varies."""
    node = loop.stretch.operations[place]
    if not is_op(node, *READS):
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


def _find_writes(loop: Loop, place: int) -> None:
    """The scatters, `place` the first in a trip, into a buffer that the loop only writes.

    Each writes where no other does, in any trip, so that their order does not matter.
    """
    base = loop.sources[place][0] if _is_scatter(loop, place) else None
    if not isinstance(base, Carried) or len(base.start) != 1:
        return
    chain = [base.place]
    while chain[0] != place:
        before = loop.sources[chain[0]][0] if _is_scatter(loop, chain[0]) else None
        if not isinstance(before, Local):
            return
        chain.insert(0, before.place)
    if not _only_written(loop, chain):
        return
    writes = [_write(loop, one, base.start[0]) for one in chain]
    covered: set[int] = set()
    for write in writes:
        if write is None or write.axis != writes[0].axis:  # type: ignore[union-attr]
            return
        places = [b + k for b in write.begins for k in range(write.width or 1)]
        if len(writes) > 1 and covered.intersection(places):
            return
        covered.update(places)
    previous: Write | None = None
    for write in writes:
        assert write is not None
        write.after, previous = previous, write
        loop.writes[write.place] = write


def _find_sum(loop: Loop, place: int) -> None:
    """`buffer[..., a : b] += y`, over windows that overlap, where nothing else reads the buffer."""
    if place in loop.writes or not _is_scatter(loop, place):
        return
    buffer, total, axis, *where = loop.sources[place]
    if not (isinstance(total, Local) and isinstance(buffer, Carried) and buffer.place == place
            and isinstance(axis, Constant)):
        return
    terms = loop.sources[total.place]
    if not is_op(loop.stretch.operations[total.place], aten.add.Tensor) or len(terms) != 2:
        return
    for read, source in (terms, terms[::-1]):
        if not isinstance(read, Local) or not isinstance(source, (Local, Invariant)):
            continue
        window = loop.stretch.operations[read.place]
        if is_op(window, aten.slice.Tensor) and loop.sources[read.place] == [buffer, axis, *where] \
                and _is_private(loop, place, read.place, total.place):
            begins = _numbers(where[0], loop.trips)
            if progression(begins) is not None and where[2] == Constant(1):
                loop.writes[place] = Write(place, buffer.start[0], source, axis.held, begins,
                                           None, added=tuple(value(window).shape))
                loop.sums |= {read.place, total.place}
            return


def _is_private(loop: Loop, place: int, read: int, total: int) -> bool:
    """Whether only the sum reads a buffer's window, and only the next trip the buffer."""
    columns = [loop.stretch.column(p) for p in (read, total, place)]
    for trip, (window, added, state) in enumerate(zip(*columns, strict=True)):
        after = [columns[0][trip + 1], columns[2][trip + 1]] if trip + 1 < loop.trips else None
        if set(window.users) != {added} or set(added.users) != {state}:
            return False
        if after is not None and set(state.users) != set(after):
            return False
    return True


def _is_scatter(loop: Loop, place: int) -> bool:
    node = loop.stretch.operations[place]
    return is_op(node, *WRITES)


def _only_written(loop: Loop, chain: Sequence[int]) -> bool:
    """Whether each state of a buffer is read by the next write alone."""
    columns = zip(*(loop.stretch.column(place) for place in chain), strict=True)
    states = [node for trip in columns for node in trip]
    return all(set(node.users) == {after} for node, after in itertools.pairwise(states))


def _write(loop: Loop, place: int, start: Node) -> Write | None:
    """A write of one value per step at places that form a progression, if it is one."""
    node = loop.stretch.operations[place]
    _, source, axis, *where = loop.sources[place]
    if not isinstance(axis, Constant) or not isinstance(source, (Local, Carried, Invariant)):
        return None
    if isinstance(source, Carried):
        _check_start(loop.stretch.operations[source.place], source, node)
    begins = _numbers(where[0], loop.trips)
    width: int | None = None
    if is_op(node, aten.slice_scatter.default):
        widths = {e - b for b, e in zip(begins, _numbers(where[1], loop.trips), strict=True)}
        if len(widths) != 1 or where[2] != Constant(1):
            return None
        width = widths.pop()
    gaps = [abs(b - a) for a, b in itertools.pairwise(begins)]
    if progression(begins) is None or min(gaps) < (width or 1):
        return None
    return Write(place, start, source, axis.held, begins, width)


def position(loop: Loop, place: int) -> tuple[int, tuple[int, ...]] | None:
    """The axis, and for each trip the place on it, of one element that is read or written there:
    of a value of the loop itself, as of a ring or of a table that is filled and read."""
    node = loop.stretch.operations[place]
    if not is_op(node, *READS, *WRITES):
        return None
    axis, *where = loop.sources[place][2 if is_op(node, *WRITES) else 1 :]
    if not isinstance(axis, Constant) or not any(isinstance(w, Varying) for w in where) \
            or not (is_inexact(node) or value(node).dtype is torch.int64):  # others add up to int64
        return None
    begins = _numbers(where[0], loop.trips)
    ends = _numbers(where[1], loop.trips) if len(where) > 1 else [b + 1 for b in begins]
    return None if any(e - b != 1 for b, e in zip(begins, ends, strict=True)) \
        else (axis.held, begins)


def _check_arguments(loop: Loop, place: int) -> None:
    node, positioned = loop.stretch.operations[place], position(loop, place) is not None
    for slot, source in enumerate(loop.sources[place]):
        if isinstance(source, Varying):
            if positioned and not isinstance(source.items[0], Node):
                continue
            _check_varying(loop.stretch.column(place), source, slot, place in loop.late)
        elif isinstance(source, Carried):
            varies = not positioned and is_op(node, *READS) \
                and any(isinstance(s, Varying) for s in loop.sources[place])
            if source.place in loop.writes or (varies and _is_scatter(loop, source.place)):
                raise Misfit("a buffer is read at a place that earlier steps write to", node)
            _check_start(loop.stretch.operations[source.place], source, node)


def _check_varying(column: list[Node], source: Varying, slot: int, late: bool) -> None:
    node = column[0]
    if isinstance(source.items[0], Node):
        changes = [i for i, pair in enumerate(itertools.pairwise(source.items), start=1)
                   if pair[0] is not pair[1]]
        shared = len(set(source.items)) < len(source.items)
        if any(n.meta.get("state") for n in source.items):
            if late:
                raise Misfit("each trip uses parameters of its own, and the result of the one "
                             "before", node, changes[0] if shared else 0)
            if shared:
                raise Misfit("some trips share parameters, others have their own",
                             column[changes[0]], changes[0])
        if not all(is_tensor(n) for n in source.items):
            raise Misfit("each trip runs another loop, or reads another tuple", node)
        first, *others = (value(n) for n in source.items)
        if any((o.shape, o.dtype, o.device) != (first.shape, first.dtype, first.device)
               for o in others):
            raise Misfit("what each trip reads from before the loop has another shape", node,
                         changes[0] if shared else 0)
        return
    if any(not isinstance(item, (int, float)) for item in source.items):
        raise Misfit("an option of the operation varies from trip to trip", node)
    if slot != filled(node) and slot not in scheduled(node):
        raise Misfit(f"a number given to {node.target} varies from trip to trip", node)


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
