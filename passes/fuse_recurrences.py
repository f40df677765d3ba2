"""A recurrence of small steps → one kernel that walks all of them.

Before:
    scan(step, carries, slices, invariants)
After:
    looplift.fused_scan(step's source, carries, slices, invariants)
Wins:
    Each tensor is read and written once, with the carries in registers or in the cache; a loop
    in Python runs every operation of every step, and so does its backward.
Sound if:
    every operation is pointwise, a view, a sum, a largest or smallest value, a matrix product,
    or composed of these (as systems of up to four equations are), on one floating dtype; where
    a system has no solution the loop runs, which raises. The kernel computes these operations,
    with the functions that eager operations use; its backward is the differentiated step, walked
    from the last to the first, with products of all steps at once where they are off its cycle.
    Complex numbers are pairs of real ones; half precision is computed in float32. Short loops
    inside a step are written out.
Skips:
    other operations; several dtypes; values too large for a core's cache, or for a GPU's
    registers; loops of few steps, which a kernel is not worth building for; no compiler, or no
    Triton on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from ..optimizer.builder import Builder
from ..optimizer.distribute import replacing
from ..optimizer.facts import Facts, body_of, is_random, is_scan, source_line, trips
from ..optimizer.fused import build_kernel
from ..optimizer.fusible import Fusible, call, fusible, missed
from ..optimizer.pointwise import Unsupported
from ..optimizer.rewrite import Rewrite, Skip


@dataclass(frozen=True)
class FuseRecurrences:
    """Run a recurrence of small steps as one kernel; see the module's docstring."""

    name: ClassVar[str] = "fuse-recurrences"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for scan in facts.operations:
            if not is_scan(scan) or only_draws(scan):
                continue
            if (fewest := missed(scan)) is not None:
                if not facts.is_body:  # else the loop around it may yet take it into its kernel
                    reason = f"{trips(scan)} steps: a kernel is built for {fewest} and more"
                    yield Skip(self.name, reason, source_line(scan))
                continue
            found = fusible(scan, build_kernel)
            if isinstance(found, Unsupported):
                yield Skip(self.name, str(found), source_line(scan))
                continue

            def make(build: Builder, found: Fusible = found) -> Sequence[Node]:
                return call(build, found)

            yield replacing(self.name, f"scan of {trips(scan)} steps → one kernel", scan, make)


def only_draws(scan: Node) -> bool:
    """Whether its steps draw random numbers and no more."""
    return all(is_random(n) for n in body_of(scan).graph.nodes if n.op == "call_function")
