"""What writes to parts of a tensor wrote, and what a read behind them sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from .builder import Builder
from .facts import READS, WRITES, aten, is_op, shape, value

LONGEST_WALK = 64  # writes looked back through, one by one, for the one that a read sees
MOST_PARTS = 32  # elements of a window that are read one by one


@dataclass(frozen=True)
class Written:
    """What a write and those right before it wrote: all of it lies in `begin:end` on `axis`."""

    axis: int
    begin: int
    end: int
    before: Node  # the buffer without these writes


def written(node: Node, writes: Mapping[Node, Written]) -> Written:
    """What a write of normal arguments wrote, and `writes` right before it."""
    axis, begin, end = _place(node)
    base = cast(Node, node.args[0])
    earlier = writes.get(base)
    if earlier is None or earlier.axis != axis:
        return Written(axis, begin, end, base)
    return Written(axis, min(begin, earlier.begin), max(end, earlier.end), earlier.before)


def behind_other_writes(node: Node, writes: Mapping[Node, Written]) -> Node | None:
    """Let a read skip the writes elsewhere, and read a part of what one wrote; what was written
    if it reads all of it."""
    axis, begin, end = _place(node)
    source = cast(Node, node.args[0])
    for _ in range(LONGEST_WALK):
        if source not in writes or (at := _place(source))[0] != axis:
            break
        if at[1] < end and begin < at[2]:
            made = cast(Node, source.args[1])
            same = is_op(node, aten.select.int) == is_op(source, aten.select_scatter.default)
            if same and node.args[1:] == source.args[2:]:
                return made
            inside = at[1] <= begin and end <= at[2]
            if inside and is_op(source, aten.slice_scatter.default) and source.args[5] == 1:
                where = [begin - at[1], end - at[1]][: len(node.args) - 2]
                node.args = (made, axis, *where, *node.args[4:])
            elif inside and is_op(node, aten.slice.Tensor) and is_op(
                    source, aten.select_scatter.default):
                node.target, node.args = aten.unsqueeze.default, (made, axis)
            else:
                break
            target: Any = node.target
            node.meta["val"] = target(value(made), *node.args[1:])
            return None
        all_before = writes[source]
        apart = all_before.end <= begin or end <= all_before.begin
        source = all_before.before if apart else cast(Node, source.args[0])
    else:
        return None
    node.args = (source, *node.args[1:])
    return None


class Windows:
    """Reads of what was written, or appended, element by element: the last outputs of a filter or
    a forecast, the last tokens of a sequence."""

    def __init__(self, build: Callable[[Node], Builder], writes: Mapping[Node, Written]) -> None:
        self.build, self.writes = build, writes  # `build`: what adds nodes before a given one
        self.known: dict[tuple[Any, ...], Node] = {}

    def read(self, node: Node) -> Node | None:
        """What takes the place of a read, or None; it may read elsewhere afterwards."""
        found = behind_other_writes(node, self.writes)
        source = cast(Node, node.args[0])
        if found is not None or not is_op(node, *READS) or not _grows(source, self.writes) \
                or any(user.op == "output" for user in node.users):  # a view for the caller
            return found
        found = self._behind(node)
        if found is None and is_op(node, aten.slice.Tensor):
            found = self._stacked(node)
        return found

    def _stacked(self, node: Node) -> Node | None:
        """A window as its elements, stacked; None if one of them was not written alone."""
        source, axis, begin, end, step = cast(Any, node.args)
        if step != 1 or not 1 < end - begin <= MOST_PARTS or not _grows(source, self.writes):
            return None
        build, parts = self.build(node), list[Node]()
        for k in range(begin, end):
            read = build.call(aten.select.int, source, axis, k)
            part = self._behind(read)
            if part is None and read.args[0] in self.writes:
                return None
            if part is None and not self._is_ahead(source, k):
                part = self._read_once(read)
            parts.append(part or read)
            if part is not None:
                node.graph.erase_node(read)
        return build.call(aten.stack.default, parts, axis)

    def _is_ahead(self, source: Node, k: int) -> bool:
        """Whether an element lies where writes have yet to come."""
        if source not in self.writes:
            return False
        done, (_, begin, end) = self.writes[source], _place(source)
        return k < done.begin if begin == done.begin and end < done.end else k >= done.end

    def _behind(self, read: Node) -> Node | None:
        """What was written or appended where `read` reads, if it was so as a whole; else it reads
        of what was there before."""
        while True:
            part = behind_other_writes(read, self.writes)
            if not is_op(read, *READS):  # all that was written there, with an axis more
                return None
            source, axis, begin, *rest = cast(Any, read.args)
            if part is not None or not is_op(source, aten.cat.default) or source.args[1] != axis:
                return part
            width = rest[0] - begin if rest else 1
            begin -= shape(source)[axis]
            for piece in reversed(source.args[0]):
                begin += shape(piece)[axis]
                if begin >= 0:
                    break
            if value(piece).dtype != value(source).dtype or begin + width > shape(piece)[axis]:
                return None
            if rest and (begin, width, rest[1]) == (0, shape(piece)[axis], 1):
                return cast(Node, piece)
            if not rest and is_op(piece, aten.unsqueeze.default) and shape(piece)[axis] == 1 \
                    and piece.args[1] % len(shape(piece)) == axis:
                return cast(Node, piece.args[0])
            read.args = (piece, axis, begin, *([begin + width, rest[1]] if rest else []))

    def _read_once(self, read: Node) -> Node:
        """An element, read where its source is made and not where the window is: windows further
        on read fewer such elements."""
        if read.args not in self.known:
            after = cast(Node, read.args[0]).next
            while after.op == "placeholder":
                after = after.next
            build = self.build(after)
            made = build.call(aten.select.int, *read.args)
            self.known[read.args] = build.call(aten.alias.default, made)
        return self.known[read.args]


def _grows(node: Node, writes: Mapping[Node, Written]) -> bool:
    """Whether one element was just written, or element after element is appended."""
    if node in writes:
        _, begin, end = _place(node)
        return end == begin + 1
    if not is_op(node, aten.cat.default) or not any(is_op(u, aten.cat.default) for u in node.users):
        return False
    parts, axis = cast(tuple[list[Node], int], node.args)
    return sum(shape(part)[axis] > 1 for part in parts) <= 1


def _place(node: Node) -> tuple[int, int, int]:
    """Axis, begin and end of a read or write (of normal arguments)."""
    axis, begin, *rest = cast(list[int], node.args[2 if is_op(node, *WRITES) else 1 :])
    return axis, begin, rest[0] if rest else begin + 1
