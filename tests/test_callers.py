"""What callers do with an optimized module beyond calling it, and what they hand to it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from looplift import apply_passes
from looplift.optimizer.module import OptimizedModule
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

jacobian: Any = torch.autograd.functional.jacobian


class Gated(nn.Module):
    """A loop that is one kernel and nothing after it: (B, T, 5) to (B, T, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.kept = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x.new_zeros(x.shape[0], 5), []
        for t in range(x.shape[1]):
            h = torch.sigmoid(self.read(x[:, t]) + self.kept(h)) * h + torch.tanh(x[:, t])
            outputs.append(h)
        return torch.stack(outputs, 1)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, OptimizedModule]:
    torch.manual_seed(0)
    model = Gated()
    fast = apply_passes(model, (torch.randn(3, 30, 5),), measure=False)
    for mode in fast.report.signatures[0].modes:
        assert "fuse-recurrences" in [r.pass_name for r in mode.rewrites]
    return model, fast


def given() -> Tensor:
    return torch.randn(3, 30, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()


def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
    x = given()
    (run(x) ** 2).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return x.grad


def overwritten(y: Tensor) -> Tensor:
    y[:, 0] = 0.0
    return y


USES: dict[str, Callable[[nn.Module], Any]] = {
    "a checkpoint": lambda m: gradient(lambda x: checkpoint(m, x, use_reentrant=False)),
    "a reentrant checkpoint": lambda m: gradient(lambda x: checkpoint(m, x, use_reentrant=True)),
    "a sum in place": lambda m: gradient(lambda x: m(x).mul_(2).add_(1)),
    "a write to a part": lambda m: gradient(lambda x: overwritten(m(x))),
    "relu in place": lambda m: gradient(lambda x: nn.ReLU(inplace=True)(m(x))),
    "torch.func.grad": lambda m: torch.func.grad(lambda x: m(x).sum())(given().detach()),
    "torch.func.jvp": lambda m: torch.func.jvp(
        m, (given().detach(),), (torch.ones(3, 30, 5),)),
    "torch.func.vmap": lambda m: torch.func.vmap(m)(given().detach().expand(2, 3, 30, 5)),
    "gradients per sample": lambda m: torch.func.vmap(torch.func.grad(
        lambda x: m(x[None]).sum()))(given().detach()),
    "batched gradients": lambda m: torch.autograd.grad(
        m(x := given())[:, -1].sum(0), x, torch.eye(5), is_grads_batched=True)[0],
    "a vectorized Jacobian": lambda m: jacobian(
        lambda x: m(x).sum((0, 1)), given().detach(), vectorize=True),
    "a gradient of a gradient": lambda m: gradient(lambda x: torch.autograd.grad(
        (m(x) ** 2).sum(), x, create_graph=True)[0]),
}


@pytest.mark.parametrize("use", USES)
def test_used_as_the_model_is(use: str, pair: tuple[nn.Module, OptimizedModule]) -> None:
    model, fast = pair
    before = len(fast.report.signatures)
    assert_close(USES[use](fast), USES[use](model), rtol=1e-4, atol=1e-5)
    assert len(fast.report.signatures) == before or use == "gradients per sample"


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(h * y[:, t] + x[:, t])
        return h


@pytest.mark.parametrize("use", [
    lambda m, x, y: torch.func.vmap(m)(torch.stack([x, y]), torch.stack([y, y])),
    lambda m, x, y: torch.func.jvp(m, (x, y), (y, x)),
    lambda m, x, y: torch.func.grad(lambda x: m(x, y).sum())(x),
    lambda m, x, y: torch.func.jacrev(lambda x: m(x, y).sum(0))(x),
])
def test_transforms_of_two_arguments(use: Callable[..., Any]) -> None:
    fast = apply_passes(model := Two(), (x := given().detach(), y := x.cos()), measure=False)
    assert "fused_scan" in fast.code
    assert_close(use(fast, x, y), use(model, x, y), rtol=1e-4, atol=1e-5)


def test_a_first_call_in_a_checkpoint_and_with_hooks() -> None:
    fast = apply_passes(model := Two(), measure=False)
    assert_close(gradient(lambda x: checkpoint(fast, x, x.cos(), use_reentrant=False)),
                 gradient(lambda x: model(x, x.cos())), rtol=1e-4, atol=1e-5)
    saved = mock.Mock(side_effect=lambda tensor: tensor)
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda tensor: tensor, lambda tensor: tensor), hooks(saved, lambda tensor: tensor):
        first = apply_passes(model, measure=False)
        first(x := given(), x.cos())
        optimized = saved.call_count
        first(x, x.cos())
    assert 0 < optimized == saved.call_count - optimized


