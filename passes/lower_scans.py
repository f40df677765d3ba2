"""What is left on a cycle → an ordinary loop over the re-rolled body.

Before:
    scan(body, carries, slices, invariants)
After:
    for step in zip(*slices): carries, outputs = body(carries, step, invariants)
Wins:
    Eager `scan` is 4–5 times slower than a plain loop; the loop's reads are one `unbind`,
    whose backward is one `stack`, and its results are stacked once; where only the last
    step's is read, it alone is kept.
Sound if:
    always: it is what scan means.
Skips:
    nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch.fx import Node

from ..optimizer.builder import Builder
from ..optimizer.facts import Facts, aten, is_op, is_scan, source_line, trips
from ..optimizer.rewrite import Rewrite, Skip


@dataclass(frozen=True)
class LowerScans:
    """Run what stays sequential as a plain loop; see the module's docstring."""

    name: ClassVar[str] = "lower-scans"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for scan in facts.operations:
            if not is_scan(scan):
                continue
            summary = f"scan of {trips(scan)} steps → a loop"
            results = list(scan.users)
            ends = {r: reads for r in results if (reads := only_the_last(scan, r))}
            replaces = [r for result in results for r in ends.get(result, [result])]

            def build(
                builder: Builder, scan: Node = scan, results: Sequence[Node] = results,
                ends: dict[Node, list[Node]] = ends,
            ) -> list[Node]:
                last = [cast(int, result.args[1]) for result in ends]
                made = builder.loop(scan, last)
                return [made[cast(int, result.args[1])] for result in results
                        for _ in ends.get(result, [result])]

            yield Rewrite(self.name, summary, source_line(scan), scan, tuple(replaces), build,
                          supersedes=(scan,))


def only_the_last(scan: Node, result: Node) -> list[Node]:
    """What reads `result`, a stack of per-step outputs, if all of it reads the last step's."""
    held = len(cast(list[Node], scan.args[1]))
    reads = list(result.users)
    last = all(is_op(r, aten.select.int) and r.args[1:] == (0, trips(scan) - 1) for r in reads)
    return reads if last and cast(int, result.args[1]) >= held else []
