"""What a caller can see of the outputs' memory, which rewrites may change only on the way."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .builder import Builder, output_node, placeholders, storage
from .facts import aten, is_kernel, is_op, is_tensor, is_view, root, value
from .normal_form import propagate
from .packing import of_call
from .walk import shown

STAMP = {"rewritten_by": "contract"}


class ContractError(Exception):
    """Something was built of another shape, dtype, device or memory than what it replaces."""


@dataclass(frozen=True)
class Seen:
    """Of one output: how it lies in memory, and whose memory it is.

    `owner` is the first output, or the input (numbered -1, -2, …), that has the same storage;
    None for an output of its own, or one that is no strided tensor. `same` is the one that it is
    itself, not only a view of.
    """

    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] | None = None
    offset: int = 0
    owner: int | None = None
    same: int | None = None

    @property
    def of_input(self) -> bool:
        return self.owner is not None and self.owner < 0

    @property
    def places(self) -> Tensor:
        """The places of all elements in their storage."""
        if 0 in self.shape:
            return torch.arange(0)
        assert self.strides is not None
        last = sum((n - 1) * by for n, by in zip(self.shape, self.strides, strict=True))
        return torch.arange(self.offset + last + 1).as_strided(
            self.shape, self.strides, self.offset).reshape(-1)


def visible(graph_module: GraphModule) -> list[Seen]:
    """What a caller can see of the outputs' memory."""
    owners, firsts = _inputs(graph_module), _numbered(graph_module)
    leaves = results(graph_module)
    return [replace(_seen(leaf, k, owners), same=_first(leaf, k, firsts))
            for k, leaf in enumerate(leaves)]


def _numbered(graph_module: GraphModule) -> dict[Node, int]:
    return {node: -1 - k for k, node in enumerate(placeholders(graph_module))}


def _first(leaf: Any, position: int, firsts: dict[Node, int]) -> int | None:
    """Which input or earlier output is the same node; `firsts` learns of it."""
    first = firsts.setdefault(leaf, position) if isinstance(leaf, Node) else position
    return None if first == position else first


def _inputs(graph_module: GraphModule) -> dict[int, int]:
    """Whose storage each input's is, for `Seen.owner`."""
    owners: dict[int, int] = {}
    for position, node in enumerate(placeholders(graph_module)):
        if is_tensor(node):
            owners.setdefault(storage(value(node)), -1 - position)
    return owners


def _seen(leaf: Any, position: int, owners: dict[int, int]) -> Seen:
    """How an output lies; `owners` learns whose its storage is."""
    if not is_tensor(leaf) or value(leaf).layout is not torch.strided:
        return Seen()
    tensor = value(leaf)
    owner = owners.get(storage(tensor))
    owners.setdefault(storage(tensor), position)
    return Seen(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), owner)


def restore(
    graph_module: GraphModule, before: Sequence[Seen], captured: GraphModule, mode: FakeTensorMode
) -> None:
    """Give the outputs back the strides and the sharing of storage that they had `before`.

    `captured` is the graph as it was then. Raises `ContractError` where that is not possible.
    """
    propagate(graph_module, mode, exact=True)
    output_node(graph_module).args = (_Outputs(graph_module, before, captured, mode).as_before(),)
    graph_module.recompile()


