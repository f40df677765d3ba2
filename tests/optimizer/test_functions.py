"""Autograd functions of a model: kept with their own backward, in loops and in kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import looplift
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

Apply = Callable[..., Any]


class Spike(torch.autograd.Function):
    """One above zero, with the gradient of an arc tangent (Fang et al., 2021)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.width = width
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * ctx.width / (1 + (ctx.width * x) ** 2), None


class Fast(torch.autograd.Function):
    """One above zero, with the gradient of SuperSpike (Zenke and Ganguli, 2018); its numbers are
    tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.gt(x, torch.as_tensor(0.0)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] / (torch.as_tensor(3.0) * x.abs() + torch.ones(1)).square()


class Table(Fast):
    """The same for all elements but the first."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0])


class Unit(torch.autograd.Function):
    """The identity, whose gradient is one of length one: no element of it is alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] / gradients[0].norm()


class Parts(torch.autograd.Function):
    """Sine and cosine, by `setup_context`."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(x), torch.cos(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        sine, cosine = ctx.saved_tensors
        return gradients[0] * cosine - gradients[1] * sine


class Noisy(torch.autograd.Function):
    """Dropout whose backward knows what was dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = (torch.rand_like(x) > 0.5).to(x.dtype)
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        return gradients[0] * kept


class Writes(torch.autograd.Function):
    """Doubles its argument in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * 2


def apply(kind: Any, *args: Any) -> Any:
    return kind.apply(*args)


class Loop(nn.Module):
    """A leaky state of 34 steps, through `function` in each."""

    def __init__(self, function: Apply) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = 0.9 * state + self.linear(x[:, t])
            out = self.function(state)
            state = state - out
            outputs.append(out)
        return torch.stack(outputs, 1)


def equal(function: Apply) -> Any:
    """The optimized loop, after values and gradients were compared."""
    model, x = Loop(function), torch.randn(2, 34, 6)
    fast = looplift.apply_passes(model, (x,), measure=False)
    assert fast.graph_module is not None, str(fast.report)
    results = []
    for run in (model, fast):
        given = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = run(given)
        results.append((y, torch.autograd.grad(y.sin().sum(), [given, *model.parameters()])))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    return fast


def test_spikes_with_a_gradient_of_their_own_are_one_kernel() -> None:
    fast = equal(lambda x: apply(Spike, x - 0.3, 2.0))
    assert "fused_scan" in fast.code
    assert "looplift_functions" in fast.code


def test_a_backward_with_numbers_that_are_tensors_is_in_the_kernel_too() -> None:
    assert "fused_scan" in equal(lambda x: apply(Fast, x - 0.3)).code
    told = str(equal(lambda x: apply(Table, x - 0.3)).report)
    assert "its backward reads a constant tensor" in " ".join(told.split())


def test_a_backward_that_mixes_its_elements_is_in_the_kernel_too() -> None:
    fast = equal(lambda x: apply(Unit, x) * 0.5)
    assert "fused_scan" in fast.code


def test_several_results() -> None:
    equal(lambda x: sum(apply(Parts, x)) * 0.3)


def test_random_numbers_are_drawn_in_their_order() -> None:
    equal(lambda x: apply(Noisy, x) * 0.5)


def test_element_by_element_functions_are_batched() -> None:
    class Outside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([apply(Spike, x[:, t] * 2, 3.0) for t in range(x.shape[1])], 1)

    model, x = Outside(), torch.randn(2, 9, 6, requires_grad=True)
    fast = looplift.apply_passes(model, (x,), measure=False)
    assert fast.code.count("looplift_functions") == 1
    assert "in zip(" not in fast.code
    one, other = (torch.autograd.grad(run(x).sum(), x)[0] for run in (model, fast))
    assert_close(other, one)


@pytest.mark.parametrize(("function", "reason"), [
    (lambda x: apply(Writes, x.clone()), "it writes to its arguments"),
    (lambda x: apply(Spike, x, [1.0]), "it takes an argument of type list"),
])
def test_what_can_be_no_operator(function: Apply, reason: str) -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = function(x)
            return made

    model = Takes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spike, "forward", staticmethod(lambda ctx, x, width: x * 1.0))
        fast = looplift.apply_passes(model, (torch.randn(3),), measure=False)
    assert reason in str(fast.report.signatures[0].failure)
