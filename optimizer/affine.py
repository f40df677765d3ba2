"""Integer progressions: what a table of indices says about the loop that made it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Progression:
    """The integers `start + step·i` for i in 0 … length-1."""

    start: int
    step: int
    length: int

    @property
    def last(self) -> int:
        return self.start + self.step * (self.length - 1)


def progression(numbers: Sequence[int]) -> Progression | None:
    """The progression that `numbers` form, or None.

    >>> progression([3, 5, 7])
    Progression(start=3, step=2, length=3)
    >>> progression([3, 5, 8]) is None
    True
    """
    if not numbers:
        return None
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if any(b - a != step for a, b in itertools.pairwise(numbers)):
        return None
    return Progression(numbers[0], step, len(numbers))


@dataclass(frozen=True)
class Digit:
    """One varying index of a loop: its distinct values, and which of them each trip uses."""

    values: tuple[int, ...]
    codes: tuple[int, ...]

    @staticmethod
    def of(table: Sequence[int]) -> Digit:
        values = tuple(sorted(set(table)))
        place = {value: code for code, value in enumerate(values)}
        return Digit(values, tuple(place[value] for value in table))


def flat_codes(digits: Sequence[Digit]) -> list[int]:
    """The row-major position of each trip in the grid that the digits span.

    A double loop over rows and columns has two digits and the codes 0, 1, 2, …

    >>> rows, columns = Digit.of([0, 0, 16, 16]), Digit.of([0, 8, 0, 8])
    >>> flat_codes([rows, columns])
    [0, 1, 2, 3]
    """
    codes = [0] * len(digits[0].codes)
    for digit in digits:
        codes = [c * len(digit.values) + d for c, d in zip(codes, digit.codes, strict=True)]
    return codes
