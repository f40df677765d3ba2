"""Where batching all steps needs too much memory, slabs of steps are batched."""

from __future__ import annotations

from typing import Any

import looplift
import pytest
import torch
from looplift.optimizer.facts import all_graphs, has_body, trips
from looplift.optimizer.measure import call, peak_memory
from looplift.optimizer.select import LITTLE
from looplift.passes import ORDER
from looplift.passes.batch_timesteps import BatchTimesteps
from looplift.passes.lower_scans import LowerScans
from looplift.passes.reroll_loops import RerollLoops
from looplift.passes.vectorize_patches import VectorizePatches
from torch import Tensor, nn


class Wide(nn.Module):
    """Steps that compute much and keep little: (B, T, 4) to (B, T, 4), with a carry or without."""

    def __init__(self, carries: bool, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.carries = carries
        self.enter, self.leave = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Any:
        h, outputs = x.new_zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            y = self.leave(torch.tanh(self.enter(x[:, t])))
            h = torch.tanh(h * 0.5 + y) if self.carries else y
            outputs.append(h * x[:, t])
        return torch.stack(outputs, 1), h


def slabs(size: int) -> list[Any]:
    return [RerollLoops(), BatchTimesteps(slab=size), VectorizePatches(slab=size), LowerScans()]


@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.parametrize("length", [8, 9, 12, 13])
def test_slabs_are_batched(carries: bool, length: int, run: Any, equal: Any) -> None:
    model, x = Wide(carries), torch.randn(2, length, 4, requires_grad=True)
    outcome = run(model, (x,), slabs(4))
    assert any(a.summary == f"{length} steps → slabs of 4" for a in outcome.applied)
    loops = [n for g in all_graphs(outcome.graph_module) for n in g.graph.nodes if has_body(n)]
    assert length // 4 in [trips(loop) for loop in loops]
    assert any(a.summary.startswith("4 × (2 linear, ") for a in outcome.applied)
    equal(model, (x,), passes=slabs(4))


def test_short_loops_are_batched_whole(run: Any) -> None:
    outcome = run(Wide(carries=True), (torch.randn(2, 4, 4),), slabs(4))
    assert not any("slabs" in a.summary for a in outcome.applied)


def test_slabs_keep_the_memory_budget() -> None:
    model, x = Wide(carries=True, width=16384), torch.randn(1, 300, 4)
    fast = looplift.apply_passes(model, (x,), mode="inference", memory_budget=1.5)
    summaries = [r["summary"] for r in fast.report.to_dict()["rewrites"]]
    naive, ours = (peak_memory(call(m, (x,), {}, False), x.device) for m in (model, fast))
    assert ours <= 1.5 * max(naive, LITTLE)
    whole = looplift.apply_passes(model, (x,), mode="inference", measure=False, passes=ORDER)
    assert peak_memory(call(whole, (x,), {}, False), x.device) > 1.5 * LITTLE
    if summaries:  # what is kept is a matter of time, but nothing is batched whole
        assert not any(s.startswith("300 × (") for s in summaries)
