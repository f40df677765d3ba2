"""What writes to parts of a tensor wrote, and what a read behind them sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch.fx import Node

from .facts import WRITES, aten, is_op

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
    """Let a read skip the writes elsewhere; what was written if it reads all of one write."""
    axis, begin, end = _place(node)
    source = cast(Node, node.args[0])
    for _ in range(LONGEST_WALK):
        if source not in writes or (at := _place(source))[0] != axis:
            break
        if at[1] < end and begin < at[2]:
            same = is_op(node, aten.select.int) == is_op(source, aten.select_scatter.default)
            if same and node.args[1:] == source.args[2:]:
                return cast(Node, source.args[1])
            break
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
