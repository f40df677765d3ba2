"""Equal operations of a graph, computed once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .builder import Builder, output_node, placeholders
from .facts import (
    aten,
    body_of,
    flat_arguments,
    is_kernel,
    is_op,
    is_pure,
    is_scan,
    is_view,
    outside_regions,
    source_line,
    trips,
)

SMALL = 1 << 12  # elements of constant tensors that are compared


def merge_equal(graph_module: GraphModule, fewest: int = 2) -> None:
    """Compute once what at least `fewest` nodes compute alike: pure operations of equal arguments.
    Views are merged in any case.

    The one that stays moves up to its arguments: what every step of a loop computed from the
    same values is computed before the loop.
    """
    heads = placeholders(graph_module)
    seen: dict[Any, list[Node]] = {}
    first: dict[Node, Node] = {}  # of those that compute the same
    place = {node: (k, 0) for k, node in enumerate(graph_module.graph.nodes)}
    ends: dict[int, Node] = {}  # of what was moved behind a node, by that node's place
    merged: dict[Node, None] = {}
    outside = list(outside_regions(graph_module.graph.nodes))
    made = _made_alike(graph_module, outside) if fewest > 2 else {}
    for node in outside:
        if node.op not in ("call_function", "get_attr") or not is_pure(node):
            continue
        key = made.get(node) or _computed(graph_module, node, first)
        alike = seen.setdefault(key, [])
        alike.append(node)
        first[node] = alike[0]
    for kept, *others in seen.values():
        if others and (len(others) + 1 >= fewest or is_view(kept)):
            for node in others:
                node.replace_all_uses_with(kept)
                graph_module.graph.erase_node(node)
            merged[kept] = None
    movable = set(outside)
    for number, node in enumerate(sorted(merged, key=place.__getitem__), start=1):
        if node.all_input_nodes and movable.issuperset(node.all_input_nodes):
            last = max(node.all_input_nodes, key=place.__getitem__)
            anchor = last if last.op != "placeholder" else heads[-1]
            behind = place[anchor][0]
            ends.setdefault(behind, anchor).append(node)
            ends[behind], place[node] = node, (behind, number)


def merge_last_states(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """The last of a state's stacked values → the final carry, where the stack is read as a whole:
    who keeps the state keeps no other step."""
    for scan in filter(is_scan, list(graph_module.graph.nodes)):
        held = len(cast(list[Node], scan.args[1]))
        results = cast(tuple[Node, ...], output_node(body_of(scan)).args[0])
        for stack in list(scan.users):
            shown, users = results[cast(int, stack.args[1])], list(stack.users)
            if cast(int, stack.args[1]) < held or shown not in results[:held] \
                    or all(is_op(user, aten.select.int) for user in users):
                continue
            for last in [u for u in users if is_op(u, aten.select.int)
                         and u.args[1:] == (0, trips(scan) - 1)]:
                build = Builder(graph_module, stack, mode, dict(last.meta))
                last.replace_all_uses_with(
                    build.call(operator.getitem, scan, results.index(shown)))
                graph_module.graph.erase_node(last)


def merge_kernels(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """Run once what several kernels compute alike but for the axes of their outputs' steps: each
    output lies as its first reader wants it."""
    alike: dict[Any, list[Node]] = {}
    for node in filter(is_kernel, graph_module.graph.nodes):
        step, *given, _, reverse = cast(Any, node.args)
        alike.setdefault((step, reverse, *map(tuple, given)), []).append(node)
    for calls in alike.values():
        if len(calls) > 1:
            _merge(graph_module, calls, mode)


def _merge(graph_module: GraphModule, calls: Sequence[Node], mode: FakeTensorMode) -> None:
    step, carries, slices, fixed, axes, reverse = cast(Any, calls[0].args)
    held = len(carries)
    reads = [(cast(int, read.args[1]) - held, cast(Any, call.args[4]), read)
             for call in calls for read in call.users]
    chosen = {k: own[k] for k, own, _ in reversed(reads) if k >= 0}
    axes = [chosen.get(k, axis) for k, axis in enumerate(axes)]
    build = Builder(graph_module, calls[0], mode, dict(calls[0].meta))
    made = build.several(calls[0].target, step, carries, slices, fixed, axes, reverse)
    for k, own, read in reads:
        result = made[k + held]
        read.replace_all_uses_with(result if k < 0 else build.move(result, axes[k], own[k]))
        graph_module.graph.erase_node(read)
    for node in (*calls, *made):
        if not node.users:
            graph_module.graph.erase_node(node)


def _computed(graph_module: GraphModule, node: Node, first: dict[Node, Node]) -> Any:
    """What a node computes, of what; the `first` of equal nodes stands for all."""
    leaves, form = flat_arguments(node)
    target = node.target if node.op == "call_function" else _held(graph_module, node)
    return (node.op, target, repr(form), tuple(
        first.get(n, n) if isinstance(n, Node) else (type(n).__name__, repr(n)) for n in leaves
    ))


def _made_alike(graph_module: GraphModule, nodes: Sequence[Node]) -> dict[Node, Any]:
    """What is made from nothing, by its line and what it is.

    Each by itself where a line makes one thing a few times and then another, as `torch.full((), t
    // 10)` does in a loop: merged, these would leave the first of some steps alone.
    """
    found: dict[Any, list[tuple[Node, Any]]] = {}
    for node in nodes:
        if node.op in ("call_function", "get_attr") and is_pure(node) and not node.all_input_nodes:
            line = source_line(next(iter(node.users), node))
            kind = line, node.target if node.op == "call_function" else "constant"
            found.setdefault(kind, []).append((node, (line, _computed(graph_module, node, {}))))
    alike: dict[Node, Any] = {}
    for pairs in found.values():
        period = len({what for _, what in pairs})
        regular = all(a[1] == b[1] for a, b in zip(pairs, pairs[period:], strict=False))
        alike |= {node: what if regular else node for node, what in pairs}
    return alike


def _held(graph_module: GraphModule, node: Node) -> Any:
    """What tells an attribute from others: a constant tensor's dtype, device, shape and bytes."""
    held = getattr(graph_module, str(node.target))
    if type(held) is not Tensor or held.numel() > SMALL or held.layout is not torch.strided:
        return node.target
    numbers = held.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (held.dtype, held.device, held.shape, held.requires_grad,
            numbers.view(torch.uint8).numpy().tobytes())
