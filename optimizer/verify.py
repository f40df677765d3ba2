"""Do two modules compute the same? Three questions, kept apart.

1. *Same function?* Both in float64, relative difference at most 1e-9, values and gradients.
2. *Accurate enough?* Each one's error in the caller's dtype against float64.
3. *Same behaviour?* Everything else that a caller can see; see `behaviour.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .behaviour import Observation, difference, forgiving, observe, special
from .cases import (
    FIRST,
    Case,
    Leaves,
    as_they_are,
    cases,
    copied,
    flat,
    odd_values,
    slightly_moved,
)
from .double import WIDER, Width, computing, doubled
from .magnitude import SMALL, epsilon, kind, relative, same_bits, scales, sizes
from .state import State, fresh_state, model_state, swapped, underlying, unseen
from .verdict import Differs, Equal

SAME_FUNCTION = 1e-9  # largest relative difference in float64
APPROXIMATE = 1e-2  # the same, where the caller allows approximations
WORSE = 4.0  # times the naive error in the caller's dtype
UNUSUAL = 100  # times the tolerance, for very large inputs, which cancel more digits
NOISE = 1e-3  # of a value's own size in the other cases: rounding noise below
FLOOR = 16  # units in the last place below which errors are not compared
AS_MUCH = 8  # times the difference that inputs make whose last bits are others
ENOUGH_SECONDS = 15.0  # no further case is begun after this long
Seen = dict[Width, Observation]


class Short(NamedTuple):
    """What `b` is on shorter inputs, and these."""

    module: nn.Module
    args: Sequence[Any]
    kwargs: dict[str, Any]


def verify(
    a: nn.Module, b: nn.Module, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *,
    mode: str = "both", seed: int = 0, tolerance: float | None = None,
    seconds: float = ENOUGH_SECONDS, approximate: bool = False, short: Short | None = None,
    as_given: bool = False,
) -> Equal | Differs:
    """Compare `b` with `a` on `args` and on random inputs like them.

    `b` is run with `a`'s parameters and buffers wherever names and shapes agree. `mode` is
    "inference" (under no_grad), "training" (with gradients) or "both". `tolerance` replaces
    the 1e-9 by which float64 results may differ, relatively. With `approximate` they may
    differ by 1%, which is measured and reported. Neither module is changed. With `short`, what
    need not be long is compared there. With `as_given`, for models that ask for the
    `requires_grad` of their inputs, no other inputs are given a gradient.

    >>> one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> verify(one, two, (torch.randn(4, 3),)).grade
    'exact'
    """
    if mode not in ("inference", "training", "both"):
        raise ValueError(f"mode must be 'inference', 'training' or 'both', not {mode!r}")
    allowed = APPROXIMATE if approximate else SAME_FUNCTION
    if tolerance is not None:
        allowed = tolerance
    comparison = _Comparison(a, b, *flat(args, kwargs), allowed, seed, approximate, as_given)
    modes = ("inference", "training") if mode == "both" else (mode,)
    with unseen():
        return comparison.run(modes, seconds, short)


def verify_once(
    a: nn.Module, b: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], *, mode: str,
    tolerance: float | None = None, approximate: bool = False,
    widths: Sequence[Width] = tuple(Width), seen: Seen | None = None, as_given: bool = False,
) -> tuple[Differs | None, Width]:
    """`verify` on the given inputs alone, in one of the `widths`: how `b` differs, and in which.

    The first is taken in which `a` runs; one that is not sound for all programs tells no
    difference. `seen` keeps what `a` did in inference, for a further comparison on these inputs.
    """
    allowed = APPROXIMATE if approximate else SAME_FUNCTION
    comparison = _Comparison(a, b, *flat(args, kwargs), tolerance or allowed, 0, approximate,
                             as_given)
    with unseen():
        return comparison.once(mode == "training", widths, {} if seen is None else seen)


class _Errors(NamedTuple):
    """Of one value: its dtype's rounding, the errors against float64, and where ours is largest."""

    rounding: float
    naive: float
    ours: float
    case: Case
    training: bool


