"""A step whose carries are affine in themselves, and how to run all its steps at once.

The carries that depend on one another are one recurrence. Its step is read once for each
semiring: every value is Σ entry ⊗ carry ⊕ term, its entries and its term known before the
recurrence is, or no such thing. What is known runs for all steps at once: the entries and terms
before the recurrence, what the step returns beside its carries after it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .axes import RESHAPES
from .cycles import components, reached_by
from .facts import aten, behind, is_tensor, shape, spelled, value
from .parallel_scan import LARGEST, LINEAR, LOG_SUM, SEMIRINGS, SMALLEST, Semiring, running, solve
from .parallel_scan import before as states_before
from .pointwise import SAME, Unsupported, constant
from .step import Counts, Sizes, functional_graph, over_steps, remembered, step_function

MOST = 4  # carries that depend on one another: products of their matrices grow with the cube
Value = Node | float  # what is known without the recurrence
Combine = Callable[[Value | None, Value | None], Value | None]
TARGETS: dict[Any, tuple[Any, Any]] = {  # on values, on numbers
    torch.add: (aten.add.Tensor, operator.add), torch.mul: (aten.mul.Tensor, operator.mul),
    torch.maximum: (aten.maximum.default, max), torch.minimum: (aten.minimum.default, min),
    torch.logaddexp: (aten.logaddexp.default, None),
}
KEPT = (aten.logaddexp.default,)  # which is an operation here, and several for a kernel
JOINS = {aten.add.Tensor: LINEAR, aten.maximum.default: LARGEST, aten.minimum.default: SMALLEST,
         aten.logaddexp.default: LOG_SUM}


@dataclass(frozen=True)
class Form:
    """entries ⊗ carries ⊕ term; None is the semiring's zero."""

    entries: dict[Node, Value]
    term: Value | None


class _Reader:
    """Values of a step as forms in some of its carries, over one semiring."""

    def __init__(self, ring: Semiring, graph: Graph, carries: Sequence[Node], like: Node) -> None:
        self.ring, self.graph, self.like = ring, graph, like
        self.forms = {c: Form({c: ring.one}, None) for c in carries}
        self.size = shape(carries[0])

    def form(self, leaf: Any) -> Form:
        """The form of a value that was read, or of one that is known; a mask's are numbers."""
        if not isinstance(leaf, Node) or leaf in self.forms:
            return self.forms[leaf] if isinstance(leaf, Node) else Form({}, leaf)
        masks = value(leaf).dtype is torch.bool
        return Form({}, self._call(aten.mul.Tensor, leaf, self._node(1.0)) if masks else leaf)

    def read(self, node: Node) -> None:
        """Find the form of an operation; raises `Unsupported` where it has none."""
        if self.forms.keys().isdisjoint(node.all_input_nodes):
            return
        if not is_tensor(node) or shape(node) != self.size:
            raise Unsupported("it is not affine element by element in what it carries")
        found = self._read(node, [self.form(leaf) for leaf in node.args])
        if found is None:
            raise self._refused(node)
        self.forms[node] = found

    def _refused(self, node: Node) -> Unsupported:
        return Unsupported(
            f"it is not affine: it computes {spelled(node.target)} of what it carries")

    def _read(self, node: Node, forms: list[Form]) -> Form | None:
        target, args, alpha = node.target, node.args, node.kwargs.get("alpha", 1)
        if set(node.kwargs) - {"alpha"} and target not in SAME:
            return None
        if target in SAME or target in RESHAPES \
                or target in (aten.expand.default, aten.type_as.default):
            return forms[0]
        if target is aten.where.self and not forms[0].entries:
            return self._chosen(cast(Node, args[0]), *forms[1:])
        if target in JOINS and JOINS[target] is self.ring:
            return self._joined(forms[0], self._scaled(forms[1], cast(float, alpha)))
        if self.ring is LINEAR:
            return self._linear(node, forms)
        if target in (aten.add.Tensor, aten.sub.Tensor) and alpha == 1:
            sign = 1 if target is aten.add.Tensor else -1
            known = next((f for f in forms if not f.entries), None)
            if known is None or known.term is None or (sign < 0 and not forms[0].entries):
                return None
            [moved] = [f for f in forms if f is not known]
            shift = self._scaled_value(known.term, sign)
            return self._each(moved, lambda value: self._times(value, shift))
        if target is aten.relu.default:
            return self._bounded(forms[0], 0.0, None)
        if target is aten.clamp.default:
            return self._bounded(forms[0], *(*args[1:], None, None)[:2])
        return None

    def _linear(self, node: Node, forms: list[Form]) -> Form | None:
        target, alpha = node.target, cast(float, node.kwargs.get("alpha", 1))
        if target is aten.sub.Tensor:
            return self._joined(forms[0], self._scaled(forms[1], -alpha))
        if target is aten.neg.default:
            return self._scaled(forms[0], -1)
        if target is aten.mul.Tensor and not (forms[0].entries and forms[1].entries):
            factor = forms[forms[0].entries != {}].term
            [moved] = [f for f in forms if f.entries]
            return self._each(moved, lambda value: self._times(value, cast(Value, factor)))
        if target is aten.div.Tensor and not forms[1].entries:
            divisor = cast(Value, forms[1].term)
            return self._each(forms[0], lambda value: self._divided(value, divisor))
        return None

    def _each(self, form: Form, change: Any) -> Form:
        return Form({c: change(e) for c, e in form.entries.items()},
                    None if form.term is None else change(form.term))

    def _scaled(self, form: Form, number: float) -> Form:
        return form if number == 1 else self._each(form, lambda v: self._scaled_value(v, number))

    def _joined(self, a: Form, b: Form) -> Form:
        return self._merged(a, b, self._plus)

    def _merged(self, a: Form, b: Form, combine: Combine) -> Form:
        carries = [*a.entries, *(c for c in b.entries if c not in a.entries)]
        entries = {c: combine(a.entries.get(c), b.entries.get(c)) for c in carries}
        return Form(cast(dict[Node, Value], entries), combine(a.term, b.term))

    def _bounded(self, form: Form, least: Any, most: Any) -> Form | None:
        """A form not below, or not above, a number or value that is known."""
        bound = least if self.ring is LARGEST else most if self.ring is SMALLEST else None
        other = most if self.ring is LARGEST else least
        if bound is None or other is not None or self.form(bound).entries:
            return None
        return self._joined(form, Form({}, bound))

    def _chosen(self, mask: Node, a: Form, b: Form) -> Form:
        """One form where the mask holds, the other elsewhere."""
        def chosen(one: Value | None, other: Value | None) -> Value | None:
            return None if one is other is None else self._call(aten.where.self, mask, *(
                self._node(self.ring.zero if v is None else v) for v in (one, other)))

        return self._merged(a, b, chosen)

    def _plus(self, a: Value | None, b: Value | None) -> Value | None:
        if a is None or b is None:
            return b if a is None else a
        return self._combined(self.ring.plus, a, b)

    def _times(self, a: Value, b: Value) -> Value:
        if self.ring.one in (a, b):
            return b if a == self.ring.one else a
        return self._combined(self.ring.times, a, b)

    def _combined(self, function: Any, a: Value, b: Value) -> Value:
        target, in_python = TARGETS[function]
        if in_python and not isinstance(a, Node) and not isinstance(b, Node):
            return cast(float, in_python(a, b))
        return self._call(target, self._node(a), self._node(b))

    def _scaled_value(self, value: Value, number: float) -> Value:
        if not isinstance(value, Node):
            return value * number
        return value if number == 1 else self._call(aten.mul.Tensor, value, number)

    def _divided(self, value: Value, divisor: Value) -> Value:
        if not isinstance(value, Node) and not isinstance(divisor, Node):
            return value / divisor
        return self._call(aten.div.Tensor, self._node(value), divisor)

    def _node(self, value: Value) -> Node:
        """A number as a value of the step."""
        if isinstance(value, Node):
            return value
        return self._call(aten.new_full.default, self.like, [], value)

    def _call(self, target: Any, *args: Any) -> Node:
        with self.graph.inserting_before(self.graph.output_node()):
            return self.graph.call_function(target, args)


