"""What each node of a step becomes in a kernel, whatever language that is written in."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Container
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from .axes import PERMUTES, PRODUCTS, REDUCTIONS, RESHAPES, SCATTERS, Axes
from .facts import aten
from .pointwise import (
    SAME,
    WHOLE,
    Language,
    Unsupported,
    constant,
    expression,
    is_integer,
    is_mask,
    no_rule,
)

PARTED = (aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int)
VIEWS = {*RESHAPES, *PERMUTES, aten.slice.Tensor, aten.select.int, aten.expand.default,
         operator.getitem}
View = Callable[[Tensor], Tensor]


class Writer(ABC):
    """Writes a step's graph down, node by node; raises `Unsupported` with a reason."""

    language: ClassVar[Language]
    reductions: ClassVar[Container[str]]

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.heads = [n for n in axes.graph.nodes if n.op == "placeholder"]
        self.constants: dict[Node, str] = {}  # values that are one number everywhere

    def write(self) -> None:
        for node in self.axes.graph.nodes:
            if node.op == "call_function":
                self._operation(node)
            elif node.op == "get_attr":
                held = getattr(self.axes.graph.owning_module, str(node.target))
                if held.numel() == 1:
                    self._constant(node, held.item())
                else:
                    self.table(node, held)

    def _constant(self, node: Node, number: float) -> None:
        text = self.language.number(number)
        self.constants[node] = self.language.as_mask(text) if is_mask(node) else text

    @abstractmethod
    def table(self, node: Node, held: Tensor) -> None:
        """Constant numbers."""

    @abstractmethod
    def same(self, node: Node, source: Node) -> None:
        """A value that is its source."""

    @abstractmethod
    def pointwise(self, node: Node, sources: list[Node], text: Callable[[list[str]], str]) -> None:
        """An expression of the elements of `sources`, none of which is constant."""

    @abstractmethod
    def product(self, node: Node) -> None:
        """A product of two matrices, or of two batches of them."""

    @abstractmethod
    def reduction(self, node: Node, name: str) -> None:
        """A sum, or the largest or smallest values, along some axes."""

    @abstractmethod
    def view(self, node: Node, source: Node, view: View) -> None:
        """Some of the elements of `source`, perhaps in another order."""

    @abstractmethod
    def assembled(self, node: Node, parts: list[tuple[Node, View]]) -> None:
        """A value that each of `parts` is written to a view of, one after the other."""

    def _operation(self, node: Node) -> None:
        target: Any = node.target
        fill = constant(node)
        if fill is not None:
            self._constant(node, fill)
            return
        sources = [n for n in node.all_input_nodes if n not in self.constants]
        if isinstance(node.meta.get("val"), Tensor):
            exact = target in (*SAME, *WHOLE, *VIEWS) \
                or (target is aten.sum.dim_IntList and is_mask(node.args[0]))
            if node.meta["val"].dtype not in (torch.float32, torch.bool) \
                    and not (exact and is_integer(node)):  # floating numbers hold them exactly
                raise Unsupported(f"the loop computes {node.meta['val'].dtype} numbers")
            if not sources and target not in {*SCATTERS, *VIEWS, aten.cat.default}:
                number = expression(node, self.constants.__getitem__, self.language)
                self.constants[node] = f"({number})"
                return
        if target in PRODUCTS:
            if any(n in self.constants for n in node.all_input_nodes):
                raise Unsupported("it multiplies a matrix of one constant")
            self.product(node)
        elif target in REDUCTIONS:
            name, source = target._schema.name.removeprefix("aten::"), node.args[0]
            if name not in self.reductions or (is_mask(source) and name != "sum"):
                raise no_rule(target)
            self.reduction(node, name)
        elif target is aten.cat.default:
            self._cat(node)
        elif target in SCATTERS:
            base, part, *where = cast(tuple[Any, ...], node.args)
            read = aten.slice.Tensor if target is aten.slice_scatter.default else aten.select.int
            self._assemble(node, [(base, lambda x: x), (part, lambda x: read(x, *where))])
        elif target in PARTED:
            return  # its items are the views
        elif not isinstance(node.meta.get("val"), Tensor):
            raise no_rule(target)
        elif target in VIEWS:
            self._view(node)
        elif target in SAME and is_mask(node) == is_mask(node.args[0]) \
                and is_integer(node) <= is_integer(node.args[0]):
            self.same(node, cast(Node, node.args[0]))
        else:
            def text(names: list[str]) -> str:
                known = dict(zip(sources, names, strict=True))
                return expression(node, lambda n: known.get(n) or self.constants[n], self.language)

            text(["x"] * len(sources))  # says now what it has no rule for
            self.pointwise(node, sources, text)

    def _view(self, node: Node) -> None:
        target: Any = node.target
        source, *args = cast(tuple[Any, ...], node.args)
        sizes = self.axes.inner(node)
        made: View = lambda x: target(x, *args)  # noqa: E731
        if target is operator.getitem:
            whole, item = source, args[0]
            source = whole.args[0]
            made = lambda x: whole.target(x, *whole.args[1:])[item]  # noqa: E731
        elif target is aten.expand.default:
            made = lambda x: x.expand(sizes)  # noqa: E731
        elif target in RESHAPES:
            made = lambda x: x.view(sizes)  # noqa: E731
        if source in self.constants:
            self.constants[node] = self.constants[source]
        else:
            self.view(node, source, made)

    def _cat(self, node: Node) -> None:
        parts = [n for n in cast(list[Node], node.args[0]) if n.meta["val"].numel()]
        axis = cast(int, node.args[1]) if len(node.args) > 1 else 0
        sizes = [self.axes.inner(part)[axis] for part in parts]

        def piece(size: int, stop: int) -> View:
            return lambda x: x.narrow(axis, stop - size, size)

        self._assemble(node, list(zip(parts, map(piece, sizes, accumulate(sizes)), strict=True)))

    def _assemble(self, node: Node, parts: list[tuple[Node, View]]) -> None:
        self.assembled(node, [(n, view) for n, view in parts if n.meta["val"].numel()])
