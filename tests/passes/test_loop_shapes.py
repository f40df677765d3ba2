"""The shapes of loops that real code writes: each folds, or says why not, and stays equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from looplift import apply_passes
from looplift.optimizer import fusible
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

WIDTH = 4
LENGTHS = (12, WIDTH)  # of the second, every axis that could be mixed up has the same size


class Shape(nn.Module):
    """The parts that the loops below use, and one of the loops as its forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.embed = nn.LayerNorm(WIDTH), nn.Embedding(10, WIDTH)
        self.decay = nn.Parameter(torch.rand(WIDTH))
        self.joined = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH))
        self.table = nn.Parameter(torch.randn(max(LENGTHS), WIDTH))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@dataclass(frozen=True)
class Expected:
    forward: Callable[..., Any]
    loops: int  # that are left, with a carry
    reason: str  # or why it is left as it is


SHAPES: dict[str, Expected] = {}


def shape(loops: int = 0, reason: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(forward: Callable[..., Any]) -> Callable[..., Any]:
        SHAPES[forward.__name__] = Expected(forward, loops, reason)
        return forward

    return add


# Reads


@shape()
def last_axis_but_one(m: Any, x: Tensor) -> Tensor:
    y = x[:, None].expand(-1, 3, -1, -1)
    return torch.stack([m.a(y[..., t, :]) for t in range(x.shape[1])], 2)


@shape()
def first_axis(m: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return torch.stack([m.a(x[t]) for t in range(len(x))])


@shape()
def negative_indices(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, -t - 1]) for t in range(x.shape[1])], 1)


@shape()
def start_and_step(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, t]) for t in range(1, x.shape[1], 2)], 1)


@shape()
def reversed_range(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, t]) for t in reversed(range(x.shape[1]))], 1)


@shape()
def windows_that_overlap(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, t : t + 2]).sum(1) for t in range(x.shape[1] - 1)], 1)


@shape()
def windows_with_gaps(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, 2 * t : 2 * t + 1]) for t in range(x.shape[1] // 2)], 1)


@shape()
def chunks(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.a(c) for c in x.chunk(x.shape[1] // 2, 1)], 1)


@shape()
def splits(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.a(c) for c in torch.split(x, 1, 1)], 1)


@shape()
def unbound(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(row) for row in x.unbind(1)], 1)


@shape()
def iterated(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(row) for row in x.transpose(0, 1)], 1)


@shape()
def shifted(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, t] - x[:, t - 1]) for t in range(1, x.shape[1])], 1)


@shape()
def two_tensors(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    return torch.stack([m.a(x[:, t]) * y[:, -1 - t] for t in range(x.shape[1])], 1)


@shape()
def affine_constant(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, t]) + t / 8 for t in range(x.shape[1])], 1)


@shape()
def table_of_constants(m: Any, x: Tensor) -> Tensor:
    schedule = [0.9**t for t in range(x.shape[1])]
    return torch.stack([m.a(x[:, t]) * schedule[t] for t in range(x.shape[1])], 1)


@shape()
def rows_of_a_parameter(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, t] * m.table[t]) for t in range(x.shape[1])], 1)


@shape()
def patches(m: Any, x: Tensor) -> Tensor:
    image = x[:, None].expand(-1, WIDTH, -1, -1)
    return torch.stack([m.a(image[:, :, i : i + 2, j : j + 2].mean((2, 3)))
                        for i in range(0, x.shape[1], 2) for j in range(0, WIDTH, 2)], 1)


# Writes


@shape()
def written_by_index(m: Any, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for t in range(x.shape[1]):
        out[:, t] = m.a(x[:, t])
    return out


@shape()
def written_in_the_middle(m: Any, x: Tensor) -> Tensor:
    y = x[:, None].expand(-1, 3, -1, -1)
    out = x.new_zeros(y.shape)
    for t in range(x.shape[1]):
        out[..., t, :] = m.a(y[..., t, :])
    return out


@shape()
def written_in_slices(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(0, x.shape[1], 2):
        out[:, t : t + 2] = m.a(x[:, t : t + 2])
    return out


@shape()
def written_in_part(m: Any, x: Tensor) -> Tensor:
    out = x.clone()
    for t in range(1, x.shape[1]):
        out[:, t] = m.a(x[:, t])
    return out


@shape()
def added_to_slices(m: Any, x: Tensor) -> Tensor:
    out = x.clone()
    for t in range(0, x.shape[1], 2):
        out[:, t : t + 2] += m.a(x[:, t : t + 2])
    return out


@shape()
def added_where_windows_overlap(m: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], x.shape[1] + 2, WIDTH)
    for t in range(x.shape[1]):
        out[:, t : t + 3] += m.a(x[:, t])[:, None]
    return out


@shape()
def written_in_two_axes(m: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], WIDTH, x.shape[1], WIDTH)
    for i in range(0, x.shape[1], 2):
        for j in range(0, WIDTH, 2):
            out[:, :, i : i + 2, j : j + 2] = m.a(x[:, i])[:, :, None, None] * (j + 1)
    return out


