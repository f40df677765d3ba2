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
    a matrix of state S is never read from memory (see optimizer/together.py). What reads the
    stacked states behind the loop, step by step, comes into it for that (optimizer/readers.py).
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

from torch.fx import Node

from ..optimizer.distribute import JOINED, Split, batchable, distribution, splits
from ..optimizer.facts import Facts, source_line, trips
from ..optimizer.fused import build_kernel
from ..optimizer.fusible import Fusible, fusible, missed
from ..optimizer.readers import with_readers
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
            if facts.fuses and self.slab is None and missed(parts.scan) is None:
                if (longer := with_readers(self.name, parts, facts)) is not None:
                    yield longer
                    continue
                whole = JOINED in parts.scan.meta
                joined = None if whole else together(parts)
                if joined and (batchable(joined) or not is_one_cycle(joined)):
                    yield distribution(self.name, joined)
                    continue
                if (whole or joined) and is_one_kernel(parts.scan):
                    continue  # all of the loop stays in it
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


def is_one_kernel(scan: Node) -> bool:
    """Whether a kernel can run the loop as it is."""
    return isinstance(fusible(scan, partial(build_kernel, write_only=True)), Fusible)
