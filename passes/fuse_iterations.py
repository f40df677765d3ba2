"""The steps of Sinkhorn's, Newton–Schulz's and like iterations, each in one call.

Before:
    x = x - torch.logsumexp(x, dim=-1, keepdim=True)
    x = a * x + (b * gram + c * gram @ gram) @ x
After:
    x = torch.log_softmax(x, -1)
    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
Wins:
    Such matrices are small and the iterations many: the time goes into calls, not numbers.
    Scalings and sums happen inside the matrix product.
Sound if:
    1. nothing else reads the parts that are fused;
    2. all tensors have one floating or complex dtype;
    3. no scale is zero (addmm does not read a tensor that it scales by zero, NaN or not).
    The sum may keep more digits than before.
Skips:
    1. products that are read elsewhere;
    2. batches of products that would have to be copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch.fx import Node

from ..optimizer.builder import Builder
from ..optimizer.facts import (
    Facts,
    aten,
    is_inexact,
    is_op,
    is_tensor,
    shape,
    source_line,
    value,
)
from ..optimizer.rewrite import Rewrite, Skip


@dataclass(frozen=True)
class FuseIterations:
    """Fuse what stands around a reduction or a matrix product; see the module's docstring."""

    name: ClassVar[str] = "fuse-iterations"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        taken: set[Node] = set()
        for node in facts.operations:
            if is_log_softmax(node):
                yield log_softmax(self.name, node)
            if not is_op(node, aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
                continue
            found = scaled_sum(node)
            if found is None or found.product in taken or node in taken:
                continue
            if len(found.product.users) > 1:
                reason = "the matrix product in a sum is read elsewhere too"
                yield Skip(self.name, reason, source_line(node))
                continue
            if not found.fits:
                reason = "the matrix products in a sum would have to be copied into one batch"
                yield Skip(self.name, reason, source_line(node))
                continue
            taken |= {node, found.product}
            yield Rewrite(self.name, "b·X + c·A@B → addmm", source_line(node), node, (node,),
                          found.build)


def is_log_softmax(node: Node) -> bool:
    """Whether `node` is x - logsumexp(x) along one axis."""
    if not is_op(node, aten.sub.Tensor) or node.kwargs:
        return False
    total = node.args[1]
    if not is_op(total, aten.logsumexp.default):
        return False
    source, axes, keeps = (*cast(Node, total).args, False)[:3]
    single = isinstance(axes, (list, tuple)) and len(axes) == 1
    return source is node.args[0] and single and bool(keeps) and shape(node) != ()


def log_softmax(pass_name: str, node: Node) -> Rewrite:
    axis = cast(list[int], cast(Node, node.args[1]).args[1])[0]
    return Rewrite(pass_name, "x - logsumexp(x) → log_softmax(x)", source_line(node), node, (node,),
                   lambda build: [build.call(aten.log_softmax.int, node.args[0], axis)])


@dataclass(frozen=True)
class ScaledSum:
    """beta · `added` + alpha · `left` @ `right`, where `product` is the matrix product."""

    product: Node
    added: Node
    beta: Any
    alpha: Any
    left: Node
    right: Node

    @property
    def fits(self) -> bool:
        """Whether both operands are matrices, or batches of them with one batch axis, uncopied."""
        left, right = value(self.left), value(self.right)
        return left.ndim <= 3 or (left.is_contiguous() and right.is_contiguous())

    def build(self, build: Builder) -> list[Node]:
        named = {"beta": self.beta, "alpha": self.alpha}
        if len(shape(self.left)) == 2:
            return [build.call(aten.addmm.default, self.added, self.left, self.right, **named)]
        added, left, right = (self._batch(build, n) for n in (self.added, self.left, self.right))
        made = build.call(aten.baddbmm.default, added, left, right, **named)
        return [build.reshape(made, shape(self.product))]

    def _batch(self, build: Builder, node: Node) -> Node:
        """`node` as a batch (g, rows, columns)."""
        if len(shape(self.product)) == 3:
            return node
        return build.reshape(node, [-1, *shape(node)[-2:]])


def scaled_sum(node: Node) -> ScaledSum | None:
    """`node`, a sum or difference, as a `ScaledSum`, if it is one."""
    operands = cast(list[Node], list(node.args))
    if not all(map(is_tensor, operands)):
        return None
    signs = (1, 1 if is_op(node, aten.add.Tensor) else -1)
    for place in (1, 0):
        alpha, product = scaled(operands[place])
        if not is_op(product, aten.matmul.default, aten.mm.default, aten.bmm.default):
            continue
        left_scale, left = scaled(cast(Node, product.args[0]))
        right_scale, right = scaled(cast(Node, product.args[1]))
        beta, added = scaled(operands[1 - place])
        alpha *= signs[place] * left_scale * right_scale
        beta *= signs[1 - place]
        parts = (node, product, added, left, right)
        matrices = shape(node) == shape(product) == shape(added) and (
            shape(left)[:-2] == shape(right)[:-2] == shape(node)[:-2] and len(shape(node)) > 1)
        one_dtype = len({value(p).dtype for p in parts}) == 1
        if matrices and one_dtype and is_inexact(node) and alpha and beta:
            return ScaledSum(product, added, beta, alpha, left, right)
    return None


def scaled(node: Node) -> tuple[Any, Node]:
    """`node` as a number times another node that only it reads, or as 1 times itself."""
    if is_op(node, aten.mul.Tensor) and len(node.users) == 1:
        source, factor = node.args
        if isinstance(factor, (int, float)) and not isinstance(factor, bool):
            return factor, cast(Node, source)
    return 1, node
