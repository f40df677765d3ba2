"""What is on no cycle runs once; what is on one stays a scan."""

from __future__ import annotations

from typing import Any

import looplift
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looplift.optimizer.facts import all_graphs, aten, is_op, is_scan
from looplift.passes.batch_timesteps import BatchTimesteps
from looplift.passes.reroll_loops import RerollLoops
from torch import Tensor, nn

PASSES = (RerollLoops(), BatchTimesteps())


class Recurrence(nn.Module):
    """Projection in, elementwise recurrence, projection out, last state."""

    def __init__(self, width: int = 4, hidden: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.decay = nn.Parameter(torch.rand(hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, outputs = x.new_zeros(x.shape[0], self.decay.shape[0]), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.decay * h + self.enter(x[:, t]))
            outputs.append(torch.relu(self.leave(h)))
        return torch.stack(outputs, 1), h


class TwoLayers(nn.Module):
    """A second recurrence on the first one's states, in the same loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Recurrence(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h, g, outputs = x.new_zeros(x.shape[0], 6), x.new_zeros(x.shape[0], 6), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.first.decay * h + self.first.enter(x[:, t]))
            g = 0.5 * g + self.second(h)
            outputs.append(g.sum(-1))
        return torch.stack(outputs, 1)


class Previous(nn.Module):
    """A carry on no cycle: the step before's value."""

    def forward(self, x: Tensor) -> Tensor:
        before, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            now = torch.sin(x[:, t])
            outputs.append(now - before)
            before = now
        return torch.stack(outputs, 1)


class AllCycle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t])
        return h


def count(graph_module: Any, target: Any) -> int:
    return sum(is_op(n, target) for n in graph_module.graph.nodes)


def test_fires(run: Any, golden: Any) -> None:
    outcome = run(Recurrence(), (torch.randn(2, 5, 4),))
    assert [a.summary for a in outcome.applied if a.pass_name == "batch-timesteps"] == [
        "5 × (2 linear, relu) → 1"
    ]
    assert count(outcome.graph_module, aten.linear.default) == 2
    golden("batch_timesteps", outcome)


def test_two_cycles_become_two_scans_with_what_lies_between_batched(run: Any, golden: Any) -> None:
    outcome = run(TwoLayers(), (torch.randn(2, 5, 4),), PASSES)
    assert sum(is_scan(n) for n in outcome.graph_module.graph.nodes) == 2
    assert count(outcome.graph_module, aten.linear.default) == 2
    assert count(outcome.graph_module, aten.sum.dim_IntList) == 1


def test_a_carry_on_no_cycle_is_a_shift(run: Any) -> None:
    outcome = run(Previous(), (torch.randn(2, 5, 4),), PASSES)
    assert not any(is_scan(n) for n in outcome.graph_module.graph.nodes)
    assert count(outcome.graph_module, aten.sin.default) == 1


def test_skips(run: Any) -> None:
    outcome = run(AllCycle(), (torch.randn(2, 5, 4),), PASSES)
    reasons = [s.reason for s in outcome.skips if s.pass_name == "batch-timesteps"]
    assert reasons == ["every operation of the loop depends on the step before"]


@pytest.mark.parametrize("model", [Recurrence, TwoLayers, Previous, AllCycle])
@settings(max_examples=5, deadline=None)
@given(batch=st.sampled_from([0, 1, 2, 3, 4, 6]), steps=st.sampled_from([1, 2, 3, 4, 6, 7]))
def test_same_values_and_gradients(model: type[nn.Module], batch: int, steps: int) -> None:
    x = torch.randn(batch, steps, 4)  # 4 and 6 are widths too: axes coincide
    fast = looplift.apply_passes(model(), (x,), measure=False)
    reasons = [d["reason"] for d in fast.report.to_dict()["declined"]]
    assert not [r for r in reasons if "differs" in r or "could not" in r], reasons


def test_keeps_the_contract(keeps_contract: Any) -> None:
    keeps_contract(TwoLayers(), (torch.randn(3, 5, 4),))
    keeps_contract(Previous(), (torch.randn(3, 5, 4),))


