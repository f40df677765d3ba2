"""An index table that is `start + step·i` → a slice.

Before:
    x.index_select(2, torch.arange(0, n, r));  zeros.index_copy(2, torch.arange(1, n, r), y)
After:
    x[:, :, 0:n:r];  zeros.slice_scatter(y, 2, 1, n, r)
Wins:
    A view instead of a gather; no table. Under seeds/001's measurements sometimes a loss in
    the whole model, so it is kept only where it measures faster.
Sound if:
    1. the table is computed from constants alone: a buffer or an input may change;
    2. it is a progression with a step above zero, inside the axis, the same for every
       position of the other axes.
Skips:
    tables that are an input, a parameter or a buffer; tables that are no such progression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch.fx import Node

from ..optimizer.affine import Progression, progression
from ..optimizer.builder import Builder
from ..optimizer.facts import Facts, aten, shape, source_line, value
from ..optimizer.rewrite import Rewrite, Skip


@dataclass(frozen=True)
class SliceIndices:
    """Turn index tables that are progressions into slices; see the module's docstring."""

    name: ClassVar[str] = "slice-indices"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for node in facts.operations:
            access = ACCESSES.get(node.target)
            found = access(facts, node) if access is not None else None
            if found is None:
                continue
            line = source_line(node)
            if isinstance(found, str):
                if "rewritten_by" in node.meta:
                    continue  # a table of our own making
                yield Skip(self.name, f"{node.target.__name__}: {found}", line)  # type: ignore[union-attr]
                continue
            name = str(node.target._opname)  # type: ignore[union-attr]
            yield Rewrite(self.name, f"{name} → {found.shown}", line, node, (node,), found.build)


@dataclass(frozen=True)
class Access:
    """One axis of `source` read or written at a progression of places."""

    source: Node
    axis: int
    places: Progression
    written: Node | None = None
    windowed: bool = False

    @property
    def shown(self) -> str:
        p = self.places
        step = f":{p.step}" if p.step != 1 else ""
        return f"slice {p.start}:{p.last + 1}{step} of axis {self.axis}"

    def build(self, build: Builder) -> list[Node]:
        p = self.places
        where = (self.axis, p.start, p.last + 1, p.step)
        if self.written is not None:
            return [build.call(aten.slice_scatter.default, self.source, self.written, *where)]
        read = build.slice(self.source, *where)
        return [build.call(aten.unsqueeze.default, read, -1) if self.windowed else read]


Found = Access | str | None


def _access(
    facts: Facts, source: Node, axis: int, table: Node, written: Node | None = None
) -> Found:
    if (constant := facts.constant(table)) is None:
        held = table.meta.get("state")
        return f"the index is {held!r}, whose values may change" if held else (
            "the index is computed from data"
        )
    if constant.dim() != 1 or constant.dtype.is_floating_point or constant.numel() == 0:
        return "the index is no table of one axis"
    size = shape(source)[axis]
    numbers = [n + size if n < 0 else n for n in constant.tolist()]
    places = progression(numbers)
    if places is None or places.step < 1:
        return "the index is no progression with a step above zero"
    if not 0 <= places.start <= places.last < size:
        return "the index reaches outside the axis"
    if written is not None and value(written).dtype != value(source).dtype:
        return "what is written has another dtype"
    return Access(source, axis % len(shape(source)), places, written)


def _index_select(facts: Facts, node: Node) -> Found:
    source, axis, table = cast(tuple[Node, int, Node], node.args)
    return _access(facts, source, axis, table) if shape(source) else None


def _index(facts: Facts, node: Node) -> Found:
    source, tables = cast(tuple[Node, list[Node | None]], node.args)
    given = [(axis, table) for axis, table in enumerate(tables) if table is not None]
    if len(given) != 1 or len(shape(given[0][1])) != 1:
        return None
    return _access(facts, source, *given[0])


def _index_copy(facts: Facts, node: Node) -> Found:
    source, axis, table, written = cast(tuple[Node, int, Node, Node], node.args)
    return _access(facts, source, axis, table, written) if shape(source) else None


def _index_put(facts: Facts, node: Node) -> Found:
    source, tables, written, *accumulate = cast(Any, node.args)
    given = [(axis, table) for axis, table in enumerate(tables) if table is not None]
    if accumulate and accumulate[0]:
        return "values are accumulated"
    if len(given) != 1 or len(shape(given[0][1])) != 1:
        return None
    axis, table = given[0]
    expected = (*shape(source)[:axis], *shape(table), *shape(source)[axis + 1 :])
    if shape(written) != expected:
        return "what is written is broadcast"
    return _access(facts, source, axis, table, written)


def _gather(facts: Facts, node: Node) -> Found:
    source, axis, table = cast(tuple[Node, int, Node], node.args[:3])
    return _same_everywhere(facts, source, axis, table, None)


def _scatter(facts: Facts, node: Node) -> Found:
    source, axis, table, written = cast(tuple[Node, int, Node, Node], node.args[:4])
    if shape(written) != shape(table):
        return "what is written is larger than the table"
    return _same_everywhere(facts, source, axis, table, written)


def _same_everywhere(
    facts: Facts, source: Node, axis: int, table: Node, written: Node | None
) -> Found:
    constant = facts.constant(table)
    if constant is None:
        return "the index is computed from data"
    if constant.dim() == 0 or constant.numel() == 0:
        return None
    axis %= constant.dim()
    others = [d for d in range(constant.dim()) if d != axis]
    if any(shape(source)[d] != constant.shape[d] for d in others):
        return "the table covers only part of the other axes"
    row = constant.permute(axis, *others).reshape(constant.shape[axis], -1)
    if not bool((row == row[:, :1]).all()):
        return "the index differs between positions of the other axes"
    places = progression(row[:, 0].tolist())
    if places is None or places.step < 1:
        return "the index is no progression with a step above zero"
    return Access(source, axis, places, written)


def _unfold(facts: Facts, node: Node) -> Found:
    source, axis, width, step = cast(tuple[Node, int, int, int], node.args)
    if width != 1 or not shape(source):
        return None
    axis %= len(shape(source))
    return Access(source, axis, Progression(0, step, shape(node)[axis]), windowed=True)


ACCESSES: dict[Any, Callable[[Facts, Node], Found]] = {
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.index_copy.default: _index_copy,
    aten.index_put.default: _index_put,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.unfold.default: _unfold,
}
