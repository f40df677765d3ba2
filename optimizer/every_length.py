"""What was chosen at one length, as one module for every length of the family."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any, cast

from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .double import Width
from .family import FEW, Family
from .formula import Lengths, Samples, at
from .general import NotOneProgram, general
from .measure import call
from .rewritten import Rewritten
from .select import LITTLE, STRUCTURAL, Example, Options, Selection, again, select
from .state import state_kept
from .verdict import Differs, Equal
from .verify import Seen, verify_once

QUICK = 0.02  # seconds: choices are measured at the longest length at which a call takes no more
SOON = 0.5  # seconds: where a call takes no more, it is seen first if it is the same program
SLOW = 5.0  # seconds: gradients whose check may take longer are checked at shorter lengths
BRIEF = 2  # times as long as a length that was not traced: there most cases are verified
LEAST, MOST = 64, 4  # or at this length; at no more than so many times the shortest
MOST_LENGTHS = 32  # at which rewrites are carried out anew
log = logging.getLogger(__name__)

Make = Callable[[Sequence[Any]], nn.Module]  # what runs inputs of any length of a family


@dataclass(frozen=True)
class Chosen:
    """What was chosen in one mode, and what runs it at each length of a family."""

    selection: Selection
    make: Make  # gives the original where nothing paid
    least: Lengths  # the shortest it is right at
    why: str = ""  # what prevents that one source holds for all lengths


def optimize_family(
    model: nn.Module, found: Family, leaves: Sequence[Any], spec: pytree.TreeSpec,
    options: Options, modes: Sequence[str], progress: Callable[[str], None],
    before: Callable[[], object],
) -> tuple[Family, dict[str, Chosen], str]:
    """Choose rewrites at lengths at which the model runs quickly; carry them to every length.

    The third result says at which. The family that is returned begins at the shortest length that
    they are right at. Raises `NotOneProgram` where the result differs from the model at a longer
    one.
    """
    wanted = tuple(n for free in found.frees if (n := free.of(leaves)) is not None)
    chosen_at, seconds = measuring_lengths(
        model, found, leaves, spec, wanted, training="training" in modes)
    growth = _growth(chosen_at, wanted)
    exact = options.verify and not options.allow_random_reorder
    if seconds * growth <= SOON and exact and found.holds(wanted):
        plain = [p for p in options.passes if p.name in (options.passes[0].name, STRUCTURAL)]
        folded = EachLength(model, found, leaves, spec, Selection("inference", model, None),
                            replace(options, passes=tuple(plain)))
        if (differs := folded.differs_at(wanted)) is not None:
            raise NotOneProgram(f"at length {_named(wanted)}: {differs}")

    def example(lengths: Lengths) -> Example:
        resized = found.resized(leaves, lengths)
        return Example(found.capture(resized), *pytree.tree_unflatten(resized, spec))

    short, here = _untraced(found), example(chosen_at)
    worth = options.verify and _growth(short, chosen_at) > BRIEF
    brief = example(short) if worth else None
    # what is little memory at these lengths may be much at those that are wanted
    little = LITTLE * min(1.0, 1 / growth)
    seen: dict[Lengths, Seen] = {}
    made = {}
    for mode in modes:
        selection = select(model, here, options, mode, progress, before, little, brief)
        folding = options.passes[0].name
        if wrong := [d for d in selection.declined
                     if d.pass_name == folding and d.reason.startswith("differs")]:
            raise NotOneProgram(f"at length {_named(chosen_at)}: {wrong[0].reason}")
        choice = Chosen(selection, _always(model), tuple(
            (first - 1) % step + 1 for first, step in zip(found.first, found.steps, strict=True)))
        if selection.rewritten is not None:
            progress(f"verifying at other lengths ({mode})")
            choice = EachLength(model, found, leaves, spec, selection, options).chosen(
                chosen_at, wanted, seen)
        made[mode] = choice
    nothing = all(choice.selection.rewritten is None for choice in made.values())
    if nothing and growth > 2 and at(found.size, wanted) <= FEW:
        raise NotOneProgram(f"nothing paid at length {_named(chosen_at)}, from which little is "
                            "known of longer ones, and their trace is short")
    leasts = zip(*(choice.least for choice in made.values()), strict=True)
    found = replace(found, first=tuple(map(max, leasts)))
    told = [f"chosen at {_named(chosen_at)}"]
    told += sorted({f"rewritten anew at each length: {c.why}" for c in made.values() if c.why})
    return found, made, ", ".join(told)


def measuring_lengths(
    model: nn.Module, found: Family, leaves: Sequence[Any], spec: pytree.TreeSpec,
    wanted: Lengths, training: bool,
) -> tuple[Lengths, float]:
    """The lengths to choose at: `wanted`, or shorter ones that run quickly, in the same steps.

    The second result is about how many seconds a call takes there, in `training` a training step.

    `NotOneProgram` where the five further ones that are needed pass the longest that may be.
    """
    firsts, steps = found.first, found.steps
    mosts = [first + ((free.most or sys.maxsize) - first) // step * step - 5 * step
             for first, step, free in zip(firsts, steps, found.frees, strict=True)]
    if any(most < first for most, first in zip(mosts, firsts, strict=True)):
        raise NotOneProgram("there are too few lengths to compare")
    short = tuple(min(most, first + -(-max(LEAST - first, 4 * step) // step) * step)
                  for first, step, most in zip(firsts, steps, mosts, strict=True))
    args, kwargs = pytree.tree_unflatten(found.resized(leaves, short), spec)
    run = call(model, args, kwargs, training)
    with state_kept(model):
        try:
            run()
        except Exception:
            if not training:
                raise
            run = call(model, args, kwargs, training=False)  # `select` tells what it raises
            run()
        start = time.perf_counter()
        run()
    seconds = time.perf_counter() - start
    more = min(max(1.0, QUICK / seconds), MOST) ** (1 / len(short))
    chosen = tuple(
        min(most, first + int((length * more - first) // step) * step)
        for length, first, step, most in zip(short, firsts, steps, mosts, strict=True)
    )
    near = all(w <= 2 * c for w, c in zip(wanted, chosen, strict=True))
    fits = all(w <= most for w, most in zip(wanted, mosts, strict=True))
    picked = wanted if near and fits and found.holds(wanted) else chosen
    return picked, seconds * prod(p / n for p, n in zip(picked, short, strict=True))


class EachLength:
    """The rewrites of a selection at all lengths of a family.

    As one module whose source holds for all, where there is one. Else, as with batches in slabs,
    they are carried out anew at each length, on the program that is known there.
    """

    def __init__(
        self, model: nn.Module, found: Family, leaves: Sequence[Any], spec: pytree.TreeSpec,
        selection: Selection, options: Options,
    ) -> None:
        self.model, self.found, self.leaves, self.spec = model, found, leaves, spec
        self.selection, self.options = selection, options
        self.known: dict[Lengths, nn.Module] = {}
        self.widths = list(Width)

    def chosen(
        self, chosen_at: Lengths, wanted: Lengths, seen: dict[Lengths, Seen]
    ) -> Chosen:
        """What was chosen at `chosen_at`, verified at lengths not traced and up to `wanted`.

        Raises `NotOneProgram` where it differs from the model. `seen` keeps what the model does.
        """
        found, selection = self.found, self.selection
        beyond = tuple(n + 5 * step for n, step in zip(chosen_at, found.steps, strict=True))
        todo = [_untraced(found), beyond]
        todo += _up_to(wanted, beyond, found, selection.mode == "training")
        try:
            one = self._one_source(chosen_at)
            self._verify(lambda _: one, todo, seen)
        except NotOneProgram as why:
            self._verify(self._at, todo, seen)
            self.leaves = self._resized(found.first)  # it lives on
            return Chosen(selection, self, found.first, str(why))
        least = self._shortest(one)
        self.leaves = self._resized(found.first)
        compared = {found.first, chosen_at, *todo} if self.options.verify else None
        return Chosen(selection, ComparedLengths(self, one, compared), least)

    def differs_at(self, lengths: Lengths) -> Differs | None:
        """How the module made at `lengths` differs from the model, in the caller's dtype."""
        return self._differs(self._at(lengths), self._resized(lengths), "inference", [Width.OWN])

    def agrees(self, made: nn.Module, leaves: Sequence[Any]) -> bool:
        """Whether a module gives the model's results on these inputs, up to rounding."""
        try:
            return self._differs(made, leaves, "inference", [Width.OWN]) is None
        except Exception:
            log.exception("looplift failed to compare; the original runs")
            return False

    def __call__(self, leaves: Sequence[Any]) -> nn.Module:
        """The module for the length of `leaves`, verified on these.

        The original where it differs or can't be made, and after many lengths.
        """
        lengths = self.found.lengths(leaves)
        assert lengths is not None
        if lengths not in self.known:
            if len(self.known) >= MOST_LENGTHS:
                warnings.warn(f"{type(self.model).__name__} was called at more than {MOST_LENGTHS} "
                              "lengths; further ones run the original model", stacklevel=5)
                return self.model
            try:
                wrong = self._differs(self._at(lengths), leaves, self.selection.mode)
            except Exception:
                log.exception("looplift failed at length %s; the original runs", _named(lengths))
                wrong = Differs(_named(lengths), "an exception", "")
            if wrong is not None:
                self.known[lengths] = self.model
        return self.known[lengths]

    def _at(self, lengths: Lengths) -> nn.Module:
        """The module made anew at `lengths`; it is kept."""
        captured = self.found.capture(self._resized(lengths))
        outcome = again(captured, self.options, self.selection)
        self.known[lengths] = Rewritten(self.model, captured, outcome.graph_module)
        return self.known[lengths]

    def _one_source(self, chosen_at: Lengths) -> Rewritten:
        """The rewrites at `chosen_at`, as one module whose source holds for all lengths.

        Raises `NotOneProgram` where they are others at other lengths.
        """
        found, steps = self.found, self.found.steps
        firsts = [tuple(n + k * step for n, step in zip(chosen_at, steps, strict=True))
                  for k in (0, 1, 3, 4)]
        if len(steps) > 1:
            firsts[3:] = [tuple(n + (k == other) * 2 * step for k, (n, step) in enumerate(
                zip(chosen_at, steps, strict=True))) for other in range(len(steps))]
        captures = [found.capture(self._resized(lengths)) for lengths in firsts]
        graphs = [again(c, self.options, self.selection).graph_module for c in captures]
        if any(captures[0].constants[k] != c.constants[k] for c in captures for k in c.constants):
            raise NotOneProgram("an output is a number that varies with the length")
        held = len(found.sample.state)
        where = {free.name: next((held + found.sample.tensor_inputs.index(place), axis)
                                 for place, axis, size in free.places if size is None)
                 for free in found.frees}
        unified = general(Samples(list(where), firsts), graphs)

        def graph_for(leaves: Sequence[Any]) -> Callable[[], GraphModule]:
            lengths = tuple(cast(int, free.of(leaves)) for free in found.frees)
            return cache(lambda: unified.at(lengths, found.fakes(self._resized(lengths)),
                                            found.sample.fake_mode))

        return Rewritten(self.model, captures[0], unified.symbolic(where), graph_for)

    def _verify(
        self, make: Callable[[Lengths], nn.Module], todo: Sequence[Lengths],
        seen: dict[Lengths, Seen],
    ) -> None:
        """Compare at each of the lengths: gradients, and float64, as far as they are quick."""
        mode, double, seconds, before = self.selection.mode, True, 0.0, todo[0]
        unproven = []
        for lengths in todo if self.options.verify else ():
            growth = _growth(before, lengths)
            # a model's own backward may take the square of the length
            if mode == "training" and seconds * growth**2 > SLOW:
                mode = "inference"
                unproven.append(f"gradients at lengths beyond {_named(before)}")
            if mode == "inference" and double and seconds * growth > SLOW:
                double = False
                unproven.append(f"equality in float64 at lengths beyond {_named(before)}")
            made, start = make(lengths), time.perf_counter()
            differs = self._differs(made, self._resized(lengths), mode,
                                    self.widths if double else [Width.OWN],
                                    seen.setdefault(lengths, {}))
            if differs is not None:
                raise NotOneProgram(f"at length {_named(lengths)}: {differs}")
            seconds, before = time.perf_counter() - start, lengths
        verdict = self.selection.verdict
        if isinstance(verdict, Equal):
            names = " or ".join(free.name for free in self.found.frees)
            shapes, *others = verdict.unproven
            shapes = shapes.replace("other than", "that differ from")
            self.selection.verdict = replace(
                verdict, unproven=(f"{shapes} in more than {names}", *others, *unproven))

    def _shortest(self, made: nn.Module) -> Lengths:
        """The shortest lengths at which the module is right, although not traced: for each one,
        the others as they were traced, and where all are the shortest.

        The very shortest of all is tried first; what lies between is compared when it is called.
        """
        first, frees = self.found.first, self.found.frees
        least = list(first)
        for k, (step, free) in enumerate(zip(self.found.steps, frees, strict=True)):
            shorter = [(*first[:k], n, *first[k + 1 :])
                       for n in range(first[k] - step, max(1, free.least) - 1, -step)]
            if not self.options.verify or not shorter:
                continue
            end = time.perf_counter() + SLOW
            if self._is_right(made, shorter[-1]):
                least[k] = shorter[-1][k]
                continue
            for lengths in shorter[:-1]:
                if time.perf_counter() > end or not self._is_right(made, lengths):
                    break
                least[k] = lengths[k]
        corner = tuple(least)
        return corner if len(first) == 1 or self._is_right(made, corner) else first

    def _is_right(self, made: nn.Module, lengths: Lengths) -> bool:
        return self._differs(made, self._resized(lengths), self.selection.mode) is None

    def _differs(
        self, made: nn.Module, leaves: Sequence[Any], mode: str,
        widths: Sequence[Width] | None = None, seen: Seen | None = None,
    ) -> Differs | None:
        if not self.options.verify:
            return None
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        approximate = any(k.applied.approximate for k in self.selection.kept)
        found, width = verify_once(
            self.model, made, args, kwargs, mode=mode, tolerance=self.options.tolerance,
            approximate=approximate, widths=widths or self.widths, seen=seen,
            as_given=self.found.sample.asks_for_gradients)
        if width is Width.DOUBLE:
            self.widths = [Width.DOUBLE, Width.OWN]  # the first need not be tried again
        return found

    def _resized(self, lengths: Lengths) -> list[Any]:
        return self.found.resized(self.leaves, lengths)


