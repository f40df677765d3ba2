"""Loops that carry nothing become batched operations on windows."""

from __future__ import annotations

from typing import Any

import looplift
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looplift.models import alternating_patches, vision_transformer
from looplift.optimizer.facts import aten, is_op, is_scan
from torch import Tensor, nn
from torch.nn import functional


class Patches(nn.Module):
    """Patches of an image, cut by a double loop, embedded one by one."""

    def __init__(self, size: int = 2, dim: int = 5, gap: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size, self.stride = size, size + gap
        self.embed = nn.Linear(3 * size * size, dim)

    def forward(self, image: Tensor) -> Tensor:
        p, tokens = self.size, []
        for i in range(0, image.shape[2] - p + 1, self.stride):
            for j in range(0, image.shape[3] - p + 1, self.stride):
                tokens.append(self.embed(image[:, :, i : i + p, j : j + p].flatten(1)))
        return torch.stack(tokens, 1)


class Heads(nn.Module):
    """Attention, one head after another."""

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for h in range(4):
            part = x[..., h * 3 : h * 3 + 3]
            heads.append(torch.softmax(part @ part.mT / 3**0.5, -1) @ part)
        return torch.cat(heads, -1)


class SlidingConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        windows = [functional.conv1d(x[..., t : t + 5], self.weight).squeeze(-1)
                   for t in range(0, x.shape[-1] - 4, 2)]
        return torch.stack(windows, -1)


class WritesRowsAndColumns(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        out = image.new_zeros(image.shape[0], 4, 3)
        for i in range(4):
            for j in range(3):
                out[:, i, j] = image[:, :, 2 * i : 2 * i + 2, j : j + 2].sum((1, 2, 3)).exp()
        return out


class Sorted(nn.Module):
    """An operation with two results, one of them integers, and no family rule."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = [torch.sort(x[:, t], dim=-1) for t in range(x.shape[1])]
        return torch.stack([f.values for f in found], 1), torch.stack([f.indices for f in found], 1)


def scans(graph_module: Any) -> int:
    return sum(is_scan(n) or "loop" in n.name for n in graph_module.graph.nodes)


def count(graph_module: Any, target: Any) -> int:
    return sum(is_op(n, target) for n in graph_module.graph.nodes)


def test_fires(run: Any, golden: Any) -> None:
    outcome = run(Patches(), (torch.randn(2, 3, 6, 8),))
    assert "12 × (linear) → 1" in [a.summary for a in outcome.applied]
    assert count(outcome.graph_module, aten.linear.default) == 1
    golden("vectorize_patches", outcome)


def test_the_vision_transformer_embeds_its_patches_in_one_operation(run: Any, golden: Any) -> None:
    model = vision_transformer.model("tiny")
    outcome = run(model, vision_transformer.example_inputs("tiny"))
    weight = next(n for n in outcome.graph_module.graph.nodes
                  if n.name == "embedding_project_weight")
    assert len(weight.users) == 1
    golden("vision_transformer", outcome)


@pytest.mark.parametrize("length", [36, 48, 60])
def test_alternating_patches_run_each_linear_once(length: int, run: Any) -> None:
    model = alternating_patches.model("tiny")
    inputs = alternating_patches.example_inputs("tiny", length=length)
    outcome = run(model, inputs)
    weights = [n for n in outcome.graph_module.graph.nodes
               if n.op == "placeholder" and "weight" in n.name]
    assert len(weights) >= 6
    assert all(len(w.users) == 1 for w in weights)
    assert scans(outcome.graph_module) == 0


def test_alternating_patches_with_a_rest(run: Any, golden: Any) -> None:
    outcome = run(alternating_patches.model("tiny"), alternating_patches.example_inputs("tiny"))
    golden("alternating_patches", outcome)


class Alternating(nn.Module):
    """Two kinds of windows in turn, widened; the last window may be short or stand alone."""

    def __init__(self, narrow: int = 2, wide: int = 3) -> None:
        super().__init__()
        self.sizes = (wide, narrow)
        self.embed = nn.ModuleList([nn.Linear(wide, 16), nn.Linear(narrow, 16)])

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        at = 0
        while at < x.shape[1]:
            kind = len(found) % 2
            window = x[:, at : at + self.sizes[kind]]
            at += self.sizes[kind]
            window = functional.pad(window, (0, max(0, at - x.shape[1])))
            found.append(torch.tanh(self.embed[kind](window)))
        return torch.stack(found, 1)


@pytest.mark.parametrize("length", [20, 21, 22, 23, 24, 25])
def test_an_incomplete_last_trip_is_absorbed(length: int, run: Any, equal: Any) -> None:
    model, inputs = Alternating(), (torch.randn(2, length),)
    outcome = run(model, inputs)
    assert count(outcome.graph_module, aten.linear.default) == 2
    assert scans(outcome.graph_module) == 0
    assert any("the rest joins" in a.summary for a in outcome.applied) == (length % 5 != 0)
    equal(model, inputs)


def test_a_last_trip_is_absorbed_that_two_stacks_show(run: Any, equal: Any) -> None:
    class Both(Alternating):
        def forward(self, x: Tensor) -> Any:
            sines, squares = [], []
            for at in range(0, x.shape[1], 3):
                window = x[:, at : at + 3]
                window = functional.pad(window, (0, 3 - window.shape[1]))
                found = torch.tanh(self.embed[0](window))
                sines.append(found.sin())
                squares.append(found * found)
            return torch.stack(sines, 1), torch.stack(squares, 1)

    model, inputs = Both(), (torch.randn(2, 23),)
    outcome = run(model, inputs)
    assert not [s.reason for s in outcome.skips if "could not be built" in s.reason]
    assert scans(outcome.graph_module) == 0
    equal(model, inputs)


def test_a_rest_that_is_something_else_is_not_absorbed(equal: Any) -> None:
    class Otherwise(Alternating):
        def forward(self, x: Tensor) -> Tensor:
            whole = super().forward(x[:, :20])
            return torch.cat([whole, torch.tanh(self.embed[0](x[:, 20:23] * 2)).unsqueeze(1),
                              torch.tanh(self.embed[0](x[:, 22:25])).unsqueeze(1)], 1)

    equal(Otherwise(), (torch.randn(2, 25),))


@pytest.mark.parametrize(("model", "inputs"), [
    (Heads(), (2, 7, 12)), (SlidingConvolution(), (2, 3, 19)), (Sorted(), (2, 5, 7)),
    (WritesRowsAndColumns(), (2, 3, 8, 4)), (Patches(2, 5, 1), (2, 3, 9, 9)),
])
def test_leaves_no_loop(model: nn.Module, inputs: tuple[int, ...], run: Any) -> None:
    outcome = run(model, (torch.randn(inputs),))
    assert scans(outcome.graph_module) == 0
    assert outcome.applied


@pytest.mark.parametrize(("model", "rank"), [
    (Patches(), 4), (Patches(2, 3, 1), 4), (Patches(3, 3), 4), (Heads(), 3),
    (SlidingConvolution(), 3), (Sorted(), 3),
])
@settings(max_examples=5, deadline=None)
@given(batch=st.sampled_from([0, 1, 2, 3]), one=st.sampled_from([6, 7, 9]),
       two=st.sampled_from([6, 8, 11]))
def test_same_values_and_gradients(
    model: nn.Module, rank: int, batch: int, one: int, two: int
) -> None:
    sizes = {"Heads": (batch, one, 12)}.get(type(model).__name__, (batch, 3, one, two)[:rank])
    fast = looplift.apply_passes(model, (torch.randn(sizes),), measure=False)
    reasons = [d["reason"] for d in fast.report.to_dict()["declined"]]
    assert not [r for r in reasons if "differs" in r or "could not" in r], reasons


def test_keeps_the_contract(keeps_contract: Any) -> None:
    keeps_contract(Patches(), (torch.randn(2, 3, 6, 8),))
    keeps_contract(Heads(), (torch.randn(2, 7, 12),))
    keeps_contract(WritesRowsAndColumns(), (torch.randn(2, 3, 8, 4),))


class Frequencies(nn.Module):
    """A lookup whose gradient depends on how often one call sees a row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, scale_grad_by_freq=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.table(x[:, t]).sum(1) for t in range(x.shape[1])], 1)


def test_lookups_that_count_frequencies_stay_apart(equal: Any) -> None:
    fast = equal(Frequencies(), (torch.randint(0, 5, (3, 6, 4)),))
    assert "for " in fast.code
