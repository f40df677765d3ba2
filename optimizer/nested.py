"""A scan inside a loop → one scan whose steps work on all of the loop's steps at once.

`for head in heads: for t in range(T): h = f(h, x[head, t])` runs T steps on all heads: the body's
operations are batched like any others, with the outer loop's steps as lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

from .batching import Batcher
from .builder import Builder, build_constant, output_node, placeholders
from .facts import body_of, is_random, is_scan, is_tensor, value
from .lane import Lane
from .normal_form import remove_dead


def batched_scan(b: Batcher, scan: Node, known: Mapping[Node, Any]) -> tuple[Lane, ...] | None:
    """The results of `scan`, a node of a loop's body, for all steps of that loop.

    None where an operation of the scan's body cannot be batched.
    """
    if is_random(scan):
        return None
    body = body_of(scan)
    carries, slices, fixed = (cast(list[Node], scan.args[i]) for i in (1, 2, 3))
    outer = [known[n] for n in (*carries, *slices, *fixed)]
    held, read = len(carries), len(carries) + len(slices)
    lanes = [k for k, o in enumerate(outer) if isinstance(o, Lane) or k < held]
    # lanes go in front, behind the steps that the scan reads itself
    given = [b.repeated(o, int(held <= k < read)) if k in lanes else cast(Node, o)
             for k, o in enumerate(outer)]

    graph = Graph()
    inner: dict[Node, Any] = {}
    for k, head in enumerate(placeholders(body)):
        made = graph.placeholder(head.name)
        made.meta["val"] = value(given[k])[0] if held <= k < read else value(given[k])
        inner[head] = Lane(made, 0) if k in lanes else made
    graph.output(())
    batched = GraphModule(Module(), graph)
    build = Builder(batched, output_node(batched), b.build.mode, b.build.stamp)
    results = _batch_body(Batcher(build, b.size, 0), body, inner)
    if results is None:
        return None
    output_node(batched).args = (tuple(results),)
    remove_dead(batched)
    batched.recompile()
    made_nodes = b.build.scan(batched, given[:held], given[held:read], given[read:])
    return tuple(Lane(node, 0 if k < held else 1) for k, node in enumerate(made_nodes))


def _batch_body(b: Batcher, body: GraphModule, known: dict[Node, Any]) -> list[Node] | None:
    """The body's results for all lanes, lanes in front; operations go where `b` builds."""
    for node in body.graph.nodes:
        if node.op == "get_attr" and is_tensor(node):
            known[node] = build_constant(b.build, body, node)
        elif node.op == "call_function":
            inputs = [known[n] for n in node.all_input_nodes if n in known]
            if all(isinstance(i, Node) for i in inputs) and not is_scan(node):
                if is_random(node):
                    return None
                known[node] = b.build.copy(node, known)
                continue
            outcome = batched_scan(b, node, known) if is_scan(node) else b.operation(node, known)
            if outcome is None:
                return None
            known[node] = outcome
    results = [known[n] for n in cast(tuple[Node, ...], output_node(body).args[0])]
    return [b.repeated(r, 0) for r in results]

