"""What reads stacked states behind a loop is computed in it, where they need not be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from looplift.optimizer.facts import is_kernel
from torch import Tensor, nn
from torch.testing import assert_close

STEPS, LANES, STATES = 14, 6, 8
ALL = 2 * STEPS * LANES * STATES  # elements of the states of all steps


class Model(nn.Module):
    """A state of `LANES` × `STATES` per step, and what is made of all of them behind the loop."""

    def __init__(self, behind: Callable[..., Any], stacked: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.behind, self.stacked = behind, stacked
        self.enter, self.show = nn.Linear(5, LANES), nn.Linear(5, STATES)
        self.decay = nn.Parameter(torch.rand(LANES, STATES))
        self.scale = nn.Parameter(torch.rand(LANES))

    def forward(self, x: Tensor) -> Any:
        entered, shown = self.enter(x), self.show(x)
        state, states = x.new_zeros(x.shape[0], LANES, STATES), []
        for t in range(x.shape[1]):
            state = torch.tanh(self.decay * state + entered[:, t, :, None])
            states.append(state)
        return self.behind(self, torch.stack(states, self.stacked), entered, shown, state)


def product(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return (states @ c.unsqueeze(-1)).squeeze(-1)


def gated(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    read = (states @ c[..., None])[..., 0]
    return (read + m.scale * u) * u.sigmoid()


def einsum(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("btln,...tn->btl", states, c)


def weighted(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("t,btln->btl", c[0, :, 0], states)


def mean(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return (states * c[:, :, None]).mean(-1, keepdim=True)


def largest_of_heads(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    heads = states.permute(2, 1, 0, 3).reshape(2, LANES // 2, STEPS, -1, STATES)
    return heads.amax((1, -1)) + heads[:, 0, ..., 1:].sum(-1)


def two_results(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return states.square().sum(-1), (states * c[:, :, None]).sum((2, 3)), h


def first_axis(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return (states * c.transpose(0, 1)[:, :, None]).sum(-1)


def last_axis(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return (states * c.mT[:, None]).sum(-2)


def of_the_last_state(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return (states * h[:, None]).sum(-1)


def of_all_steps(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return (states * states.mean(1, keepdim=True)).sum(-1)


def of_other_steps(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return (states[:, 1:] * c[:, :-1, None]).sum(-1)


def of_steps_reversed(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return (states.flip(1) * c[:, :, None]).sum(-1)


def with_one_for_all_steps(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    """One product of all steps."""
    return torch.einsum("btln,bln->tbl", states, c[:, :1].expand(-1, LANES, -1) * 2)


def with_weights(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return nn.functional.linear(states, m.show.weight.T)


def shown_too(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return states, (states * c[:, :, None]).sum(-1)


def in_another_dtype(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return (states.double() * c[:, :, None]).sum(-1)


def counted(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> Tensor:
    return (states > c[:, :, None]).sum(-1)


def sizes(fast: Any) -> int:
    """How many elements the largest tensor has."""
    made = [n.meta.get("val") for n in fast.graph_module.graph.nodes]
    return max(t.numel() for t in made if isinstance(t, Tensor))


@pytest.mark.parametrize("behind", [
    product, gated, einsum, weighted, mean, largest_of_heads, two_results])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_states_are_read_where_they_are(
    behind: Callable[..., Any], mode: str, equal: Any
) -> None:
    fast = equal(Model(behind), (torch.randn(2, STEPS, 5),), mode=mode)
    assert len([n for n in fast.graph_module.graph.nodes if is_kernel(n)]) == 1
    assert sizes(fast) < ALL, fast.code


@pytest.mark.parametrize(("behind", "axis"), [(first_axis, 0), (last_axis, -1)])
def test_however_they_are_stacked(behind: Callable[..., Any], axis: int, equal: Any) -> None:
    fast = equal(Model(behind, axis), (torch.randn(2, STEPS, 5),), mode="inference")
    assert sizes(fast) < ALL, fast.code


@pytest.mark.parametrize("behind", [
    of_the_last_state, of_all_steps, of_other_steps, of_steps_reversed, with_weights,
    with_one_for_all_steps, shown_too, in_another_dtype, counted])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_what_a_step_does_not_have_stays_behind(
    behind: Callable[..., Any], mode: str, equal: Any
) -> None:
    fast = equal(Model(behind), (torch.randn(2, STEPS, 5),), mode=mode)
    assert [n for n in fast.graph_module.graph.nodes if is_kernel(n)]
    assert sizes(fast) >= ALL, fast.code


def test_steps_as_many_as_lanes(equal: Any) -> None:
    """Which axis counts the steps is told by where it comes from, not by its length."""
    for behind in (product, gated, mean, two_results):
        equal(Model(behind), (torch.randn(LANES, LANES, 5),), mode="inference")
        equal(Model(behind), (torch.randn(STATES, STATES, 5),), mode="inference")


def test_another_loop_that_is_read_too_runs_once(equal: Any) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b, first, second = x.new_zeros(2, 5), x.new_zeros(2, 5), [], []
            for t in range(x.shape[1]):
                a = torch.tanh(0.9 * a + x[:, t])
                first.append(a)
            for t in range(x.shape[1]):
                b = torch.sigmoid(0.8 * b + x[:, t])
                second.append(b)
            return (torch.stack(first, 1) * torch.stack(second, 1)).sum(-1)

    fast = equal(Two(), (torch.randn(2, STEPS, 5),), mode="inference")
    assert len([n for n in fast.graph_module.graph.nodes if is_kernel(n)]) == 2


def test_a_loop_that_reads_nothing_but_its_inputs(equal: Any) -> None:
    """What is the same for all steps comes after what is not."""
    class Bare(nn.Module):
        def forward(self, x: Tensor, w: Tensor, z: Tensor) -> Tensor:
            state, states = x.new_zeros(2, 5), []
            for t in range(x.shape[1]):
                state = torch.tanh(0.9 * state + x[:, t])
                states.append(state)
            return ((torch.stack(states, 1) * w) * z).sum(-1)

    inputs = (torch.randn(2, STEPS, 5), torch.randn(5), torch.randn(2, STEPS, 5))
    fast = equal(Bare(), inputs, mode="inference")
    [kernel] = [n for n in fast.graph_module.graph.nodes if is_kernel(n)]
    assert "sum" in kernel.args[0]


def test_states_that_are_shown_before_their_update(equal: Any) -> None:
    class Before(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            state, states = x.new_zeros(2, 5), []
            for t in range(x.shape[1]):
                states.append(state)
                state = torch.tanh(0.9 * state + x[:, t])
            return (torch.stack(states, 1) * z).sum(-1)

    inputs = (torch.randn(2, STEPS, 5), torch.randn(2, STEPS, 5))
    for mode in ("inference", "training"):
        fast = equal(Before(), inputs, mode=mode)
        [kernel] = [n for n in fast.graph_module.graph.nodes if is_kernel(n)]
        assert "sum" in kernel.args[0]


def test_what_has_no_gradient_of_a_result_gets_none(equal: Any) -> None:
    def behind(m: Model, states: Tensor, u: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return states.sum(-1), (states * c[:, :, None]).sum(-1)

    model, x = Model(behind), torch.randn(2, STEPS, 5)
    fast = equal(model, (x,), mode="training")
    assert sizes(fast) < ALL
    for made in (model(x)[0], fast(x)[0]):
        model.zero_grad()
        made.sum().backward()
        assert model.show.weight.grad is None
        assert model.decay.grad is not None


def test_one_program_for_all_lengths(equal: Any) -> None:
    model = Model(gated)
    fast = equal(model, (torch.randn(2, 40, 5),), mode="inference",
                 dynamic_shapes={"x": {1: torch.export.Dim("T", min=2)}})
    for length in (17, 64, LANES, STATES):
        x = torch.randn(2, length, 5)
        with torch.no_grad():
            assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
