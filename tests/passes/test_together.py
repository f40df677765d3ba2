"""What reads a recurrence's values stays in its loop, where that moves less through memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import looplift
import pytest
import torch
from looplift.optimizer import fused
from looplift.optimizer.facts import is_kernel
from looplift.tests import recurrences
from torch import Tensor, nn
from torch.testing import assert_close

STATEFUL = ("GatedDeltaRule", "GatedLinearAttention", "Rwkv6", "SelectiveScan", "MatrixLstm")


class Model(nn.Module):
    """A matrix of state, written and read by what the input is projected to."""

    def __init__(self, loop: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loop, self.into, self.out = loop, nn.Linear(8, 24), nn.Linear(8, 3)
        self.decay, self.inside = nn.Parameter(torch.rand(8)), nn.Linear(8, 8)

    def forward(self, *inputs: Tensor) -> Any:
        return self.loop(self, *inputs)


def read(m: Any, x: Tensor) -> Tensor:
    state, outputs = torch.zeros(x.shape[0], 8, 8), []
    for t in range(x.shape[1]):
        key, value, query = m.into(x[:, t]).chunk(3, -1)
        state = m.decay * state + key.unsqueeze(-1) * value.unsqueeze(-2)
        outputs.append(m.out((query.unsqueeze(-2) @ state).squeeze(-2).tanh()))
    return torch.stack(outputs, 1)


def two_layers(m: Any, x: Tensor) -> Tensor:
    h, g, outputs = torch.zeros(2, 8), torch.zeros(2, 8), []
    for t in range(x.shape[1]):
        h = torch.tanh(m.decay * h + x[:, t])
        g = torch.tanh(m.decay * g + m.inside(h))
        outputs.append((g * h).sum(-1))
    return torch.stack(outputs, 1)


def two_gates(m: Any, x: Tensor) -> Tensor:
    """Two recurrences, one of which reads the other, and one result of both."""
    most, total, outputs = torch.zeros(2, 8), torch.zeros(2, 8), []
    for t in range(x.shape[1]):
        before, most = most, torch.maximum(most * m.decay, x[:, t])
        total = total * torch.exp(before - most) + torch.exp(x[:, t] - most)
        outputs.append(total.log() + most)
    return torch.stack(outputs, 1)


def mean_so_far(m: Any, x: Tensor) -> Tensor:
    total, outputs = torch.zeros(2, 8), []
    for t in range(x.shape[1]):
        total = total + x[:, t].sigmoid()
        outputs.append((total / (t + 1)).sum(-1))
    return torch.stack(outputs, 1)


def sorted_state(m: Any, x: Tensor) -> Tensor:
    """A state that no kernel computes."""
    state, outputs = torch.zeros(2, 8), []
    for t in range(x.shape[1]):
        state = torch.sort(state * m.decay + x[:, t], -1)[0]
        outputs.append((state * x[:, t]).sum(-1))
    return torch.stack(outputs, 1)


def delayed(m: Any, x: Tensor) -> Tensor:
    """What is read is the state of one step before, too."""
    state, before, outputs = torch.zeros(2, 8), torch.zeros(2, 8), []
    for t in range(x.shape[1]):
        state = torch.tanh(state * m.decay + x[:, t])
        outputs.append((state - before).square().sum(-1))
        before = state
    return torch.stack(outputs, 1)


def noisy(m: Any, x: Tensor) -> Tensor:
    state, outputs = torch.zeros(2, 8), []
    for t in range(x.shape[1]):
        state = torch.tanh(state * m.decay + x[:, t] + torch.randn_like(state))
        outputs.append(state.square().sum(-1))
    return torch.stack(outputs, 1)


def alone(m: Any, x: Tensor) -> Tensor:
    """Nothing but a recurrence, with noise."""
    state = torch.zeros(2, 8)
    for _ in range(x.shape[1]):
        state = torch.tanh(state * m.decay + torch.randn_like(state))
    return state


def with_one_that_nobody_reads(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a, b, outputs = torch.zeros(2, 8), torch.zeros(2, 8), []
    for t in range(x.shape[1]):
        a, b = torch.tanh(a * m.decay + x[:, t]), torch.tanh(b + y[:, t])
        outputs.append(a.unsqueeze(-1) * x[:, t].unsqueeze(1))
    return (torch.stack(outputs, 1),)


def detached(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a, outputs = torch.zeros(2, 8), []
    for t in range(x.shape[1]):
        a = torch.tanh(a * m.decay + x[:, t])
        outputs.append((a.detach() * y[:, t]).sum(-1))
    return (torch.stack(outputs, 1),)


def as_masks(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a, b, outputs, masks = torch.zeros(2, 8), torch.zeros(2, 8), [], []
    for t in range(x.shape[1]):
        a, b = torch.tanh(a + x[:, t]), 0.5 * b + y[:, t]
        outputs.append((a * (b > 0)).sum(-1))
        masks.append((a.sign() * b.detach()).sum(-1))
    return torch.stack(outputs, 1), torch.stack(masks, 1)


def one_way(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The first result depends on `x` alone, and the last on both."""
    a, b, outputs, others = torch.zeros(2, 8), torch.zeros(2, 8), [], []
    for t in range(x.shape[1]):
        a = torch.tanh(a + x[:, t])
        b = torch.tanh(b * m.decay + y[:, t] + a)
        outputs.append(a.sum(-1))
        others.append(b.sum(-1))
    return torch.stack(outputs, 1), torch.stack(others, 1), a, b


