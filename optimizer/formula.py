"""Integers as functions of lengths: what the numbers of a few short programs say of all; no torch.

A number is looked for among the polynomials in the lengths whose degree the samples can tell:
interpolation, checked on the samples that it does not need.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, combinations_with_replacement
from math import prod
from typing import Any

import sympy

Lengths = tuple[int, ...]
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Formula:
    """An integer-valued polynomial in lengths, by the names of these."""

    expression: sympy.Expr
    names: tuple[str, ...]

    @cached_property
    def _value(self) -> Any:
        top, bottom = sympy.fraction(sympy.together(self.expression))
        return sympy.lambdify([sympy.Symbol(n) for n in self.names], (top, bottom), "math")

    def at(self, lengths: Lengths) -> int:
        """The integer at `lengths`; `ValueError` where the formula gives none."""
        top, bottom = self._value(*lengths)
        if top % bottom:
            raise ValueError(f"{self} is no integer where {self.names} = {lengths}")
        return int(top // bottom)

    def __str__(self) -> str:
        """As Python source."""
        top, bottom = sympy.fraction(sympy.together(self.expression))
        text = sympy.pycode(top)
        return text if bottom == 1 else f"({text}) // {bottom}"


class Symbolic(int):
    """An integer at one length, shown as the formula that gives it at every length."""

    formula: Formula

    def __new__(cls, number: int, formula: Formula) -> Symbolic:
        made = super().__new__(cls, number)
        made.formula = formula
        return made

    def __repr__(self) -> str:
        return str(self.formula)

    __str__ = __repr__


class Samples:
    """The lengths that programs were traced at, and the formulas that their numbers follow."""

    def __init__(self, names: Sequence[str], lengths: Sequence[Lengths]) -> None:
        self.names, self.lengths = tuple(names), tuple(lengths)

    def formula(self, numbers: Sequence[int]) -> Formula | int | None:
        """What gives `numbers`, one for each sample: an integer, a formula, or None.

        >>> str(Samples(["T"], [(10,), (13,), (21,)]).formula([19, 25, 41]))
        '2*T - 1'
        >>> Samples(["T"], [(10,), (13,), (21,)]).formula([7, 7, 7])
        7
        >>> Samples(["T"], [(10,), (13,), (21,)]).formula([4, 8, 32]) is None
        True
        """
        if len(set(numbers)) == 1:
            return numbers[0]
        return _interpolated(tuple(numbers), self.names, self.lengths)

    def text(self, texts: Sequence[str]) -> Text | None:
        """A text whose numbers are formulas; None where more than numbers differ."""
        if len({NUMBER.sub("#", text) for text in texts}) > 1:
            return None
        columns = zip(*(map(int, NUMBER.findall(text)) for text in texts), strict=True)
        numbers = tuple(self.formula(column) for column in columns)
        return None if None in numbers else Text(tuple(NUMBER.split(texts[0])), numbers)


@dataclass(frozen=True)
class Text:
    """Pieces of a text, with a number between each two."""

    pieces: tuple[str, ...]
    numbers: tuple[Formula | int | None, ...]

    def at(self, lengths: Lengths) -> str:
        numbers = [str(at(n, lengths)) for n in self.numbers]
        return "".join(a + b for a, b in zip(self.pieces, [*numbers, ""], strict=True))


def at(number: Any, lengths: Lengths) -> Any:
    """A number, or that of a formula at `lengths`."""
    return number.at(lengths) if isinstance(number, Formula) else number


@lru_cache(maxsize=4096)
def _interpolated(
    numbers: tuple[int, ...], names: tuple[str, ...], lengths: tuple[Lengths, ...]
) -> Formula | None:
    """The polynomial of fewest terms through `numbers`, if it needs not all of them."""
    symbols = [sympy.Symbol(name) for name in names]
    for powers in _powers(len(names)):
        if len(powers) >= len(numbers):
            return None
        rows = sympy.Matrix([[prod(at[k] for k in power) for power in powers] for at in lengths])
        if rows.rank() < len(powers):
            return None
        for found in sympy.linsolve((rows, sympy.Matrix(numbers))):
            terms = [c * prod(symbols[k] for k in power)
                     for c, power in zip(found, powers, strict=True)]
            return Formula(sympy.Add(*terms), names)
    return None


def _powers(count: int) -> Iterator[list[tuple[int, ...]]]:
    """Linear terms; products of two lengths as well; squares as well."""
    linear: list[tuple[int, ...]] = [(), *((k,) for k in range(count))]
    yield linear
    if count > 1:
        yield [*linear, *combinations(range(count), 2)]
    yield [*linear, *combinations_with_replacement(range(count), 2)]


def agree(values: Sequence[Hashable]) -> bool:
    return all(value == values[0] for value in values)
