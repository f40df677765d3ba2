"""The part of a loop's body that does not depend on earlier steps, once for all steps.

Before:
    h, ys = scan(lambda h, x: (h := a·h + W x, V h), h0, xs)
After:
    us = linear(xs, W); hs = scan(lambda h, u: a·h + u, h0, us); ys = linear(hs, V)
    linear(cat([x, h]), W), on the cycle → linear(x, W[:, :n]) + linear(h, W[:, n:]), so that
    the first term is not (likewise matmul and convolutions).
Wins:
    One matrix product of T·B rows instead of T products of B rows; no per-step overhead for
    what is batched. Shared weights are batched by identity: more rows, never copies.
    `slab` steps at a time where all of them would need too much memory. Where a kernel runs the
    recurrence, what reads its states stays with it if less is moved through memory so: `q @ S` of
    a matrix of state S is never read from memory (see optimizer/together.py).
Sound if:
    1. an operation is on no carry's cycle: no later step's carry that it depends on depends
       on it;
    2. it is not random: random operations draw in a loop of their own, in their order;
    3. a batching rule, or torch.vmap, covers it; otherwise it stays in a loop of its own.
Skips:
    scans whose body is all cycle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ..optimizer.distribute import JOINED, Split, batchable, distribution, splits
from ..optimizer.facts import Facts, source_line, trips
from ..optimizer.fused import build_kernel
from ..optimizer.fusible import Fusible, fusible, missed
from ..optimizer.rewrite import Rewrite, Skip
from ..optimizer.separate import separable, separation
from ..optimizer.slabs import in_slabs
from ..optimizer.together import together


@dataclass(frozen=True)
class BatchTimesteps:
    """Distribute scans with carries; see the module's docstring."""

    slab: int | None = None  # batch at most so many steps at a time
    name: ClassVar[str] = "batch-timesteps"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for parts in splits(facts):
            if not parts.carries:
                continue
            products = separable(parts)
            if products:
                yield separation(self.name, parts, products)
                continue
            kernels = facts.fuses and self.slab is None
            if kernels and (joined := in_one_kernel(parts)) is not None:
                if joined is not parts:
                    yield distribution(self.name, joined)
                continue
            if not batchable(parts) and is_one_cycle(parts):
                reason = "every operation of the loop depends on the step before"
                yield Skip(self.name, reason, source_line(parts.scan))
                continue
            if self.slab is not None and trips(parts.scan) > self.slab:
                yield in_slabs(self.name, parts.scan, self.slab)
                continue
            yield distribution(self.name, parts)


def is_one_cycle(parts: Split) -> bool:
    """Whether all carries are of one cycle, and nothing is on another, such as random numbers."""
    return len(set(parts.on_cycle.values())) <= 1 and any(
        len(cycle) == len(parts.carries) for cycle in parts.cycles)


def in_one_kernel(parts: Split) -> Split | None:
    """The split whose loops hold what reads their recurrences, too, if kernels will run them;
    None where more is gained by running all of that once, or there is no kernel."""
    if missed(parts.scan) is not None:
        return None
    if not parts.scan.meta.get(JOINED):
        joined = together(parts)
        if joined is None or batchable(joined) or not is_one_cycle(joined):
            return joined
    runs = partial(build_kernel, write_only=True)
    return parts if isinstance(fusible(parts.scan, runs), Fusible) else None
