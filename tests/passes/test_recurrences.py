"""Recurrent models from the literature: one kernel each, with the loop's values and gradients."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import looplift
import pytest
import torch
from looplift.optimizer import fused
from looplift.tests.peers import AsScan
from looplift.tests.recurrences import (
    MODELS,
    WIDTH,
    Evolution,
    EvolutionAtOnce,
    EvolutionByHand,
    Gru,
    GruByHand,
)
from torch import nn
from torch.testing import assert_close


@pytest.mark.parametrize("name", MODELS)
def test_one_kernel(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(2, 34, WIDTH)
    fast = looplift.apply_passes(model, (x,), measure=False)
    assert not [d for d in fast.report.to_dict()["declined"] if "differs" in d["reason"]]
    assert "fused_scan" in fast.code
    assert "in zip(" not in fast.code  # no loop is left
    results = []
    for run in (model, fast):
        given = x.clone().requires_grad_()
        y = run(given)
        total = sum(part.sin().sum() for part in (y if isinstance(y, tuple) else (y,)))
        results.append((y, torch.autograd.grad(total, [given, *model.parameters()])))
    assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def test_states_that_begin_equal_make_the_first_step_no_other() -> None:
    """`real * cosine` and `imaginary * cosine` are one value there, if equal ones are merged."""
    fast = looplift.apply_passes(Evolution(), (torch.randn(2, 34, WIDTH),), measure=False,
                                 mode="inference")
    assert "scan of 34 steps" in str(fast.report)
    assert "torch.cat" not in fast.code


def test_what_no_step_reads_is_computed_but_has_no_gradient() -> None:
    """The last update of mean and variance: NaN in the last step's input would be NaN in that
    input's gradient."""
    model, x = MODELS["running statistics"](), torch.randn(2, 34, WIDTH)
    x[0, -1, 0] = torch.nan
    fast = looplift.apply_passes(model, (x.nan_to_num(),), measure=False)
    gradients: list[torch.Tensor] = []
    for run in (model, fast):
        given = x.clone().requires_grad_()
        gradients += torch.autograd.grad(run(given).sum(), given)
    assert gradients[0].isnan().sum() < 34
    assert torch.equal(gradients[1].isnan(), gradients[0].isnan())
    for mode in ("inference", "training"):  # a kernel's backward leaves the update out
        fast = looplift.apply_passes(model, (x,), measure=False, mode=mode)
        assert "scan of 34 steps" in str(fast.report)
        assert "torch.cat" not in fast.code