def test_is_idempotent(run: Any) -> None:
    once = run(Recurrence(), (torch.randn(2, 5, 4),), PASSES)
    twice = run(Recurrence(), (torch.randn(2, 5, 4),), (*PASSES, BatchTimesteps()))
    assert len(once.applied) == len(twice.applied)


def test_shared_weights_are_never_copied(run: Any) -> None:
    outcome = run(Recurrence(), (torch.randn(2, 5, 4),), PASSES)
    weights = [n for n in outcome.graph_module.graph.nodes if "weight" in n.name]
    assert all(is_op(u, aten.linear.default) for w in weights for u in w.users)


class Iterated(nn.Module):
    """A recurrence of its own in each row; the rows do not know of one another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, lasts = [], []
        for r in range(x.shape[1]):
            h, seen = torch.zeros(x.shape[0], x.shape[3]), []
            for t in range(x.shape[2]):
                h = torch.tanh(h @ self.weight + x[:, r, t])
                seen.append(h)
            rows.append(torch.stack(seen, 1))
            lasts.append(h)
        return torch.stack(rows, 1), torch.stack(lasts, 0)


@pytest.mark.parametrize(("rows", "steps"), [(3, 5), (5, 3), (4, 4)])
def test_recurrences_of_independent_rows_run_together(
    rows: int, steps: int, run: Any, equal: Any
) -> None:
    model, x = Iterated(), torch.randn(2, rows, steps, 4)
    graphs = list(all_graphs(run(model, (x,)).graph_module))
    assert len(graphs) <= 2  # the model's, and perhaps one loop over time for all rows
    products = [n for g in graphs for n in g.graph.nodes if is_op(n, aten.matmul.default)]
    assert len(products) <= steps
    equal(model, (x,))


class Joined(nn.Module):
    """A cell with one weight for its input and its state: (B, T, …) to (B, T, …)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.linear, self.bare = nn.Linear(7, 4), nn.Linear(11, 4, bias=False)
        self.weight = nn.Parameter(torch.randn(7, 4) / 3)
        self.conv = nn.Conv2d(7, 4, 3, padding=1, stride=1)
        self.grouped = nn.Conv1d(6, 4, 1, groups=2)

    def product(self, x: Tensor, h: Tensor) -> Any:
        both = torch.cat([x, h], 1)
        match self.kind:
            case "linear":
                return self.linear(both)
            case "matmul":
                return both @ self.weight
            case "in between":
                return self.bare(torch.cat([h, x, h * h], -1))
            case "conv2d":
                return self.conv(both)
            case "grouped":
                return self.grouped(torch.cat([x[:, :2], h], 1))
            case "another axis":
                return (torch.cat([x, h], 0) @ self.weight[:4])[len(h) :]
            case _:
                return both @ (self.weight * h.mean())

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x.new_zeros(x.shape[0], 4, *x.shape[3:]), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.product(x[:, t], h))
            outputs.append(h)
        return torch.stack(outputs, 1)


SEPARABLE = {"linear": (2, 5, 3), "matmul": (2, 5, 3), "in between": (2, 5, 3),
             "conv2d": (2, 5, 3, 6, 6)}
INSEPARABLE = {"grouped": (2, 5, 3, 6), "another axis": (2, 5, 4), "a weight of its own": (2, 5, 3)}


@pytest.mark.parametrize("kind", SEPARABLE)
def test_the_input_of_a_joined_product_goes_first(kind: str, run: Any, equal: Any) -> None:
    model, inputs = Joined(kind), (torch.randn(SEPARABLE[kind], requires_grad=True),)
    outcome = run(model, inputs)
    summaries = [a.summary for a in outcome.applied]
    assert "1 × product of a concatenation → a sum of products" in summaries
    assert any(s.startswith("5 × (") for s in summaries)
    equal(model, inputs)


@pytest.mark.parametrize("kind", INSEPARABLE)
def test_products_that_cannot_be_separated(kind: str, run: Any, equal: Any) -> None:
    model, inputs = Joined(kind), (torch.randn(INSEPARABLE[kind]),)
    outcome = run(model, inputs)
    assert any(a.summary.endswith("→ one scan") for a in outcome.applied)
    assert not any("concatenation" in a.summary for a in outcome.applied)
    equal(model, inputs)
