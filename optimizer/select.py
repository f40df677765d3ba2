"""Which rewrites to keep: all that verify, less those that lose inside the whole model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from torch import nn

from .behaviour import observe
from .capture import Capture
from .cases import copied, flat
from .measure import (
    BUSY,
    Comparison,
    call,
    device_of,
    interleaved,
    peak_memory,
)
from .pipeline import Applied, Group, Outcome, run_passes
from .refused import REENTRANT
from .rewrite import Pass, Skip
from .rewritten import Rewritten
from .state import fresh_state, model_state, state_kept, swapped
from .verdict import Differs, NotVerified, Verdict
from .verify import Short, verify

LITTLE = 1 << 24  # bytes of peak memory: what takes less may as well take so much
STRUCTURAL = "lower-scans"  # not a choice: a scan must be run somehow
LARGE = 500  # nodes: a graph of more is not run unrolled to see what re-rolling is worth
MOST_GROUPS = 8  # beyond this many, rewrites are tried pass by pass, not line by line
MOST_COUNTEREXAMPLES = 8
LOSS, GAIN = 0.02, 0.01  # a rewrite may cost so much by chance; what is kept must gain so much
SLABS = (256, 64, 16)  # steps that are batched at a time where all of them need too much memory


@dataclass(frozen=True)
class Options:
    """What a caller may ask of `apply_passes`; see there."""

    passes: tuple[Pass, ...]
    mode: str = "both"
    allow_approximate: bool = False
    allow_random_reorder: bool = False
    verify: bool = True
    measure: bool = True
    tolerance: float | None = None
    memory_budget: float = 1.25
    seed: int = 0
    dynamic_shapes: Any = None


@dataclass(frozen=True)
class Kept:
    """A rewrite in the result, and how many times slower the model is without its group."""

    applied: Applied
    verdict: Verdict
    worth: float | None


@dataclass(frozen=True)
class Declined:
    """What is not in the result: a near miss, a loser with its number, or a wrong rewrite."""

    pass_name: str
    where: str
    reason: str


NOTHING = NotVerified("nothing was rewritten")


@dataclass(frozen=True)
class Example:
    """A model's program for some inputs, and these inputs."""

    captured: Capture
    args: Sequence[Any]
    kwargs: dict[str, Any]


def _in_turn(*calls: Callable[[], object]) -> None:
    for each in calls:
        each()


@dataclass
class Selection:
    """The outcome of optimizing one model for one signature and mode."""

    mode: str
    module: nn.Module  # the rewritten module, or the original where nothing paid
    rewritten: Rewritten | None
    kept: list[Kept] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    verdict: Verdict = NOTHING
    comparison: Comparison | None = None
    nodes: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    excluded: frozenset[Group] = frozenset()
    slab: int | None = None  # steps that passes batch at a time


Progress = Callable[[str], None]


def select(
    model: nn.Module, example: Example, options: Options, mode: str, progress: Progress,
    before: Callable[[], object], little: float = LITTLE, short: Example | None = None,
) -> Selection:
    """Rewrite, verify, measure and choose, for `mode` "inference" or "training".

    What a call does `before` it runs what was chosen counts as its time. A peak memory below
    `little` bytes counts as so many. Most cases are verified on the `short` example, where there
    is one that the same rewrites apply to.
    """
    return _Selecting(model, example, options, mode, progress, before, little, short).run()


def again(captured: Capture, options: Options, selection: Selection) -> Outcome:
    """The rewrites of a selection on another capture of the same model."""
    passes = _in_slabs_of(selection.slab, options.passes)
    return _run(captured, options, passes, selection.excluded, selection.mode)


def _run(
    captured: Capture, options: Options, passes: Sequence[Pass], excluded: frozenset[Group],
    mode: str,
) -> Outcome:
    return run_passes(
        captured, passes, excluded=excluded, allow_approximate=options.allow_approximate,
        allow_random_reorder=options.allow_random_reorder, training=mode == "training",
    )


def _in_slabs_of(slab: int | None, passes: Sequence[Pass]) -> Sequence[Pass]:
    """The passes, those that can batch in slabs told to."""
    if slab is None:
        return passes
    return [replace(cast(Any, p), slab=slab) if hasattr(p, "slab") else p for p in passes]


