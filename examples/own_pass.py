"""A pass of your own, added to looplift's.

    python examples/own_pass.py
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import looplift
import torch
from looplift.optimizer.builder import Builder
from looplift.optimizer.facts import Facts, aten, is_op, source_line
from looplift.optimizer.rewrite import Rewrite, Skip
from looplift.passes import ORDER
from torch import Tensor, nn
from torch.fx import Node


@dataclass(frozen=True)
class DoubleNegation:
    """neg(neg(x)) → x."""

    name: ClassVar[str] = "double-negation"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for node in facts.operations:
            if not is_op(node, aten.neg.default):
                continue
            inner = node.args[0]
            if not is_op(inner, aten.neg.default):
                yield Skip(self.name, "what is negated is no negation", source_line(node))
                continue
            assert isinstance(inner, Node)

            def build(builder: Builder, inner: Node = inner) -> list[Node]:
                return [inner.args[0]]  # type: ignore[list-item]

            yield Rewrite(self.name, "neg(neg(x)) → x", source_line(node), node, (node,), build)


class Negates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-x.neg())


def main() -> looplift.OptimizedModule:
    passes = (*ORDER, DoubleNegation())
    fast = looplift.apply_passes(Negates(), (torch.randn(5),), passes=passes, measure=False)
    print(fast.code)
    return fast


if __name__ == "__main__":
    main()
