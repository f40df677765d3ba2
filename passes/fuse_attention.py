"""softmax(q·kᵀ·scale + mask)·v, written out → scaled_dot_product_attention.

Before:
    (q @ k.mT / d ** 0.5).softmax(-1) @ v
After:
    scaled_dot_product_attention(q, k, v, scale=1 / d ** 0.5)
Wins:
    The scores need not exist in memory (Dao et al., "FlashAttention", 2022), forward and
    backward.
Sound if:
    1. the softmax runs over the last axis and nothing else reads the scores or the weights;
    2. between the product and the softmax there is at most a scale (a number), then at most
       one mask (added, or filled with -inf);
    3. q, k and v have the same leading axes and dtype.
Skips:
    weights that are used elsewhere or pass through dropout; scales that are tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, prod
from typing import Any, ClassVar, cast

from torch.fx import Node

from ..optimizer.builder import Builder
from ..optimizer.facts import Facts, aten, is_op, shape, source_line, value
from ..optimizer.rewrite import Rewrite, Skip


@dataclass(frozen=True)
class FuseAttention:
    """Use torch's fused attention; see the module's docstring."""

    name: ClassVar[str] = "fuse-attention"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for node in facts.operations:
            if not is_op(node, aten.matmul.default, aten.bmm.default):
                continue
            weights = cast(Node, node.args[0])
            if not is_op(weights, aten.softmax.int, aten._softmax.default):
                continue
            found = attention(node, weights)
            line = source_line(node)
            if isinstance(found, str):
                yield Skip(self.name, found, line)
                continue
            summary = "softmax attention → one fused operation"
            yield Rewrite(self.name, summary, line, node, (node,), found.build)


@dataclass(frozen=True)
class Attention:
    """The parts of an attention that was written out."""

    query: Node
    key_transposed: Node
    values: Node
    scale: float
    mask: Node | None = None
    fills: bool = False  # the mask says where to fill with -inf, not what to add

    def build(self, build: Builder) -> list[Node]:
        rank = len(shape(self.query))
        key = build.permute(self.key_transposed, [*range(rank - 2), rank - 1, rank - 2])
        four = [self._as_four(build, n) for n in (self.query, key, self.values)]
        mask = self._mask(build)
        made = build.call(
            aten.scaled_dot_product_attention.default, *four, attn_mask=mask, scale=self.scale
        )
        return [build.reshape(made, [*shape(self.query)[:-1], shape(self.values)[-1]])]

    def _as_four(self, build: Builder, node: Node) -> Node:
        """Batch, heads, positions, features: the form in which all devices have a fast kernel."""
        sizes = shape(node)
        lead = sizes[:-2]
        if len(sizes) == 4:
            return node
        return build.reshape(node, [prod(lead[:-1]), *(lead[-1:] or (1,)), *sizes[-2:]])

    def _mask(self, build: Builder) -> Node | None:
        if self.mask is None:
            return None
        mask = build.call(aten.logical_not.default, self.mask) if self.fills else self.mask
        lead, sizes = shape(self.query)[:-2], shape(mask)
        sizes = (1,) * (2 - len(sizes)) + sizes  # the operation wants two axes at least
        mask = build.reshape(mask, sizes)
        if len(lead) == 2:
            return mask
        return self._as_four(build, build.call(aten.expand.default, mask, [*lead, *sizes[-2:]]))


def attention(product: Node, weights: Node) -> Attention | str:
    """The attention that ends in `product`, or which condition it misses."""
    values = cast(Node, product.args[1])
    axis = cast(int, weights.args[1])
    if axis not in (-1, len(shape(weights)) - 1):
        return "the softmax does not run over the last axis"
    if len(weights.users) > 1:
        return "the attention weights are used elsewhere"
    scores, mask, fills = _unmasked(cast(Node, weights.args[0]))
    scores, scale = _unscaled(scores)
    if scale is None:
        return "the scale is a tensor"
    if not is_op(scores, aten.matmul.default, aten.bmm.default):
        return "what is under the softmax is no product of two matrices"
    if len(scores.users) > 1:
        return "the scores are used elsewhere"
    query, key = cast(tuple[Node, Node], scores.args)
    parts = (query, key, values)
    if len({shape(n)[:-2] for n in parts}) > 1 or len({value(n).dtype for n in parts}) > 1:
        return "query, key and value differ in leading axes or dtype"
    if len(shape(query)) < 2 or (mask is not None and len(shape(mask)) > len(shape(scores))):
        return "query or mask has too few or too many axes"
    return Attention(query, key, values, scale, mask, fills)


def _unmasked(scores: Node) -> tuple[Node, Node | None, bool]:
    if is_op(scores, aten.masked_fill.Scalar) and scores.args[2] == -inf:
        return cast(Node, scores.args[0]), cast(Node, scores.args[1]), True
    if is_op(scores, aten.add.Tensor) and isinstance(scores.args[1], Node):
        first, second = cast(tuple[Node, Node], scores.args)
        if value(second).dtype == value(scores).dtype and shape(first) == shape(scores):
            return first, second, False
    return scores, None, False


def _unscaled(scores: Node) -> tuple[Node, float | None]:
    if not is_op(scores, aten.div.Tensor, aten.mul.Tensor):
        return scores, 1.0
    inner, by = cast(tuple[Node, Any], scores.args[:2])
    if isinstance(by, Node):
        return scores, None
    return inner, (1.0 / by if is_op(scores, aten.div.Tensor) else float(by))
