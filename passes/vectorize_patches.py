"""A loop over patches that carries nothing → one batched operation over windows.

Before:
    [embed(image[:, :, p·i : p·i+p, p·j : p·j+p].flatten(1)) for i … for j …]
After:
    embed(image.unfold(2, p, p).unfold(3, p, p) … .reshape(batch, rows·columns, -1))
Wins:
    One operation over all windows instead of one for each; windows are strided views.
    `slab` steps at a time where all of them would need too much memory.
Sound if:
    1. the scan carries nothing, so that no step can see another;
    2. they are not random: random operations draw in a loop of their own, in their order;
    3. a batching rule, or torch.vmap, covers each; one that none covers stays in a loop.
Skips:
    scans none of whose operations can be batched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..optimizer.distribute import distribution, splits
from ..optimizer.facts import Facts, trips
from ..optimizer.rewrite import Rewrite, Skip
from ..optimizer.slabs import in_slabs


@dataclass(frozen=True)
class VectorizePatches:
    """Batch scans that carry nothing; see the module's docstring."""

    slab: int | None = None  # batch at most so many steps at a time
    name: ClassVar[str] = "vectorize-patches"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for parts in splits(facts):
            if parts.carries:
                continue
            if self.slab is not None and trips(parts.scan) > self.slab:
                yield in_slabs(self.name, parts.scan, self.slab)
            else:
                yield distribution(self.name, parts)