@dataclass
class _Comparison:
    a: nn.Module
    b: nn.Module
    inputs: Leaves
    spec: pytree.TreeSpec
    tolerance: float
    seed: int
    approximate: bool = False
    as_given: bool = False
    worst: float = 0.0
    error: float = 0.0
    naive_error: float = 0.0
    exact: bool = True
    doubles: bool = True
    count: int = 0
    raised: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    errors: dict[str, _Errors] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unstable: dict[str, None] = field(default_factory=dict)

    def run(
        self, modes: Sequence[str], seconds: float, short: Short | None
    ) -> Equal | Differs:
        end = time.monotonic() + seconds
        b, inputs = self.b, self.inputs
        todo = [(b, case) for case in cases(inputs, self.seed) if case.long or short is None]
        if short is not None:
            b, inputs = short.module, flat(short.args, short.kwargs)[0]
            todo += [(b, case) for case in cases(inputs, self.seed) if not case.long]
        if self.approximate:
            self.notes.append("NaN and infinite inputs, which approximations may treat otherwise")
        else:
            todo += [(b, case) for case in odd_values(inputs, self.seed)]
        for b, case in todo:
            if self.count and time.monotonic() > end:
                left = len(todo) - self.count
                self.notes.append(f"{left} of {len(todo)} cases, for which time ran out")
                break
            for mode in modes:
                found = self._compare(b, case, mode == "training")
                if found is not None:
                    return found
            self.count += 1
        inaccurate = self._inaccurate()
        return self._equal(modes) if inaccurate is None else inaccurate

    def _compare(self, b: nn.Module, case: Case, training: bool) -> Differs | None:
        """All questions on one case; on inputs that are not the caller's it tells nothing where
        the model would differ from itself."""
        before = self.worst, self.error
        found, width, theirs, ours = self._differs(b, case, training)
        if found is not None and case.name != FIRST \
                and self._unstable(case, training, width, theirs, ours):
            self.exact, (self.worst, self.error) = False, before
            self.unstable.setdefault(case.name)
            return None
        return found

    def _unstable(
        self, case: Case, training: bool, width: Width, theirs: Observation, ours: Observation
    ) -> bool:
        """Whether each value that differs is one that differs about as much in the model itself
        where its inputs and parameters move by a few units in the last place: it is chaotic
        there, or diverges."""
        moved = self._observe(self.a, case, training, width, again=False, moved=True)
        if theirs.exception or ours.exception or moved.exception or ours.facts != theirs.facts \
                or not theirs.values.keys() == ours.values.keys() == moved.values.keys():
            return False
        counts = self._counts(theirs)
        for name, want, got in _pairs(theirs, ours):
            other, inexact = moved.values[name], want.is_floating_point() or want.is_complex()
            if other.shape != want.shape or want.shape != got.shape or not (
                    inexact or torch.equal(want, got)):
                return False
            gaps = [relative(want, t, counts[name]) for t in (got, other)]
            places = [int((special(want) != special(t)).sum()) for t in (got, other)]
            for own, its in (gaps, places):
                if own > self._allowed(case) and not own <= AS_MUCH * its:
                    return False
        return True

    def _differs(
        self, b: nn.Module, case: Case, training: bool
    ) -> tuple[Differs | None, Width, Observation, Observation]:
        """How `b` differs on one case, in which width, and what both did in it."""
        theirs, ours = (self._observe(m, case, training, Width.OWN) for m in (self.a, b))
        self.raised += theirs.exception is not None
        found = self._behaves(case, training, theirs, ours)
        if found is not None and (case.odd or not case.usual):
            truth = self._observe(self.a, case, training, Width.DOUBLE)
            found = self._behaves(case, training, forgiving(theirs, truth, ours), ours)
        if found is not None or case.odd or not self.doubles:
            return found, Width.OWN, theirs, ours
        truth, wide = (self._observe(m, case, training, Width.DOUBLE) for m in (self.a, b))
        if truth.exception is not None and theirs.exception is None:
            self.doubles = False
            return self._behaves(case, training, theirs, ours), Width.OWN, theirs, ours
        found = self._same_function(case, training, truth, wide)
        if case.usual and found is None:
            self._note_errors(case, training, truth, theirs, ours)
        return found, Width.DOUBLE, truth, wide

    def once(
        self, training: bool, widths: Sequence[Width], seen: Seen
    ) -> tuple[Differs | None, Width]:
        """The given inputs alone, in the first width that tells something."""
        case = Case(FIRST, self.inputs, as_they_are, self.seed)
        for width in widths:
            if training or width not in seen:
                theirs = self._observe(self.a, case, training, width, again=False)
                seen |= {} if training else {width: theirs}
            else:
                theirs = seen[width]
            if theirs.exception is not None and width is not widths[-1]:
                continue
            ours = self._observe(self.b, case, training, width, again=False)
            self.doubles = width is not Width.OWN
            found = self._behaves(case, training, theirs, ours)
            if found is None and self.doubles:
                found = self._same_function(case, training, theirs, ours)
            wide = all(t.dtype not in WIDER for t in theirs.values.values())
            if width is not Width.TENSORS or (found is None and wide):
                break
        return found, width

    def _equal(self, modes: Sequence[str]) -> Equal:
        grade = "exact" if self.exact else "same function" if self.doubles else "tested"
        if self.approximate and not self.exact:
            grade = "approximate"
        if self.raised == self.count * len(modes):
            grade = "tested"
            self.notes.append("anything but the exception, which both raised in every case")
        shapes = ", ".join(str(tuple(i.shape)) for i in self.inputs if isinstance(i, Tensor))
        dtypes = sorted({str(i.dtype).removeprefix("torch.") for i in self.inputs
                         if isinstance(i, Tensor)})
        state = "train" if self.a.training else "eval"
        unproven = [
            f"shapes other than {shapes or 'none'}", f"dtypes other than {', '.join(dtypes)}",
            f"the model in {'eval' if self.a.training else 'train'}() (it was in {state}())",
            *(f"{m} mode" for m in ("inference", "training") if m not in modes), *self.notes,
        ]
        if self.unstable:
            unproven.append(f"{', '.join(self.unstable)}: there the last bits of its inputs move "
                            "what the model itself computes by more than is allowed")
        if not self.doubles:
            unproven.append("equality in float64, which the model could not be run in")
        worst = self.worst if self.doubles else self.error
        return Equal(grade, self.count - len(self.unstable), worst, self.error,
                     self.naive_error, tuple(unproven))

    def _observe(
        self, model: nn.Module, case: Case, training: bool, width: Width, again: bool = True,
        moved: bool = False,
    ) -> Observation:
        convert = as_they_are if width is Width.OWN else doubled
        signs = torch.Generator().manual_seed(case.seed)

        def given(tensor: Tensor) -> Tensor:
            return slightly_moved(convert(tensor), signs) if moved else convert(tensor)

        leaves = copied(case.inputs, given)
        tensors = fresh_state(model, self.a, lambda t: given(case.parameters(t)), convert)
        again = again and case.name == FIRST and not training
        dtypes = {t.dtype for t in (*case.inputs, *map(State.get, model_state(self.a)))
                  if isinstance(t, Tensor) and t.dtype in WIDER and t.is_floating_point()}
        narrow = dtypes.pop() if len(dtypes) == 1 else None
        with swapped(model, tensors) as before, computing(width, narrow):
            return observe(model, leaves, self.spec, model_state(model), before, training,
                           case.seed, again, underlying(self.a) is underlying(self.b),
                           self.as_given)

    def _behaves(
        self, case: Case, training: bool, theirs: Observation, ours: Observation
    ) -> Differs | None:
        """The caller's dtype: everything visible the same, values close, NaN and Inf in place."""
        found = difference(theirs, ours)
        if found is not None:
            return Differs(f"{case.name}, {_mode(training)}", *found)
        counts = self._counts(theirs)
        for name, want, got in _pairs(theirs, ours):
            if not same_bits(want, got):
                self.exact = False
            gap = relative(want, got, counts[name])
            rounding = epsilon(want)
            loose = max(4096 * rounding, APPROXIMATE * self.approximate)
            if (not self.doubles or case.odd) and not name.startswith("the grad") and gap > loose:
                return Differs(f"{case.name}, {_mode(training)}", name, f"by {gap:.1e}, relatively")
            self.error = max(self.error, gap) if not self.doubles else self.error
        return None

    def _same_function(
        self, case: Case, training: bool, theirs: Observation, ours: Observation
    ) -> Differs | None:
        """float64: values and gradients within the tolerance."""
        if ours.exception is not None and theirs.exception is None:
            return Differs(f"{case.name}, float64", "an exception", ours.exception)
        counts = self._counts(theirs)
        for name, want, got in _pairs(theirs, ours):
            gap = relative(want, got, counts[name])
            self.worst = max(self.worst, gap)
            if not gap <= self._allowed(case):
                return Differs(f"{case.name}, {_mode(training)}, float64", name,
                               f"by {gap:.1e}, relatively (allowed: {self._allowed(case):.0e})")
        return None

    def _allowed(self, case: Case) -> float:
        """The largest relative difference in float64."""
        return self.tolerance * (1 if case.usual else UNUSUAL)

    def _counts(self, observation: Observation) -> dict[str, float]:
        """The smallest size that counts, by value; also seen from the sizes in earlier cases.

        Where an input of zeros leaves nothing but rounding noise, the noise need not agree.
        """
        found = sizes(observation)
        for name, size in found.items():
            self.largest[name] = max(size, self.largest.get(name, 0.0))
        return {n: max(c, NOISE * self.largest[n]) for n, c in scales(found).items()}

    def _note_errors(
        self, case: Case, training: bool, truth: Observation, naive: Observation,
        ours: Observation,
    ) -> None:
        """Each program's error in the caller's dtype against float64, by value, the worst case."""
        error = _errors(truth)
        for name, theirs, own in _pairs(naive, ours):
            if name not in truth.values or not theirs.is_floating_point():
                continue
            before, after = error(name, theirs), error(name, own)
            if name.startswith("output") and after >= self.error:
                self.naive_error, self.error = before, after
            found = _Errors(epsilon(theirs), before, after, case, training)
            worst = self.errors.setdefault(name, found)
            larger = worst if worst.ours >= after else found
            self.errors[name] = larger._replace(naive=max(worst.naive, before))

    def _inaccurate(self) -> Differs | None:
        """The value whose error is several times the naive one's, over all cases, if any.

        Where the model itself errs so where its inputs move by a few units in the last place,
        which no program can tell apart, it may be some times more.
        """
        for name, (rounding, before, after, case, training) in self.errors.items():
            wider = rounding > torch.finfo(torch.float64).eps  # float64 is its own measure
            allowed = WORSE * max(before, FLOOR * rounding)
            if not wider or self.approximate or after <= allowed:
                continue
            truth = self._observe(self.a, case, training, Width.DOUBLE)
            moved = self._observe(self.a, case, training, Width.OWN, moved=True)
            if name in truth.values.keys() & moved.values.keys() \
                    and after <= WORSE * min(allowed, _errors(truth)(name, moved.values[name])):
                continue
            return Differs("all cases", f"the accuracy of {name}",
                           f"error {after:.1e} against float64, naive {before:.1e}")
        return None


def _errors(truth: Observation) -> Callable[[str, Tensor], float]:
    """How far a value of a name is from that in float64, relatively."""
    counts = scales(sizes(truth))
    return lambda name, found: relative(
        truth.values[name], found, SMALL[kind(name) == "gradient"] ** -1 * counts[name])


def _mode(training: bool) -> str:
    return "training" if training else "inference"


def _pairs(a: Observation, b: Observation) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, want in a.values.items():
        got = b.values.get(name)
        if isinstance(want, Tensor) and isinstance(got, Tensor):
            yield name, want, got
