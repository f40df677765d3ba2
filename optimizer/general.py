"""The graphs of one model at a few short lengths → one graph for every length.

Where the graphs are the same program, node for node, and each number in which they differ
follows a formula in the lengths, the program at other lengths needs no trace.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, isclose, log
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .builder import duplicate, fake_result
from .facts import (
    all_graphs,
    body_of,
    flat_arguments,
    has_body,
    source_line,
    value,
    with_leaves,
)
from .formula import Formula, Function, Lengths, Samples, agree, at, shown

Place = tuple[tuple[str, ...], str]  # a node: the bodies it is in, and its name


class NotOneProgram(Exception):
    """What prevents that graphs are the same program at every length."""


class NoFormula(NotOneProgram):
    """Numbers that follow no rule which so few samples can tell."""


Number = Formula | Function | int | float
@dataclass(frozen=True)
class Table:
    """A constant tensor of numbers that follow a rule in their place."""

    rule: Rule
    numbers: tuple[Number, ...]
    count: Formula | int
    dtype: torch.dtype
    device: torch.device

    def at(self, lengths: Lengths) -> Tensor:
        numbers = [at(n, lengths) for n in self.numbers]
        made = [self.rule.number(i, *numbers) for i in range(at(self.count, lengths))]
        return torch.tensor(made, dtype=self.dtype, device=self.device)

    @property
    def source(self) -> str:
        """Python source of the tensor at every length."""
        floating = self.dtype.is_floating_point
        places = f"torch.arange({self.count}, dtype={torch.float64 if floating else self.dtype}, " \
            f"device=torch.device({str(self.device)!r}))"
        made = self.rule.source.format(*(f"({n})" for n in self.numbers), i=places)
        return f"({made}).to({self.dtype})" if floating else made


@dataclass(frozen=True)
class Rule:
    """How a table's numbers follow from their places `i` and a few numbers of the rule."""

    source: str
    number: Callable[..., Any]
    fit: Callable[[list[Any]], tuple[Any, ...] | None]  # the rule's numbers, from a table's


def _progression(row: list[int]) -> tuple[int, int]:
    return row[0], row[1] - row[0]


def _clamped(row: list[int]) -> tuple[int, int, int, int]:
    middle = len(row) // 2
    step = row[middle] - row[middle - 1]
    return row[middle] - step * middle, step, min(row), max(row)


def _wrapped(row: list[int]) -> tuple[int, int, int] | None:
    step = row[1] - row[0]
    size = gcd(*(row[0] + step * i - n for i, n in enumerate(row)))
    return (row[0], step, size) if size else None


def _multiples(row: list[float]) -> tuple[float, float] | None:
    step = (row[-1] - row[0]) / (len(row) - 1)
    return (row[0] / step, step) if step else None


def _powers(row: list[float]) -> tuple[float, float] | None:
    if min(row) <= 0 or row[0] == row[-1]:
        return None
    step = (row[-1] / row[0]) ** (1 / (len(row) - 1))
    return log(row[0]) / log(step), step


INTEGERS = (
    Rule("{i} * {1} + {0}", lambda i, start, step: start + step * i, _progression),
    Rule("({i} * {1} + {0}).clamp({2}, {3})",
         lambda i, start, step, low, high: min(max(start + step * i, low), high), _clamped),
    Rule("({i} * {1} + {0}) % {2}", lambda i, start, step, size: (start + step * i) % size,
         _wrapped),
)
FLOATS = (
    Rule("({i} + {0}) * {1}", lambda i, start, step: step * (start + i), _multiples),
    Rule("{1} ** ({i} + {0})", lambda i, start, step: step ** (start + i), _powers),
)


