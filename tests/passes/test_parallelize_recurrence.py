"""parallelize-recurrence: what fires, what does not and why, and that it changes nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import looplift
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looplift.optimizer import fused
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


def waiting(m: Any, x: Tensor) -> Tensor:
    """A queue: what waits, comes and is served."""
    rest, rests = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        rest = torch.relu(rest + m.a(x[:, t]))
        rests.append(rest)
    return torch.stack(rests, 1)


def turning(m: Any, x: Tensor) -> Tensor:
    turn, rests = torch.polar(torch.sigmoid(m.a.bias), m.a.bias), []
    h = torch.zeros_like(turn)
    for t in reversed(range(x.shape[1])):
        h = turn * h + m.a(x[:, t])
        rests.append(h.real)
    return torch.stack(rests, 1)


def gated(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = torch.tanh(h + m.a(x[:, t]))
    return h


def counted(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Numbers and a vector of the model, the same for all steps."""
    time, times, drift = x.new_tensor(0.5), [], torch.zeros_like(m.a.bias)
    for t in range(x.shape[1]):
        times.append(time * x[:, t])
        time = time + 0.1
        drift = drift + m.a.bias
    return torch.stack(times, 1), time, drift


FORWARDS = [last, after, before, both]


def optimized(model: nn.Module, *inputs: Tensor) -> looplift.OptimizedModule:
    return looplift.apply_passes(model, inputs, measure=False)


def fired(fast: looplift.OptimizedModule) -> list[str]:
    return [r["summary"] for r in fast.report.to_dict()["rewrites"] if r["pass_name"] == NAME]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_counts_keep_their_dtype_and_wrap_around(dtype: torch.dtype) -> None:
    def counted(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        n, seen = torch.full((x.shape[0],), 250, dtype=dtype), []
        for t in range(x.shape[1]):
            n = n + (x[:, t, 0] > 0).to(dtype)
            seen.append(n)
        return n, torch.stack(seen, 1)

    x = torch.randn(2, 24, 4)
    fast = optimized(Model(counted), x)
    assert fired(fast)
    torch.testing.assert_close(fast(x), Model(counted)(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_counters_of_a_model(dtype: torch.dtype) -> None:
    """Small integers are left: eager operations take numbers that do not fit them, and wrap."""
    class Counts(Model):
        steps: Tensor

        def __init__(self) -> None:
            super().__init__(last)
            self.register_buffer("steps", torch.tensor(250, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros_like(x[:, 0])
            for t in range(x.shape[1]):
                self.steps += 1
                h = torch.tanh(self.a(h) + x[:, t])
            return h

    model, naive, x = Counts(), Counts(), torch.randn(2, 24, 4)
    fast = optimized(model, x)
    assert ("running sum of 24 steps → one sum" in fired(fast)) is (dtype is torch.int64)
    for _ in range(2):
        torch.testing.assert_close(fast(x), naive(x))
        assert torch.equal(model.steps, naive.steps)


def test_sums_of_what_is_the_same_in_all_steps() -> None:
    model = Model(counted).double()
    fast = optimized(model, torch.randn(2, 24, 4).double())
    assert fired(fast) == ["running sum of 24 steps → one sum"] * 2  # twice in each mode
    assert not {"for ", "scan"} & set(re.findall("for |scan", fast.code))
    same(model, fast, torch.randn(2, 24, 4).double())


@pytest.mark.parametrize("forward", FORWARDS)
def test_running_sums_are_computed_at_once(forward: Forward) -> None:
    fast = optimized(Model(forward), torch.randn(2, 7, 4))
    assert len(fired(fast)) == 2  # one for each mode; the first or last step may stand by itself
    assert all(re.fullmatch("running sum of [67] steps → one sum", each) for each in fired(fast))
    assert "for " not in fast.code


@pytest.fixture
def no_compiler() -> Iterator[None]:
    with mock.patch.object(fused, "compiled", return_value=None):
        yield


LONG = 160  # steps, of which it pays


@pytest.mark.parametrize("forward", [decayed, waiting, turning])
def test_affine_recurrences_run_at_once_where_there_is_no_kernel(
    forward: Forward, no_compiler: None
) -> None:
    model, x = Model(forward).double(), torch.randn(2, LONG, 4, dtype=torch.float64)
    fast = optimized(model, x)
    assert [re.sub(r"\d+", "N", each) for each in fired(fast)] == [
        "affine recurrence of N steps → all at once"] * 2
    assert "for " not in fast.code
    with mock.patch.object(fused, "plain", side_effect=AssertionError("a loop ran")):
        same(model, fast, x)
    same(model, fast, x.masked_fill(x > 2, float("inf")))


def test_other_steps_are_left_with_the_reason(no_compiler: None) -> None:
    fast = optimized(Model(gated), torch.randn(2, LONG, 4))
    assert fired(fast) == []
    declined = {d["reason"] for d in fast.report.to_dict()["declined"] if d["pass_name"] == NAME}
    assert declined == {"it is not affine: it computes tanh of what it carries"}


def test_short_loops_and_those_with_a_kernel_are_left() -> None:
    for steps in (LONG // 4, LONG):
        fast = optimized(Model(decayed), torch.randn(2, steps, 4))
        assert fired(fast) == []
        assert "fused_scan" in fast.code


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(FORWARDS), st.integers(1, 3), st.integers(3, 7), st.integers(1, 3))
def test_values_and_gradients_are_the_models(
    forward: Forward, batch: int, steps: int, width: int
) -> None:
    model = Model(forward, width).double()
    x = torch.randn(batch, steps, width, dtype=torch.float64)
    same(model, looplift.apply_passes(model, (x,), measure=False, verify=False), x)


def same(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    results = []
    for run in (model, fast):
        given = x.clone().requires_grad_()
        outputs = torch.utils._pytree.tree_leaves(run(given))
        roots = [o.sin().sum() for o in outputs if o.requires_grad]
        grads = torch.autograd.grad(roots, [given, *model.parameters()],
                                    allow_unused=True)
        results.append((outputs, grads, [o.stride() for o in outputs]))
    assert_close(results[1], results[0], equal_nan=True)


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


@pytest.mark.parametrize(("start", "number"), [
    (torch.zeros(3, dtype=torch.bool), True), (torch.zeros(3, dtype=torch.int32), 1),
    (torch.zeros(3, dtype=torch.int8), 300), (torch.zeros(3), 1), (torch.zeros(3), 0.1),
    (torch.zeros(2, dtype=torch.bfloat16), 1), (torch.tensor(5), -3),
    (torch.zeros(3, dtype=torch.float16), 70000.0),
])
def test_counters_are_the_models_where_nothing_verifies(start: Tensor, number: Any) -> None:
    """Also under Inductor, which has an idea of its own of cumulative sums of a number."""
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        count, seen = start.clone(), []
        for _ in range(x.shape[1]):
            seen.append(count)
            count = count + number
        return torch.stack(seen), count

    model, x = Model(run), torch.randn(2, 20, 4)
    fast = looplift.apply_passes(model, (x,), measure=False, verify=False, mode="inference")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="looplift")
    with torch.no_grad():
        expected = model(x)
        for other in (fast, compiled):
            found = other(x)
            assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert [t.stride() for t in found] == [t.stride() for t in expected]
