"""One way to write each thing, so that equal steps of a loop look equal.

Grad regions become `detach`es, multi-output splits become `select`s and `slice`s, each read
stands right before its reader, reads of what was just written become the written value, and
`view` becomes `reshape`, so that a later change of strides cannot break it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .builder import Builder, note_computed, placeholders, refresh
from .equal import merge_equal
from .facts import (
    AUTOCAST,
    READS,
    SUPERSEDED,
    WASTED,
    WRITES,
    aten,
    is_op,
    is_pure,
    is_random,
    is_region_marker,
    is_tensor,
    outside_regions,
    value,
)
from .normal_rules import RULES
from .written import Windows, Written, written

FEW = 3  # equal operations: two may be one step that begins with equal states
MOVES = (aten.unsqueeze.default, aten.squeeze.dim, aten.permute.default, aten.expand.default)


class UnsupportedRegion(Exception):
    """The graph holds a call that is neither an operator nor a known region marker."""


def normalize(graph_module: GraphModule, state_names: Sequence[str], mode: FakeTensorMode) -> None:
    """Bring a freshly traced graph into normal form, in place."""
    for node in graph_module.graph.nodes:
        note_computed(node)
    name_inputs(graph_module, state_names)
    drop_idle_regions(graph_module)
    detach_regions(graph_module, mode)
    mark_wasted(graph_module)
    simplify(graph_module, mode)
    remove_dead(graph_module)
    merge_equal(graph_module, FEW)
    sink_reads(graph_module)
    propagate(graph_module, mode)
    graph_module.recompile()


def mark_wasted(graph_module: GraphModule) -> None:
    """Mark what the model computes for nothing, where its line makes use of most it computes:
    in the last steps of loops, not in all but the last."""
    alike: dict[Any, list[Node]] = {}
    for node in filter(_is_plain, graph_module.graph.nodes):
        alike.setdefault((node.target, node.meta.get("stack_trace")), []).append(node)
    for nodes in alike.values():
        wasted = [n for n in nodes if not n.users]
        if 2 * len(wasted) < len(nodes):
            for node in wasted:
                node.meta[WASTED] = True


def _is_plain(node: Node) -> bool:
    """Whether a node computes a tensor whose size does not depend on numbers in others."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and is_pure(node) and is_tensor(node) \
        and torch.Tag.dynamic_output_shape not in target.tags


def name_inputs(graph_module: GraphModule, state_names: Sequence[str]) -> None:
    """Placeholders of the model's state carry its qualified names."""
    for position, node in enumerate(placeholders(graph_module)):
        if position < len(state_names):
            node.meta["state"] = state_names[position]
            wanted = re.sub(r"\W", "_", state_names[position])
        else:
            wanted = f"input_{position - len(state_names)}"
        node.name = graph_module.graph._graph_namespace.create_name(wanted, None)
        node.target = node.name


def drop_idle_regions(graph_module: GraphModule) -> None:
    """Autocast regions that switch off what is off go, as around rotary embeddings: a program
    serves calls with autocast as it is now."""
    on = {kind: torch.is_autocast_enabled(kind) for kind in AUTOCAST}
    before: dict[Node, bool] = {}  # what opens a region → whether autocast was on
    for node in list(filter(is_region_marker, graph_module.graph.nodes)):
        opens = node.args[0] if isinstance(node.args[0], Node) else node
        kind, _, enabled, _ = cast(tuple[str, Any, bool, bool], opens.args)
        if opens is node:
            before[node] = on.get(kind, True)
            on[kind] = enabled
        else:
            on[kind] = before[opens]
            if not enabled and not before[opens]:
                graph_module.graph.erase_node(node)
                graph_module.graph.erase_node(opens)