@dataclass(frozen=True)
class _Part:
    """Values of a step, as a function of what is known before them."""

    function: GraphModule
    heads: tuple[Node, ...]
    ends: tuple[Node, ...]

    def run(
        self, known: Mapping[Node, Tensor], moving: Set[Node], steps: int
    ) -> dict[Node, Tensor]:
        """The values of all steps, along axis 0; a stride of 0 if they are all the same."""
        given = [known[h] for h in self.heads]
        moves = [h in moving for h in self.heads]
        made: Sequence[Tensor] = over_steps(self.function, moves, given) if any(moves) else [
            t.expand(steps, *t.shape) for t in self.function(*given)]
        return dict(zip(self.ends, made, strict=True))


@dataclass(frozen=True)
class _Block:
    """Carries that are affine in one another; `part` finds the values in matrix and terms."""

    carries: tuple[int, ...]
    ring: Semiring
    matrix: tuple[tuple[Value | None, ...], ...]
    terms: tuple[Value | None, ...]
    part: _Part

    def solved(
        self, found: Mapping[Node, Tensor], starts: Sequence[Tensor], steps: int, reverse: bool
    ) -> list[Tensor]:
        """The carries after each step, of the values that the part found."""
        first, rank = starts[0], starts[0].dim()

        def stacked(value: Value) -> Tensor:
            if not isinstance(value, Node):
                return first.new_full([1] * (rank + 1), value)
            made = found[value]
            made = made.view(made.shape[0], *[1] * (rank + 1 - made.dim()), *made.shape[1:])
            return (made if made.stride(0) else made[:1]).to(first.dtype)

        terms = [stacked(self.ring.zero if t is None else t).expand(steps, *first.shape)
                 for t in self.terms]
        if self.matrix == ((self.ring.one,),):
            return [running(self.ring, terms[0], first, reverse)]
        matrix = [[e if e is None else stacked(e) for e in row] for row in self.matrix]
        return solve(self.ring, matrix, terms, starts, reverse)


