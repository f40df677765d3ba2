"""Writes that autograd does not see, and reads without a gradient, keep the model's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import looplift
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

X = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(1))
REASON = "forward writes to a tensor that has a gradient"


class Model(nn.Module):
    """A loop whose states are changed by `change(model, h)`, with a buffer for it to use."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.change = nn.Parameter(torch.randn(4, 4) / 2), change
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] + 0.5 * h) @ self.weight
            outputs.append(self.change(self, h))
        return torch.stack(outputs, 1)


def zeroed(model: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        h[:, 0] = 0.0
    return h


@torch.no_grad()
def scaled_without_gradient(model: Any, h: Tensor) -> Tensor:
    return h.mul_(0.5)


def clamped(model: Any, h: Tensor) -> Tensor:
    h.data.clamp_(-0.5, 0.5)
    return h


def part_of_a_detached_one(model: Any, h: Tensor) -> Tensor:
    h.detach()[:, 1:3].neg_()
    return h


def straight_through(model: Any, h: Tensor) -> Tensor:
    return h + (torch.sign(h) - h).data


def averaged(model: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        model.mean.mul_(0.9).add_(h.mean(0))
    return torch.sub(h, model.mean)


def masked(model: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.zeros_like(h)
        mask[:, 1:] = 1.0
        mask.mul_(h.sigmoid())
    return h * mask


UNSEEN = [zeroed, scaled_without_gradient, clamped, part_of_a_detached_one]
HARMLESS = [straight_through, averaged, masked]


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    x = X.clone().requires_grad_()
    result = (model if run is None else run)(x)
    return [result, *torch.autograd.grad(result.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("change", [*UNSEEN, *HARMLESS])
def test_gradients_are_the_models(change: Any) -> None:
    want = gradients(Model(change))
    fast = looplift.apply_passes(Model(change), (X,), measure=False, verify=False)
    assert_close(gradients(fast.original, fast), want)
    (training,) = [m for m in fast.report.signatures[0].modes if m.mode == "training"]
    assert any(d.reason.startswith(REASON) for d in training.declined) == (change in UNSEEN)
    assert bool(training.rewrites) == (change in HARMLESS)


@pytest.mark.parametrize("change", [*UNSEEN, *HARMLESS])
def test_gradients_are_the_models_under_torch_compile(change: Any) -> None:
    torch._dynamo.reset()
    want, model = gradients(Model(change)), Model(change)
    run = torch.compile(model, backend="looplift", options={"inner_backend": "aot_eager"})
    assert_close(gradients(model, run), want)


def test_the_line_of_the_write_is_told_and_inference_is_rewritten() -> None:
    fast = looplift.apply_passes(Model(zeroed), (X,), measure=False)
    inference, training = fast.report.signatures[0].modes
    assert inference.rewrites
    (told,) = [d.where for d in training.declined if d.reason.startswith(REASON)]
    file, number = told.split(":")
    assert file == "test_untracked.py"
    with open(__file__) as source:
        assert source.readlines()[int(number) - 1].strip() == "h[:, 0] = 0.0"
