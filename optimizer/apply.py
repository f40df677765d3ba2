"""The only place where a graph changes, and the keeper of what a caller can see of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .builder import Builder, output_node, placeholders
from .facts import aten, is_pure, is_tensor, source_line, value
from .normal_form import propagate, remove_dead, simplify, sink_reads
from .rewrite import Rewrite

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
    made = list(zip(rewrite.replaces, rewrite.build(build), strict=True))
    for old, new in made:
        _check(rewrite, old, new)
    for old, new in made:
        old.replace_all_uses_with(new)


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
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()


def merge_equal(graph_module: GraphModule) -> None:
    """Compute once what two nodes compute alike (pure operations of equal arguments)."""
    seen: dict[Any, Node] = {}
    for node in list(graph_module.graph.nodes):
        if node.op not in ("call_function", "get_attr") or not is_pure(node):
            continue
        leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
        key = (node.op, node.target, repr(spec), tuple(
            n if isinstance(n, Node) else (type(n).__name__, repr(n)) for n in leaves
        ))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph_module.graph.erase_node(node)


def visible(graph_module: GraphModule) -> list[tuple[tuple[int, ...] | None, int | None]]:
    """Of each output: its strides, and which input or earlier output shares its storage.

    Inputs are numbered -1, -2, …; a fresh output has no such number.
    """
    owners: dict[int, int] = {}
    for position, node in enumerate(placeholders(graph_module)):
        if is_tensor(node):
            owners.setdefault(_storage(value(node)), -1 - position)
    seen: list[tuple[tuple[int, ...] | None, int | None]] = []
    for position, leaf in enumerate(results(graph_module)):
        if not is_tensor(leaf):
            seen.append((None, None))
            continue
        assert isinstance(leaf, Node)
        key = _storage(value(leaf))
        seen.append((tuple(value(leaf).stride()), owners.get(key)))
        owners.setdefault(key, position)
    return seen


def restore(
    graph_module: GraphModule,
    before: Sequence[tuple[tuple[int, ...] | None, int | None]],
    mode: FakeTensorMode,
) -> None:
    """Give the outputs back the strides and the freshness that `visible` saw `before`."""
    end = output_node(graph_module)
    leaves = results(graph_module)
    for position, (now, was) in enumerate(zip(visible(graph_module), before, strict=True)):
        if now == was:
            continue
        node, (strides, shared) = leaves[position], was
        assert isinstance(node, Node)
        assert strides is not None
        if shared is not None:
            raise ContractError(f"output {position} shared storage with another value, and lost it")
        build = Builder(graph_module, end, mode, {"rewritten_by": "contract"})
        leaves[position] = _with_strides(build, node, strides)
    end.args = (leaves,)
    tidy_strides(graph_module, mode)


def tidy_strides(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    propagate(graph_module, mode)
    graph_module.recompile()


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


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
