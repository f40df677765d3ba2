"""A tandem repeat of operations: where the arguments of each trip's operations come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .facts import flat_arguments, is_tensor


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
    """A repeat is not a loop: the reason, the node whose argument says so, and the trip, if
    another loop may begin there."""

    def __init__(self, reason: str, node: Node, trip: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.trip = trip


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

    def sources(self, place: int) -> tuple[list[Source], Any]:
        """The class of each argument of operation `place`, flat, and what holds them."""
        column = self.column(place)
        flat = [flat_arguments(node) for node in column]
        form = flat[0][1]
        if any(other != form for _, other in flat):
            raise Misfit("the arguments differ in structure from trip to trip", column[0])
        slots = zip(*(leaves for leaves, _ in flat), strict=True)
        return [self._source(column, slot) for slot in slots], form

    def _source(self, column: list[Node], slot: tuple[Any, ...]) -> Source:
        if not isinstance(slot[-1], Node):
            if any(isinstance(item, Node) for item in slot):
                raise Misfit("an argument is a number in some trips, a tensor in others", column[0])
            kind, spelled = type(slot[0]), repr(slot[0])  # by which 0.0 and -0.0 are two numbers
            same = all(type(i) is kind and repr(i) == spelled for i in slot)
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
                    column[i], i,
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