def test_forward_mode(pair: tuple[nn.Module, OptimizedModule]) -> None:
    forward_ad: Any = torch.autograd.forward_ad

    def tangent(module: nn.Module) -> Any:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(given().detach(), torch.ones(3, 30, 5))
            return forward_ad.unpack_dual(module(dual)).tangent

    model, fast = pair
    assert_close(tangent(fast), tangent(model), rtol=1e-4, atol=1e-5)


@dataclass
class Batch:
    x: Tensor


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loop = Gated()

    def forward(self, batch: Batch) -> Any:
        return self.loop(batch.x)


def test_objects_are_no_inputs() -> None:
    model = Batched()
    fast = apply_passes(model, (Batch(given()),), measure=False)
    for _ in range(3):
        batch = Batch(torch.randn(3, 12, 5))
        assert_close(fast(batch), model(batch))
    assert len(fast.report.signatures) == 1
    assert "an object of the type Batch" in str(fast.report.signatures[0].failure)


class Refused(Gated):
    """Does something that a graph can't keep, and says what."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(x))


def hooked(x: Tensor) -> Tensor:
    y = x * 1.0
    if y.requires_grad:
        y.register_hook(lambda g: g.clamp(-0.1, 0.1))  # type: ignore[no-untyped-call]
    return y


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "registers a hook on a tensor": hooked,
    "random numbers from Python or NumPy": lambda x: x * random.choice((1.0, 1.0, 1.0)),
    "draws random numbers from Python": lambda x: x * float(numpy.random.rand() < 2),
    "such as a torch.Generator": lambda x: x + torch.randn(
        x.shape, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_graph_can_not_keep(reason: str) -> None:
    fast = apply_passes(Refused(REFUSED[reason]), (given(),), measure=False)
    assert reason in str(fast.report.signatures[0].failure)


class Caching(Batched):
    def forward(self, x: Tensor, cache: Any) -> Any:  # type: ignore[override]
        y = self.loop(x)
        if isinstance(cache, dict):
            cache["last"] = y[:, -1]
        else:
            cache.append(y[:, -1])
        return y


@pytest.mark.parametrize("kind", [dict, list])
def test_a_cache_that_is_handed_in_is_filled(kind: type[Any]) -> None:
    model, cache = Caching(), kind()
    fast = apply_passes(model, (given(), kind()), measure=False)
    fast(given(), cache)
    assert len(cache) == 1
    assert "a list or table among its arguments" in str(fast.report.signatures[0].failure)


def test_a_backward_hook_that_comes_later_runs() -> None:
    model = Gated()
    fast = apply_passes(model, (given(),), measure=False)
    def none(module: nn.Module, to_inputs: Any, grads: Any) -> Any:
        return tuple(g if g is None else g * 0 for g in to_inputs)

    model.kept.register_full_backward_hook(none)
    assert_close(gradient(fast), gradient(model))


class Counted(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_buffers_stay_as_they_were_where_all_lengths_are_tried(mode: str) -> None:
    model = Counted()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shapes = {"x": {1: torch.export.Dim("T", min=2)}}
    fast = apply_passes(model, (given(),), mode=mode, measure=False, dynamic_shapes=shapes)
    assert "one program" in str(fast.report.signatures[0].lengths)
    assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


class Contracted(nn.Module):
    """As Mamba's reference writes it: three operands, which torch contracts in an order."""

    def forward(self, delta: Tensor, b: Tensor, u: Tensor) -> Tensor:
        driven = torch.einsum("bdl,bnl,bdl->bdln", delta, b, u)
        h, outputs = driven.new_zeros(*driven[:, :, 0].shape), []
        for t in range(u.shape[2]):
            h = torch.tanh(h) * delta[:, :, t, None] + driven[:, :, t]
            outputs.append(h.sum(-1))
        return torch.stack(outputs, 2)


