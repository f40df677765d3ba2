"""Optimizing a model leaves it, its surroundings and the random generators as they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from looplift import apply_passes
from looplift.passes.batch_timesteps import BatchTimesteps
from looplift.passes.lower_scans import LowerScans
from looplift.passes.reroll_loops import RerollLoops
from torch import Tensor, nn
from torch.testing import assert_close

STEPS, WIDTH = 26, 4
PASSES = RerollLoops(), BatchTimesteps(), LowerScans()  # measured, without a kernel to build
LOG: list[Tensor] = []


class Writes(nn.Module):
    """A recurrence over (B, T, 4) that updates some of its own tensors."""

    plain: Tensor

    def __init__(self, update: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.update = update
        self.a = nn.Linear(WIDTH, WIDTH)
        self.slow = copy.deepcopy(self.a).requires_grad_(False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("direction", torch.ones(WIDTH))
        self.plain = torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.update(self, x)
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(self.a(x[:, t]) + h)
        return h


def running_mean(m: Any, x: Tensor) -> Any:
    m.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
    return x - m.mean


def batch_norm(m: Any, x: Tensor) -> Any:
    return m.norm(x.transpose(1, 2)).transpose(1, 2)


def momentum_encoder(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        for slow, fast in zip(m.slow.parameters(), m.a.parameters(), strict=True):
            slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
    return x - m.slow(x)


def power_iteration(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        found = m.a.weight.t() @ (m.a.weight @ m.direction)
        m.direction.copy_(found / found.norm())
    return x / (m.a.weight @ m.direction).norm()


def plain_attribute(m: Any, x: Tensor) -> Any:
    m.plain.add_(x.detach().mean((0, 1)))
    return x * m.plain


def held(model: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in
            (*model.named_parameters(), *model.named_buffers(), ("plain", model.plain))}


@pytest.mark.parametrize("update", [running_mean, batch_norm, momentum_encoder, power_iteration,
                                    plain_attribute])
def test_what_a_model_updates_is_updated_once_a_call(update: Callable[[Any, Tensor], Any]) \
        -> None:
    x = torch.randn(3, STEPS, WIDTH)
    model = Writes(update)
    naive = copy.deepcopy(model)
    before = held(model)
    fast = apply_passes(model, (x,), passes=PASSES)
    assert "for " in fast.code
    assert_close(held(model), before, rtol=0, atol=0)
    later = apply_passes(naive_too := copy.deepcopy(naive), passes=PASSES)
    for _ in range(2):
        expected = naive(x)
        assert_close(fast(x), expected)
        assert_close(later(x), expected)
    assert_close(held(model), held(naive))
    assert_close(held(naive_too), held(naive))


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python_and_numpy(draw: Callable[[], float]) -> None:
    class Sampled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x[:, 0]
            for t in range(x.shape[1]):
                h = torch.tanh(h + x[:, t] if draw() < 0.5 else h - x[:, t])
            return h

    model, x = Sampled(), torch.randn(3, STEPS, WIDTH)
    fast = apply_passes(model)

    def seeded() -> None:
        random.seed(0)
        np.random.seed(0)

    seeded()
    expected = model(x)
    seeded()
    assert_close(fast(x), expected, rtol=0, atol=0)
    seeded()
    apply_passes(model, (x,))
    assert_close(model(x), expected, rtol=0, atol=0)


def logs_globally(m: Any, h: Tensor) -> None:
    LOG.append(h)


def logs_where_it_was_defined() -> tuple[list[Tensor], Callable[[Any, Tensor], None]]:
    log: list[Tensor] = []
    return log, lambda m, h: log.append(h)


def logs_in_its_class(m: Any, h: Tensor) -> None:
    m.kept.append(h)


@pytest.mark.parametrize("name", ["LOG", "log", "kept"])
def test_lists_beside_the_model(name: str) -> None:
    own: list[Tensor] = []
    log, keep = {"LOG": (LOG, logs_globally), "log": logs_where_it_was_defined(),
                 "kept": (own, logs_in_its_class)}[name]

    class Logged(nn.Module):
        kept = own

        def __init__(self) -> None:
            super().__init__()
            self.keep = keep

        @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
        def forward(self, x: Tensor) -> Tensor:
            h = x[:, 0]
            for t in range(x.shape[1]):
                h = torch.tanh(h + x[:, t])
                self.keep(self, h)
            return h

    fast = apply_passes(Logged())
    for _ in range(2):
        log.clear()
        fast(torch.randn(3, STEPS, WIDTH))
        assert [type(t) for t in log] == [Tensor] * STEPS
    assert f"forward changes what the global or enclosed '{name}' holds" in str(fast.report)


def test_hooks_run_as_often_as_the_model() -> None:
    seen: list[Tensor] = []
    model = Writes(lambda m, x: x)
    model.a.register_forward_hook(lambda module, args, output: seen.append(output))
    apply_passes(model)(torch.randn(3, STEPS, WIDTH))
    assert len(seen) == STEPS
