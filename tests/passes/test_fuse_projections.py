"""fuse-projections: fires, skips, same values and gradients, contract, idempotent."""

from __future__ import annotations

from typing import Any

import looplift
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looplift.optimizer.facts import aten, is_op
from looplift.passes.fuse_projections import FuseProjections
from torch import Tensor, nn


class Linears(nn.Module):
    """Two linears on one input, their results used in turn."""

    def __init__(self, width: int, first: int, second: int, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(width, first, bias=bias)
        self.second = nn.Linear(width, second, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x).tanh(), self.second(x)], -1)


class Mixing(nn.Module):
    """Products with a shared right side; the second matrix is computed after the first product."""

    def forward(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        left = a @ x
        return torch.cat([left.relu(), torch.softmax(b, -1) @ x], -2)


class Chain(nn.Module):
    """The second product's matrix depends on the first product."""

    def forward(self, a: Tensor, x: Tensor) -> Tensor:
        return (a @ x).mean(-1, keepdim=True).expand(-1, len(x)) @ x


class Noisy(nn.Module):
    """The second product's matrix is random."""

    def forward(self, a: Tensor, x: Tensor) -> Tensor:
        return torch.cat([a @ x, torch.dropout(a, 0.5, True) @ x])


def products(outcome: Any) -> int:
    return sum(is_op(n, aten.matmul.default, aten.linear.default)
               for n in outcome.graph_module.graph.nodes)


def test_fires_on_linears(run: Any, golden: Any) -> None:
    outcome = run(Linears(5, 2, 3), (torch.randn(99, 5),), [FuseProjections()])
    assert [a.summary for a in outcome.applied] == ["2 products of one operand → 1"]
    assert products(outcome) == 1
    golden("fuse_projections", outcome)


def test_fires_on_what_is_computed_later(run: Any) -> None:
    inputs = torch.randn(2, 3), torch.randn(4, 3), torch.randn(3, 70)
    assert products(run(Mixing(), inputs, [FuseProjections()])) == 1


@pytest.mark.parametrize(("model", "inputs", "reason"), [
    (Linears(5, 2, 3), (torch.randn(4, 5),), "too large beside it"),
    (Chain(), (torch.randn(2, 3), torch.randn(3, 90)), "depends on another"),
    (Noisy(), (torch.randn(2, 3), torch.randn(3, 90)), "depends on another"),
])
def test_skips(model: nn.Module, inputs: Any, reason: str, run: Any) -> None:
    outcome = run(model, inputs, [FuseProjections()])
    assert outcome.applied == []
    assert reason in outcome.skips[0].reason


@settings(max_examples=8, deadline=None)
@given(lead=st.lists(st.sampled_from([1, 2, 3]), max_size=2), sizes=st.tuples(
    *[st.sampled_from([1, 2, 3, 7])] * 3), bias=st.booleans())
def test_same_values_and_gradients(
    lead: list[int], sizes: tuple[int, int, int], bias: bool
) -> None:
    fast = looplift.apply_passes(Linears(*sizes, bias=bias), (torch.randn(*lead, 67, sizes[0]),),
                                 measure=False, passes=[FuseProjections()])
    reasons = [d["reason"] for d in fast.report.to_dict()["declined"]]
    assert not [r for r in reasons if "too large" not in r], reasons


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_same_values_of_products(lead: tuple[int, ...], equal: Any) -> None:
    fast = equal(Mixing(), (torch.randn(*lead, 2, 3), torch.randn(*lead, 5, 3),
                            torch.randn(*lead, 3, 71)), passes=[FuseProjections()])
    assert fast.report.to_dict()["rewrites"]


def test_keeps_the_contract(keeps_contract: Any) -> None:
    keeps_contract(Linears(5, 2, 3), (torch.randn(67, 5),))


def test_idempotent(run: Any) -> None:
    twice = run(Linears(5, 2, 3), (torch.randn(99, 5),), [FuseProjections(), FuseProjections()])
    assert len(twice.applied) == 1