@dataclass
class ComparedLengths:
    """One module for all lengths. At each new one it is compared with the model once, at the first
    call: what a model does at some lengths alone is in no trace of others."""

    each: EachLength
    module: nn.Module
    compared: set[Lengths] | None  # None: none are to be

    def __call__(self, leaves: Sequence[Any]) -> nn.Module:
        lengths = tuple(free.of(leaves) or 0 for free in self.each.found.frees)
        if self.compared is not None and lengths not in self.compared:
            if not self.each.agrees(self.module, leaves):
                return self.each.model
            self.compared.add(lengths)
        return self.module

    def anew(self) -> ComparedLengths:
        """The same, to be compared once more at all lengths: the model holds something else."""
        return replace(self, compared=None if self.compared is None else set())


def _always(module: nn.Module) -> Make:
    return lambda _: module


def _up_to(
    wanted: Lengths, begin: Lengths, found: Family, training: bool
) -> Iterator[Lengths]:
    """`wanted`; in training lengths on the way to it, each about four times the one before."""
    while training and max(w / n for w, n in zip(wanted, begin, strict=True)) > 4:
        begin = tuple(
            min(w, first + (4 * n - first) // step * step)
            for w, n, first, step in zip(wanted, begin, found.first, found.steps, strict=True)
        )
        yield begin
    if wanted != begin and found.holds(wanted):
        yield wanted


def _untraced(found: Family) -> Lengths:
    """Short lengths that were not traced."""
    return tuple(n + 2 * step for n, step in zip(found.first, found.steps, strict=True))


def _growth(before: Lengths, after: Lengths) -> float:
    """How many times as many steps one is as another."""
    return prod(a / b for b, a in zip(before, after, strict=True))


def _named(lengths: Lengths) -> str:
    return "×".join(map(str, lengths))
