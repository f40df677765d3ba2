"""Measurement: complete, plausible, and without a trace on what it measures."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import looplift
import pytest
import torch
from looplift.optimizer import measure
from looplift.optimizer.measure import (
    Comparison,
    Timing,
    interleaved,
    keep_freed_memory,
    peak_memory,
)
from torch import nn


def test_peak_memory_counts_what_is_held_at_a_time() -> None:
    x = torch.randn(1 << 18)  # 1 MiB

    def run() -> None:
        a = x.exp()
        b = a + 1
        del a
        b.mul(2)

    peak = peak_memory(run, torch.device("cpu"))
    assert 2 << 20 <= peak < (2 << 20) + 4096


def test_measuring_memory_takes_little_of_it() -> None:
    """What the profiler keeps for each operation lay in the holes between freed blocks."""
    statm, x, held = Path("/proc/self/statm"), torch.zeros(4, 1024, 64, requires_grad=True), []
    if not statm.exists():
        pytest.skip("it reads /proc")

    def run() -> None:
        state, outputs = torch.zeros(4, 64), []
        for t in range(1024):  # each backward makes a gradient as large as x, and adds it to x's
            state = torch.tanh(0.9 * state + x[:, t])
            outputs.append(state)
        torch.autograd.grad(torch.stack(outputs).sum(), x)
        held.append(int(statm.read_text().split()[1]) * resource.getpagesize())

    run()
    peak_memory(run, torch.device("cpu"))
    assert held[1] - held[0] < 300 << 20


def test_peak_memory_sees_the_backward() -> None:
    x = torch.randn(1 << 18, requires_grad=True)
    forward = peak_memory(lambda: x.exp().detach_(), torch.device("cpu"))
    both = peak_memory(lambda: torch.autograd.grad(x.exp().sum(), x), torch.device("cpu"))
    assert both > forward


def test_interleaved_compares_all_with_the_first() -> None:
    x = torch.randn(64, 64)
    found = interleaved({"one": lambda: x @ x, "two": lambda: x @ x @ x}, rounds=3, seconds=0.05)
    assert [t.name for t in found.timings] == ["one", "two"]
    assert found["one"].ratio == 1.0
    assert found.noise >= 0
    assert found["two"].low <= found["two"].ratio <= found["two"].high


@pytest.mark.parametrize(("edge", "noise", "parts"), [
    (1.02, 0.02, 1), (0.5, 0.0, 2), (0.52, 0.0, 1), (0.52, 0.03, 2), (None, 0.0, 1),
])
def test_where_a_side_is_asked_for_little_time_tells(
    monkeypatch: pytest.MonkeyPatch, edge: float | None, noise: float, parts: int
) -> None:
    """Unless the ratio may lie on either side."""
    timed: list[int] = []

    def in_turns(
        timers: Any, calls: Mapping[str, int], rounds: int, mode: str, seed: int
    ) -> Comparison:
        timed.append(sum(calls.values()))
        return Comparison(mode, (Timing("one", 1.0, 1.0, 1.0, 1.0, 1.0),
                                 Timing("two", 2.0, 0.5, 0.49, 0.51, 0.5)), noise, rounds, 1)

    monkeypatch.setattr(measure, "_in_turns", in_turns)
    monkeypatch.setattr(measure._Timer, "seconds_per_call", lambda timer, calls: 1e-4)
    interleaved({"one": list, "two": list}, rounds=4, seconds=1.2, edge=edge)
    assert len(timed) == parts
    assert round(timed[-1] / 750) == (4 if edge is None or parts == 2 else 1)


def test_what_little_time_tells_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[str]] = []

    def in_turns(
        timers: Any, calls: Mapping[str, int], rounds: int, mode: str, seed: int
    ) -> Comparison:
        timed.append(list(calls))
        ratios = {"one": 1.0, "slow": 0.5, "close": 1.02 / len(timed)}
        return Comparison(mode, tuple(Timing(n, 1.0, r, r, r, r) for n, r in ratios.items()
                                      if n in calls), 0.01, rounds, 1)

    monkeypatch.setattr(measure, "_in_turns", in_turns)
    monkeypatch.setattr(measure._Timer, "seconds_per_call", lambda timer, calls: 1e-4)
    found = interleaved({"one": list, "slow": list, "close": list}, seconds=1.2, edge=1.02)
    assert timed == [["one", "slow", "close", measure.AGAIN], ["one", "close", measure.AGAIN]]
    assert [(t.name, t.ratio) for t in found.timings] == [("one", 1.0), ("slow", 0.5),
                                                          ("close", 0.51)]


def test_compare_has_both_modes_and_memory() -> None:
    a, b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    found = looplift.compare(a, b, (torch.randn(3, 4),), rounds=3, seconds=0.02)
    assert [c.mode for c in found] == ["inference", "training"]
    assert all(t.memory is not None for c in found for t in c.timings)
    assert a.weight.grad is None


def test_the_allocator_setting_is_harmless() -> None:
    keep_freed_memory()
    assert torch.ones(3).sum().item() == 3
