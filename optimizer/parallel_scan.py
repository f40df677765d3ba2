"""h(t) = A(t) ⊗ h(t-1) ⊕ b(t) for all steps at once, over a semiring.

Two steps are one step of the same kind, so the states after every other step are a recurrence half
as long; those between follow from them. This is the cyclic reduction of Kogge and Stone, "A
Parallel Algorithm for the Efficient Solution of a General Class of Recurrence Equations" (1973),
with the work of Blelloch's scan: a dozen passes over memory in O(log T) operations. Nothing is
divided, and no product has more factors than the steps that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Entry = Tensor | None  # None: the semiring's zero
Matrix = Sequence[Sequence[Entry]]


@dataclass(frozen=True)
class Semiring:
    """⊕ and ⊗ with their neutral elements; `running` is ⊕ over all steps before, along axis 0."""

    name: str
    plus: Callable[[Tensor, Tensor], Tensor]
    times: Callable[[Tensor, Tensor], Tensor]
    zero: float
    one: float
    running: Callable[[Tensor], Tensor]

    def added(self, total: Entry, a: Entry, b: Entry) -> Entry:
        """total ⊕ a ⊗ b."""
        if a is None or b is None:
            return total
        if total is None:
            return self.times(a, b)
        return torch.addcmul(total, a, b) if self is LINEAR else self.plus(total, self.times(a, b))

    def holds(self, states: Iterable[Tensor]) -> bool:
        """Whether a loop finds these states too: rounding aside, no if numbers are not finite."""
        sums = [float(s.detach().sum().abs()) for s in states]
        return all(map(math.isfinite, sums)) if self is LINEAR else not any(map(math.isnan, sums))


LINEAR = Semiring("a sum", torch.add, torch.mul, 0.0, 1.0, lambda t: t.cumsum(0))
LARGEST = Semiring("a maximum", torch.maximum, torch.add, -math.inf, 0.0,
                   lambda t: t.cummax(0).values)
SMALLEST = Semiring("a minimum", torch.minimum, torch.add, math.inf, 0.0,
                    lambda t: t.cummin(0).values)
LOG_SUM = Semiring("a log-sum-exp", torch.logaddexp, torch.add, -math.inf, 0.0,
                   lambda t: t.logcumsumexp(0))
SEMIRINGS = (LINEAR, LARGEST, SMALLEST, LOG_SUM)


def running(ring: Semiring, term: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """`solve` of h(t) = h(t-1) ⊕ b(t)."""
    found = ring.plus(ring.running(term.flip(0) if reverse else term), start)
    return found.flip(0) if reverse else found


def solve(
    ring: Semiring, matrix: Matrix, terms: Sequence[Tensor], starts: Sequence[Tensor],
    reverse: bool,
) -> list[Tensor]:
    """The states after each step, (steps, *size of a state).

    `terms` are (steps, *size); entries of `matrix` broadcast to that, with steps or 1 in front.
    In `reverse` the last step is the first.
    """
    made = [torch.empty_like(t) for t in terms]
    _fill(made, ring, matrix, terms, starts, reverse)
    return made


def _fill(
    made: Sequence[Tensor], ring: Semiring, matrix: Matrix, terms: Sequence[Tensor],
    starts: Sequence[Tensor], reverse: bool,
) -> None:
    """Write the states to `made`: first those after every other step, a recurrence half as long,
    then those between."""
    steps = made[0].shape[0]
    if steps == 0:
        return
    early, late = (steps - 1) % 2 * reverse, (steps % 2 if reverse else 1)
    at_early, at_late = (_cut(matrix, slice(k, None, 2)) for k in (early, late))
    terms_early, terms_late = ([t[k::2] for t in terms] for k in (early, late))
    made_early, made_late = ([m[k::2] for m in made] for k in (early, late))
    pairs = steps // 2
    if pairs:
        first = slice(-pairs, None) if reverse else slice(pairs)
        paired = _cut(at_early, first)
        both = [_applied(ring, row, [t[first] for t in terms_early], own)
                for row, own in zip(at_late, terms_late, strict=True)]
        _fill(made_late, ring, _multiplied(ring, at_late, paired), both, starts, reverse)
    entered = [before(late, start, reverse, steps - pairs)
               for late, start in zip(made_late, starts, strict=True)]
    for target, row, own in zip(made_early, at_early, terms_early, strict=True):
        target.copy_(_applied(ring, row, entered, own))


def before(after: Tensor, start: Tensor, reverse: bool, steps: int) -> Tensor:
    """The first `steps` states that steps find, of the states after them."""
    first = start.unsqueeze(0)
    return torch.cat([after, first])[-steps:] if reverse else torch.cat([first, after])[:steps]


def _cut(matrix: Matrix, steps: slice) -> Matrix:
    """The matrices of some steps."""
    return [[e[steps] if e is not None and e.shape[0] > 1 else e for e in row] for row in matrix]


def _applied(ring: Semiring, row: Sequence[Entry], states: Sequence[Tensor], own: Tensor) -> Tensor:
    """row ⊗ states ⊕ own."""
    found: Entry = own
    for entry, state in zip(row, states, strict=True):
        found = ring.added(found, entry, state)
    assert isinstance(found, Tensor)
    return found


def _multiplied(ring: Semiring, left: Matrix, right: Matrix) -> Matrix:
    columns = list(zip(*right, strict=True))
    made: list[list[Entry]] = [[None for _ in columns] for _ in left]
    for i, row in enumerate(left):
        for k, column in enumerate(columns):
            for a, b in zip(row, column, strict=True):
                made[i][k] = ring.added(made[i][k], a, b)
    return made
