"""Products that share an operand → one product.

Before:
    q, k = x @ A, x @ B;  pre, mixed = P @ lanes, R @ lanes
After:
    q, k = (x @ cat([A, B], 1)).split(...);  pre, mixed = (cat([P, R]) @ lanes).split(...)
Wins:
    The shared operand is read once; one larger product does better than several small ones.
Sound if:
    1. the other operands have equal shapes but for the joined axis, and equal dtypes;
    2. none depends on another of the products, and what they need is pure, so that it can be
       computed before the first of the products.
Skips:
    1. the other operands together hold more than a quarter of what the shared one holds, and
       would be copied at every call;
    2. an operand depends on another of the products, or on something impure after it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

from torch.fx import Node

from ..optimizer.builder import Builder
from ..optimizer.facts import Facts, aten, is_op, shape, source_line, value
from ..optimizer.hoist import can_be_early, hoisted
from ..optimizer.rewrite import Rewrite, Skip

LARGEST_SHARE = 1 / 4  # of the shared operand's elements, in all that is joined


@dataclass(frozen=True)
class FuseProjections:
    """Multiply a shared operand once; see the module's docstring."""

    name: ClassVar[str] = "fuse-projections"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        alike: dict[object, list[Product]] = defaultdict(list)
        for node in facts.operations:
            for product in readings(node):
                alike[product.kind].append(product)
        taken: set[Node] = set()
        for products in alike.values():
            products = [p for p in products if p.node not in taken]
            if len(products) < 2:
                continue
            line = source_line(products[0].node)
            first = products[0].node
            group = [p for p in products if can_be_early(p.joined, first, facts)]
            if len(group) < 2:
                reason = "products share an operand, but the other operand of one depends on " \
                    "another"
                yield Skip(self.name, reason, line)
                continue
            size = sum(value(n).numel() for p in group for n in p.joined)
            if size > LARGEST_SHARE * value(group[0].shared).numel():
                reason = f"{len(group)} products share an operand, but what would be joined at " \
                    "every call is too large beside it"
                yield Skip(self.name, reason, line)
                continue
            taken |= {p.node for p in group}
            yield Rewrite(self.name, f"{len(group)} products of one operand → 1", line, first,
                          tuple(p.node for p in group), Joined(tuple(group), facts).build)


@dataclass(frozen=True)
class Product:
    """`node` as a product of `shared` and what can be joined with its like along an axis."""

    node: Node
    shared: Node
    joined: tuple[Node, ...]  # a matrix, and a linear's bias
    axis: int  # of the matrix, counted from the end
    result_axis: int

    @property
    def kind(self) -> tuple[object, ...]:
        """What products have in common that can be joined."""
        matrix = list(shape(self.joined[0]))
        matrix[self.axis] = -1
        dtypes = tuple(value(n).dtype for n in self.joined)
        return self.node.target, self.shared, self.axis, tuple(matrix), dtypes


def readings(node: Node) -> Iterable[Product]:
    """The ways to see `node` as a product with a shared operand."""
    if is_op(node, aten.linear.default):
        source, *joined = (n for n in node.args if n is not None)
        if len(shape(cast(Node, joined[0]))) == 2:
            yield Product(node, cast(Node, source), tuple(cast(list[Node], joined)), -2, -1)
    elif is_op(node, aten.matmul.default, aten.mm.default, aten.bmm.default):
        left, right = cast(tuple[Node, Node], node.args[:2])
        if left is not right and min(len(shape(left)), len(shape(right))) >= 2:
            yield Product(node, left, (right,), -1, -1)
            yield Product(node, right, (left,), -2, -2)


@dataclass(frozen=True)
class Joined:
    """Several products as one; the results are pieces of its result."""

    products: tuple[Product, ...]
    facts: Facts

    def build(self, build: Builder) -> list[Node]:
        first = self.products[0]
        moved = hoisted(build, [n for p in self.products for n in p.joined], self.facts)
        columns = zip(*(p.joined for p in self.products), strict=True)
        operands = [
            build.call(aten.cat.default, [moved.get(n, n) for n in column],
                       len(shape(column[0])) + first.axis if place == 0 else 0)
            for place, column in enumerate(columns)
        ]
        if first.axis == -2 and not is_op(first.node, aten.linear.default):
            whole = build.call(first.node.target, operands[0], first.shared)
        else:
            whole = build.call(first.node.target, first.shared, *operands)
        axis, start, pieces = len(shape(whole)) + first.result_axis, 0, []
        for product in self.products:
            stop = start + shape(product.joined[0])[product.axis]
            pieces.append(build.slice(whole, axis, start, stop))
            start = stop
        return pieces
