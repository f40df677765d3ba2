"""One operation on one step's values → the same operation on all steps' values at once.

A lane value holds the values of all steps, stacked on its lane axis. Common operations have
a rule by family, which keeps them what they are (a `linear` stays one `linear` of more rows);
every other operation goes through `torch.vmap`. A rule may decline; then the caller keeps a
loop. Every result is checked against the shape and dtype that a single step has.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .batching_rules import RULES, pointwise
from .facts import apart, argument, aten, is_op, is_random, is_scan, shape, value
from .lane import Lane, Lanes, Outcome, Rule

log = logging.getLogger(__name__)

INACCURATE = tuple(  # torch.vmap computes them in float32, whatever the dtype
    getattr(packet, name) for packet in (aten.linspace, aten.logspace)
    for name in ("Tensor_Tensor", "Tensor_Scalar", "Scalar_Tensor")
)


def _index_fill(x: Tensor, axis: int, index: Tensor, number: Any) -> Tensor:
    """As a write: `torch.vmap` of the fill takes places below 0 for those of another step."""
    if not isinstance(number, Tensor):
        number = torch.full((), number, dtype=x.dtype, device=x.device)
    return x.index_put([*[None] * (axis % x.dim()), index], number)


INSTEAD: dict[Any, Any] = dict.fromkeys(  # of what torch.vmap gets wrong
    (aten.index_fill.int_Scalar, aten.index_fill.int_Tensor), _index_fill)


class Batcher(Lanes):
    """Batches the operations of one scan's body over `size` steps."""

    def operation(self, node: Node, known: Mapping[Node, Any]) -> Outcome:
        """`node` with its operands looked up in `known`; None where it cannot be batched."""
        if is_random(node) or is_scan(node) or node.target in INACCURATE:
            return None
        if node.target is operator.getitem:
            source = known[cast(Node, node.args[0])]
            return cast(Lane, source[cast(int, node.args[1])])
        args, kwargs = torch.fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda n: known.get(n, n)
        )
        if is_op(node, aten.embedding.default) and (argument(node, "scale_grad_by_freq") or (
            isinstance(args[0], Lane) and argument(node, "padding_idx") >= 0
        )):
            return None  # its gradient depends on how it is called, or torch.vmap forgets it
        rule = RULES.get(node.target)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = pointwise
        outcome = _declining(rule, self, node, args, kwargs) if rule is not None else None
        if outcome is None or not self._right(node, outcome):
            outcome = _declining(_vmapped, self, node, args, kwargs)
        return outcome if outcome is not None and self._right(node, outcome) else None

    def _right(self, node: Node, outcome: Lane | tuple[Lane, ...]) -> bool:
        lanes = outcome if isinstance(outcome, tuple) else (outcome,)
        single, _ = pytree.tree_flatten(node.meta["val"])
        return len(lanes) == len(single) and all(
            lane.sizes == tuple(one.shape)
            and value(lane.node).dtype == one.dtype
            and shape(lane.node)[lane.axis] == self.size
            for lane, one in zip(lanes, single, strict=True)
        )


def _declining(
    rule: Rule, b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Outcome:
    """What `rule` gives; None where it raises, which is how some say that they can't."""
    try:
        return rule(b, node, args, kwargs)
    except Exception:
        log.debug("no batching of %s", node.target, exc_info=True)
        return None


def _vmapped(b: Lanes, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    """Any operation through `torch.vmap`, traced to ATen and copied into the graph; None if it
    becomes several of which one only raises, as `linalg.lu_factor` does: nothing would keep it."""
    leaves, spec = pytree.tree_flatten(
        (list(args), dict(kwargs)), is_leaf=lambda x: isinstance(x, Lane)
    )
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (Lane, Node))]
    in_dims = tuple(leaves[i].axis if isinstance(leaves[i], Lane) else None for i in places)
    nodes = [leaves[i].node if isinstance(leaves[i], Lane) else leaves[i] for i in places]

    def one_step(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        positional, named = pytree.tree_unflatten(filled, spec)
        called: Any = INSTEAD.get(node.target, node.target)
        return called(*positional, **named)

    functorch: Any = torch._C._functorch
    fallback = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)  # its fallback is a loop: better one of ours
    try:
        with b.build.mode, torch.no_grad():
            batched = torch.vmap(one_step, in_dims=in_dims, out_dims=0)
            traced = make_fx(torch.func.functionalize(batched))(*apart(nodes))
    finally:
        functorch._set_vmap_fallback_enabled(fallback)
    return _inlined(b, traced.graph, nodes)


def _inlined(b: Lanes, graph: torch.fx.Graph, nodes: Sequence[Node]) -> Outcome:
    known: dict[Node, Node] = {}
    inputs = iter(nodes)
    for inner in graph.nodes:
        if inner.op == "placeholder":
            known[inner] = next(inputs)
        elif inner.op == "output":
            results = inner.args[0]
            many = isinstance(results, (list, tuple))
            lanes = tuple(Lane(known[r], 0) for r in (results if many else [results]))
            return lanes if many else lanes[0]
        elif inner.op != "call_function" or _only_raises(inner):
            return None
        else:
            args, kwargs = torch.fx.node.map_arg(
                (inner.args, dict(inner.kwargs)), known.__getitem__
            )
            known[inner] = b.call(inner.target, *args, **kwargs)
    return None


def _only_raises(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and not node.target._schema.returns