class _Outputs:
    """The outputs of a rewritten graph while they get back what a caller sees of them."""

    def __init__(self, graph_module: GraphModule, before: Sequence[Seen], captured: GraphModule,
                 mode: FakeTensorMode) -> None:
        self.build = Builder(graph_module, output_node(graph_module), mode, STAMP)
        self.before = before
        self.owners = _inputs(graph_module)
        self.inputs = dict(zip(placeholders(captured), placeholders(graph_module), strict=True))
        self.originals = results(captured)
        self.detached = [is_tensor(leaf) and _is_detached(leaf) for leaf in self.originals]
        self.now = [_attached(leaf) if detached else leaf for leaf, detached in
                    zip(results(graph_module), self.detached, strict=True)]

    def as_before(self) -> list[Any]:
        self._copy_views_that_are_shown_detached()
        for position, was in enumerate(self.before):
            if was.strides is None:
                continue
            now = _seen(self.now[position], position, dict(self.owners))
            if now != replace(was, same=None):
                self._restore(position, now)
            self.owners.setdefault(storage(value(self.now[position])), position)
        firsts, shown = _numbered(self.build.graph_module), list[Any]()
        for k, (was, leaf) in enumerate(zip(self.before, self.now, strict=True)):
            shown.append(shown[was.same] if was.same is not None and was.same >= 0
                         else self._own(k, leaf, firsts))
        return shown

    def _own(self, position: int, leaf: Any, firsts: dict[Node, int]) -> Any:
        """An output as a tensor of its own, where it was one, detached, where it was."""
        if self.detached[position] and not _is_detached(leaf):
            leaf = self.build.call(aten.detach.default, leaf)
        was = self.before[position]
        if was.strides is not None and was.same is None and leaf in firsts:
            leaf = self.build.call(aten.alias.default, leaf)
        _first(leaf, position, firsts)
        return leaf

    def _copy_views_that_are_shown_detached(self) -> None:
        """AOTAutograd takes a detached view of an output for one of the whole that this views."""
        for position, was in enumerate(self.before):
            if self._loses_gradient(position) and is_view(self.now[cast(int, was.owner)]):
                owner = cast(int, was.owner)
                self.now[owner] = self.build.call(aten.clone.default, self.now[owner])

    def _loses_gradient(self, position: int) -> bool:
        """Whether an output shares memory with an earlier one, and one of both is detached."""
        owner = self.before[position].owner
        return owner is not None and owner >= 0 and (
            self.detached[position] or self.detached[owner])

    def _restore(self, position: int, now: Seen) -> None:
        was = self.before[position]
        if was.of_input:
            self.now[position] = self._as_view(position, self.inputs)
            if self.now[position] is None:
                raise ContractError("an output is no view of its input any more")
        elif not self._can_be_alone(was, now):
            self._put_in_one_storage(position if was.owner is None else was.owner)
        elif was.owner is not None:
            self.now[position] = self._in_owner(position, was.owner)
        elif (now.owner, now.strides) != (None, was.strides):  # or elsewhere in its own storage
            self.now[position] = _with_strides(
                self.build, self.now[position], cast(Any, was.strides))

    def _can_be_alone(self, was: Seen, now: Seen) -> bool:
        """Whether an output lies as it did, is to be dense, or is a part of an earlier output."""
        assert was.strides is not None
        if was.owner is not None:
            whole = self.before[was.owner]
            return tuple(value(self.now[was.owner]).stride()) == whole.strides and bool(
                torch.isin(was.places, whole.places).all())
        if now.owner is None and now.strides == was.strides:
            return True
        dense = 1
        for stride, size in () if 0 in was.shape else sorted(
                zip(was.strides, was.shape, strict=True)):
            if size != 1 and stride != dense:
                return False
            dense *= size
        return True

    def _in_owner(self, position: int, owner: int) -> Node:
        """An output as the part that it was of an earlier one."""
        whole, was = self.now[owner], self.before[position]
        view = self._as_view(position, {_attached(self.originals[owner]): whole})
        if view is not None:
            return view
        if self._loses_gradient(position):
            raise ContractError("two outputs share memory, one without its gradient")
        begin = int(value(whole).storage_offset()) - self.before[owner].offset
        return self.build.call(aten.as_strided.default, whole, list(was.shape),
                               list(cast(Any, was.strides)), was.offset + begin)

    def _as_view(self, position: int, known: Mapping[Node, Node]) -> Node | None:
        """The view of a `known` node that an output is in the captured graph, if it is one."""
        def view(original: Node) -> Node | None:
            if original in known or not is_view(original):
                return known.get(original)
            source = view(cast(Node, original.args[0]))
            return source and self.build.call(
                original.target, source, *original.args[1:], **original.kwargs)

        return view(self.originals[position])

    def _put_in_one_storage(self, root: int) -> None:
        """The outputs that share `root`'s memory as views of one, such as a buffer that is gone."""
        group = [k for k, seen in enumerate(self.before)
                 if seen.strides is not None and root in (k, seen.owner)]
        places = {k: self.before[k].places for k in group}
        size = max((1 + int(p.max()) for p in places.values() if p.numel()), default=0)
        memory = self.build.call(aten.new_zeros.default, self.now[group[0]], [size])
        covered = torch.zeros(size, dtype=torch.bool)

        def table(numbers: Iterable[int]) -> Node:
            return self.build.table(list(numbers), value(memory).device, torch.int64)

        for k in sorted(group, key=lambda k: -value(self.now[k]).numel()):
            own = places[k]
            if covered[own].all():
                continue  # a part of what is there
            if covered[own].any():
                raise ContractError(
                    "two outputs share a part of their memory, but neither all of it")
            covered[own] = True
            flat = self.build.reshape(self.now[k], [own.numel()])
            firsts: dict[int, int] = {}
            for i, place in enumerate(own.tolist()):
                firsts.setdefault(place, i)
            if len(firsts) < own.numel():  # expanded: each element once, or its gradient doubles
                flat = self.build.call(aten.index_select.default, flat, 0, table(firsts.values()))
            memory = self.build.call(aten.index_copy.default, memory, 0, table(firsts), flat)
        for k in group:
            was = self.before[k]
            self.now[k] = self.build.call(aten.as_strided.default, memory, list(was.shape),
                                          list(cast(Any, was.strides)), was.offset)


def _is_detached(leaf: Node) -> bool:
    """Whether a result shows what it shows without its gradient."""
    while is_view(leaf) and not is_op(leaf, aten.detach.default):
        leaf = cast(Node, leaf.args[0])
    return is_op(leaf, aten.detach.default)


def _attached(leaf: Node) -> Node:
    """A detached result with its gradient, for others to be views of."""
    return cast(Node, leaf.args[0]) if is_op(leaf, aten.detach.default) else leaf


def outputs_apart(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """Let outputs be copies of what a fused loop's backward reads: a caller may write to them."""
    roots = dict.fromkeys(root(leaf) for leaf in results(graph_module) if is_tensor(leaf))
    for made in roots:
        if made.target is operator.getitem and is_kernel(made.args[0]) and _is_read_back(made):
            build = Builder(graph_module, made.next, mode, STAMP)
            copied = build.call(aten.clone.default, made)
            made.replace_all_uses_with(copied, partial(operator.is_not, copied))


def _is_read_back(result: Node) -> bool:
    """Whether the backward of a fused scan reads a result of it."""
    step, sizes, (held, _, _) = of_call(cast(Node, result.args[0]))
    number = cast(int, result.args[1])
    return number - held in {output for output, _ in shown(step, sizes, held).values()}


def _with_strides(build: Builder, node: Node, strides: tuple[int, ...]) -> Node:
    """A copy of `node` with the given strides (a permutation of a dense layout)."""
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    laid_out = build.permute(node, order)
    dense = build.call(aten.clone.default, laid_out, memory_format=torch.contiguous_format)
    inverse = [order.index(d) for d in range(len(order))]
    if inverse == list(range(len(order))):
        return dense
    return build.call(aten.permute.default, dense, inverse)


def results(graph_module: GraphModule) -> list[Any]:
    return list(output_node(graph_module).args[0])  # type: ignore[arg-type]
