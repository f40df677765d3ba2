"""Which nodes of a graph have lines of their own in its source, and when they are used last."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import cast

from torch.fx import GraphModule, Node

from .builder import output_node, placeholders
from .facts import aten, body_of, has_body, is_op, is_tensor, stacked_as


def from_loop(node: Node) -> bool:
    """Whether `_loop` has written `node` already: a loop's result, or its one permute."""
    if node.target is operator.getitem and has_body(node.args[0]):
        return True
    if not is_op(node, aten.permute.default):
        return False
    source = node.args[0]
    return (
        isinstance(source, Node) and from_loop(source) and source.target is operator.getitem
        and stacked_as(source)[0] is node
    )


def is_piece(node: Node) -> bool:
    """Whether `node` is bound where its split is written."""
    return node.target is operator.getitem and is_unpacked(cast(Node, node.args[0]))


def is_unpacked(node: Node) -> bool:
    """Whether `node` is a split each of whose pieces is used."""
    if not is_op(node, aten.split_with_sizes.default):
        return False
    places = {user.args[1] for user in node.users if user.target is operator.getitem}
    return len(places) == len(node.users) == len(cast(list[int], node.args[1]))


def front_axis(node: Node) -> int | None:
    """The axis that `node`, a permute, only moves to the front, if it is one."""
    if not is_op(node, aten.permute.default):
        return None
    first, *rest = cast(list[int], node.args[1])
    return first if rest == sorted(rest) else None


def folded(node: Node) -> bool:
    """Whether `node` is written in place: a permute that only feeds the steps of loops, or a
    range that only counts them."""
    if only_counts(node):
        return True
    if front_axis(node) is None or from_loop(node):
        return False
    return bool(node.users) and all(
        has_body(u) and node in cast(list[Node], u.args[2])
        and node not in cast(list[Node], u.args[1]) and node not in cast(list[Node], u.args[3])
        for u in node.users
    )


def only_counts(node: Node) -> bool:
    """Whether `node` is a range whose numbers no step of a loop reads."""
    return is_op(node, aten.arange.default) and bool(node.users) and all(
        has_body(u) and u.args[2] == [node] and node not in cast(list[Node], u.args[3])
        and not placeholders(body_of(u))[len(cast(list[Node], u.args[1]))].users
        for u in node.users
    )


def last_uses(graph_module: GraphModule) -> Mapping[Node, list[Node]]:
    """For each node, the tensors that nothing after it uses."""
    last: dict[Node, list[Node]] = {}
    end = output_node(graph_module)
    seen: set[Node] = set()

    def visit(user: Node, at: Node) -> None:
        for source in user.all_input_nodes:
            if folded(source):
                visit(source, at)
            elif source not in seen:
                seen.add(source)
                if source.op == "call_function" and at is not end and is_tensor(source):
                    last.setdefault(at, []).append(source)

    for node in reversed(list(graph_module.graph.nodes)):
        if not folded(node):
            visit(node, node)
    return last