@shape(1)
def last_value_only(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(x[:, t]) + h)
    return h


@shape(1)
def several_nested_outputs(m: Any, x: Tensor) -> Any:
    states, read = [], []
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(x[:, t]) + h)
        states.append(h)
        read.append(m.b(h))
    return {"states": torch.stack(states), "read": (torch.cat(read, -1), [h])}


# Carries


@shape(1)
def three_carries(m: Any, x: Tensor) -> Tensor:
    a, b, c = x[:, 0], x[:, 1], x[:, 0] * 2
    for t in range(x.shape[1]):
        a, b, c = torch.tanh(m.a(x[:, t]) + c), a * 0.5 + b, b - a
    return a + b + c


@shape(1)
def read_from_two_steps_back(m: Any, x: Tensor) -> Tensor:
    outputs = [x[:, 0], x[:, 1]]
    for t in range(2, x.shape[1]):
        outputs.append(torch.tanh(outputs[t - 1] + m.a(outputs[t - 2]) + x[:, t]))
    return torch.stack(outputs, 1)


@shape(1)
def peeled_first_step(m: Any, x: Tensor) -> Tensor:
    h, outputs = None, []
    for t in range(x.shape[1]):
        z = m.a(x[:, t])
        h = z if h is None else torch.tanh(z + h * m.decay)
        outputs.append(h)
    return torch.stack(outputs, 1)


@shape(1)
def trimmed_last_step(m: Any, x: Tensor) -> Tensor:
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        outputs.append(m.b(h))
        h = torch.tanh(m.a(x[:, t]) + h)  # the last is used by nobody
    return torch.stack(outputs, 1)


@shape(1)
def carried_in_a_buffer(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 0] = x[:, 0]
    for t in range(1, x.shape[1]):
        out[:, t] = torch.tanh(m.a(x[:, t]) + out[:, t - 1])
    return out


@shape(1)
def chosen_by_where(m: Any, x: Tensor) -> Tensor:
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        h = torch.where(x[:, t] > 0, torch.tanh(m.a(h)), h)
        outputs.append(h.amax(-1))
    return torch.stack(outputs, 1)


@shape(1)
def joined_with_the_state(m: Any, x: Tensor) -> Tensor:
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(F.linear(torch.cat([x[:, t], h], -1), m.joined))
        outputs.append(h)
    return torch.stack(outputs, 1)


# Bodies


@shape()
def even_and_odd(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, t]) if t % 2 else m.b(x[:, t]) for t in range(x.shape[1])], 1)


@shape(2)
def layers_of_recurrences(m: Any, x: Tensor) -> Tensor:
    for linear in (m.a, m.b):
        h, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.tanh(linear(x[:, t]) + h)
            outputs.append(h)
        x = torch.stack(outputs, 1)
    return x


@shape(1)
def inner_iterations(m: Any, x: Tensor) -> Tensor:
    outputs = []
    for t in range(x.shape[1]):
        z = x[:, t]
        for _ in range(3):
            z = torch.tanh(m.a(z))
        outputs.append(z)
    return torch.stack(outputs, 1)


@shape()
def rows_and_columns(m: Any, x: Tensor) -> Tensor:
    pairs = [(m.a(x[:, i]) * m.b(x[:, j])).sum(-1)
             for i in range(x.shape[1]) for j in range(x.shape[1])]
    return torch.stack(pairs, 1)


@shape(2)
def heads_in_time(m: Any, x: Tensor) -> Tensor:
    outputs = []
    for h in range(2):
        state = torch.zeros_like(x[:, 0, :2])
        for t in range(x.shape[1]):
            state = torch.tanh(x[:, t, 2 * h : 2 * h + 2] + state * 0.5)
            outputs.append(state)
    return torch.stack(outputs, 1)


@shape()
def einsum(m: Any, x: Tensor) -> Tensor:
    return torch.stack([torch.einsum("bi,ji->bj", x[:, t], m.a.weight)
                        for t in range(x.shape[1])], 1)


@shape()
def einsum_of_implied_letters(m: Any, x: Tensor) -> Tensor:
    tall = x[..., None] * x[:, :, None]
    return torch.stack([torch.einsum("...j,jk", tall[:, t], m.a.weight)
                        + torch.einsum("b...j,bj", tall[:, t], x[:, t])[..., None]
                        for t in range(x.shape[1])], -1)


@shape()
def attention(m: Any, x: Tensor) -> Tensor:
    window = [x[:, None, t : t + 2] for t in range(x.shape[1] - 1)]
    return torch.stack([torch.softmax(w @ w.transpose(-1, -2), -1) @ w for w in window], 1)