def largest(fast: looplift.OptimizedModule) -> int:
    assert fast.graph_module is not None
    made = [n.meta["val"] for n in fast.graph_module.graph.nodes if "val" in n.meta]
    return max(t.numel() for t in made if isinstance(t, Tensor))


def kernels(fast: looplift.OptimizedModule) -> list[str]:
    assert fast.graph_module is not None
    return [n.args[0] for n in fast.graph_module.graph.nodes if is_kernel(n)]


@pytest.mark.parametrize("name", STATEFUL)
def test_states_of_all_steps_are_never_in_memory(name: str, equal: Any) -> None:
    model, inputs = getattr(recurrences, name)(), recurrences.example_inputs(length=24)
    fast = equal(model, inputs, mode="inference")
    assert len(kernels(fast)) == 1
    assert largest(fast) <= 4 * inputs[0].numel()


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_projections_run_once_and_reads_stay(mode: str, equal: Any) -> None:
    fast = equal(Model(read), (torch.randn(2, 20, 8),), mode=mode)
    [step] = kernels(fast)
    assert "@" in step or "matmul" in step
    assert "linear" not in step
    assert largest(fast) <= 2 * 20 * 24


@pytest.mark.parametrize(("loop", "count"), [
    (two_layers, 2),  # with a product with weights between them
    (two_gates, 1), (delayed, 1), (noisy, 1), (alone, 1),
    (mean_so_far, 0),  # one cumulative sum
    (sorted_state, 0),
])
def test_how_many_kernels(loop: Callable[..., Tensor], count: int, equal: Any) -> None:
    fast = equal(Model(loop), (torch.randn(2, 20, 8),), mode="inference")
    assert len(kernels(fast)) == count, fast.code


def test_without_a_kernel_all_steps_are_read_at_once(equal: Any) -> None:
    model, x = Model(sorted_state), torch.randn(2, 20, 8)
    alone = equal(Model(read), (x,), mode="inference",
                  passes=[p for p in looplift.passes.ORDER if p.name != "fuse-recurrences"])
    with mock.patch.object(fused, "compiled", return_value=None):
        bare = equal(Model(read), (x,), mode="inference")
    for fast in (equal(model, (x,), mode="inference"), alone, bare):
        [_, *loops] = fast.code.split("for ")
        body = loops[0].split("del ")[0]
        assert not [name for name in ("sum", "@", "matmul") if name in body], fast.code


@pytest.mark.parametrize("loop", [with_one_that_nobody_reads, detached, as_masks, one_way])
def test_what_has_no_gradient_of_a_result_gets_none(loop: Callable[..., Any], equal: Any) -> None:
    model, inputs = Model(loop), (torch.randn(2, 12, 8), torch.randn(2, 12, 8))
    fast = equal(model, inputs, mode="training")
    assert len(kernels(fast)) == 1, fast.code
    given = [t.requires_grad_() for t in inputs]
    for want, got in zip(model(*given), fast(*given), strict=True):
        assert_close(got, want)
        assert got.requires_grad == want.requires_grad
        if want.requires_grad:
            grads = [torch.autograd.grad(y.sum(), [*given, model.decay], allow_unused=True,
                                         retain_graph=True) for y in (want, got)]
            assert [g is None for g in grads[1]] == [g is None for g in grads[0]]
            assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
