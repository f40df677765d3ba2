"""parallelize-recurrence: what fires, what does not and why, and that it changes nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import looplift
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

Forward = Callable[[Any, Tensor], Any]
NAME = "parallelize-recurrence"


class Model(nn.Module):
    def __init__(self, forward: Forward, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(width, width)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def last(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        total = total + torch.tanh(m.a(x[:, t]))
    return total


def after(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    total, totals = x[:, 0], []
    for t in range(x.shape[1]):
        total = m.a(x[:, t]) + total
        totals.append(total)
    return torch.stack(totals, 1), total


def before(m: Any, x: Tensor) -> Tensor:
    total, totals = torch.ones_like(x[:, 0]), []
    for t in reversed(range(x.shape[1])):
        totals.append(total.tanh())
        total = total + m.a(x[:, t]).relu()
    return torch.stack(totals, 1)


def both(m: Any, x: Tensor) -> Tensor:
    total, totals = x[:, 0], []
    for t in range(x.shape[1]):
        old = total
        total = total + m.a(x[:, t])
        totals.append(old * total)
    return torch.stack(totals, -1)


def broadcast(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        total = total + m.a(x[:, t]).sum(-1, keepdim=True)
    return total


def scaled(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        total = torch.add(total, torch.tanh(m.a(x[:, t])), alpha=2)
    return total


def decayed(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        total = 0.9 * total + m.a(x[:, t])
    return total


FORWARDS = [last, after, before, both]


def optimized(model: nn.Module, *inputs: Tensor) -> looplift.OptimizedModule:
    return looplift.apply_passes(model, inputs, measure=False)


def fired(fast: looplift.OptimizedModule) -> list[str]:
    return [r["summary"] for r in fast.report.to_dict()["rewrites"] if r["pass_name"] == NAME]


@pytest.mark.parametrize("forward", FORWARDS)
def test_running_sums_are_computed_at_once(forward: Forward) -> None:
    fast = optimized(Model(forward), torch.randn(2, 7, 4))
    assert len(fired(fast)) == 2  # one for each mode; the first or last step may stand by itself
    assert all(re.fullmatch("running sum of [67] steps → one sum", each) for each in fired(fast))
    assert "for " not in fast.code


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(FORWARDS), st.integers(1, 3), st.integers(3, 7), st.integers(1, 3))
def test_values_and_gradients_are_the_models(
    forward: Forward, batch: int, steps: int, width: int
) -> None:
    model = Model(forward, width).double()
    x = torch.randn(batch, steps, width, dtype=torch.float64)
    results = []
    for run in (model, looplift.apply_passes(model, (x,), measure=False, verify=False)):
        given = x.clone().requires_grad_()
        outputs = torch.utils._pytree.tree_leaves(run(given))
        grads = torch.autograd.grad([o.sin().sum() for o in outputs], [given, *model.parameters()],
                                    allow_unused=True)
        results.append((outputs, grads, [o.stride() for o in outputs]))
    assert_close(results[1], results[0])


def test_terms_that_are_broadcast_are_left_with_the_reason() -> None:
    fast = optimized(Model(broadcast), torch.randn(2, 7, 4))
    declined = {d["reason"] for d in fast.report.to_dict()["declined"] if d["pass_name"] == NAME}
    assert declined == {"its terms, (2, 1), are broadcast to the total's size"}


@pytest.mark.parametrize("forward", [scaled, decayed])
def test_other_recurrences_are_left(forward: Forward) -> None:
    assert fired(optimized(Model(forward), torch.randn(2, 7, 4))) == []


def test_the_sum_of_many_steps_is_as_accurate_as_the_loop() -> None:
    model = Model(last)
    x = torch.randn(1, 200, 4) * 100
    fast = optimized(model, x)
    assert fired(fast)
    truth = model.double()(x.double())
    model.float()
    error, naive = ((run(x) - truth).abs().max() for run in (fast, model))
    assert error <= 4 * naive
