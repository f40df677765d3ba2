"""The only place where a graph changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .builder import Builder
from .contract import ContractError
from .equal import merge_equal, merge_last_states
from .facts import SUPERSEDED, source_line, value
from .normal_form import propagate, remove_dead, simplify, sink_reads
from .rewrite import Rewrite

log = logging.getLogger(__name__)


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
    merge_last_states(graph_module, mode)
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
