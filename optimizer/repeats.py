"""Tandem repeats: stretches of a sequence that are the same run of tokens, again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NEXT_OCCURRENCES = 8  # a body may use its rarest token this often
MOST_PERIODS = 48


@dataclass(frozen=True)
class Repeat:
    """Tokens `start … start+length-1`, each equal to the one `period` places on, if inside."""

    start: int
    period: int
    length: int

    @property
    def trips(self) -> int:
        return self.length // self.period

    @property
    def stop(self) -> int:
        return self.start + self.length


def repeats(tokens: Sequence[int], least_trips: int = 3) -> list[Repeat]:
    """All maximal tandem repeats of at least `least_trips` trips, longest first.

    Each has its primitive period, and may be one of several that overlap: a loop and the
    loop inside it are both listed. O(n) per candidate period, and few periods are tried:
    distances from a token to its next few occurrences, by how often they are seen.

    >>> repeats([7, 1, 2, 1, 2, 1, 2, 9])
    [Repeat(start=1, period=2, length=6)]
    """
    array = np.asarray(tokens, dtype=np.int64)
    found = [r for p in _periods(array, least_trips) for r in _runs(array, p, least_trips)]
    found.sort(key=lambda r: (-r.length, r.period, r.start))
    return _primitive(found)


def _periods(array: np.ndarray, least_trips: int) -> list[int]:
    """Distances at which many tokens recur, weighted by the stretch they could cover."""
    weight: Counter[int] = Counter()
    order = np.argsort(array, kind="stable")
    for hop in range(1, NEXT_OCCURRENCES + 1):
        if len(order) <= hop:
            break
        near, far = order[:-hop], order[hop:]
        distances = (far - near)[array[near] == array[far]]
        for distance, count in zip(*np.unique(distances, return_counts=True), strict=True):
            if distance * least_trips <= len(array):
                weight[int(distance)] += int(count)
    return [period for period, _ in weight.most_common(MOST_PERIODS)]


def _runs(array: np.ndarray, period: int, least_trips: int) -> Iterator[Repeat]:
    same = np.concatenate(([False], array[:-period] == array[period:], [False]))
    edges = np.flatnonzero(same[1:] != same[:-1])
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        length = int(stop - start) + period
        if length >= least_trips * period:
            yield Repeat(int(start), period, length)


def _primitive(found: list[Repeat]) -> list[Repeat]:
    """Without the runs that another run, of a period that divides theirs, already covers."""
    kept: list[Repeat] = []
    for run in sorted(found, key=lambda r: r.period):
        if not any(
            run.period % k.period == 0 and k.start <= run.start and run.stop <= k.stop
            for k in kept
        ):
            kept.append(run)
    return sorted(kept, key=lambda r: (-r.length, r.period, r.start))
