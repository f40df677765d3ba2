"""A loop's last step without the update that only a next step would read.

Such an update has no gradient. In a loop whose steps are all alike its gradient is zero times
what it computes from, which is NaN where that is NaN or infinite. Where gradients count, the last
step therefore stands behind the loop, without its update.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .apply import apply
from .builder import Builder, build_constant, output_node, placeholders
from .distribute import replacing
from .facts import (
    all_graphs,
    aten,
    behind,
    body_of,
    is_random,
    is_scan,
    is_view,
    stacked_as,
    trips,
)


def last_steps_apart(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """Take the last step out of each scan that wastes a part of it."""
    scans = [(graph, node) for graph in all_graphs(graph_module) for node in graph.graph.nodes
             if is_scan(node) and _wastes(node)]
    for graph, scan in scans:
        summary = "the last step apart"
        apply(graph, [replacing("reroll-loops", summary, scan, partial(_apart, scan))], mode)


def _wastes(scan: Node) -> bool:
    """Whether the last step computes what nobody reads."""
    if is_random(scan):
        return False
    needed = _needed(scan)
    return any(n.op == "call_function" and not is_view(n) and n not in needed
               for n in body_of(scan).graph.nodes)


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