def test_an_einsum_of_three_is_emitted() -> None:
    from looplift.passes import ORDER

    passes = [p for p in ORDER if p.name != "lower-einops"]
    inputs = torch.rand(3, 8, 24), torch.randn(3, 4, 24), torch.randn(3, 8, 24)
    fast = apply_passes(Contracted(), inputs, passes=passes, measure=False)
    assert "torch.einsum('bdl,bnl,bdl->bdln'" in fast.code
    assert_close(fast(*inputs), Contracted()(*inputs))


class Slopes(nn.Module):
    """A number of each head's own times distances that are integers (ALiBi)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(12, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        apart = (places[:, None] - places[None]).abs()
        outputs = []
        for k, head in enumerate(self.heads):
            q = head(x)
            outputs.append((q @ q.transpose(1, 2) - 2 ** (-2 * (k + 1)) * apart).softmax(-1) @ q)
        return torch.cat(outputs, -1)


def test_numbers_times_integers_keep_their_dtype() -> None:
    model, x = Slopes(), torch.randn(3, 24, 12)
    fast = apply_passes(model, (x,), measure=False)
    assert fast.report.signatures[0].failure is None
    assert_close(fast(x), model(x))


class Filtered(nn.Module):
    """Solves a system in each step, as a Kalman filter does."""

    def forward(self, x: Tensor) -> Tensor:
        p, outputs = torch.eye(3), []
        for t in range(x.shape[1]):
            p = p + torch.linalg.solve(p + p.T, x[:, t].T @ x[:, t] + torch.eye(3))
            outputs.append(p)
        return torch.stack(outputs)


def test_a_loop_that_solves_systems_is_no_error() -> None:
    x = torch.randn(4, 12, 3)
    fast = apply_passes(Filtered(), (x,), measure=False)
    assert fast.report.signatures[0].failure is None
    assert_close(fast(x), Filtered()(x))


class Scaled(nn.Module):
    """h ← tanh(h + x[t]) * decay, with a setting of the class."""

    decay: float = 0.5

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.held = held

    def scale(self, h: Tensor) -> Tensor:
        return h * self.decay

    def forward(self, x: Tensor) -> Tensor:
        h = x[0]
        for t in range(1, x.shape[0]):
            h = self.scale(torch.tanh(h + x[t]))
        return h


class ByObject(Scaled):
    def scale(self, h: Tensor) -> Tensor:
        return h * float(self.held.decay)


class ByFunction(Scaled):
    def scale(self, h: Tensor) -> Tensor:
        return self.held(h)  # type: ignore[no-any-return]


@dataclass
class InSlots:
    __slots__ = ("decay",)
    decay: float


def test_settings_of_classes_in_slots_and_of_partial_functions_are_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(20, 3)
    models = (Scaled(), ByObject(InSlots(0.5)), ByFunction(partial(torch.clamp, max=0.5)))
    for model in models:
        fast = apply_passes(model, (x,), measure=False, mode="inference")
        with torch.no_grad():
            before = fast(x)
            assert_close(before, model(x))
            monkeypatch.setattr(Scaled, "decay", 0.25)
            if isinstance(model.held, InSlots):
                model.held.decay = 0.25
            elif model.held is not None:
                model.held.keywords["max"] = 0.1
            assert_close(fast(x), model(x))
            assert not torch.equal(fast(x), before)


class Divided(nn.Module):
    def forward(self, x: Tensor, by: float) -> Tensor:
        h = x[0]
        for t in range(1, x.shape[0]):
            h = torch.tanh(h) + x[t]
        return h / by


def test_zeros_of_either_sign_are_different_arguments() -> None:
    model, x = Divided(), torch.randn(20, 3)
    fast = apply_passes(model, (x, 0.0), measure=False)
    assert_close(fast(x, 0.0), model(x, 0.0))
    assert_close(fast(x, -0.0), model(x, -0.0))


class AsksForGradients(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x[0]
        for t in range(1, x.shape[0]):
            h = torch.sin(h) + x[t]
        return h * 2 if x.requires_grad else h


def test_whether_an_input_requires_a_gradient_counts_where_forward_asks() -> None:
    model, x = AsksForGradients(), torch.randn(20, 3)
    fast = apply_passes(model, (x.clone().requires_grad_(),), measure=False)
    for given in (x, x.clone().requires_grad_()):
        assert_close(fast(given), model(given))
        with torch.no_grad():
            assert_close(fast(given), model(given))


class Aliased(nn.Module):
    """One buffer is part of another, which is written to."""

    stats: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stats", torch.zeros(2, 3))
        self.register_buffer("mean", self.stats[0])

    def forward(self, x: Tensor) -> Tensor:
        for t in range(x.shape[0]):
            self.stats.mul_(0.9).add_(x[t])
        return x - self.mean


def test_a_buffer_that_is_written_to_and_part_of_another_is_refused() -> None:
    one, other, x = Aliased(), Aliased(), torch.randn(20, 3)
    fast = apply_passes(other, (x,), measure=False)
    assert "shares memory" in str(fast.report.signatures[0].failure)
    assert_close(fast(x), one(x))


class Halving(nn.Module):
    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(20, 3))

    def forward(self, x: Tensor) -> Tensor:
        for t in range(self.kept.shape[0]):
            self.kept[t].mul_(0.5)
        return x.sum(0)


def test_an_input_that_is_a_buffer_which_is_written_to_runs_the_original() -> None:
    one, other = Halving(), Halving()
    fast = apply_passes(other, (torch.randn(20, 3),), measure=False, mode="inference")
    with torch.no_grad():
        assert_close(fast(other.kept), one(one.kept))
        assert_close(fast(other.kept[:]), one(one.kept[:]))


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = [nn.Linear(3, 3).requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        h = x[0]
        for t in range(1, x.shape[0]):
            h = torch.tanh(self.cells[0](h)) + x[t]
        return h


class Sparse(nn.Module):
    def forward(self, adjacency: Tensor, h: Tensor) -> Tensor:
        for _ in range(17):
            h = torch.tanh(torch.sparse.mm(adjacency, h))
        return h


class Learns(nn.Module):
    """Steps along a gradient that forward computes itself."""

    def __init__(self, mapped: bool) -> None:
        super().__init__()
        self.mapped = mapped

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            if self.mapped:
                x = x - 0.1 * torch.func.vmap(torch.func.grad(lambda row: (row**2).sum()))(x)
            else:
                x = x.detach().requires_grad_()
                with torch.enable_grad():
                    [slope] = torch.autograd.grad((x**2).sum(), x)
                x = x - 0.1 * slope
        return x


@pytest.mark.parametrize(("model", "inputs", "reason"), [
    (Learns(True), (torch.randn(4, 3),), "differentiates or maps a function"),
    (Learns(False), (torch.randn(4, 3),), "differentiates or maps a function"),
    (Unregistered(), (torch.randn(20, 3),), "nn.ModuleList"),
    (Sparse(), (torch.eye(5).to_sparse(), torch.randn(5, 3)), "layout torch.sparse_coo"),
    (Gated().to("meta"), (torch.randn(3, 30, 5, device="meta"),), "meta device"),
])
def test_what_is_refused_with_a_reason(
    model: nn.Module, inputs: tuple[Tensor, ...], reason: str
) -> None:
    fast = apply_passes(model, inputs, measure=False)
    assert reason in str(fast.report.signatures[0].failure)
    assert fast(*inputs).shape == model(*inputs).shape


class Neuron(Gated):
    """Its state is in attributes, as in libraries of spiking networks; `kept_here` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.steps, self.kept_here = torch.zeros(()), 0, True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x + self.state)
        if self.kept_here:
            self.state, self.steps = y.mean().detach(), self.steps + x.shape[1]
        return y


