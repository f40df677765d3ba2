"""The equation of an einsum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from string import ascii_lowercase, ascii_uppercase


def spelled_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The terms and the result of an equation, with letters for `...` and for an implied result.

    >>> spelled_out("...i, ij", [3, 2])
    (['ABi', 'ij'], 'ABj')
    >>> spelled_out("ba", [2])
    (['ba'], 'ab')
    """
    equation = equation.replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        out = ("..." if "..." in left else "") + "".join(letters)
    free = [c for c in ascii_uppercase + ascii_lowercase if c not in equation]
    hidden = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True)
         if "..." in t), default=0
    )
    dots = "".join(free[:hidden])
    spelled = [
        t.replace("...", dots[hidden - (rank - len(t.replace("...", ""))):] if "..." in t else "")
        for t, rank in zip(terms, ranks, strict=True)
    ]
    return spelled, out.replace("...", dots)


def longest(terms: Iterable[str], sizes: Iterable[Sequence[int]]) -> dict[str, int]:
    """The length of each letter's axis; an axis of one repeats along a longer one.

    >>> longest(["ab", "b"], [(2, 1), (3,)])
    {'a': 2, 'b': 3}
    """
    found: dict[str, int] = {}
    for term, lengths in zip(terms, sizes, strict=True):
        for letter, length in zip(term, lengths, strict=True):
            found[letter] = max(length, found.get(letter, 0))
    return found
