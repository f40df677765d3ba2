"""Values of all steps of a loop, stacked: lanes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .builder import Builder
from .facts import aten, shape


@dataclass(frozen=True)
class Lane:
    """A tensor of all steps' values; `axis` counts the steps, the other axes are the value's."""

    node: Node
    axis: int

    @property
    def rank(self) -> int:
        return len(shape(self.node)) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of one step's value."""
        whole = shape(self.node)
        return (*whole[: self.axis], *whole[self.axis + 1 :])


Operand = Lane | Node | Any
Outcome = Lane | tuple[Lane, ...] | None


class Lanes:
    """Makes lane values of `size` steps.

    `axis` is where the lane axis of a value is put if the value has that many axes: the place
    where the loop's reads and results have it, so that they need no permuting.
    """

    def __init__(self, build: Builder, size: int, axis: int) -> None:
        self.build, self.size, self.axis = build, size, axis

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.build.call(target, *args, **kwargs)

    def place(self, rank: int) -> int:
        """The preferred lane axis of a value of `rank` axes."""
        return min(self.axis, rank)

    def at(self, lane: Lane, axis: int) -> Node:
        """The lane's node with its lane axis at `axis`."""
        return self.build.move(lane.node, lane.axis, axis)

    def repeated(self, operand: Operand, axis: int) -> Node:
        """`operand` with a lane axis at `axis`, also if it is the same in all steps."""
        if isinstance(operand, Lane):
            return self.at(operand, axis)
        sizes = shape(operand)
        wide = self.call(aten.unsqueeze.default, operand, axis)
        return self.call(aten.expand.default, wide, [*sizes[:axis], self.size, *sizes[axis:]])

    def aligned(self, operand: Operand, rank: int) -> Any:
        """`operand` so that it broadcasts as it would in one step of an operation of `rank`.

        Lower-rank lanes get the missing axes as ones: without them the lane axis would line
        up with a data axis, which goes unnoticed whenever both have the same size.
        """
        axis = self.place(rank)
        if isinstance(operand, Lane):
            node = self.at(operand, 0) if operand.rank < rank else operand.node
            if operand.rank < rank:
                missing = [1] * (rank - operand.rank)
                sizes = shape(node)
                node = self.build.reshape(node, [sizes[0], *missing, *sizes[1:]])
                return self.build.move(node, 0, axis)
            return self.at(operand, axis)
        if isinstance(operand, Node):
            own = len(shape(operand))
            inside = axis - (rank - own)
            if inside > 0:
                return self.call(aten.unsqueeze.default, operand, inside)
        return operand


Rule = Callable[[Lanes, Node, Sequence[Any], Mapping[str, Any]], Outcome]
