"""The differentiated step of a loop: one graph of all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .axes import RESHAPES
from .composed import Early
from .facts import aten, shape
from .pointwise import SAME, Unsupported, constant
from .step import Counts, Sizes, functional_graph, halves, step_function, traced


def joint(
    step: str, sizes: tuple[Sizes, ...], counts: Counts, wanted: tuple[bool, ...],
    without: frozenset[int],
) -> tuple[GraphModule, list[int]]:
    """The differentiated step, and which arguments it has gradients for, carries all; the
    outputs of the numbers `without` have none."""
    held, read, _ = counts
    function: Any = step_function(step)  # not its core operations: formulas of gradients are safer
    results: Any = traced(step, sizes).graph.output_node().args[0]
    made = [shape(n) for n in results]
    present: list[int] = []

    def backward(*given: Tensor) -> list[Tensor]:
        grads, rest = given[:held], given[held:]
        to_outputs = rest[held + read : held + read + len(made) - held]
        arguments = [*rest[: held + read], *rest[held + read + len(made) - held :]]
        inputs = [x.detach().requires_grad_(k < held or wanted[k])
                  for k, x in enumerate(arguments)]
        with torch.enable_grad():
            results = function(*inputs)
        to = [k for k, x in enumerate(inputs) if x.requires_grad]
        pairs = [(r, g) for k, (r, g) in enumerate(zip(results, (*grads, *to_outputs), strict=True))
                 if r.requires_grad and k - held not in without]
        found = torch.autograd.grad([r for r, _ in pairs], [inputs[k] for k in to],
                                    [g for _, g in pairs], allow_unused=True) if pairs \
            else [None] * len(to)
        present[:] = [k for k, g in zip(to, found, strict=True) if k < held or g is not None]
        return [torch.zeros_like(inputs[k]) if g is None else g
                for k, g in zip(to, found, strict=True) if k in present]

    like = [*sizes[:held], *sizes[: held + read], *made[held:], *sizes[held + read :]]
    try:
        with torch.enable_grad(), Early():
            graph_module = make_fx(backward)(*halves(like))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise Unsupported(f"the loop's step can't be differentiated ({reason})") from error
    graph_module = functional_graph(graph_module, like)  # gradients' formulas write in place
    _simplify(graph_module.graph)
    names = [*(f"carry_{k}" for k in range(held)), *(f"history_{k}" for k in range(held)),
             *(f"slice_{k}" for k in range(read)), *(f"grad_{k}" for k in range(len(made) - held)),
             *(f"invariant_{k}" for k in range(counts[2]))]
    heads = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    for head, name in zip(heads, names, strict=True):
        head.name = name
    return graph_module, present


def _simplify(graph: Graph) -> None:
    """Without operations that change no number; what fills an axis piece by piece joins pieces."""
    for node in list(graph.nodes):
        if _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):  # the last of a chain of additions first
        joined = _joined(graph, node) if node.target is aten.add.Tensor else None
        if joined is not None:
            node.replace_all_uses_with(joined)
    graph.eliminate_dead_code()
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):  # what formulas compute twice
        key = node.op == "call_function" and (node.target, repr(node.args), repr(node.kwargs))
        if key and seen.setdefault(key, node) is not node:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)


def _changes_nothing(node: Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(node.meta.get("val"), Tensor):
        return False
    if node.target in SAME:
        return bool(node.meta["val"].dtype == source.meta["val"].dtype)
    if node.target in RESHAPES or node.target is aten.expand.default:
        return shape(node) == shape(source)
    if node.target is aten.permute.default:
        return node.args[1] == list(range(len(shape(node))))
    return node.target is aten.mul.Scalar and node.args[1] in (1, 1.0)


def _joined(graph: Graph, node: Node) -> Node | None:
    """A sum of pieces, each written to zeros along one axis, as the join of them and zeros."""
    leaves, stack = [], [node]
    while stack:
        leaf = stack.pop()
        if leaf.target is aten.add.Tensor and not leaf.kwargs:
            stack += [a for a in leaf.args if isinstance(a, Node)]
        else:
            leaves.append(leaf)
    found = [_piece(leaf) for leaf in leaves]
    if any(p is None for p in found) or len({p.axis for p in found if p}) != 1:
        return None
    pieces = sorted((p for p in found if p), key=lambda p: p.start)
    starts, stops = [p.start for p in pieces], [p.start + shape(p.node)[p.axis] for p in pieces]
    size = shape(node)[pieces[0].axis]
    if starts != [0, *stops[:-1]] or stops[-1] != size:
        return None
    with graph.inserting_before(node):
        made = graph.call_function(aten.cat.default, ([p.node for p in pieces], pieces[0].axis))
    made.meta.update(node.meta)
    return made


@dataclass(frozen=True)
class _Piece:
    node: Node
    axis: int
    start: int


def _piece(node: Node) -> _Piece | None:
    """What is written to zeros, and where."""
    if node.target is not aten.slice_scatter.default:
        return None
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 2 :]]
    base, part, axis, start, _, step = given
    return _Piece(part, axis, start or 0) if constant(base) == 0 and step == 1 else None
