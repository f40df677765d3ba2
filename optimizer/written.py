"""What writes to parts of a tensor wrote, and what a read behind them sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from .facts import WRITES, aten, is_op, value

LONGEST_WALK = 64  # writes looked back through, one by one, for the one that a read sees


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


def _place(node: Node) -> tuple[int, int, int]:
    """Axis, begin and end of a read or write (of normal arguments)."""
    axis, begin, *rest = cast(list[int], node.args[2 if is_op(node, *WRITES) else 1 :])
    return axis, begin, rest[0] if rest else begin + 1