def test_what_is_refused_again_and_again_is_not_looked_at() -> None:
    model, x = Neuron(), torch.randn(3, 30, 5)
    fast = apply_passes(model, measure=False)
    for _ in range(12):
        fast(x)
    assert [s.failure is not None for s in fast.report.signatures] == [True, True]
    with torch.no_grad():
        fast(x)  # another way to call it
    assert len(fast.report.signatures) == 3


def test_a_setting_that_changes_after_a_refusal_counts() -> None:
    model, x = Neuron(), torch.randn(3, 30, 5)
    fast = apply_passes(model, (x,), measure=False, mode="inference")
    assert fast.report.signatures[0].failure is not None
    model.kept_here = False
    with torch.no_grad():
        fast(x)
    assert fast.report.signatures[1].failure is None
    assert "fused_scan" in fast.code


class Chosen(nn.Module):
    """A loop, or one operation that nothing is to be gained on."""

    def __init__(self) -> None:
        super().__init__()
        self.gated, self.loops = Gated(), False

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x) if self.loops else x * 2


def test_where_the_original_runs_changes_are_seen_in_the_end() -> None:
    model, x = Chosen(), torch.randn(3, 30, 5)
    fast = apply_passes(model, measure=False)
    with torch.no_grad():
        for _ in range(20):
            fast(x)
        model.loops = True
        for _ in range(63):
            assert_close(fast(x), model(x))
    assert len(fast.report.signatures) == 2
    assert "fused_scan" in fast.code
    model.loops = False
    with torch.no_grad():
        assert_close(fast(x), x * 2)  # at once, where it is no original that runs


