"""The backward of a fused scan: a step of its own, and what runs at once for all steps.

The differentiated step walks from the last step to the first; its carries are the gradients of
the carries. Products that do not lie on this cycle run outside it, one for all steps: those that
need no gradient before it, those that make the gradient of a matrix after it, where the sum over
the steps is part of the product. Other gradients of invariants are summed in the walk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from .axes import PERMUTES, PRODUCTS, RESHAPES, permutation
from .emit import emit
from .facts import aten, behind, shape
from .joint import joint
from .pointwise import Unsupported
from .step import Counts, Sizes, placed, remembered
from .unread import Unread

LINEAR = RESHAPES | PERMUTES | {
    aten.sum.dim_IntList, aten.expand.default, aten.neg.default, aten.clone.default,
    aten.detach.default, aten.alias.default}
TINY = 64  # numbers of a matrix: a product with it costs less in the walk than a call before it
SCALED = {aten.mul.Tensor, aten.div.Tensor}


@dataclass(frozen=True)
class Factor:
    """What a product multiplies: something known for all steps, its axes in another order."""

    name: str
    order: tuple[int, ...]  # of all steps' axes, steps first


@dataclass(frozen=True)
class Term:
    """A summand of an invariant's gradient: `chain`, linear, of the sum over steps of its root.

    The root is a sum that the walk carries, or of factors: the product of two, or one as it is.
    `chain` is the source of a function of one tensor. In the last steps, as many as `unread`,
    there is no summand.
    """

    chain: str
    carry: int = -1
    factors: tuple[Factor, ...] = ()
    unread: int = 0


@dataclass(frozen=True)
class Backward:
    """A differentiated step, and by name what it reads and makes for all steps.

    Names: `history_k` (of a carry), `slice_k`, `grad_k` (of an output), `before_k` (results of
    `before`, source of one step's products of `before_slices` and all invariants), `left_0` (how
    many steps come after), `to_slice_k`.
    """

    step: str
    sizes: tuple[Sizes, ...]  # of the step's arguments
    sums: tuple[Sizes, ...]  # of the carries beside the gradients of the carries
    slices: tuple[str, ...]
    invariants: tuple[int, ...]
    outputs: tuple[str, ...]
    before: str
    before_slices: tuple[str, ...]
    pieces: dict[str, tuple[str, int, int, int]]  # parts of outputs: which; axis, start, size
    to_invariants: dict[int, tuple[Term, ...]]

    @cached_property
    def factors(self) -> frozenset[str]:
        """What the products after the walk multiply."""
        return frozenset(f.name for terms in self.to_invariants.values() for t in terms
                         for f in t.factors)

    @cached_property
    def histories(self) -> list[int]:
        """The carries whose values at each step are read."""
        names = {*self.slices, *self.before_slices, *self.factors}
        return sorted(int(n.removeprefix("history_")) for n in names if n.startswith("history_"))


@remembered
def backward_of(
    step: str, sizes: tuple[Sizes, ...], counts: Counts, wanted: tuple[bool, ...],
    without: frozenset[int] = frozenset(), unread: tuple[tuple[int, int], ...] = (),
) -> Backward:
    """The backward of a step on arguments of `sizes`, as far as their gradients are `wanted`,
    where the outputs of the numbers `without` have none themselves, nor have updates of carries
    that are `unread` in so many of the last steps."""
    graph_module, present = joint(step, sizes, counts, wanted, without)
    return _Division(graph_module, counts, present).made(dict(unread))


def _pieces(wanted: dict[str, Node]) -> dict[str, tuple[str, int, int, int]]:
    """Those of the wanted values that are parts of others."""
    found: dict[str, tuple[str, int, int, int]] = {}
    for whole, node in wanted.items():
        if node.target is aten.cat.default:
            parts: Any = node.args[0]
            axis: Any = node.args[1] if len(node.args) > 1 else 0
            stops = list(accumulate(shape(p)[axis] for p in parts))
            for name, other in wanted.items():
                if other in parts and name not in found:
                    k = parts.index(other)
                    size = shape(other)[axis]
                    found[name] = whole, axis % len(shape(node)), stops[k] - size, size
    return found


class _Division:
    """A differentiated step, divided into what runs before, in and after the walk."""

    def __init__(self, graph_module: GraphModule, counts: Counts, present: list[int]) -> None:
        self.root, self.graph = graph_module, graph_module.graph
        self.counts, self.present = counts, present
        nodes = list(self.graph.nodes)
        self.heads = [n for n in nodes if n.op == "placeholder"]
        self.results = cast(list[Node], list(nodes[-1].args[0]))
        self.varies: set[Node] = set()  # from step to step
        self.walks: set[Node] = set()  # what depends on the walk's carries
        for node in nodes[:-1]:
            inputs = set(node.all_input_nodes)
            head = node.name if node in self.heads else "invariant"
            if not head.startswith("invariant") or not inputs.isdisjoint(self.varies):
                self.varies.add(node)
            if head.startswith("carry") or not inputs.isdisjoint(self.walks):
                self.walks.add(node)
        self.early = [n for n in nodes if n.target in PRODUCTS and n in self.varies
                      and n not in self.walks
                      and any(a not in self.varies and math.prod(shape(a)) > TINY
                              for a in n.all_input_nodes)]

    def made(self, unread: dict[int, int]) -> Backward:
        held, read, _ = self.counts
        found = {k - held - read: self._terms(n)
                 for k, n in zip(self.present[held:], self.results[held:], strict=True)
                 if k >= held + read}
        self._leave_out(unread)
        to = dict(zip(self.present[held:], self.results[held:], strict=True))
        wanted = {f"to_slice_{k - held}": node for k, node in to.items() if k < held + read}
        sums: list[Node] = []
        ends = {k: self._added([(self._summed(root), chain) for root, chain in terms], wanted)
                for k, terms in found.items()}
        for root, _ in [end for found in ends.values() for end in found]:
            if root.target in PRODUCTS:  # first: their factors may be what another root is
                self._factors(root, wanted)
        to_invariants = {k: tuple(self._term(root, chain, sums, wanted) for root, chain in found)
                         for k, found in ends.items()}
        pieces = _pieces(wanted)
        wanted = {name: node for name, node in wanted.items() if name not in pieces}
        graph_module, read_there = self._walk(self.results[:held], sums, list(wanted.values()))
        self.early = [n for n in self.early if n in read_there]
        fixed = [n for n in read_there if self._is_fixed(n)]
        before, heads = self._before() if self.early else ("", [])
        return Backward(
            _source(graph_module),
            tuple(shape(n) for n in (*self.heads[:held], *sums, *read_there)),
            tuple(shape(n) for n in sums),
            tuple(self._name(n) for n in read_there if n not in fixed),
            tuple(int(n.name.removeprefix("invariant_")) for n in fixed), tuple(wanted),
            before, tuple(n.name for n in heads), pieces, to_invariants,
        )

    def _leave_out(self, unread: dict[int, int]) -> None:
        """Gradients of updates that nobody reads are zero from now on, where others join them."""
        self.unread = Unread(self.graph, unread)
        self.results = [self.unread.read(n) for n in self.results]
        if self.unread.left is not None:
            self.heads.append(self.unread.left)

    def _summed(self, root: Node) -> Node:
        """What the sum of all steps adds up; factors of products are left out after the walk."""
        return root if root.target in PRODUCTS else self.unread.read(root)

    def _is_fixed(self, node: Node) -> bool:
        return node in self.heads and node.name.startswith("invariant_")

    def _name(self, node: Node) -> str:
        return f"before_{self.early.index(node)}" if node in self.early else node.name

    def _terms(self, node: Node, chain: tuple[Node, ...] = ()) -> list[tuple[Node, Any]]:
        """The summands of a gradient, each the end of a chain of linear operations."""
        source = node.args[0] if node.args else None
        if node.target is aten.add.Tensor and not node.kwargs and all(
            isinstance(a, Node) and shape(a) == shape(node) for a in node.args
        ):
            return [term for a in node.args for term in self._terms(cast(Node, a), chain)]
        scaled = node.target in SCALED and isinstance(node.args[1], (int, float))
        if isinstance(source, Node) and (node.target in LINEAR or scaled):
            return self._terms(source, (node, *chain))
        largest = max(math.prod(shape(h)) for h in self.heads)
        while chain and math.prod(shape(node)) > largest and node.target not in PRODUCTS:
            first, *rest = chain  # of this summand alone, where others join it before
            node = first if first.args[0] is node else self._made(
                first.target, node, *first.args[1:], like=first, **first.kwargs)
            chain = tuple(rest)
        return [(node, chain)]

    def _made(self, target: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        """An operation whose result has the size of another node."""
        with self.graph.inserting_before(self.graph.output_node()):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = like.meta["val"]
        return node

    def _added(
        self, terms: list[tuple[Node, Any]], wanted: dict[str, Node]
    ) -> list[tuple[Node, Any]]:
        """The terms; of those with equal chains that the walk sums, one, of the sum of roots."""
        made: list[tuple[Node, Any]] = []
        sums: dict[Any, int] = {}  # place in `made`
        for root, chain in terms:
            key = shape(root), tuple((n.target, repr(n.args[1:]), repr(n.kwargs)) for n in chain)
            if root.target in PRODUCTS or root in wanted.values():
                made.append((root, chain))
            elif key not in sums:
                sums[key] = len(made)
                made.append((root, chain))
            else:
                total = made[sums[key]][0]
                made[sums[key]] = self._made(aten.add.Tensor, total, root, like=root), chain
        return made

    def _term(
        self, root: Node, chain: tuple[Node, ...], sums: list[Node], wanted: dict[str, Node]
    ) -> Term:
        linear = self._chained(root, chain)
        if root.target in PRODUCTS:
            return Term(linear, factors=self._factors(root, wanted),
                        unread=self.unread.steps.get(root, 0))
        name = next((name for name, node in wanted.items() if node is root), None)
        if name is not None:
            return Term(linear, factors=(Factor(name, tuple(range(len(shape(root)) + 1))),))
        if root not in sums:
            sums.append(root)
        return Term(linear, carry=sums.index(root))

    def _chained(self, root: Node, chain: tuple[Node, ...]) -> str:
        graph = Graph()
        made = graph.placeholder("total")
        made.meta.update(root.meta)
        for node in chain:
            target: Any = node.target
            made = graph.call_function(target, (made, *node.args[1:]), node.kwargs)
            made.meta.update(node.meta)
        graph.output([made])
        return _source(GraphModule(self.root, graph))

    def _factors(self, product: Node, wanted: dict[str, Node]) -> tuple[Factor, ...]:
        """What a product multiplies; the walk returns what is not there before it."""
        made = []
        for factor in cast(tuple[Node, Node], product.args):
            order: Sequence[int] = range(len(shape(factor)))
            while factor.target in PERMUTES:
                moved = permutation(factor)
                factor, order = cast(Node, factor.args[0]), [moved[axis] for axis in order]
            place = (0, *(axis + 1 for axis in order))
            if factor in self.heads and not factor.name.startswith("carry_"):
                made.append(Factor(factor.name, place))
                continue
            factor = self.unread.read(factor)
            name = next((name for name, node in wanted.items() if node is factor),
                        f"factor_{len(wanted)}")
            wanted[name] = factor
            made.append(Factor(name, place))
        return tuple(made)

    def _walk(
        self, carries: list[Node], sums: list[Node], outputs: list[Node]
    ) -> tuple[GraphModule, list[Node]]:
        """The walk's step, and what it reads beside its carries."""
        held = self.counts[0]
        cut = {*self.heads, *self.early}
        needed = behind([*carries, *sums, *outputs], cut)
        order = [*self.heads[held:], *self.early]
        read = [n for n in order if n in needed]
        fixed = [n for n in read if self._is_fixed(n)]
        moving = [n for n in read if n not in fixed]
        if not moving:  # something has to say how many steps there are
            moving = [next(n for n in self.heads if n.name.startswith("slice_"))]
        graph = Graph()
        inner: dict[Node, Node] = {}
        for node in self.heads[:held]:
            inner[node] = graph.placeholder(node.name)
        totals = [graph.placeholder(f"sum_{k}") for k in range(len(sums))]
        for node in (*moving, *fixed):
            inner[node] = graph.placeholder(self._name(node))
        for node in self.graph.nodes:
            if node in inner:
                inner[node].meta.update(node.meta)
            elif node in needed and node.op != "output":
                inner[node] = graph.node_copy(node, inner.__getitem__)
        for total, node in zip(totals, sums, strict=True):
            total.meta.update(node.meta)
        added = [graph.call_function(aten.add.Tensor, (t, inner[n]))
                 for t, n in zip(totals, sums, strict=True)]
        graph.output([*(inner[n] for n in carries), *added, *(inner[n] for n in outputs)])
        return GraphModule(self.root, graph), [*moving, *fixed]

    def _before(self) -> tuple[str, list[Node]]:
        """The products of one step that need no gradient, and what they read per step."""
        needed = behind(self.early)
        read = [h for h in self.heads if h in needed and not self._is_fixed(h)]
        graph, inner = Graph(), {}
        for node in (*read, *filter(self._is_fixed, self.heads)):
            inner[node] = graph.placeholder(node.name)
        for node in self.graph.nodes:
            if node in needed and node not in inner:
                inner[node] = graph.node_copy(node, inner.__getitem__)
        graph.output([inner[n] for n in self.early])
        return _source(GraphModule(self.root, graph)), read


def _source(graph_module: GraphModule) -> str:
    """A step's source; what it fills is of its arguments' dtype, whatever it was traced with."""
    if graph_module.graph.find_nodes(op="get_attr"):
        raise Unsupported("its backward reads a constant tensor")
    first = next(iter(graph_module.graph.nodes)).name
    return placed(emit(graph_module, "step"), first, torch.float32)
