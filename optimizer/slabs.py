"""A scan over all steps → a scan over slabs of steps, each of which is a scan of its own.

What is batched then needs the memory of one slab. (Strip-mining: Allen and Kennedy,
"Optimizing Compilers for Modern Architectures", 2001, section 5.)
"""

from __future__ import annotations

from typing import cast

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

from .builder import Builder, output_node
from .distribute import TAKEN_APART, replacing
from .facts import aten, body_of, shape, trips, value
from .rewrite import Rewrite


def in_slabs(pass_name: str, scan: Node, size: int) -> Rewrite:
    """The rewrite that runs `scan`, of more than `size` steps, in slabs of so many."""
    return replacing(pass_name, f"{trips(scan)} steps → slabs of {size}", scan,
                     lambda b: _slabs(b, scan, size))


def _slabs(build: Builder, scan: Node, size: int) -> list[Node]:
    """The scan's results: final carries, then per-step outputs stacked on axis 0."""
    carries, slices, fixed = (cast(list[Node], a) for a in scan.args[1:4])
    count, held = trips(scan) // size, len(carries)
    whole = count * size
    slabs = [build.reshape(build.slice(s, 0, 0, whole), [count, size, *shape(s)[1:]])
             for s in slices]
    body = _slab_body(scan, size, build.mode)
    results = build.scan(body, carries, slabs, fixed)
    cast(Node, results[0].args[0]).meta[TAKEN_APART] = True
    stacks = [build.reshape(r, [whole, *shape(r)[2:]]) for r in results[held:]]
    if whole == trips(scan):
        return [*results[:held], *stacks]
    behind = [build.slice(s, 0, whole, trips(scan)) for s in slices]
    rest = build.scan(body_of(scan), results[:held], behind, fixed)
    return [*rest[:held], *(build.call(aten.cat.default, [stack, tail], 0)
                            for stack, tail in zip(stacks, rest[held:], strict=True))]


def _slab_body(scan: Node, size: int, mode: FakeTensorMode) -> GraphModule:
    """A body that scans one slab."""
    graph, kinds = Graph(), ("carry", "slice", "invariant")
    heads: list[list[Node]] = []
    for name, outer in zip(kinds, (cast(list[Node], a) for a in scan.args[1:4]), strict=True):
        heads.append([graph.placeholder(f"{name}_{k}") for k in range(len(outer))])
        for head, node in zip(heads[-1], outer, strict=True):
            with mode:
                head.meta["val"] = value(node)[:size] if name == "slice" else value(node)
    graph.output(())
    body = GraphModule(Module(), graph)
    end = output_node(body)
    build = Builder(body, end, mode, {"stack_trace": scan.meta.get("stack_trace")})
    made = build.scan(body_of(scan), *heads)
    end.args = (tuple(made),)
    body.recompile()
    return body
