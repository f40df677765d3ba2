"""x + a·b → addcmul(x, a, b).

Before:
    h = decay * h + u;  lanes + output * post
After:
    h = torch.addcmul(u, decay, h);  torch.addcmul(lanes, output, post)
Wins:
    One operation instead of two: less overhead in small loops, one pass less over large values.
Sound if:
    1. nothing else reads the product;
    2. all three have the result's dtype, a floating or complex one;
    3. neither sum nor product is scaled by a number.
    The product may keep more digits than before.
Skips:
    products that are read elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

from torch.fx import Node

from ..optimizer.builder import Builder
from ..optimizer.facts import Facts, aten, is_inexact, is_op, is_tensor, source_line, value
from ..optimizer.rewrite import Rewrite, Skip


@dataclass(frozen=True)
class FuseMultiplyAdd:
    """Fuse a product into the sum that takes it; see the module's docstring."""

    name: ClassVar[str] = "fuse-multiply-add"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        taken: set[Node] = set()
        for node in facts.operations:
            if not is_op(node, aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
                continue
            product = product_in(node)
            if product is None or product in taken:
                continue
            if len(product.users) > 1:
                reason = "the product in a sum is read elsewhere too"
                yield Skip(self.name, reason, source_line(node))
                continue
            taken |= {node, product}
            yield fused(self.name, node, product)


def product_in(node: Node) -> Node | None:
    """The operand of a sum (of a difference, the second) that is a product of its dtype."""
    operands = cast(list[Node], list(node.args))
    if not all(map(is_tensor, operands)) or not is_inexact(node):
        return None
    candidates = operands if is_op(node, aten.add.Tensor) else operands[1:]
    for product in reversed(candidates):
        if is_op(product, aten.mul.Tensor) and all(map(is_tensor, product.args)):
            parts = cast(tuple[Node, ...], (*operands, *product.args))
            if all(value(p).dtype == value(node).dtype for p in parts):
                return product
    return None


def fused(pass_name: str, node: Node, product: Node) -> Rewrite:
    sign = 1 if is_op(node, aten.add.Tensor) else -1

    def build(builder: Builder) -> list[Node]:
        first, second = node.args[:2]  # as they are now: one may have been fused itself
        other = first if second is product else second
        named = {} if sign == 1 else {"value": -1}
        return [builder.call(aten.addcmul.default, other, *product.args, **named)]

    return Rewrite(pass_name, f"x {'+' if sign == 1 else '-'} a·b → addcmul", source_line(node),
                   node, (node,), build)