@dataclass(frozen=True)
class AtOnce:
    """How to run all steps of a scan whose carries are affine in themselves."""

    heads: tuple[Node, ...]
    results: tuple[Node, ...]
    counts: Counts
    blocks: tuple[_Block, ...]
    outputs: _Part

    @cached_property
    def read(self) -> Set[Node]:
        """The arguments that are read outside of their own recurrence."""
        return {h for p in (*(b.part for b in self.blocks), self.outputs) for h in p.heads}

    def run(
        self, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
        reverse: bool,
    ) -> list[Tensor] | None:
        """The final carries, then each output of all steps along axis 0; None if a loop may
        find something else, since a number is not finite."""
        held, read, _ = self.counts
        steps = slices[0].shape[0]
        known = dict(zip(self.heads[held:], (*slices, *invariants), strict=True))
        moving = set(self.heads[held : held + read])
        finals: dict[int, Tensor] = {}
        for block in self.blocks:
            starts = [carries[k] for k in block.carries]
            states = block.solved(block.part.run(known, moving, steps), starts, steps, reverse)
            if not block.ring.holds(states):
                return None
            for k, start, after in zip(block.carries, starts, states, strict=True):
                head, result = self.heads[k], self.results[k]
                finals[k] = after[0 if reverse else -1].clone()
                if head in self.read:
                    known[head] = states_before(after, start, reverse, steps)
                known[result] = after
                moving |= {head, result}
        made = self.outputs.run(known, moving, steps)
        return [*(finals[k] for k in range(held)), *(made[n] for n in self.results[held:])]


@remembered
def at_once(
    step: str, sizes: tuple[Sizes, ...], counts: Counts
) -> AtOnce | Unsupported:
    """How all steps run at once, or why they can't."""
    try:
        return _plan(functional_graph(step_function(step), sizes, KEPT), counts)
    except Unsupported as error:
        return error


def _plan(graph_module: GraphModule, counts: Counts) -> AtOnce:
    graph, held = graph_module.graph, counts[0]
    heads = [n for n in graph.nodes if n.op == "placeholder"]
    results = cast(list[Node], graph.output_node().args[0])
    like = heads[held]
    for node in graph.nodes:  # traced in single precision, on the CPU; run on any slices
        floats = is_tensor(node) and value(node).is_floating_point()
        if floats and constant(node) is not None:
            node.args, node.kwargs = (like, list(shape(node)), constant(node)), {}
            node.target = aten.new_full.default
        elif floats and node.target is aten._to_copy.default:
            node.target, node.args, node.kwargs = aten.type_as.default, (node.args[0], like), {}
    reached = reached_by(graph, heads[:held])
    known = set(heads[held:])
    blocks = []
    for group in components([reached[n] for n in results[:held]]):
        blocks.append(_block(graph_module, heads, results, group, known))
        known |= {n for k in group for n in (heads[k], results[k])}
    outputs = _part(graph_module, results[held:], known)
    return AtOnce(tuple(heads), tuple(results), counts, tuple(blocks), outputs)


def _block(
    graph_module: GraphModule, heads: Sequence[Node], results: Sequence[Node],
    group: tuple[int, ...], known: Set[Node],
) -> _Block:
    """Some carries, read over the semiring in which they are affine."""
    graph = graph_module.graph
    carries, nexts = [heads[k] for k in group], [results[k] for k in group]
    if len(group) > MOST:
        raise Unsupported(f"{len(group)} of what it carries depend on one another")
    needed = behind(nexts, known)
    operations = [n for n in graph.nodes if n in needed and n.op == "call_function"
                  and n not in known]
    reasons: list[tuple[int, Unsupported]] = []
    for ring in SEMIRINGS:
        reader = _Reader(ring, graph, carries, next(n for n in heads if n in known))
        try:
            for node in operations:
                reader.read(node)
            forms = [reader.form(n) for n in nexts]
        except Unsupported as error:
            reasons.append((len(reader.forms), error))
            continue
        matrix = tuple(tuple(form.entries.get(c) for c in carries) for form in forms)
        terms = tuple(form.term for form in forms)
        values = (*(e for row in matrix for e in row), *terms)
        ends = dict.fromkeys(v for v in values if isinstance(v, Node))
        return _Block(group, ring, matrix, terms, _part(graph_module, list(ends), known))
    raise max(reasons, key=itemgetter(0))[1]  # of the semiring that went farthest


def _part(graph_module: GraphModule, ends: Sequence[Node], known: Set[Node]) -> _Part:
    needed = behind(ends, known)
    graph, inner = Graph(), {}
    heads = [n for n in graph_module.graph.nodes if n in needed and n in known]
    for node in heads:
        inner[node] = graph.placeholder(node.name)
    for node in graph_module.graph.nodes:
        if node in needed and node not in inner:
            inner[node] = graph.node_copy(node, inner.__getitem__)
    unlike = tuple(dict.fromkeys(ends))
    graph.output(tuple(inner[n] for n in unlike))
    return _Part(GraphModule(graph_module, graph), tuple(heads), unlike)
