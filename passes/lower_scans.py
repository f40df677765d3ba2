"""What is left on a cycle → an ordinary loop over the re-rolled body.

Before:
    scan(body, carries, slices, invariants)
After:
    for step in zip(*slices): carries, outputs = body(carries, step, invariants)
Wins:
    Eager `scan` is 4–5 times slower than a plain loop; the loop's reads are one `unbind`,
    whose backward is one `stack`, and its results are stacked once.
Sound if:
    always: it is what scan means.
Skips:
    nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from ..optimizer.builder import Builder
from ..optimizer.facts import Facts, is_scan, source_line, trips
from ..optimizer.loop import plain_loop
from ..optimizer.rewrite import Rewrite, Skip


@dataclass(frozen=True)
class LowerScans:
    """Run what stays sequential as a plain loop; see the module's docstring."""

    name: ClassVar[str] = "lower-scans"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for scan in facts.operations:
            if not is_scan(scan):
                continue
            results = tuple(scan.users)

            def build(
                builder: Builder, scan: Node = scan, results: tuple[Node, ...] = results
            ) -> list[Node]:
                made = builder.loop(plain_loop, scan)
                places: list[Any] = [result.args[1] for result in results]
                return [made[place] for place in places]

            summary = f"scan of {trips(scan)} steps → a loop"
            yield Rewrite(self.name, summary, source_line(scan), scan, results, build,
                          supersedes=(scan,))
