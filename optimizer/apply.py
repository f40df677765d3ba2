"""The only place where a graph changes, and the keeper of what a caller can see of it."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .builder import Builder, output_node, placeholders, storage
from .equal import merge_equal
from .facts import (
    SUPERSEDED,
    aten,
    is_kernel,
    is_op,
    is_tensor,
    is_view,
    source_line,
    value,
)
from .normal_form import propagate, remove_dead, simplify, sink_reads
from .packing import step_sizes
from .rewrite import Rewrite
from .walk import shown

log = logging.getLogger(__name__)


class ContractError(Exception):
    """A pass built something of another shape, dtype or device than what it replaces."""


def apply(
    graph_module: GraphModule, rewrites: Sequence[Rewrite], mode: FakeTensorMode
) -> dict[Rewrite, Exception]:
    """Carry out `rewrites` on `graph_module`, then tidy it; returns those that failed.

    A rewrite that raises while it is built, or builds something of another shape, dtype or
    device, leaves the graph as it was: nothing is replaced before all of it is there.
    """
    failed: dict[Rewrite, Exception] = {}
    for rewrite in rewrites:
        try:
            _carry_out(graph_module, rewrite, mode)
        except Exception as error:
            log.debug("%s failed at %s", rewrite.pass_name, rewrite.line, exc_info=True)
            failed[rewrite] = error
    tidy(graph_module, mode)
    return failed


def _carry_out(graph_module: GraphModule, rewrite: Rewrite, mode: FakeTensorMode) -> None:
    stamp: dict[str, Any] = {"rewritten_by": rewrite.pass_name}
    if (line := rewrite.line) is not None:
        stamp["stack_trace"] = line.as_frame()
    build = Builder(graph_module, rewrite.at, mode, stamp)
    try:
        made = list(zip(rewrite.replaces, rewrite.build(build), strict=True))
        for old, new in made:
            _check(rewrite, old, new)
    except Exception:
        for node in reversed(build.made):
            graph_module.graph.erase_node(node)
        raise
    for old, new in made:
        old.replace_all_uses_with(new)
    for old in rewrite.supersedes:
        old.meta[SUPERSEDED] = True


def _check(rewrite: Rewrite, old: Node, new: Node) -> None:
    before, after = value(old), value(new)
    same = (before.shape, before.dtype, before.device) == (after.shape, after.dtype, after.device)
    if not same:
        raise ContractError(
            f"{rewrite.pass_name} replaced {before.dtype}{list(before.shape)} by "
            f"{after.dtype}{list(after.shape)} for {old.name} at {source_line(old)}"
        )


def tidy(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """Back to normal form, without what is unused or computed twice, every fake result true."""
    simplify(graph_module, mode)
    remove_dead(graph_module)
    merge_equal(graph_module)
    sink_reads(graph_module)
    propagate(graph_module, mode)
    remove_unused_bodies(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()


def remove_unused_bodies(graph_module: GraphModule) -> None:
    """Drop the bodies that no scan runs any more. (torch's own method would also drop the
    bodies inside the bodies that are used.)"""
    used = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
    for name, _ in list(graph_module.named_children()):
        if name not in used:
            delattr(graph_module, name)


@dataclass(frozen=True)
class Seen:
    """Of one output: how it lies in memory, and whose memory it is.

    `owner` is the first output, or the input (numbered -1, -2, …), that has the same storage;
    None for an output of its own, or one that is no strided tensor.
    """

    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] | None = None
    offset: int = 0
    owner: int | None = None


def visible(graph_module: GraphModule) -> list[Seen]:
    """What a caller can see of the outputs' memory."""
    owners: dict[int, int] = {}
    for position, node in enumerate(placeholders(graph_module)):
        if is_tensor(node):
            owners.setdefault(storage(value(node)), -1 - position)
    return [_seen(leaf, position, owners) for position, leaf in enumerate(results(graph_module))]


def _seen(leaf: Any, position: int, owners: dict[int, int]) -> Seen:
    if not is_tensor(leaf) or value(leaf).layout is not torch.strided:
        return Seen()
    tensor = value(leaf)
    owner = owners.get(storage(tensor))
    owners.setdefault(storage(tensor), position)
    return Seen(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()),
                owner)