@dataclass(frozen=True)
class General:
    """A graph for every length: one of the samples, and what to put in place of its numbers."""

    sample: GraphModule
    numbers: dict[Place, tuple[Any, ...]]  # of the flat arguments; a formula where it varies
    constants: dict[Place, Table]

    def at(
        self, lengths: Lengths, inputs: Sequence[Any], mode: FakeTensorMode
    ) -> GraphModule:
        """The graph at `lengths`; `inputs` are the fakes that its placeholders stand for.

        `NotOneProgram` where its numbers make no program there: the rule they follow is another.
        """
        made = duplicate(self.sample)
        try:
            self._fill(made, (), lambda number, _: at(number, lengths),
                       lambda _, rule: rule.at(lengths))
            _propagate(made, inputs, mode)
        except (IndexError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise NotOneProgram(f"at length {'×'.join(map(str, lengths))}: what short ones tell is "
                                f"no program ({reason})") from error
        return made

    def symbolic(self, lengths: dict[str, tuple[int, int]]) -> GraphModule:
        """The sample, its numbers shown as formulas, in `lengths`: placeholder and axis of each.

        It computes what the sample does; `emit` writes it down for every length.
        """
        made = duplicate(self.sample)
        tables: dict[int, Table] = {}

        def note(held: Tensor, table: Table) -> Tensor:
            tables[id(held)] = table
            return held

        self._fill(made, (), shown, note)
        for graph in all_graphs(made):
            graph.meta.update(lengths=lengths, tables=tables)
        return made

    def _fill(
        self, graph_module: GraphModule, path: tuple[str, ...],
        number: Callable[[Any, Any], Any], table: Callable[[Tensor, Table], Tensor],
    ) -> None:
        for node in graph_module.graph.nodes:
            place = (path, node.name)
            if place in self.numbers:
                leaves, form = flat_arguments(node)
                node.args, node.kwargs = with_leaves(form, (
                    leaf if given is None else number(given, leaf)
                    for given, leaf in zip(self.numbers[place], leaves, strict=True)
                ))
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
            line = next(filter(None, map(source_line, nodes)), None)
            return f"{f'at {line} ' if line else ''}it does other operations at other lengths"
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
        table = _table(samples, held)
        if table is None:
            raise NotOneProgram(f"a table of numbers at {source_line(nodes[0])} follows no "
                                "simple rule")
        found.constants[path, nodes[0].name] = table


def _unify_arguments(
    found: General, samples: Samples, nodes: Sequence[Node], places: Sequence[dict[Node, int]],
    path: tuple[str, ...],
) -> None:
    flat, forms = zip(*map(flat_arguments, nodes), strict=True)
    if not agree(forms):
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
        elif all(type(leaf) is type(leaves[0]) and type(leaf) in (int, float) for leaf in leaves):
            whole = type(leaves[0]) is int
            formula = samples.formula(leaves) if whole else samples.function(leaves)
            if formula is None:
                raise NoFormula(f"the numbers {', '.join(map(str, leaves))} at "
                                f"{source_line(nodes[0])} follow no simple rule")
            given.append(formula)
        else:
            one, other = (textwrap.shorten(repr(leaf), 40) for leaf in leaves[:2])
            raise NotOneProgram(f"{one} at {source_line(nodes[0])} is {other} at another length")
    if any(g is not None for g in given):
        found.numbers[path, nodes[0].name] = tuple(given)


def _table(samples: Samples, tables: Sequence[Tensor]) -> Table | None:
    """The rule of tables of numbers, one for each sample, if it is one of `KINDS`."""
    first = tables[0]
    if any(t.dim() != 1 or len(t) < 2 or t.dtype != first.dtype for t in tables):
        return None
    rows = [t.tolist() for t in tables]
    count = samples.formula([len(row) for row in rows])
    for rule in (FLOATS if first.dtype.is_floating_point else INTEGERS) if count else ():
        fits = [fit for row in rows if (fit := rule.fit(row)) is not None]
        numbers = [_number(samples, column) for column in zip(*fits, strict=True)]
        if len(fits) < len(rows) or None in numbers:
            continue
        found = Table(rule, tuple(cast(Any, numbers)), cast(Any, count), first.dtype, first.device)
        if all(_same(found.at(lengths), table)
               for lengths, table in zip(samples.lengths, tables, strict=True)):
            return found
    return None


def _number(samples: Samples, numbers: Sequence[float]) -> Number | None:
    whole = [round(n) for n in numbers]
    if all(isclose(n, w, abs_tol=1e-9) for n, w in zip(numbers, whole, strict=True)):
        return samples.formula(whole)
    return samples.function(numbers)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether tables agree up to the rounding of their rule."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    apart = (one - other).abs().max() / other.abs().max()
    return bool(apart <= 16 * torch.finfo(one.dtype).eps)
