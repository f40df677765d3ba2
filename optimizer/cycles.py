"""Which carries of a loop depend on which, and on one another."""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch.fx import Graph, Node


def reached_by(graph: Graph, carries: Sequence[Node]) -> dict[Node, set[int]]:
    """For each node, the carries of this step that it depends on."""
    reached: dict[Node, set[int]] = {c: {k} for k, c in enumerate(carries)}
    for node in graph.nodes:
        if node not in reached:
            reached[node] = set().union(*(reached[n] for n in node.all_input_nodes))
    return reached


def closure(direct: Sequence[Set[int]]) -> list[set[int]]:
    """What each needs, of what each needs directly.

    >>> closure([{1}, {2}, set()])
    [{1, 2}, {2}, set()]
    """
    closed = [set(d) for d in direct]
    for middle in range(len(closed)):
        for reach in closed:
            if middle in reach:
                reach |= closed[middle]
    return closed


def components(direct: Sequence[Set[int]]) -> list[tuple[int, ...]]:
    """Those that need one another together, each group after the groups that it needs.

    >>> components([{1}, {0, 2}, {2}, {0}])
    [(2,), (0, 1), (3,)]
    """
    closed = closure(direct)
    groups = {tuple(m for m in range(len(closed)) if m == k or (m in closed[k] and k in closed[m]))
              for k in range(len(closed))}
    return sorted(groups, key=lambda group: (len(closed[group[0]] | {group[0]}), group))