def restore(
    graph_module: GraphModule, before: Sequence[Seen], captured: GraphModule, mode: FakeTensorMode
) -> None:
    """Give the outputs back the strides and the sharing of storage that they had `before`.

    `captured` is the graph as it was then. Raises `ContractError` where that is not possible.
    """
    end, leaves = output_node(graph_module), results(graph_module)
    propagate(graph_module, mode, exact=True)
    originals = results(captured)
    cut = [is_tensor(leaf) and _is_detached(leaf) for leaf in originals]
    leaves = [_attached(leaf) if apart else leaf for leaf, apart in zip(leaves, cut, strict=True)]
    inputs = dict(zip(placeholders(captured), placeholders(graph_module), strict=True))
    owners = {storage(value(n)): -1 - i for i, n in enumerate(placeholders(graph_module))
              if is_tensor(n)}
    build = Builder(graph_module, end, mode, {"rewritten_by": "contract"})
    for position, was in enumerate(before):
        if was.owner is not None and was.owner >= 0 and (cut[position] or cut[was.owner]) \
                and is_view(leaves[was.owner]):
            # AOTAutograd takes what is detached for a view of the whole that such an output is of
            leaves[was.owner] = build.call(aten.clone.default, leaves[was.owner])
    for position, was in enumerate(before):
        if was.strides is None:
            continue
        now = _seen(leaves[position], position, dict(owners))
        if was.owner is not None and was.owner < 0 and now != was:
            leaves[position] = _viewed(build, originals[position], inputs)
            if leaves[position] is None:
                raise ContractError("an output is no view of its input any more")
        elif now != was and not _can_be_restored(leaves, before, was, now):
            root = position if was.owner is None else was.owner
            group = [k for k, seen in enumerate(before)
                     if seen.strides is not None and root in (k, seen.owner)]
            for k, leaf in zip(group, _in_one_storage(build, leaves, before, group), strict=True):
                leaves[k] = leaf
        elif now != was:
            shown = None if was.owner is None else _viewed(
                build, originals[position], {_attached(originals[was.owner]): leaves[was.owner]})
            if shown is None and was.owner is not None and (cut[position] or cut[was.owner]):
                raise ContractError("two outputs share memory, one without its gradient")
            leaves[position] = _restored(build, leaves, before, position, now) \
                if shown is None else shown
        owners.setdefault(storage(value(leaves[position])), position)
    end.args = ([build.call(aten.detach.default, leaf) if apart and not _is_detached(leaf) else leaf
                 for leaf, apart in zip(leaves, cut, strict=True)],)
    graph_module.recompile()


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
    roots = dict.fromkeys(_root(leaf) for leaf in results(graph_module) if is_tensor(leaf))
    for root in roots:
        if root.target is operator.getitem and is_kernel(root.args[0]) and _is_read_back(root):
            build = Builder(graph_module, root.next, mode, {"rewritten_by": "contract"})
            copied = build.call(aten.clone.default, root)
            root.replace_all_uses_with(copied, partial(operator.is_not, copied))


def _is_read_back(result: Node) -> bool:
    """Whether the backward of a fused scan reads a result of it."""
    step, carries, slices, invariants = cast(Any, cast(Node, result.args[0]).args[:4])
    sizes = step_sizes(*([value(n) for n in nodes] for nodes in (carries, slices, invariants)))
    held, number = len(carries), cast(int, result.args[1])
    return number - held in {output for output, _ in shown(step, sizes, held).values()}


def _root(node: Node) -> Node:
    """What a view is a view of."""
    while is_view(node):
        node = cast(Node, node.args[0])
    return node


def _viewed(build: Builder, original: Node, known: Mapping[Node, Node]) -> Node | None:
    """The view of a `known` node that `original` is in the captured graph, if it is one."""
    if original in known:
        return known[original]
    if not is_view(original):
        return None
    source = _viewed(build, cast(Node, original.args[0]), known)
    return source and build.call(original.target, source, *original.args[1:], **original.kwargs)


def _restored(
    build: Builder, leaves: list[Any], before: Sequence[Seen], position: int, now: Seen
) -> Node:
    node, was = leaves[position], before[position]
    assert was.strides is not None
    if was.owner is None:
        if now.owner is None and now.strides == was.strides:
            return cast(Node, node)  # elsewhere in a storage of its own
        return _with_strides(build, node, was.strides)
    begin = int(value(leaves[was.owner]).storage_offset()) - before[was.owner].offset
    return build.call(aten.as_strided.default, leaves[was.owner], list(was.shape),
                      list(was.strides), was.offset + begin)


def _can_be_restored(
    leaves: list[Any], before: Sequence[Seen], was: Seen, now: Seen
) -> bool:
    """Whether an output lies as it did, is to be dense, or is a part of an earlier output."""
    assert was.strides is not None
    if was.owner is not None:
        whole = before[was.owner]
        return tuple(value(leaves[was.owner]).stride()) == whole.strides and bool(
            torch.isin(_places(was), _places(whole)).all())
    if now.owner is None and now.strides == was.strides:
        return True
    dense = 1
    for stride, size in () if 0 in was.shape else sorted(zip(was.strides, was.shape, strict=True)):
        if size != 1 and stride != dense:
            return False
        dense *= size
    return True


def _last(was: Seen) -> int:
    """The place of the last element in its storage."""
    assert was.strides is not None
    return was.offset + sum((n - 1) * st for n, st in zip(was.shape, was.strides, strict=True))


def _places(was: Seen) -> Tensor:
    """The places of all elements in their storage."""
    numbers = torch.arange(max(_last(was) + 1, 0))
    assert was.strides is not None
    return torch.as_strided(numbers, was.shape, was.strides, was.offset).reshape(-1) \
        if 0 not in was.shape else numbers[:0]


def _in_one_storage(
    build: Builder, leaves: list[Any], before: Sequence[Seen], group: Sequence[int]
) -> list[Node]:
    """The outputs of `group` as views of one storage, such as a buffer that is gone."""
    size = max(0, *(1 + _last(before[k]) for k in group))
    storage = build.call(aten.new_zeros.default, leaves[group[0]], [size])
    places = [(list(before[k].shape), list(cast(Any, before[k].strides)), before[k].offset)
              for k in group]
    covered = torch.zeros(size, dtype=torch.bool)
    largest = sorted(range(len(group)), key=lambda i: -value(leaves[group[i]]).numel())
    for i in largest:
        own = _places(before[group[i]])
        if covered[own].all():
            continue  # a part of what is there
        if covered[own].any():
            raise ContractError("two outputs share a part of their memory, but neither all of it")
        covered[own] = True
        flat = build.reshape(leaves[group[i]], [own.numel()])
        index = build.table(own.tolist(), value(storage).device, torch.int64)
        storage = build.call(aten.index_copy.default, storage, 0, index, flat)
    return [build.call(aten.as_strided.default, storage, *place) for place in places]


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
