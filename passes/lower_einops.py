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
from math import inf, prod
from typing import ClassVar, cast

import opt_einsum
from torch.fx import Node

from ..optimizer.builder import Builder
from ..optimizer.equation import longest, spelled_out
from ..optimizer.facts import Facts, aten, is_op, shape, source_line, value
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
        terms, nodes = self._without_ones(build)
        for step in self._path(terms, nodes):
            chosen = [(terms[i], nodes[i]) for i in step]
            for i in sorted(step, reverse=True):
                del terms[i], nodes[i]
            wanted = set(self.out).union(*terms)
            term, node = chosen[0]
            for other in chosen[1:]:
                term, node = pair(build, (term, node), other, wanted, self.out)
            terms.append(term)
            nodes.append(node)
        return [arranged(build, *summed(build, terms[0], nodes[0], set(self.out)), self.out)]

    def _without_ones(self, build: Builder) -> tuple[list[str], list[Node]]:
        """The operands without axes of one that are longer in another, along which they repeat."""
        size = longest(self.terms, map(shape, self.operands))
        terms, nodes = [], []
        for term, node in zip(self.terms, self.operands, strict=True):
            kept = [c for c, n in zip(term, shape(node), strict=True) if n == size[c] or n == 0]
            terms.append("".join(kept))
            nodes.append(build.reshape(node, [size[c] for c in kept]))
        return terms, nodes

    def _path(self, terms: Sequence[str], nodes: Sequence[Node]) -> list[tuple[int, ...]]:
        """Which operands to contract at each step, the results going to the end."""
        if len(terms) < 3:
            return [tuple(range(len(terms)))]
        equation, sizes = f"{','.join(terms)}->{self.out}", [shape(n) for n in nodes]
        path, _ = opt_einsum.contract_path(equation, *sizes, shapes=True, optimize="auto")
        return cast(list[tuple[int, ...]], path)


def summed(build: Builder, term: str, node: Node, kept: set[str]) -> tuple[str, Node]:
    """`node` summed over its letters that are not in `kept`."""
    gone = [i for i, letter in enumerate(term) if letter not in kept]
    if not gone:
        return term, node
    made = build.call(aten.sum.dim_IntList, node, gone)
    return "".join(c for c in term if c in kept), made


def arranged(build: Builder, term: str, node: Node, wanted: str) -> Node:
    return build.permute(node, [term.index(c) for c in wanted])


Operand = tuple[str, Node]  # the letters of a node's axes, and the node


def pair(build: Builder, left: Operand, right: Operand, wanted: set[str], out: str) -> Operand:
    """The contraction of two operands over the letters that nobody else wants."""
    (a, x), (b, y) = left, right
    a, x = summed(build, a, x, wanted | set(b))
    b, y = summed(build, b, y, wanted | set(a))
    shared = [c for c in a if c in b]
    inner = [c for c in shared if c not in wanted]
    if not inner:
        letters = sorted(set(a + b), key=lambda c: (out + a + b).index(c))
        return multiplied(build, (a, x), (b, y), letters)
    if len(inner) < len(shared):
        return batched(build, (a, x), (b, y), [c for c in shared if c in wanted], inner)
    if prod(shape(x)) > prod(shape(y)):
        (a, x), (b, y) = (b, y), (a, x)
    return applied(build, (a, x), (b, y), inner)


def applied(build: Builder, small: Operand, large: Operand, inner: list[str]) -> Operand:
    """A small matrix applied along the inner axes of a large operand, in the order it lies in.

    Axes that lie outside the inner ones become a batch, those inside them columns, so that
    the large operand is neither permuted nor copied. An axis along which it only repeats
    lies outermost: it is copied anyway, and the longest columns are the cheapest.
    """
    (a, x), (b, y) = small, large
    lying = sorted(b, key=lambda c: -(value(y).stride(b.index(c)) or inf))
    first = min(lying.index(c) for c in inner)
    lead = [c for c in lying[:first] if c not in inner]
    tail = [c for c in lying[first:] if c not in inner]
    rows = [c for c in a if c not in inner]
    size = dict(zip(a + b, shape(x) + shape(y), strict=True))
    count = {name: prod([size[c] for c in part])
             for name, part in (("lead", lead), ("tail", tail), ("rows", rows), ("inner", inner))}
    x = arranged(build, a, x, "".join(rows + inner))
    x = build.reshape(x, [count["rows"], count["inner"]])
    y = arranged(build, b, y, "".join(lead + inner + tail))
    letters = lead + rows + tail
    if not tail:
        y = build.reshape(y, [count["lead"], count["inner"]])
        made = build.call(aten.matmul.default, y, build.permute(x, [1, 0]))
    elif not lead:
        y = build.reshape(y, [count["inner"], count["tail"]])
        made = build.call(aten.matmul.default, x, y)
    else:
        y = build.reshape(y, [count["lead"], count["inner"], count["tail"]])
        sizes = [count["lead"], count["rows"], count["inner"]]
        made = build.call(aten.bmm.default, build.call(aten.expand.default, x, sizes), y)
    return "".join(letters), build.reshape(made, [size[c] for c in letters])


def batched(
    build: Builder, left: Operand, right: Operand, batch: list[str], inner: list[str]
) -> Operand:
    """A matrix product for each position of the batch axes."""
    (a, x), (b, y) = left, right
    rows, columns = ([c for c in t if c not in o] for t, o in ((a, b), (b, a)))
    size = dict(zip(a + b, shape(x) + shape(y), strict=True))
    lead = [size[c] for c in batch]
    count = [prod([size[c] for c in part]) for part in (rows, inner, columns)]
    x = arranged(build, a, x, "".join(batch + rows + inner))
    y = arranged(build, b, y, "".join(batch + inner + columns))
    x = build.reshape(x, [*lead, count[0], count[1]])
    y = build.reshape(y, [*lead, count[1], count[2]])
    letters = batch + rows + columns
    made = build.call(aten.matmul.default, x, y)
    return "".join(letters), build.reshape(made, [size[c] for c in letters])


def multiplied(
    build: Builder, left: Operand, right: Operand, letters: Sequence[str]
) -> Operand:
    """The outer (or elementwise) product, both operands broadcast over `letters`."""
    factors = []
    for term, node in (left, right):
        own = [c for c in letters if c in term]
        node = arranged(build, term, node, "".join(own))
        size = dict(zip(own, shape(node), strict=True))
        factors.append(build.reshape(node, [size.get(c, 1) for c in letters]))
    return "".join(letters), build.call(aten.mul.Tensor, *factors)
