"""store-carries: what fires, where there is nothing to store, and that gradients stay the same."""

from __future__ import annotations

from typing import Any
from unittest import mock

import looplift
import pytest
import torch
from looplift.optimizer import fused, walk
from looplift.optimizer.backward import backward_of
from torch import Tensor, nn
from torch.testing import assert_close

STEPS = 20


class Cells(nn.Module):
    """LSTM cells; `shows` says which of their states the model returns of every step."""

    def __init__(self, shows: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.shows = nn.LSTMCell(3, 4), shows

    def forward(self, x: Tensor) -> list[Tensor]:
        h = c = x.new_zeros(x.shape[0], 4)
        outputs: dict[str, list[Tensor]] = {"h": [], "c": []}
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            outputs["h"].append(h)
            outputs["c"].append(c)
        return [torch.stack(outputs[name], 1) for name in self.shows] or [h.sin() + c]


def stored(fast: looplift.OptimizedModule) -> list[str]:
    return [r["summary"] for r in fast.report.to_dict()["rewrites"]
            if r["pass_name"] == "store-carries"]


def gradients(run: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the results, and of how large these gradients are."""
    wanted = [x, *run.parameters()]
    first = torch.autograd.grad([o.sin().sum() for o in run(x)], wanted, create_graph=True)
    return [*first, *torch.autograd.grad([g.square().sum() for g in first], wanted)]


@pytest.mark.parametrize(("shows", "summary"), [
    ("", "2 of 2 carries are stored for the backward"),
    ("h", "1 of 2 carries are stored for the backward"),
    ("c", "1 of 2 carries are stored for the backward")])
@pytest.mark.parametrize("kernels", [True, False])
def test_gradients_and_theirs_are_the_same(shows: str, summary: str, kernels: bool) -> None:
    model, x = Cells(shows).double(), torch.randn(2, STEPS, 3, dtype=torch.float64)
    fast = looplift.apply_passes(model, (x,), mode="training", measure=False)
    assert stored(fast) == [summary]
    x.requires_grad_()
    with mock.patch.object(fused, "KINDS", fused.KINDS if kernels else ()), \
            mock.patch.object(walk, "CHUNK", 1), mock.patch.object(walk, "LEAST", 7):
        assert_close(gradients(fast, x), gradients(model, x))


def test_nothing_is_computed_again(equal: Any) -> None:
    """Neither a walk for the carries, nor gradients of what only the backward reads."""
    fast, x = equal(Cells(""), (torch.randn(2, STEPS, 3),), mode="training"), \
        torch.randn(2, STEPS, 3, requires_grad=True)
    walk._course.cache_clear()
    with mock.patch.object(walk, "_with_history") as again, \
            mock.patch.object(walk, "backward_of", wraps=backward_of) as made:
        sum(o.sum() for o in fast(x)).backward()
    again.assert_not_called()
    made.assert_called_once()
    assert made.call_args.args[-2:] == ({0, 1}, ())
    assert not [name for name in backward_of(*made.call_args.args).slices if "grad" in name]


@pytest.mark.parametrize(("shows", "mode"), [("hc", "training"), ("", "inference")])
def test_where_there_is_nothing_to_store(shows: str, mode: str, equal: Any) -> None:
    fast = equal(Cells(shows), (torch.randn(2, STEPS, 3),), mode=mode)
    assert "fused_scan" in fast.code
    assert not stored(fast)


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = 0.5 * h + x[:, t] * torch.maximum(h, x[:, t])
        return h


def test_skips_steps_that_cost_less_than_memory(equal: Any) -> None:
    fast = equal(Sums(), (torch.randn(2, STEPS, 3),), mode="training")
    assert "fused_scan" in fast.code
    [reason] = [d["reason"] for d in fast.report.to_dict()["declined"]
                if d["pass_name"] == "store-carries"]
    assert reason == "4 operations for each number that is carried: computing them again costs " \
        "less than storing them"


class Turned(nn.Module):
    """Steps that turn, sort out and pad what they carry."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(x.shape[1]):
            apart = torch.stack([h[:, ::2], h[:, 1::2]], -1).flatten(1)
            padded = nn.functional.pad(h[:, :-1], (1, 0), value=-3.0)
            h = torch.tanh(h @ self.weight + apart + h.flip(-1) - padded + x[:, t])
        return h


def test_steps_of_views_and_several_results(equal: Any) -> None:
    """The first kernel of a step was made under the verifier's mode, which copies views: it read
    every first number where it was to read every second."""
    fast = equal(Turned(), (torch.randn(2, STEPS, 4),), mode="training")
    assert stored(fast) == ["1 of 1 carries are stored for the backward"]


def test_it_can_be_left_out(equal: Any) -> None:
    passes = [p for p in looplift.passes.ORDER if p.name != "store-carries"]
    fast = equal(Cells(""), (torch.randn(2, STEPS, 3),), mode="training", passes=passes)
    assert "fused_scan" in fast.code
    assert not stored(fast)