def detach_regions(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """Inside `no_grad`, every value that enters is detached; the region markers go."""
    enabled = True
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch._C._set_grad_enabled:
            if enabled and node.args[0]:
                raise UnsupportedRegion("forward enables gradients for a part of itself")
            enabled = bool(node.args[0])
            graph_module.graph.erase_node(node)
        elif is_region_marker(node):
            continue
        elif not isinstance(node.target, torch._ops.OpOverload) and (
            node.target is not operator.getitem
        ):
            raise UnsupportedRegion(f"the call {node.target} can't be kept in a graph")
        elif not enabled and node.target is not operator.getitem:
            build = Builder(graph_module, node, mode, {**node.meta})
            fresh = {
                n: build.call(aten.detach.default, n)
                for n in node.all_input_nodes
                if is_tensor(n) and not n.meta.get("no_grad")
            }
            for source, detached in fresh.items():
                node.replace_input_with(source, detached)
            node.meta["no_grad"] = True


def simplify(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """Apply the one-node rules of `RULES`, in program order; read behind writes elsewhere."""
    def build(node: Node) -> Builder:
        stamp = {k: v for k, v in node.meta.items() if k in ("stack_trace", "no_grad")}
        return Builder(graph_module, node, mode, stamp)

    writes: dict[Node, Written] = {}
    windows = Windows(build, writes)
    for node in list(outside_regions(graph_module.graph.nodes)):
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is None:
            continue
        found = rule(node, build(node))
        if found is None and is_op(node, *WRITES):
            writes[node] = written(node, writes)
        elif found is None and is_op(node, *READS):
            found = windows.read(node)
        if found is not None and found is not node:
            if node.meta.get(WASTED):
                found.meta[WASTED] = True
            node.replace_all_uses_with(found)
            graph_module.graph.erase_node(node)


def remove_dead(graph_module: GraphModule) -> None:
    """Remove what nobody uses, except random operations: they advance the generator.

    What the model itself computes for nothing stays until loops are folded: without its last
    update of the state, which only a next step would read, a last step looks unlike the others.
    """
    for node in reversed(list(graph_module.graph.nodes)):
        wasted = node.meta.get(WASTED) and not node.meta.get(SUPERSEDED)
        if not node.users and is_pure(node) and not wasted:
            graph_module.graph.erase_node(node)


def sink_reads(graph_module: GraphModule) -> None:
    """Give each argument that is a `select` or `slice`, or a view of one, its own, right before
    its reader.

    They stand in the order of the arguments, so that it is the same in every step of a loop,
    whichever reads were written first or shared.
    """
    graph = graph_module.graph
    reads: set[Node] = set()
    for node in graph.nodes:
        if is_op(node, *READS) or (is_op(node, *MOVES) and node.args[0] in reads):
            reads.add(node)
    for user in list(graph.nodes):
        if user.op != "call_function" or user in reads:
            continue

        def own(node: Node, moved: bool = True, user: Node = user) -> Node:
            if node not in reads or not (moved or is_op(node, *READS)):
                return node  # what a step reads of may be a view that all steps share
            source = own(cast(Node, node.args[0]), moved and not is_op(node, *READS))
            with graph.inserting_before(user):
                copied = graph.create_node(node.op, node.target, (source, *node.args[1:]), {})
            copied.meta = dict(node.meta)
            return copied

        user.args = torch.fx.node.map_arg(user.args, own)
        user.kwargs = torch.fx.node.map_arg(user.kwargs, own)
    for node in reversed(list(graph.nodes)):
        if node in reads and not node.users:
            graph.erase_node(node)


def propagate(graph_module: GraphModule, mode: FakeTensorMode, exact: bool = False) -> None:
    """Make every fake result true again, from the placeholders on; strides may have changed.

    The results of loops count as contiguous, unless `exact`. An operation that refuses its
    inputs' strides gets contiguous ones.
    """
    for node in list(outside_regions(graph_module.graph.nodes)):
        if node.op != "call_function":
            continue
        try:
            refresh(node, mode, exact)
        except RuntimeError:
            if is_random(node):
                raise
            build = Builder(graph_module, node, mode)
            for source in node.all_input_nodes:
                if is_tensor(source) and not value(source).is_contiguous():
                    node.replace_input_with(source, build.call(aten.contiguous.default, source))
            refresh(node, mode, exact)
