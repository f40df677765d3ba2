"""Integers as functions of lengths: what the numbers of a few short programs say of all; no torch.

A number is looked for among the polynomials in the lengths whose degree the samples can tell:
interpolation, checked on the samples that it does not need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, combinations_with_replacement
from math import gcd, isclose, isfinite, prod
from typing import Any

import sympy

Lengths = tuple[int, ...]
LARGEST_STRIDE = 16
NUMBER = re.compile(r"\d+")


class NoInteger(ValueError):
    """Where a formula gives no integer: the numbers follow another rule."""


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
        """The integer at `lengths`; `NoInteger` where the formula gives none."""
        top, bottom = self._value(*lengths)
        if top % bottom:
            raise NoInteger(f"{self} is no integer where {self.names} = {lengths}")
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


@dataclass(frozen=True)
class Function:
    """A floating-point number: source of an expression in the integer of a formula."""

    source: str  # with {} in place of the integer
    of: Formula

    def at(self, lengths: Lengths) -> float:
        return float(eval(self.source.format(self.of.at(lengths))))

    def __str__(self) -> str:
        return self.source.format(f"({self.of})")


INVERSES: dict[str, Callable[[float], float]] = {
    "float({})": float, "1 / {}": lambda x: 1 / x, "{} ** 0.5": lambda x: x**2,
    "{} ** -0.5": lambda x: x**-2,
}
EXACT = 1e-12  # relative difference of two ways to compute a number


class SymbolicFloat(float):
    """A number at one length, shown as the function that gives it at every length."""

    function: Function

    def __new__(cls, number: float, function: Function) -> SymbolicFloat:
        made = super().__new__(cls, number)
        made.function = function
        return made

    def __repr__(self) -> str:
        return str(self.function)

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
        >>> str(Samples(["T"], [(10,), (13,), (21,)]).formula([2, 5, 5]))
        'T % 8'
        >>> Samples(["T"], [(10,), (13,), (21,)]).formula([4, 8, 32]) is None
        True
        """
        if len(set(numbers)) == 1:
            return numbers[0]
        return _interpolated(tuple(numbers), self.names, self.lengths)

    def function(self, numbers: Sequence[float]) -> Function | float | None:
        """What gives floating-point `numbers`: a constant, or a simple function of a formula.

        >>> str(Samples(["T"], [(10,), (13,), (21,)]).function([1 / 9, 1 / 12, 1 / 20]))
        '1 / (T - 1)'
        >>> str(Samples(["T"], [(10,), (13,), (21,)]).function([0.9**10, 0.9**13, 0.9**21]))
        '1.0 * 0.9 ** (T)'
        """
        if not all(map(isfinite, numbers)):
            return None
        if all(isclose(n, numbers[-1], rel_tol=EXACT) for n in numbers):
            return _short(numbers[-1])
        candidates = []
        for source, inverse in INVERSES.items() if all(numbers) else ():
            found = self.formula([round(inverse(n)) for n in numbers])
            candidates += [Function(source, found)] if isinstance(found, Formula) else []
        if len(self.names) == 1:
            candidates += self._affine(numbers)
        return next((c for c in candidates if all(
            isclose(c.at(at), n, rel_tol=EXACT)
            for at, n in zip(self.lengths, numbers, strict=True))), None)

    def _affine(self, numbers: Sequence[float]) -> Iterator[Function]:
        """The functions `a + b·T` and `a · b ** T` through the first and the last number."""
        [(first,), *_, (last,)] = self.lengths
        length = Formula(sympy.Symbol(self.names[0]), self.names)
        slope = (numbers[-1] - numbers[0]) / (last - first)
        yield Function(f"{_short(numbers[0] - slope * first)} + {_short(slope)} * {{}}", length)
        if numbers[0] * numbers[-1] > 0:
            base = (numbers[-1] / numbers[0]) ** (1 / (last - first))
            yield Function(f"{_short(numbers[0] / base**first)} * {_short(base)} ** {{}}", length)

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
    return number.at(lengths) if isinstance(number, (Formula, Function)) else number


def _short(number: float) -> float:
    """0.1 where a computation gave 0.1 and a little."""
    short = float(f"{number:.10g}")
    return short if isclose(short, number, rel_tol=EXACT, abs_tol=EXACT) else number


def shown(number: Any, was: Any) -> Any:
    """`was`, that reads as the formula or function `number`."""
    if isinstance(number, Formula):
        return Symbolic(was, number)
    return SymbolicFloat(was, number) if isinstance(number, Function) else number


@lru_cache(maxsize=4096)
def _interpolated(
    numbers: tuple[int, ...], names: tuple[str, ...], lengths: tuple[Lengths, ...]
) -> Formula | None:
    """The polynomial of fewest terms through `numbers`, if it needs not all of them; or their
    remainder, where no line goes through them."""
    symbols = [sympy.Symbol(name) for name in names]
    for powers in _powers(len(names)):
        if len(powers) > 2 and len(names) == 1:
            found = _remainder(numbers, names, lengths) or _quotient(numbers, names, lengths)
            if found is not None:
                return found
        if len(powers) >= len(numbers):
            return None
        rows = sympy.Matrix([[prod(at[k] for k in power) for power in powers] for at in lengths])
        if rows.rank() < len(powers):
            return None
        for factors in sympy.linsolve((rows, sympy.Matrix(numbers))):
            terms = [c * prod(symbols[k] for k in power)
                     for c, power in zip(factors, powers, strict=True)]
            return Formula(sympy.Add(*terms), names)
    return None


def _remainder(
    numbers: tuple[int, ...], names: tuple[str, ...], lengths: tuple[Lengths, ...]
) -> Formula | None:
    """A place in a ring: the length, or a few less or more, modulo the least size that fits."""
    apart = [at - number for (at,), number in zip(lengths, numbers, strict=True)]
    multiple = gcd(*(a - apart[0] for a in apart))
    size = next((n for n in sympy.divisors(multiple) if n > max(numbers)), None)
    if size is None or min(numbers) < 0:
        return None
    before = (apart[0] + size // 2) % size - size // 2
    return Formula(sympy.Mod(sympy.Symbol(names[0]) - before, size), names)


def _quotient(
    numbers: tuple[int, ...], names: tuple[str, ...], lengths: tuple[Lengths, ...]
) -> Formula | None:
    """The length divided by a small number, rounded down or up: how many `[::2]` takes."""
    for size in range(2, LARGEST_STRIDE + 1):
        for more in (0, size - 1):
            if all((at + more) // size == n for (at,), n in zip(lengths, numbers, strict=True)):
                length = sympy.Symbol(names[0]) + more
                return Formula((length - sympy.Mod(length, size)) / size, names)
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
