"""What a value needs that is computed after some place, and its computation at that place."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from .builder import Builder
from .facts import Facts, is_pure


def late(nodes: Iterable[Node], place: Node, facts: Facts) -> list[Node]:
    """What `nodes` need, they included, that is computed at `place` or after, in program order."""
    found: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if facts.order[node] >= facts.order[place] and node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return sorted(found, key=facts.order.__getitem__)


def can_be_early(nodes: Iterable[Node], place: Node, facts: Facts) -> bool:
    """Whether `nodes` can be computed before `place`: they don't need it, nor anything impure."""
    return all(node is not place and node in facts.movable and is_pure(node)
               for node in late(nodes, place, facts))


def hoisted(build: Builder, nodes: Iterable[Node], facts: Facts) -> dict[Node, Node]:
    """The late nodes of `nodes`, computed at the builder's place, by what they stand for."""
    moved: dict[Node, Node] = {}
    for node in late(nodes, build.at, facts):
        moved[node] = build.copy(node, moved)
    return moved
