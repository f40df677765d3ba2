"""einsum → matmul, multiply-and-sum, or sum, in the cheapest order.

Before:
    einsum("st,bnsd->bntd", H, x);  einsum("ab,bc,cd->ad", A, B, C)
After:
    H.mT @ x;  A @ (B @ C)
Wins:
    No parsing, no intermediate permutes; the contraction order of more than two operands is
    opt_einsum's. (Reshape and permute chains are composed by the normal form already.)
Sound if:
    no letter stands twice in one operand; the sum is re-associated, so that results may
    differ in the last bits.
Skips:
    repeated letters in one operand (a diagonal).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import opt_einsum
from torch.fx import Node

from ..optimizer.builder import Builder
from ..optimizer.facts import Facts, aten, is_op, shape, source_line
from ..optimizer.rewrite import Rewrite, Skip


@dataclass(frozen=True)
class LowerEinops:
    """Contract without einsum; see the module's docstring."""

    name: ClassVar[str] = "lower-einops"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for node in facts.operations:
            if not is_op(node, aten.einsum.default):
                continue
            equation, operands = cast(str, node.args[0]), cast(list[Node], node.args[1])
            terms, out = spelled_out(equation, [len(shape(o)) for o in operands])
            if any(len(set(term)) < len(term) for term in terms):
                yield Skip(self.name, f"{equation!r} takes a diagonal", source_line(node))
                continue
            contraction = Contraction(tuple(terms), out, tuple(operands))
            yield Rewrite(self.name, f"einsum {equation!r} → {contraction.shown}",
                          source_line(node), node, (node,), contraction.build)


def spelled_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The terms and the result of an equation, with letters for `...` and for an implied result."""
    equation = equation.replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        out = ("..." if "..." in left else "") + "".join(letters)
    free = [c for c in map(chr, [*range(65, 91), *range(97, 123)]) if c not in equation]
    hidden = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True)
         if "..." in t), default=0
    )
    dots = "".join(free[:hidden])
    spelled = [
        t.replace("...", dots[hidden - (rank - len(t.replace("...", ""))):] if "..." in t else "")
        for t, rank in zip(terms, ranks, strict=True)
    ]
    return spelled, out.replace("...", dots)


@dataclass(frozen=True)
class Contraction:
    """`operands`, whose axes are the letters of `terms`, summed over what is not in `out`."""

    terms: tuple[str, ...]
    out: str
    operands: tuple[Node, ...]

    @property
    def shown(self) -> str:
        if len(self.terms) == 1:
            return "sum"
        shared = set(self.terms[0]) & set(self.terms[1]) - set(self.out)
        if len(self.terms) > 2:
            return f"{len(self.terms) - 1} products"
        return "matmul" if shared else "multiply"

    def build(self, build: Builder) -> list[Node]:
        terms, nodes = list(self.terms), list(self.operands)
        if len(nodes) > 2:
            equation = f"{','.join(terms)}->{self.out}"
            sizes = [shape(n) for n in nodes]
            path, _ = opt_einsum.contract_path(equation, *sizes, shapes=True, optimize="optimal"
                                               if len(nodes) < 6 else "auto")
        else:
            path = [tuple(range(len(nodes)))]
        for step in path:
            chosen = [(terms[i], nodes[i]) for i in step]
            for i in sorted(step, reverse=True):
                del terms[i], nodes[i]
            wanted = set(self.out).union(*terms)
            term, node = chosen[0]
            for other in chosen[1:]:
                term, node = pair(build, (term, node), other, wanted)
            terms.append(term)
            nodes.append(node)
        return [arranged(build, *summed(build, terms[0], nodes[0], set(self.out)), self.out)]


def summed(build: Builder, term: str, node: Node, kept: set[str]) -> tuple[str, Node]:
    """`node` summed over its letters that are not in `kept`."""
    gone = [i for i, letter in enumerate(term) if letter not in kept]
    if not gone:
        return term, node
    made = build.call(aten.sum.dim_IntList, node, gone)
    return "".join(c for c in term if c in kept), made


def arranged(build: Builder, term: str, node: Node, wanted: str) -> Node:
    return build.permute(node, [term.index(c) for c in wanted])


def pair(
    build: Builder, left: tuple[str, Node], right: tuple[str, Node], wanted: set[str]
) -> tuple[str, Node]:
    """The contraction of two operands over the letters that nobody else wants."""
    (a, x), (b, y) = left, right
    a, x = summed(build, a, x, wanted | set(b))
    b, y = summed(build, b, y, wanted | set(a))
    batch = [c for c in a if c in b and c in wanted]
    inner = [c for c in a if c in b and c not in wanted]
    rows, columns = ([c for c in t if c not in o] for t, o in ((a, b), (b, a)))
    if not inner:
        return multiplied(build, (a, x), (b, y), batch + rows + columns)
    size = dict(zip(a + b, shape(x) + shape(y), strict=True))
    if not batch and len(rows) > 1 >= len(columns) and len(inner) == 1:
        x, y = arranged(build, a, x, "".join(rows + inner)), arranged(
            build, b, y, "".join(inner + columns))
        return "".join(rows + columns), build.call(aten.matmul.default, x, y)
    if not batch and len(columns) > 1 and len(rows) <= 1 and len(inner) == 1:
        return pair(build, (b, y), (a, x), wanted)

    def product(letters: Sequence[str]) -> int:
        count = 1
        for letter in letters:
            count *= size[letter]
        return count

    x = arranged(build, a, x, "".join(batch + rows + inner))
    y = arranged(build, b, y, "".join(batch + inner + columns))
    lead = [size[c] for c in batch]
    x = build.reshape(x, [*lead, product(rows), product(inner)])
    y = build.reshape(y, [*lead, product(inner), product(columns)])
    made = build.call(aten.matmul.default, x, y)
    return "".join(batch + rows + columns), build.reshape(
        made, [size[c] for c in batch + rows + columns]
    )


def multiplied(
    build: Builder, left: tuple[str, Node], right: tuple[str, Node], letters: Sequence[str]
) -> tuple[str, Node]:
    """The outer (or elementwise) product, both operands broadcast over `letters`."""
    factors = []
    for term, node in (left, right):
        own = [c for c in letters if c in term]
        node = arranged(build, term, node, "".join(own))
        size = dict(zip(own, shape(node), strict=True))
        factors.append(build.reshape(node, [size.get(c, 1) for c in letters]))
    return "".join(letters), build.call(aten.mul.Tensor, *factors)
