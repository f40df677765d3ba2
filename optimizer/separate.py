"""A product with a concatenation in a loop's body → a sum of products, some of them early.

`linear(cat([x, h]), W) = linear(x, W[:, :n]) + linear(h, W[:, n:])`, and likewise for matmul
and for convolutions. Where `h` is on a carry's cycle and `x` is not, the first product can run
once for all steps, as recurrent cells do that have a weight of their own for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .builder import Builder, duplicate
from .cycles import reached_by
from .distribute import Split, replacing
from .facts import argument, aten, is_op, shape
from .normal_form import remove_dead
from .rewrite import Rewrite

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True)
class Product:
    """`node` multiplies the concatenation of `parts` with `weight`, whose `axis` they share."""

    node: Node
    parts: tuple[Node, ...]
    weight: Node
    axis: int
    bias: Node | None

    def separated(self, build: Builder, late: set[Node]) -> Node:
        """A product for each run of parts that are late, or not, added up: late ones last."""
        along = 1 if self.node.target in CONVOLUTIONS else -1
        sums: dict[bool, Node] = {}
        bias, begin = self.bias, 0
        for is_late, group in itertools.groupby(self.parts, late.__contains__):
            run = list(group)
            width = sum(shape(part)[along] for part in run)
            weight = build.slice(self.weight, self.axis, begin, begin + width)
            joined = run[0] if len(run) == 1 else build.call(aten.cat.default, run, along)
            more: tuple[Any, ...] = ()
            if self.bias is not None or len(self.node.args) > 3:
                more = (None if is_late else bias, *self.node.args[3:])
            made = build.call(self.node.target, joined, weight, *more)
            bias = bias if is_late else None
            earlier = sums.get(is_late)
            sums[is_late] = made if earlier is None else build.call(aten.add.Tensor, earlier, made)
            begin += width
        return build.call(aten.add.Tensor, sums[False], sums[True])


def separable(parts: Split) -> list[Product]:
    """The products on a cycle of which some parts are not on it."""
    reached = reached_by(parts.body.graph, parts.carries)
    return [
        product
        for node, number in parts.on_cycle.items()
        if (product := _product(node)) is not None
        and not reached[product.weight] & parts.cycles[number]
        and 0 < len([p for p in product.parts if reached[p] & parts.cycles[number]])
        < len(product.parts)
    ]


def separation(pass_name: str, parts: Split, products: Sequence[Product]) -> Rewrite:
    """The rewrite of a scan whose body has separable products, in the name of a pass."""
    def make(build: Builder) -> Sequence[Node]:
        body = _separated(parts, products, build.mode)
        return build.scan(body, *cast(Any, parts.scan.args[1:]))

    summary = f"{len(products)} × product of a concatenation → a sum of products"
    return replacing(pass_name, summary, parts.scan, make)


def _separated(parts: Split, products: Sequence[Product], mode: FakeTensorMode) -> GraphModule:
    """A copy of the body with its products separated."""
    reached = reached_by(parts.body.graph, parts.carries)
    body = duplicate(parts.body)
    known = dict(zip(parts.body.graph.nodes, body.graph.nodes, strict=True))
    for product in products:
        cycle = parts.cycles[parts.on_cycle[product.node]]
        late = {known[p] for p in product.parts if reached[p] & cycle}
        at = known[product.node]
        here = Product(at, tuple(known[p] for p in product.parts), known[product.weight],
                       product.axis, known[product.bias] if product.bias is not None else None)
        stamp = {"stack_trace": at.meta.get("stack_trace")}
        at.replace_all_uses_with(here.separated(Builder(body, at, mode, stamp), late))
        body.graph.erase_node(at)
    remove_dead(body)
    return body


def _product(node: Node) -> Product | None:
    if not is_op(node, aten.linear.default, aten.matmul.default, *CONVOLUTIONS):
        return None
    joined, weight, *more = cast(list[Node], node.args)
    if not is_op(joined, aten.cat.default) or len(shape(weight)) < 2:
        return None
    parts = tuple(cast(list[Node], joined.args[0]))
    axis = cast(int, argument(joined, "dim")) % len(shape(joined))
    if node.target in CONVOLUTIONS:
        fits = axis == 1 and len(shape(joined)) == len(shape(weight)) \
            and argument(node, "groups") == 1
        return Product(node, parts, weight, 1, more[0] if more else None) if fits else None
    if axis != len(shape(joined)) - 1 or len(shape(weight)) != 2:
        return None
    if is_op(node, aten.matmul.default):
        return Product(node, parts, weight, 0, None)
    return Product(node, parts, weight, 1, more[0] if more else None)
