"""A loop's last step without the update that only a next step would read.

Such an update has no gradient. In a loop whose steps are all alike its gradient is zero times
what it computes from, which is NaN where that is NaN or infinite. A kernel's walk back leaves it
out (see `unread`); where gradients count and something else comes of the loop, its last step
stands behind it, without its update.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from typing import Any, cast

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .apply import apply
from .builder import Builder, build_constant, output_node, placeholders
from .distribute import replacing, split
from .facts import (
    all_graphs,
    aten,
    behind,
    body_of,
    has_body,
    is_kernel,
    is_random,
    is_scan,
    is_view,
    stacked_as,
    trips,
)
from .packing import of_call
from .step import traced
from .unread import unread


def wasting(graph_module: GraphModule) -> list[Node]:
    """The scans whose last step computes what nobody reads."""
    return [node for graph in all_graphs(graph_module) for node in graph.graph.nodes
            if is_scan(node) and wastes(node)]


def wastes(scan: Node) -> bool:
    """Whether the last step of a scan, or of a loop, computes what nobody reads."""
    if is_random(scan):
        return False
    needed = _needed(scan)
    return any(n.op == "call_function" and not is_view(n) and n not in needed
               for n in body_of(scan).graph.nodes)


def may_stay(scan: Node) -> bool:
    """Whether all that the last step wastes is for states that a loop has to carry: a state that
    is known without the one before is no loop, and has no kernel."""
    parts = split(scan)
    return len(set().union(*parts.cycles)) == len(parts.carries)


def left_out(graph_module: GraphModule, given: Set[Node]) -> bool:
    """Whether nothing differentiates updates that nobody reads: kernels hold them, and what they
    read for them alone was `given` by the model."""
    return all(not (has_body(node) and wastes(node))
               and not (is_kernel(node) and _differentiated(node) - given)
               for graph in all_graphs(graph_module) for node in graph.graph.nodes)


def _differentiated(kernel: Node) -> set[Node]:
    """The operations whose results a kernel's last step reads for a wasted update alone."""
    step, sizes, counts = of_call(kernel)
    results: Any = traced(step, sizes).graph.output_node().args[0]
    read = {cast(int, user.args[1]) for user in kernel.users if user.users}
    if not unread(step, sizes, counts, tuple(k in read for k in range(len(results)))):
        return set()
    heads, needed = placeholders(traced(step, sizes)), behind(results[k] for k in read)
    found = set()
    for head, source in zip(heads[counts[0] :], cast(list[Node], kernel.args[2]), strict=False):
        while is_view(source):
            source = cast(Node, source.args[0])
        if head.users and head not in needed and source.op == "call_function":
            found.add(source)
    return found


def last_steps_apart(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """Take the last step out of each scan that wastes a part of it; the one before too, where it
    updates a state for the last step's update alone, and so on."""
    most = max((len(cast(list[Node], scan.args[1])) for scan in wasting(graph_module)), default=0)
    for _ in range(most):
        for scan in wasting(graph_module):
            owner = cast(GraphModule, scan.graph.owning_module)
            rewrite = replacing("reroll-loops", "the last step apart", scan, partial(_apart, scan))
            apply(owner, [rewrite], mode)


def _needed(scan: Node) -> set[Node]:
    """What of the body the last step has to compute."""
    results = cast(tuple[Node, ...], output_node(body_of(scan)).args[0])
    return behind(results[cast(int, user.args[1])] for user in scan.users if user.users)


def _apart(scan: Node, build: Builder) -> list[Node]:
    """The scan's results: final carries, then per-step outputs stacked on axis 0."""
    body, last, needed = body_of(scan), trips(scan) - 1, _needed(scan)
    carries, slices, fixed = (cast(list[Node], a) for a in scan.args[1:4])
    made = build.scan(body, carries, [build.slice(s, 0, 0, last) for s in slices], fixed)
    reads = [build.call(aten.select.int, s, 0, last) for s in slices]
    known = dict(zip(placeholders(body), [*made[: len(carries)], *reads, *fixed], strict=True))
    for node in body.graph.nodes:
        if node in needed and node not in known:
            known[node] = build_constant(build, body, node) if node.op == "get_attr" \
                else build.copy(node, known)
    results = cast(tuple[Node, ...], output_node(body).args[0])
    stacked = {cast(int, user.args[1]): stacked_as(user)[1] for user in scan.users}
    for k, result in enumerate(results):
        if result in known and k < len(carries):
            made[k] = known[result]
        elif result in known:
            axis = stacked.get(k, 0)
            parts = [build.move(made[k], 0, axis),
                     build.call(aten.unsqueeze.default, known[result], axis)]
            made[k] = build.move(build.call(aten.cat.default, parts, axis), axis, 0)
    return made
