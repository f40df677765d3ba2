"""fuse-attention, approximate-gelu and lower-scans: fire, skip, stay equal."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import looplift
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looplift.models import eigenstate
from looplift.optimizer.facts import aten, is_op
from looplift.optimizer.loop import plain_loop
from looplift.passes.approximate_gelu import ApproximateGelu
from looplift.passes.fuse_attention import FuseAttention
from looplift.passes.fuse_multiply_add import FuseMultiplyAdd
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v with `change` applied to the scores."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda scores: scores) -> None:
        super().__init__()
        self.change = change

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.change(q @ k.mT / q.shape[-1] ** 0.5)
        return torch.softmax(scores, -1) @ v


def causal(scores: Tensor) -> Tensor:
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
    return scores.masked_fill(ones.triu(1), -inf)


def biased(scores: Tensor) -> Tensor:
    return scores + torch.linspace(0, 1, scores.shape[-1])


def triple(*shape: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for _ in range(3))


@pytest.mark.parametrize("change", [lambda s: s, causal, biased])
def test_attention_fires(change: Callable[[Tensor], Tensor], run: Any) -> None:
    outcome = run(Attention(change), triple(2, 3, 5, 4), [FuseAttention()])
    assert len(outcome.applied) == 1
    assert not any(is_op(n, aten.softmax.int) for n in outcome.graph_module.graph.nodes)


class LooksAtWeights(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ v, weights


class LearnsItsScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * self.scale, -1) @ v


@pytest.mark.parametrize(("model", "reason"), [
    (LooksAtWeights(), "used elsewhere"), (LearnsItsScale(), "the scale is a tensor"),
    (Attention(torch.relu), "no product of two matrices"),
])
def test_attention_skips(model: nn.Module, reason: str, run: Any) -> None:
    outcome = run(model, triple(2, 3, 5, 4), [FuseAttention()])
    assert outcome.applied == []
    assert reason in outcome.skips[0].reason


@pytest.mark.parametrize("change", [lambda s: s, biased])
@settings(max_examples=6, deadline=None)
@given(lead=st.lists(st.sampled_from([1, 2, 3]), max_size=3), rows=st.sampled_from([1, 2, 3, 7]))
def test_attention_same_values(
    change: Callable[[Tensor], Tensor], lead: list[int], rows: int
) -> None:
    fast = looplift.apply_passes(Attention(change), triple(*lead, rows, 3), measure=False)
    reasons = [d["reason"] for d in fast.report.to_dict()["declined"]]
    assert not [r for r in reasons if "differs in the" in r or "could not" in r], reasons


class Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x) + functional.gelu(x, approximate="tanh")


def test_gelu_only_when_allowed(run: Any) -> None:
    refused = run(Gelu(), (torch.randn(5),), [ApproximateGelu()])
    assert refused.applied == []
    assert refused.skips[0].reason == "gelu → tanh gelu: approximations are not allowed"
    allowed = run(Gelu(), (torch.randn(5),), [ApproximateGelu()], allow_approximate=True)
    assert len(allowed.applied) == 1


def test_gelu_reports_its_error() -> None:
    x = torch.linspace(-4, 4, 101)
    fast = looplift.apply_passes(Gelu(), (x,), measure=False, allow_approximate=True,
                                 mode="inference")
    verdict = fast.report.to_dict()["modes"][0]["verdict"]
    assert verdict["grade"] == "approximate"
    assert 1e-6 < verdict["worst"] < 1e-3


def test_scans_become_loops(run: Any, golden: Any) -> None:
    outcome = run(eigenstate.model("tiny"), eigenstate.example_inputs("tiny"))
    loops = [n for n in outcome.graph_module.graph.nodes if is_op(n, plain_loop)]
    assert len(loops) == 2
    linears = [n for n in outcome.graph_module.graph.nodes if is_op(n, aten.linear.default)]
    assert len(linears) == 8  # per layer: input and output projection, and the FFN's two
    golden("eigenstate", outcome)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 32])
def test_projections_run_once_whatever_the_length(length: int, run: Any) -> None:
    inputs = eigenstate.example_inputs("tiny", length=length)
    outcome = run(eigenstate.model("tiny"), inputs)
    linears = [n for n in outcome.graph_module.graph.nodes if is_op(n, aten.linear.default)]
    assert len(linears) == 8 or length == 2  # two trips are no evidence of a loop


class Sums(nn.Module):
    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x + a * b - b * x


class SharedProduct(nn.Module):
    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        product = a * b
        return x + product, product


def test_multiply_add_fires(run: Any, golden: Any) -> None:
    outcome = run(Sums(), triple(3, 4), [FuseMultiplyAdd()])
    assert [a.summary for a in outcome.applied] == ["x + a·b → addcmul", "x - a·b → addcmul"]
    golden("fuse_multiply_add", outcome)


def test_multiply_add_skips(run: Any) -> None:
    outcome = run(SharedProduct(), triple(3, 4), [FuseMultiplyAdd()])
    assert outcome.applied == []
    assert outcome.skips[0].reason == "the product in a sum is read elsewhere too"
    whole = tuple(torch.arange(3) for _ in range(3))
    assert run(Sums(), whole, [FuseMultiplyAdd()]).applied == []


@settings(max_examples=6, deadline=None)
@given(shapes=st.lists(st.sampled_from([(), (1,), (3,), (2, 1), (2, 3), (0,)]), min_size=3,
                       max_size=3), dtype=st.sampled_from([torch.float32, torch.complex64]))
def test_multiply_add_same_values(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    if (0,) in shapes and ((3,) in shapes or (2, 3) in shapes):
        return
    inputs = tuple(torch.randn(shape, dtype=dtype) for shape in shapes)
    fast = looplift.apply_passes(Sums(), inputs, measure=False)
    reasons = [d["reason"] for d in fast.report.to_dict()["declined"]]
    assert not [r for r in reasons if "differs in the" in r or "could not" in r], reasons


def test_multiply_add_keeps_the_contract(keeps_contract: Any) -> None:
    keeps_contract(Sums(), triple(3, 4))