class Twenty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(20):
            h = torch.tanh(h + x[:, t])
        return h


def test_the_graph_of_a_model_that_is_a_graph_is_still_its_own() -> None:
    model = torch.fx.symbolic_trace(Twenty())
    fast = apply_passes(model, (torch.randn(2, 20),), measure=False)
    assert fast.graph_module is not None
    assert fast.graph is model.graph


def test_under_torch_compile_how_a_call_runs_is_chosen_outside_of_the_graph() -> None:
    torch._dynamo.reset()
    graphs = CompileCounter()
    model = Gated()
    fast: Any = torch.compile(apply_passes(model, measure=False), backend=graphs)
    for batch in (3, 4, 3):
        x = torch.randn(batch, 20, 5, requires_grad=True)
        assert_close(fast(x), model(x))
        assert_close(torch.autograd.grad(fast(x).sum(), x), torch.autograd.grad(model(x).sum(), x))
    assert [s.failure for s in fast._orig_mod.report.signatures] == [None, None]
    assert graphs.frame_count == 2
    assert graphs.op_count < 20


def test_tracers_see_the_model_and_use_up_no_signature() -> None:
    model = Gated()
    fast = apply_passes(model, measure=False)
    trace: Any = torch.jit.trace
    traced = trace(fast, torch.randn(2, 20, 5), check_trace=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fast(torch.randn(3, 20, 5)).shape == (3, 20, 5)
    assert fast.report.signatures == []
    x = torch.randn(2, 20, 5)
    assert_close(traced(x), model(x))


class InDefaultDtype(Twenty):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.get_default_dtype()))


def test_the_default_dtype_counts() -> None:
    fast = apply_passes(InDefaultDtype(), (torch.randn(2, 20),), measure=False)
    torch.set_default_dtype(torch.float64)
    try:
        assert fast(torch.randn(2, 20, dtype=torch.float32)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
