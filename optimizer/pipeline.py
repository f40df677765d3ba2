"""Capture → passes, in order → one rewritten graph, with what was done and what was not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from torch.fx import GraphModule

from .apply import apply, tidy
from .builder import duplicate
from .capture import Capture
from .contract import outputs_apart, restore
from .equal import merge_equal, merge_kernels
from .facts import WASTED, Facts, Line, all_graphs
from .rewrite import Pass, Rewrite, Skip
from .split import join_reads
from .turns import TRACING
from .waste import last_steps_apart, left_out, may_stay, wasting

log = logging.getLogger(__name__)

FUSING = "fuse-recurrences"  # the pass that builds kernels
MOST_ROUNDS = 64  # a pass proposes again after its rewrites were applied, this often at most

Group = tuple[str, str]


@dataclass(frozen=True)
class Allowed:
    """What the caller lets rewrites do."""

    approximate: bool
    random_reorder: bool


@dataclass(frozen=True)
class Applied:
    """One rewrite that was carried out."""

    pass_name: str
    summary: str
    line: Line | None
    group: Group
    approximate: bool
    reorders_random: bool


@dataclass
class Outcome:
    """A rewritten graph and the account of it."""

    graph_module: GraphModule
    applied: list[Applied] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    def summary(self, group: Group) -> str:
        """What the rewrites of a group did, the first of them."""
        return next((a.summary for a in self.applied if a.group == group), "")

    @property
    def groups(self) -> list[Group]:
        return list(dict.fromkeys(a.group for a in self.applied))


def run_passes(
    captured: Capture, passes: Sequence[Pass], *, excluded: frozenset[Group] = frozenset(),
    allow_approximate: bool = False, allow_random_reorder: bool = False, training: bool = False,
) -> Outcome:
    """Run `passes` on a copy of the captured graph, without the rewrites of `excluded` groups;
    for `training` without a gradient of what a last step computes and nobody reads."""
    passes, allowed = tuple(passes), Allowed(allow_approximate, allow_random_reorder)
    first = begun(captured, passes[:1], excluded, allowed)
    wasted = wasting(first.graph_module) if training else []
    for apart in (False, True) if all(map(may_stay, wasted)) else (True,):
        outcome = Outcome(duplicate(first.graph_module), list(first.applied), list(first.skips))
        given = {n for graph in all_graphs(outcome.graph_module) for n in graph.graph.nodes}
        if apart:
            last_steps_apart(outcome.graph_module, captured.fake_mode)
        _run(outcome, captured, passes[1:], excluded, allowed, training)
        if not wasted or left_out(outcome.graph_module, given):
            break
    merge_equal(outcome.graph_module)
    merge_kernels(outcome.graph_module, captured.fake_mode)
    if training:
        outputs_apart(outcome.graph_module, captured.fake_mode)
    restore(outcome.graph_module, captured.seen, captured.graph_module, captured.fake_mode)
    join_reads(outcome.graph_module, captured.fake_mode)
    return outcome


def begun(
    captured: Capture, passes: tuple[Pass, ...], excluded: frozenset[Group], allowed: Allowed
) -> Outcome:
    """What the first of all passes makes of the whole unrolled graph, which it sees once."""
    own = frozenset(g for g in excluded if passes and g[0] == passes[0].name)
    key = (passes, allowed, own)
    if key not in captured.begun:
        outcome = Outcome(duplicate(captured.graph_module))
        _run(outcome, captured, passes, excluded, allowed)
        for graph in all_graphs(outcome.graph_module):
            for node in graph.graph.nodes:
                node.meta.pop(WASTED, None)
        tidy(outcome.graph_module, captured.fake_mode)
        captured.begun[key] = outcome
    return cast(Outcome, captured.begun[key])


def _run(
    outcome: Outcome, captured: Capture, passes: Sequence[Pass], excluded: frozenset[Group],
    allowed: Allowed, training: bool = False,
) -> None:
    look = partial(Facts, training=training, fuses=any(one.name == FUSING for one in passes))
    for one in passes:
        done: set[GraphModule] = set()
        while todo := [g for g in all_graphs(outcome.graph_module) if g not in done]:
            graph = todo[-1]  # bodies before the loops around them
            done.add(graph)
            with TRACING:
                _run_pass(one, graph, look, captured, excluded, allowed, outcome)


def _run_pass(
    one: Pass, graph: GraphModule, look: Callable[[GraphModule], Facts], captured: Capture,
    excluded: frozenset[Group], allowed: Allowed, outcome: Outcome,
) -> None:
    failed: set[tuple[str, str]] = set()
    for _ in range(MOST_ROUNDS):
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for proposal in _proposals(one, look(graph)):
            if isinstance(proposal, Skip):
                skips.append(proposal)
            elif (proposal.at.name, str(proposal.line)) in failed or proposal.group in excluded:
                continue
            elif proposal.approximate and not allowed.approximate:
                reason = f"{proposal.summary}: approximations are not allowed"
                skips.append(Skip(one.name, reason, proposal.line))
            elif proposal.reorders_random and not allowed.random_reorder:
                reason = f"{proposal.summary}: several random operations run in every step, " \
                    "whose order must be kept"
                skips.append(Skip(one.name, reason, proposal.line))
            else:
                rewrites.append(proposal)
        if not rewrites:
            outcome.skips += [s for s in skips if s not in outcome.skips]
            return
        errors = apply(graph, rewrites, captured.fake_mode)
        for rewrite, error in errors.items():
            failed.add((rewrite.at.name, str(rewrite.line)))
            reason = f"{rewrite.summary}: could not be built ({type(error).__name__}: {error})"
            outcome.skips.append(Skip(one.name, reason, rewrite.line))
        outcome.applied += [_applied(r) for r in rewrites if r not in errors]


def _proposals(one: Pass, facts: Facts) -> list[Rewrite | Skip]:
    """What a pass proposes; where it raises, a skip that says so."""
    try:
        return list(one.propose(facts))
    except Exception as error:
        log.exception("the pass %s failed; the others go on", one.name)
        return [Skip(one.name, f"failed to propose ({type(error).__name__}: {error})")]


def _applied(rewrite: Rewrite) -> Applied:
    return Applied(rewrite.pass_name, rewrite.summary, rewrite.line, rewrite.group,
                   rewrite.approximate, rewrite.reorders_random)
