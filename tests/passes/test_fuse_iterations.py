"""fuse-iterations: fires, skips, same values and gradients, contract, idempotent."""

from __future__ import annotations

from typing import Any

import looplift
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looplift.models import hyper_connections
from looplift.optimizer.facts import all_graphs, aten, is_op
from looplift.passes.fuse_iterations import FuseIterations
from torch import Tensor, nn


class NewtonSchulz(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(4):
            gram = x @ x.mT
            x = 1.875 * x + (-1.25 * gram + 0.375 * gram @ gram) @ x
        return x


class Sinkhorn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x - torch.logsumexp(x, dim=-1, keepdim=True)
            x = x - torch.logsumexp(x, dim=-2, keepdim=True)
        return x.exp()


class Difference(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x - x @ x + (x - 3 * (x.mT @ x))


class SharedProduct(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product = x @ x
        return x + product, product


class ZeroScale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.0 + x @ x


class KeptAxis(nn.Module):
    """No log-softmax: the sum is taken of another value, or along two axes."""

    def forward(self, x: Tensor) -> Tensor:
        other = x - torch.logsumexp(2 * x, -1, keepdim=True)
        return other - torch.logsumexp(other, (-1, -2), keepdim=True)


def calls(outcome: Any, *targets: Any) -> int:
    return sum(is_op(n, *targets) for g in all_graphs(outcome.graph_module) for n in g.graph.nodes)


def test_newton_schulz_fires(run: Any, golden: Any) -> None:
    outcome = run(NewtonSchulz(), (torch.randn(3, 5),))
    assert calls(outcome, aten.addmm.default) == 2
    assert calls(outcome, aten.matmul.default) == 1
    golden("fuse_iterations", outcome)


def test_sinkhorn_fires(run: Any) -> None:
    outcome = run(Sinkhorn(), (torch.randn(2, 3, 5),), [FuseIterations()])
    assert calls(outcome, aten.log_softmax.int) == 8
    assert calls(outcome, aten.logsumexp.default) == 0


@pytest.mark.parametrize(("model", "inputs", "reason"), [
    (SharedProduct(), (torch.randn(3, 3),), "read elsewhere"),
    (NewtonSchulz(), (torch.randn(2, 3, 2, 5).transpose(0, 1),), "copied into one batch"),
])
def test_skips(model: nn.Module, inputs: Any, reason: str, run: Any) -> None:
    outcome = run(model, inputs, [FuseIterations()])
    assert any(reason in s.reason for s in outcome.skips)


@pytest.mark.parametrize("model", [ZeroScale(), KeptAxis()])
def test_leaves_alone(model: nn.Module, run: Any) -> None:
    assert run(model, (torch.randn(3, 3),), [FuseIterations()]).applied == []
    whole = run(Difference(), (torch.randint(5, (3, 3)),), [FuseIterations()])
    assert whole.applied == []


@settings(max_examples=8, deadline=None)
@given(lead=st.lists(st.sampled_from([1, 2, 3]), max_size=2), rows=st.sampled_from([1, 2, 3, 7]),
       model=st.sampled_from([NewtonSchulz(), Sinkhorn()]))
def test_same_values_and_gradients(lead: list[int], rows: int, model: nn.Module) -> None:
    fast = looplift.apply_passes(model, (torch.randn(*lead, rows, 3),), measure=False,
                                 passes=[FuseIterations()])
    told = fast.report.to_dict()
    assert told["rewrites"]
    assert not told["declined"], told["declined"]


def test_signs(equal: Any) -> None:
    fast = equal(Difference(), (torch.randn(3, 3),), passes=[FuseIterations()])
    assert len(fast.report.to_dict()["rewrites"]) == 2  # one in each mode


def test_constraints_hold_as_before() -> None:
    """Doubly stochastic and orthogonal matrices stay so."""
    logits = torch.randn(6, 4, 4)
    fast = looplift.apply_passes(Sinkhorn(), (logits,), mode="inference", measure=False)
    sums = fast(logits).sum(-2)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
    square = torch.randn(4, 4)
    orthogonal = looplift.apply_passes(NewtonSchulz(), (square,), mode="inference", measure=False)
    got, want = (torch.linalg.svdvals(f(square)) for f in (orthogonal, NewtonSchulz()))
    torch.testing.assert_close(got, want)


def test_keeps_the_contract(keeps_contract: Any) -> None:
    keeps_contract(NewtonSchulz(), (torch.randn(3, 5),))


def test_idempotent(run: Any) -> None:
    model = hyper_connections.hyper_connections("tiny", mode="orthostochastic")
    inputs = hyper_connections.example_inputs("tiny")
    once = run(model, inputs, [FuseIterations()])
    twice = run(model, inputs, [FuseIterations(), FuseIterations()])
    assert len(once.applied) == len(twice.applied) > 0
