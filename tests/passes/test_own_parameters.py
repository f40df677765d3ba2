"""Independent modules of one shape, one to a step, run as one batched operation."""

from __future__ import annotations

from typing import Any

import looplift
import pytest
import torch
from looplift.optimizer.facts import aten, is_op
from torch import Tensor, nn

STEPS, WIDTH = 5, 4


class Own(nn.Module):
    """A loop whose steps each have a module of their own: (B, STEPS, WIDTH) to a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        linears = (nn.Linear(WIDTH, WIDTH, bias=kind != "no bias") for _ in range(STEPS))
        self.linears = nn.ModuleList(linears)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))
            for _ in range(STEPS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(STEPS))
        self.scales = nn.ParameterList(torch.rand(WIDTH) for _ in range(STEPS))
        padding = 2 if "padded" in kind else None
        self.tables = nn.ModuleList(nn.Embedding(6, WIDTH, padding) for _ in range(STEPS))
        self.wide = nn.ModuleList(nn.Linear(WIDTH, 1 << 13) for _ in range(STEPS))

    def forward(self, x: Tensor) -> Any:
        match self.kind:
            case "a linear for each" | "no bias":
                return torch.stack([m(x[:, i]) for i, m in enumerate(self.linears)], 1)
            case "matrices":
                y = x.unsqueeze(2).expand(-1, -1, 3, -1)
                return torch.stack([m(y[:, i]) for i, m in enumerate(self.linears)], 1)
            case "experts on one input":
                return torch.stack([m(x) for m in self.experts], -1).mean(-1)
            case "weighted experts":
                y = torch.zeros_like(x)
                for i, expert in enumerate(self.experts):
                    y = y + expert(x) * (i + 1)
                return y
            case "norms and scales":
                pairs = zip(self.norms, self.scales, strict=True)
                return torch.stack([torch.tanh(n(x[:, i])) * s for i, (n, s) in enumerate(pairs)])
            case "tables" | "padded tables":
                places = (x * 3).long().clamp(-2, 3) + 2
                rows = [m(places[:, i]).sum(1) for i, m in enumerate(self.tables)]
                return torch.stack([m(places[:, 0]).sum(1) for m in self.tables] + rows, 1)
            case "shared by some":
                shared = [self.linears[i % 2] for i in range(STEPS)]
                return torch.stack([torch.relu(m(x[:, i])) for i, m in enumerate(shared)], 1)
            case "layers":
                for layer in self.linears:
                    x = torch.relu(layer(x))
                return x
            case "one input":
                return torch.stack([m(x) for m in self.linears], 1)
            case "last alone":
                for i, layer in enumerate(self.linears):
                    y = layer(x[:, i])
                return torch.tanh(y)
            case _:
                return torch.stack([m(x[:, i]).relu() for i, m in enumerate(self.wide)], 1)


BATCHED = ["a linear for each", "no bias", "matrices", "experts on one input", "weighted experts",
           "norms and scales", "tables"]
X = torch.randn(2, STEPS, WIDTH)


@pytest.mark.parametrize("kind", BATCHED)
def test_independent_modules_are_batched(kind: str, run: Any, equal: Any) -> None:
    model, inputs = Own(kind), (X.clone().requires_grad_(),)
    outcome = run(model, inputs)
    assert any("→ 1" in a.summary for a in outcome.applied)
    products = [n for n in outcome.graph_module.graph.nodes
                if is_op(n, aten.linear.default, aten.bmm.default, aten.baddbmm.default)]
    assert len(products) <= 2
    equal(model, inputs)


@pytest.mark.parametrize(("kind", "reason"), [
    ("layers", "each trip uses parameters of its own, and the result of the one before"),
    ("shared by some", "some trips share parameters, others have their own"),
    ("wide", "its parameters would be copied into one at every call"),
])
def test_what_is_left(kind: str, reason: str, run: Any, equal: Any) -> None:
    model = Own(kind)
    outcome = run(model, (X,))
    assert not [a for a in outcome.applied if a.summary.endswith("→ one scan")]
    told = [s.reason for s in outcome.skips]
    assert any(reason in r for r in told), told
    equal(model, (X,))


def test_the_padding_of_each_table_gets_no_gradient(equal: Any) -> None:
    model = Own("padded tables")
    fast = equal(model, (X,))
    fast(X).square().sum().backward()
    grads = [table.grad for table in model.tables.parameters()]
    assert all(grad is not None and not grad[2].any() and grad.any() for grad in grads)


def test_projections_of_one_input_are_no_loop(run: Any) -> None:
    outcome = run(Own("one input"), (X,))
    assert not [a for a in outcome.applied if a.summary.endswith("→ one scan")]


def test_modules_whose_results_nobody_reads_get_no_gradient() -> None:
    """They ran with the last one, as one product, and got gradients of zero."""
    model = Own("last alone")
    fast = looplift.apply_passes(model, (X,), verify=False, measure=False, mode="training")
    fast(X).sum().backward()
    assert [m.weight.grad is None for m in model.linears] == [True] * (STEPS - 1) + [False]


def test_parameters_get_their_own_gradients() -> None:
    model = Own("weighted experts")
    fast = looplift.apply_passes(model, (X,), measure=False)
    fast(X).square().mean().backward()
    got = [p.grad for p in model.experts.parameters()]
    model.zero_grad()
    model(X).square().mean().backward()
    torch.testing.assert_close(got, [p.grad for p in model.experts.parameters()])