@shape()
def convolution(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.conv(x[:, t : t + 1].expand(-1, 5, -1).mT)
                        for t in range(x.shape[1])], 1)


@shape()
def normalisation(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.norm(m.a(x[:, t])) for t in range(x.shape[1])], 1)


@shape()
def lookup(m: Any, x: Tensor) -> Tensor:
    tokens = (x.abs() * 3).long().clamp(0, 9)[..., 0]
    return torch.stack([m.a(m.embed(tokens[:, t])) for t in range(x.shape[1])], 1)


@shape()
def sorted_values(m: Any, x: Tensor) -> Tensor:
    return torch.stack([x[:, t].topk(2).values + x[:, t].sort().values[:, :2]
                        for t in range(x.shape[1])], 1)


@shape(1)
def complex_state(m: Any, x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.reshape(*x.shape[:2], 2, 2))
    h, outputs = torch.zeros_like(z[:, 0]), []
    for t in range(x.shape[1]):
        h = h * (0.9 + 0.1j) + z[:, t]
        outputs.append(h)
    return torch.view_as_real(torch.stack(outputs, 1))


# Parameters of each step's own


@shape()
def heads_of_their_own(m: Any, x: Tensor) -> Tensor:
    return torch.stack([head(x[:, i]) for i, head in enumerate(m.heads)], 1)


@shape()
def norms_of_their_own(m: Any, x: Tensor) -> Tensor:
    return torch.stack([norm(x[:, i]) for i, norm in enumerate(m.norms)], 1)


@shape(reason="each trip uses parameters of its own, and the result of the one before")
def layers(m: Any, x: Tensor) -> Tensor:
    for linear in m.heads:
        x = torch.tanh(linear(x))
    return x


# Random numbers


@shape(loops=1)
def random(m: Any, x: Tensor) -> Tensor:
    return torch.stack([F.dropout(m.a(x[:, t]), 0.5) + F.dropout(x[:, t], 0.5)
                        for t in range(x.shape[1])], 1)


@shape(loops=3)
def zoneout(m: Any, x: Tensor) -> Tensor:
    h, c, outputs = x[:, 0], x[:, 0], []
    for t in range(x.shape[1]):
        h = h + F.dropout(torch.tanh(m.a(h) + x[:, t]) - h, 0.1)
        c = c + F.dropout(h * m.decay - c, 0.2) + 0.1 * torch.randn_like(c)
        outputs.append(h + c)
    return torch.stack(outputs, 1)


@shape(loops=2)
def masks_like_the_states(m: Any, x: Tensor) -> Tensor:
    """Of the states that the masks are like, only the sizes count."""
    h, c, outputs = x[:, 0], x[:, 0], []
    for t in range(x.shape[1]):
        keep, drop = (torch.bernoulli(torch.full_like(s, 0.3)) for s in (h, c))
        h = keep * h + (1 - keep) * torch.tanh(m.a(c) + x[:, t])
        c = drop * c + h * torch.bernoulli(0.5 * torch.ones_like(h))
        outputs.append(h + c)
    return torch.stack(outputs, 1)


# What is left as it is


@shape(reason="they work on different sizes")
def triangular(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, : t + 1].sum(1)) for t in range(x.shape[1])], 1)


@shape(reason="forward asks for the value of a tensor")
def branching(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, t]) if x[0, t, 0] > 0 else x[:, t]
                        for t in range(x.shape[1])], 1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_of_loop(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusible, "FEW", 16)  # no kernels: loops are counted
    expected, x = SHAPES[name], torch.randn(2, length, WIDTH)
    model = Shape(expected.forward)
    fast = apply_passes(model, (x,), measure=False)
    told = fast.report.to_dict()
    if length == max(LENGTHS):
        found = [r for r in told["rewrites"] if r["mode"] == "inference"]
        passes = [r["pass_name"] for r in found for _ in range(r["count"])]
        reasons = [d["reason"] for d in told["declined"]] + [c["failure"] or ""
                                                             for c in told["captures"]]
        assert ("reroll-loops" in passes) == (not expected.reason), reasons
        assert passes.count("lower-scans") == expected.loops
        assert not any("carries nothing" in reason for reason in reasons)
        assert any(expected.reason in reason for reason in reasons) or not expected.reason
    for grad in (False, True):
        results = []
        for run in (model, fast):
            torch.manual_seed(1)
            given = x.clone().requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                outputs = torch.utils._pytree.tree_leaves(run(given))
            grads = torch.autograd.grad([o.sin().sum() for o in outputs],
                                        [given, *model.parameters()],
                                        allow_unused=True) if grad else ()
            results.append((outputs, grads, [o.stride() for o in outputs], given.detach()))
        assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