class Shown(nn.Module):
    """Shows two states as they are before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, k, hs, ks = torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0]), [], []
        for t in range(x.shape[1]):
            hs.append(h)
            ks.append(k)
            h, k = torch.tanh(self.inside(h) + torch.sqrt(x[:, t])), 0.9 * k + h
        return torch.stack(hs, 1), torch.stack(ks[::-1])


@pytest.mark.parametrize("number", [0.0, torch.nan])
def test_bare_states_before_each_step_are_what_the_scan_shows(number: float) -> None:
    model, x = Shown(), torch.rand(2, 34, WIDTH)
    fast = looplift.apply_passes(model, (x,), measure=False)
    assert "fused_scan" in fast.code
    inference = looplift.apply_passes(model, (x,), measure=False, mode="inference")
    assert "torch.cat" not in inference.code
    x[0, -1, 0] = number
    found = []
    for run in (model, fast):
        given = x.clone().requires_grad_()
        hs, ks = run(given)
        found.append((hs, ks, torch.autograd.grad(hs.sin().sum() + ks.sin().sum(), given)))
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-4, equal_nan=True)


class LastUpdate(nn.Module):
    """Shows its state before the update, whose gradient is infinite where an input is zero."""

    def __init__(self, update: str) -> None:
        super().__init__()
        self.update = compile(update, "update", "eval")
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, k, outputs = torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0]), []
        for t in range(x.shape[1]):
            outputs.append(h + k)
            h, k = eval(self.update, {"torch": torch}, {"h": h, "k": k, "x": x[:, t], "m": self})
        return torch.stack(outputs, 1)


@pytest.mark.parametrize(("update", "compiler", "kept"), [
    ("(torch.tanh(h + torch.sqrt(x)), k * 0.5)", True, True),  # in the kernel
    ("(torch.tanh(h + m.inside(torch.sqrt(x))), k * 0.5)", True, False),  # batched, before it
    ("(torch.tanh(h + x), torch.sqrt(x))", True, False),  # a state that is the last step's input
    ("(torch.tanh(h + k), torch.tanh(k + torch.sqrt(x)))", True, True),  # not seen for two steps
    ("(h + torch.sqrt(x), k)", True, True),
    ("(h + torch.sqrt(x), k)", False, False),  # one cumulative sum
    ("(torch.tanh(h + torch.sqrt(x)), k)", False, False),  # a loop
])
def test_last_updates_have_no_gradient_wherever_they_run(
    update: str, compiler: bool, kept: bool
) -> None:
    model, x = LastUpdate(update), torch.rand(2, 34, WIDTH)
    with nullcontext() if compiler else mock.patch.object(fused, "compiled", return_value=None):
        fast = looplift.apply_passes(model, (x,), measure=False, mode="training")
    x[0, -1, 0] = x[1, -2, 1] = 0.0
    found = []
    for run in (model, fast):
        given = x.clone().requires_grad_()
        grads = torch.autograd.grad(run(given).sin().sum(), [given, *model.parameters()],
                                    allow_unused=True)
        found.append([g for g in grads if g is not None])
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-4, equal_nan=True)
    assert fast.report.to_dict()["rewrites"]
    assert ("torch.cat" not in fast.code) is kept


def test_what_the_steps_compute_is_never_in_memory() -> None:
    """Mamba's `exp(dt·A)` of all steps is sixteen times as large as its inputs."""
    model, x = MODELS["Mamba"](), torch.randn(2, 34, WIDTH)
    fast = looplift.apply_passes(model, (x,), measure=False, mode="inference")
    assert fast.graph_module is not None
    made = [n.meta["val"] for n in fast.graph_module.graph.nodes if "val" in n.meta]
    assert max(t.numel() for t in made if isinstance(t, torch.Tensor)) == x.numel()


@pytest.mark.parametrize("pair", [
    (Gru, GruByHand), (Evolution, EvolutionByHand), (Evolution, EvolutionAtOnce)])
def test_the_hand_form_is_the_loop(pair: tuple[type[nn.Module], type[nn.Module]]) -> None:
    torch.manual_seed(0)
    (loop, hand), x = (form() for form in pair), torch.randn(2, 9, WIDTH)
    hand.load_state_dict(loop.state_dict())
    assert_close(hand(x), loop(x))


@pytest.mark.parametrize("form", [Gru, Evolution])
def test_the_scan_of_the_benchmark_is_the_loop(form: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = form(), torch.randn(2, 24, WIDTH)
    assert_close(AsScan(model, (x,))(x), model(x))


class ReadsThroughViews(nn.Module):
    """A selective state space as transformers' Mamba has it: what the steps read is a part of one
    projection, turned twice on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x = nn.Linear(WIDTH, WIDTH + 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.of_x(x).transpose(1, 2)
        rate, c = made[:, :WIDTH], made[:, WIDTH:].transpose(1, 2)
        state, outputs = x.new_zeros(x.shape[0], WIDTH, 8), []
        for t in range(x.shape[1]):
            state = torch.sigmoid(rate[:, :, t, None]) * state + x[:, t, :, None]
            outputs.append((state @ c[:, t, :].unsqueeze(-1))[:, :, 0])
        return torch.stack(outputs, 1)


def test_steps_that_read_through_views_that_all_share() -> None:
    fast = looplift.apply_passes(ReadsThroughViews(), (torch.randn(2, 34, WIDTH),), measure=False)
    assert "scan of 34 steps" in str(fast.report)
