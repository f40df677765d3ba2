"""The plain way to run a scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def plain_loop(
    body: Callable[..., Sequence[Tensor]], carries: Sequence[Tensor], slices: Sequence[Tensor],
    invariants: Sequence[Any], last: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """Final carries, then per-step outputs stacked on axis 0; of those in `last` the last alone.

    `body(*carries, *step, *invariants)` gives the next carries, then this step's outputs;
    `step` is one slice of each of `slices`, along axis 0. At least one step.
    """
    held = len(carries)
    collected: list[Sequence[Tensor]] = []
    for step in zip(*(s.unbind(0) for s in slices), strict=True):
        results = body(*carries, *step, *invariants)
        carries = results[:held]
        collected.append(results[held:])
    columns = enumerate(zip(*collected, strict=True), held)
    return (*carries, *(c[-1] if k in last else torch.stack(c) for k, c in columns))
