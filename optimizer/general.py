"""The graphs of one model at a few short lengths → one graph for every length.

Where the graphs are the same program, node for node, and each number in which they differ
follows a formula in the lengths, the program at other lengths needs no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .builder import duplicate, fake_result
from .facts import all_graphs, body_of, has_body, source_line, value
from .formula import Formula, Lengths, Samples, Symbolic, agree, at

Place = tuple[tuple[str, ...], str]  # a node: the bodies it is in, and its name


class NotOneProgram(Exception):
    """What prevents that graphs are the same program at every length."""


class NoFormula(NotOneProgram):
    """Numbers that follow no rule which so few samples can tell."""


@dataclass(frozen=True)
class Ramp:
    """A constant tensor of the numbers `(start + i) / over`, or `start + step·i`."""

    start: Formula | int
    step: Formula | int
    over: Formula | int | None  # None for integers
    count: Formula | int
    dtype: torch.dtype
    device: torch.device

    def at(self, lengths: Lengths) -> Tensor:
        start, step, over, count = (at(n, lengths) for n in (
            self.start, self.step, self.over, self.count))
        numbers = [start + step * i for i in range(count)]
        if over is not None:
            numbers = [n / over for n in numbers]
        return torch.tensor(numbers, dtype=self.dtype, device=self.device)

    @property
    def source(self) -> str:
        """Python source of the tensor at every length."""
        dtype = self.dtype if self.over is None else torch.float64
        numbers = f"torch.arange({self.count}, dtype={dtype}, device=torch.device" \
            f"({str(self.device)!r}))"
        if self.over is None:
            return f"{numbers} * ({self.step}) + ({self.start})"
        return f"(({numbers} + ({self.start})) / ({self.over})).to({self.dtype})"


@dataclass(frozen=True)
class General:
    """A graph for every length: one of the samples, and what to put in place of its numbers."""

    sample: GraphModule
    numbers: dict[Place, tuple[Any, ...]]  # of the flat arguments; a formula where it varies
    constants: dict[Place, Ramp]

    def at(
        self, lengths: Lengths, inputs: Sequence[Any], mode: FakeTensorMode
    ) -> GraphModule:
        """The graph at `lengths`; `inputs` are the fakes that its placeholders stand for."""
        made = duplicate(self.sample)
        self._fill(made, (), lambda number, _: at(number, lengths),
                   lambda _, ramp: ramp.at(lengths))
        _propagate(made, inputs, mode)
        return made

    def symbolic(self, lengths: dict[str, tuple[int, int]]) -> GraphModule:
        """The sample, its numbers shown as formulas, in `lengths`: placeholder and axis of each.

        It computes what the sample does; `emit` writes it down for every length.
        """
        made = duplicate(self.sample)
        tables: dict[int, Ramp] = {}

        def note(held: Tensor, ramp: Ramp) -> Tensor:
            tables[id(held)] = ramp
            return held

        self._fill(made, (), lambda number, was: Symbolic(was, number)
                   if isinstance(number, Formula) else number, note)
        for graph in all_graphs(made):
            graph.meta.update(lengths=lengths, tables=tables)
        return made

    def _fill(
        self, graph_module: GraphModule, path: tuple[str, ...],
        number: Callable[[Any, Any], Any], table: Callable[[Tensor, Ramp], Tensor],
    ) -> None:
        for node in graph_module.graph.nodes:
            place = (path, node.name)
            if place in self.numbers:
                leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
                node.args, node.kwargs = pytree.tree_unflatten([
                    leaf if given is None else number(given, leaf)
                    for given, leaf in zip(self.numbers[place], leaves, strict=True)
                ], spec)
            if place in self.constants:
                name = str(node.target)
                made = table(getattr(graph_module, name), self.constants[place])
                setattr(graph_module, name, made)
        for name, held in graph_module.named_children():
            if isinstance(held, GraphModule):
                self._fill(held, (*path, name), number, table)
        graph_module.recompile()


def _propagate(graph_module: GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> None:
    """The fake result of every node, from those of the placeholders on."""
    given = iter(inputs)
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = next(given)
        elif node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor):
            held = getattr(graph_module, str(node.target))
            node.meta["val"] = mode.from_tensor(held, static_shapes=True)
        elif node.op == "call_function":
            if has_body(node):
                carries, slices, fixed = (
                    [value(n) for n in cast(list[Node], node.args[k])] for k in (1, 2, 3))
                with mode:
                    lanes = [s.select(0, 0) for s in slices]
                _propagate(body_of(node), [*carries, *lanes, *fixed], mode)
            node.meta["val"] = fake_result(node, mode)


def general(samples: Samples, graphs: Sequence[GraphModule]) -> General:
    """The one program that `graphs` are at the lengths of `samples`, or `NotOneProgram`."""
    found = General(graphs[0], {}, {})
    _unify(found, samples, graphs, ())
    return found


def _unify(
    found: General, samples: Samples, graphs: Sequence[GraphModule], path: tuple[str, ...]
) -> None:
    sizes = [len(g.graph.nodes) for g in graphs]
    if not agree(sizes):
        raise NotOneProgram(_first_difference(graphs) or f"its programs have {sizes} operations")
    places: list[dict[Node, int]] = [{} for _ in graphs]
    for number, nodes in enumerate(zip(*(g.graph.nodes for g in graphs), strict=True)):
        for seen, node in zip(places, nodes, strict=True):
            seen[node] = number
        first = nodes[0]
        if not agree([n.op for n in nodes]) or (
            first.op in ("call_function", "placeholder") and not agree([n.target for n in nodes])
        ):
            raise NotOneProgram(_first_difference(graphs))
        if first.op == "get_attr":
            _unify_attribute(found, samples, graphs, nodes, path)
        else:
            _unify_arguments(found, samples, nodes, places, path)


def _first_difference(graphs: Sequence[GraphModule]) -> str:
    for nodes in zip(*(g.graph.nodes for g in graphs), strict=False):
        if not agree([(n.op, n.target if n.op == "call_function" else "") for n in nodes]):
            return f"at {source_line(nodes[0])} it does other operations at other lengths"
    return ""


def _unify_attribute(
    found: General, samples: Samples, graphs: Sequence[GraphModule], nodes: Sequence[Node],
    path: tuple[str, ...],
) -> None:
    held = [getattr(g, str(n.target)) for g, n in zip(graphs, nodes, strict=True)]
    if all(isinstance(h, GraphModule) for h in held):
        inner = (*path, str(nodes[0].target))
        _unify(found, samples, held, inner)
    elif not all(torch.equal(h, held[0]) for h in held):
        ramp = _ramp(samples, held)
        if ramp is None:
            raise NotOneProgram(f"a table of numbers at {source_line(nodes[0])} follows no "
                                "simple rule")
        found.constants[path, nodes[0].name] = ramp


def _unify_arguments(
    found: General, samples: Samples, nodes: Sequence[Node], places: Sequence[dict[Node, int]],
    path: tuple[str, ...],
) -> None:
    flat, specs = zip(*(pytree.tree_flatten((n.args, dict(n.kwargs))) for n in nodes), strict=True)
    if not agree(specs):
        raise NotOneProgram(f"at {source_line(nodes[0])} {nodes[0].target} takes other arguments "
                            "at other lengths")
    given: list[Any] = []
    for leaves in zip(*flat, strict=True):
        if any(isinstance(leaf, Node) for leaf in leaves):
            seen = [p.get(leaf) for p, leaf in zip(places, leaves, strict=True)]
            if not agree(seen):
                raise NotOneProgram(f"at {source_line(nodes[0])} it takes another result at other "
                                    "lengths")
            given.append(None)
        elif agree([repr(leaf) for leaf in leaves]):
            given.append(None)
        elif all(type(leaf) is int for leaf in leaves):
            formula = samples.formula(leaves)
            if formula is None:
                raise NoFormula(f"the numbers {', '.join(map(str, leaves))} at "
                                f"{source_line(nodes[0])} follow no simple rule")
            given.append(formula)
        else:
            raise NotOneProgram(f"{leaves[0]!r} at {source_line(nodes[0])} is {leaves[1]!r} at "
                                "another length")
    if any(g is not None for g in given):
        found.numbers[path, nodes[0].name] = tuple(given)


def _ramp(samples: Samples, tables: Sequence[Tensor]) -> Ramp | None:
    """The rule of tables, one for each sample, of evenly spaced numbers."""
    first = tables[0]
    if any(t.dim() != 1 or len(t) < 2 or t.dtype != first.dtype for t in tables):
        return None
    columns: list[tuple[int, ...]] = []
    for numbers in (t.tolist() for t in tables):
        step = numbers[1] - numbers[0]
        over = None
        if first.dtype.is_floating_point and step:
            over = round(1 / step)
            step = 1
        start = numbers[0] if over is None else round(numbers[0] * over)
        if over == 0 or numbers != [
            start + step * i if over is None else (start + i) / over for i in range(len(numbers))
        ]:
            return None
        columns.append((start, step, 0 if over is None else over, len(numbers)))
    start, step, over, count = (samples.formula(column) for column in zip(*columns, strict=True))
    if None in (start, step, over, count):
        return None
    return Ramp(cast(Any, start), cast(Any, step),
                over if first.dtype.is_floating_point else None, cast(Any, count),
                first.dtype, first.device)