class _Selecting:
    def __init__(
        self, model: nn.Module, example: Example, options: Options, mode: str,
        progress: Progress, before: Callable[[], object], little: float, short: Example | None,
    ) -> None:
        self.before, self.little, self.short = before, little, short
        self.model, self.captured = model, example.captured
        self.args, self.kwargs = example.args, example.kwargs
        self.options, self.mode, self.progress = options, mode, progress
        self.rewritten: dict[tuple[frozenset[Group], int | None], Outcome] = {}  # and in slabs
        self.excluded: frozenset[Group] = frozenset()
        self.slab: int | None = None
        self.declined: list[Declined] = []
        self.worth: dict[Group, float] = {}

    def run(self) -> Selection:
        start = time.perf_counter()
        size = self.captured.size
        if (raised := self._naive_exception()) is not None:
            reason = REENTRANT if "use_reentrant" in raised \
                else f"the original itself raises in {self.mode}: {raised}"
            return self._nothing([Declined("all passes", "?", reason)], size, start)
        if self.mode == "training" and (lost := self.captured.lost) is not None:
            return self._nothing([Declined("all passes", lost.where, lost.reason)], size, start)
        outcome = self._rewrite()
        near_misses = [self._near_miss(skip) for skip in outcome.skips]
        if not outcome.applied:
            return self._nothing(near_misses, size, start)
        outcome, verdict = self._verified(outcome)
        comparison = None
        if outcome.applied and self.options.measure:
            outcome, verdict, comparison = self._measured(outcome, verdict)
        self.declined += near_misses
        if not outcome.applied:
            return self._nothing([], size, start, comparison)
        rewritten = self._module(outcome)
        kept = [Kept(a, verdict, self.worth.get(a.group)) for a in outcome.applied]
        return Selection(
            self.mode, rewritten, rewritten, kept, self.declined, verdict, comparison,
            (size, len(outcome.graph_module.graph.nodes)), time.perf_counter() - start,
            self.excluded, self.slab,
        )

    def _naive_exception(self) -> str | None:
        """What a call of the original raises, with its backward in training."""
        leaves, spec = flat(self.args, self.kwargs)
        state = fresh_state(self.model)
        with swapped(self.model, state) as before:
            seen = observe(self.model, copied(leaves), spec, model_state(self.model), before,
                           self.mode == "training", self.options.seed,
                           as_given=self.captured.asks_for_gradients)
        return seen.exception

    def _nothing(
        self, near_misses: list[Declined], size: int, start: float,
        comparison: Comparison | None = None,
    ) -> Selection:
        return Selection(self.mode, self.model, None, [], self.declined + near_misses,
                         comparison=comparison, nodes=(size, size),
                         seconds=time.perf_counter() - start)

    def _rewrite(self, also: frozenset[Group] = frozenset()) -> Outcome:
        excluded = self.excluded | also
        key = excluded, self.slab
        if key not in self.rewritten:
            self.rewritten[key] = self._run(self._passes(), excluded)
        return self.rewritten[key]

    def _run(self, passes: Sequence[Pass], excluded: frozenset[Group]) -> Outcome:
        return _run(self.captured, self.options, passes, excluded, self.mode)

    def _in_short(self, outcome: Outcome, passes: Sequence[Pass]) -> Short | None:
        """The same rewrites on the short example, if they are that."""
        if self.short is None or self.slab is not None:
            return None
        found = _run(self.short.captured, self.options, passes, self.excluded, self.mode)
        if found.groups != outcome.groups:
            return None
        module = Rewritten(self.model, self.short.captured, found.graph_module)
        return Short(module, self.short.args, self.short.kwargs)

    def _passes(self) -> Sequence[Pass]:
        return _in_slabs_of(self.slab, self.options.passes)

    def _module(self, outcome: Outcome) -> Rewritten:
        return Rewritten(self.model, self.captured, outcome.graph_module)

    def _near_miss(self, skip: Skip) -> Declined:
        return Declined(skip.pass_name, str(skip.line or "?"), skip.reason)

    def _verify(self, outcome: Outcome, passes: Sequence[Pass] | None = None) -> Verdict:
        if not self.options.verify:
            return NotVerified("verification was switched off")
        if any(a.reorders_random for a in outcome.applied):
            return NotVerified("random operations were reordered: results can't be compared")
        approximate = any(a.approximate for a in outcome.applied)
        tolerance = self.options.tolerance
        return verify(
            self.model, self._module(outcome), self.args, self.kwargs, mode=self.mode,
            seed=self.options.seed, tolerance=tolerance, approximate=approximate,
            short=self._in_short(outcome, passes or self._passes()),
            as_given=self.captured.asks_for_gradients,
        )

    def _verified(self, outcome: Outcome) -> tuple[Outcome, Verdict]:
        """Drop the rewrites of each pass that a counterexample is traced to, and go on."""
        for _ in range(MOST_COUNTEREXAMPLES):
            if not outcome.applied:
                break
            self.progress(f"verifying {len(outcome.applied)} rewrites ({self.mode})")
            verdict = self._verify(outcome)
            if not isinstance(verdict, Differs):
                return outcome, verdict
            culprit = self._culprit(outcome)
            self.declined += [
                Declined(name, where, str(verdict))
                for name, where in outcome.groups if name == culprit
            ]
            self.excluded |= {g for g in outcome.groups if g[0] == culprit}
            outcome = self._rewrite()
        return Outcome(outcome.graph_module), NotVerified("every rewrite was dropped")

    def _culprit(self, outcome: Outcome) -> str:
        """The first pass, in order, with which the result differs."""
        names = list(dict.fromkeys(a.pass_name for a in outcome.applied))
        for count, name in enumerate(names[:-1], start=1):
            first = [p for p in self._passes() if p.name in (*names[:count], STRUCTURAL)]
            partial = self._run(first, self.excluded)
            if isinstance(self._verify(partial, first), Differs):
                return name
        return names[-1] if names[-1] != STRUCTURAL or len(names) == 1 else names[-2]

    def _measured(
        self, outcome: Outcome, verdict: Verdict
    ) -> tuple[Outcome, Verdict, Comparison | None]:
        """Time the whole model with and without each group; drop the losers; check the budget.

        The greatest loser goes first: without it, others may be worth what they cost.
        """
        bundles, first = self._bundles(outcome), (outcome, verdict)
        excluded, declined = self.excluded, len(self.declined)
        while bundles and (losers := self._losers(outcome, bundles)):
            worst = max(losers, key=losers.__getitem__)
            reason = f"loses: the model is {losers[worst]:.2f}x faster without it"
            self._decline(bundles[worst], reason)
            self.excluded |= set(bundles[worst])
            outcome = self._rewrite()
            bundles = {n: [g for g in bundles[n] if g in outcome.groups]
                       for n in losers if n != worst}
            bundles = {name: groups for name, groups in bundles.items() if groups}
        if outcome is not first[0] and outcome.applied:
            verdict = self._verify(outcome)
            if isinstance(verdict, Differs):  # what was equal together is taken together
                outcome, verdict = first
                self.excluded = excluded
                del self.declined[declined:]
        return self._within_budget(outcome, verdict)

    def _losers(self, outcome: Outcome, bundles: dict[str, list[Group]]) -> dict[str, float]:
        """Those without which the model is faster, and how much."""
        variants = {"looplift": outcome}
        for name, groups in bundles.items():
            self.progress(f"measuring without {name} ({self.mode})")
            variants[name] = self._rewrite(frozenset(groups))
        timed = self._timed(self._modules(variants), 1 + LOSS, rounds=5)
        losers = {}
        for name, groups in bundles.items():
            worth = 1 / timed.gain(name)  # ratios are to the first variant, all rewrites
            self.worth |= dict.fromkeys(groups, worth)
            if worth < 1 - max(min(timed.noise, BUSY), LOSS):
                losers[name] = 1 / worth
        return losers

    def _within_budget(
        self, outcome: Outcome, verdict: Verdict
    ) -> tuple[Outcome, Verdict, Comparison | None]:
        """Drop what takes the peak memory beyond the budget, and all of it if nothing is gained."""
        naive = self._weigh(self.model)
        budget = int(self.options.memory_budget * max(naive, self.little))
        heaviest: list[list[Group]] | None = None
        while outcome.applied and (ours := self._weigh(self._module(outcome))) > budget:
            if heaviest is None and self.slab is None and (slabbed := self._in_slabs(budget)):
                outcome, verdict = slabbed
                continue
            heaviest = self._heaviest(outcome, budget) if heaviest is None else heaviest
            groups = [g for g in heaviest.pop(0) if g in outcome.groups] \
                if heaviest else outcome.groups
            self._decline(
                groups, f"needs {ours / max(naive, 1):.2f}x the naive peak memory "
                f"(allowed: {self.options.memory_budget:.2f}x)",
            )
            self.excluded |= frozenset(groups)
            outcome = self._rewrite()
        if heaviest is not None and outcome.applied:
            verdict = self._verify(outcome)
            if isinstance(verdict, Differs):
                self._decline(outcome.groups, str(verdict))
                outcome = Outcome(outcome.graph_module)
        if not outcome.applied:
            return outcome, verdict, None
        comparison = self._timed(
            {"naive": self.model, **self._modules({"looplift": outcome})}, 1 + GAIN,
            memory={"naive": naive, "looplift": ours},
        )
        gain = comparison.gain("looplift")
        if gain < 1 + max(min(comparison.noise, BUSY), GAIN):
            reason = f"no gain: {gain:.2f}x naive in the whole model, all rewrites together" \
                + comparison.measured_in("looplift")
            self._decline(outcome.groups, reason)
            outcome = Outcome(outcome.graph_module)
        return outcome, verdict, comparison

    def _in_slabs(self, budget: int) -> tuple[Outcome, Verdict] | None:
        """The rewrites with batches of as many steps as fit, if some do; the longest that do.

        In training the gradients need what every step computed, slabs or not.
        """
        for slab in SLABS if self.mode == "inference" else ():
            self.slab = slab
            outcome = self._rewrite()
            if outcome.applied and self._weigh(self._module(outcome)) <= budget:
                verdict = self._verify(outcome)
                if not isinstance(verdict, Differs):
                    return outcome, verdict
        self.slab = None
        return None

    def _heaviest(self, outcome: Outcome, budget: int) -> list[list[Group]]:
        """The last groups without which it fits; else all, first those without which it needs
        the least."""
        weights = []
        for groups in reversed(self._bundles(outcome).values()):
            variant = self._rewrite(frozenset(groups))
            weight = self._weigh(self._module(variant) if variant.applied else self.model)
            if weight <= budget:
                return [groups]
            weights.append((weight, groups))
        return [groups for _, groups in sorted(weights, key=lambda w: w[0])]

    def _weigh(self, module: nn.Module) -> int:
        run = call(module, self.args, self.kwargs, self.mode == "training")
        with state_kept(self.model):
            return peak_memory(run, device_of(self.model, self.args))

    def _bundles(self, outcome: Outcome) -> dict[str, list[Group]]:
        """Groups to try leaving out together, by a name to show."""
        large = self.captured.size > LARGE
        fixed = {STRUCTURAL, *(p.name for p in self.options.passes[:1] if self.captured.rolled)}
        groups = [g for g in outcome.groups
                  if g[0] not in fixed and not (large and "→ one scan" in outcome.summary(g))]
        if len(groups) <= MOST_GROUPS:
            return {f"{name} at {where}": [(name, where)] for name, where in groups}
        return {name: [g for g in groups if g[0] == name] for name, _ in groups}

    def _modules(self, variants: dict[str, Outcome]) -> dict[str, nn.Module]:
        return {n: self._module(v) if v.applied else self.model for n, v in variants.items()}

    def _timed(
        self, modules: dict[str, nn.Module], edge: float, rounds: int = 7,
        memory: dict[str, int] | None = None,
    ) -> Comparison:
        training = self.mode == "training"
        runs = {n: call(m, self.args, self.kwargs, training) for n, m in modules.items()}
        if memory is not None:  # the whole is compared with the model, as a caller sees it
            runs["looplift"] = partial(_in_turn, self.before, runs["looplift"])
        self.progress(f"measuring {len(runs)} variants ({self.mode})")
        with state_kept(self.model):
            timed = interleaved(runs, mode=self.mode, seed=self.options.seed, rounds=rounds,
                                seconds=0.5 * (1 + len(runs)), edge=edge)
        weighed = [replace(t, memory=(memory or {}).get(t.name)) for t in timed.timings]
        return replace(timed, timings=tuple(weighed))

    def _decline(self, groups: Sequence[Group], reason: str) -> None:
        self.declined += [Declined(name, where, reason) for name, where in groups
                          if name != STRUCTURAL]

