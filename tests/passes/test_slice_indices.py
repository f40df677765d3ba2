"""Index tables that are progressions become slices; all others are left, with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import looplift
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looplift.models import dilated_attention
from looplift.optimizer.facts import aten, is_op
from looplift.passes.slice_indices import SliceIndices
from torch import Tensor, nn

Body = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    table: Tensor

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("table", torch.tensor([0, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def every_second(m: Any, x: Tensor) -> Tensor:
    return x.index_select(1, torch.arange(0, x.shape[1], 2)) * 2


def with_offset(m: Any, x: Tensor) -> Tensor:
    return x[:, torch.arange(1, x.shape[1]) - 0]


def from_the_end(m: Any, x: Tensor) -> Tensor:
    return x[:, torch.tensor([-3, -2, -1])]


def all_of_it(m: Any, x: Tensor) -> Tensor:
    return x.index_select(1, torch.arange(x.shape[1]))


def gathered(m: Any, x: Tensor) -> Tensor:
    table = torch.arange(1, x.shape[1], 2)[None, :, None].expand(x.shape[0], -1, x.shape[2])
    return x.gather(1, table)


def copied(m: Any, x: Tensor) -> Tensor:
    places = torch.arange(1, 2 * x.shape[1], 2)
    return torch.zeros(x.shape[0], 2 * x.shape[1], x.shape[2]).index_copy(1, places, x.exp())


def put(m: Any, x: Tensor) -> Tensor:
    out = torch.ones(x.shape[0], x.shape[1] + 2, x.shape[2])
    out[:, torch.arange(2, x.shape[1] + 2)] = x.exp()
    return out


def scattered(m: Any, x: Tensor) -> Tensor:
    table = torch.arange(0, 2 * x.shape[1], 2)[None, :, None].expand_as(x)
    return torch.zeros(x.shape[0], 2 * x.shape[1], x.shape[2]).scatter(1, table, x)


def unfolded(m: Any, x: Tensor) -> Tensor:
    return x.unfold(1, 1, 2).squeeze(-1)


FIRES = {
    "index_select": every_second, "offset": with_offset, "end": from_the_end, "all": all_of_it,
    "gather": gathered, "index_copy": copied, "index_put": put, "scatter": scattered,
    "unfold": unfolded,
}
INDEXED = (aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.unfold.default,
           aten.index_copy.default, aten.index_put.default, aten.scatter.src)


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, run: Any, golden: Any) -> None:
    outcome = run(Model(FIRES[name]), (torch.randn(2, 5, 3),), [SliceIndices()])
    assert len(outcome.applied) == 1
    assert not any(is_op(n, *INDEXED) for n in outcome.graph_module.graph.nodes)
    golden(f"slice_indices_{name}", outcome)


def test_dilated_attention_keeps_no_index_select(run: Any) -> None:
    model, inputs = dilated_attention.model("tiny"), dilated_attention.example_inputs("tiny")
    outcome = run(model, inputs)
    assert not any(is_op(n, *INDEXED) for n in outcome.graph_module.graph.nodes)


def uneven(m: Any, x: Tensor) -> Tensor:
    return x[:, torch.tensor([0, 1, 3])]


def backwards(m: Any, x: Tensor) -> Tensor:
    return x[:, torch.arange(x.shape[1] - 1, -1, -1)]


def buffered(m: Any, x: Tensor) -> Tensor:
    return x.index_select(1, m.table)


def from_data(m: Any, x: Tensor) -> Tensor:
    return x.index_select(1, x[0, :, 0].argsort())


def accumulated(m: Any, x: Tensor) -> Tensor:
    zeros, places = torch.zeros_like(x), torch.arange(3)
    put: Tensor = aten.index_put.default(zeros, [None, places], x[:, :3], True)
    return put


def differing(m: Any, x: Tensor) -> Tensor:
    return x.gather(1, torch.arange(6).view(1, 2, 3).expand(x.shape[0], 2, 3) % x.shape[1])


@pytest.mark.parametrize(("body", "reason"), [
    (uneven, "no progression"), (backwards, "no progression with a step above zero"),
    (buffered, "whose values may change"), (from_data, "computed from data"),
    (accumulated, "accumulated"), (differing, "differs between positions"),
])
def test_skips(body: Body, reason: str, run: Any) -> None:
    outcome = run(Model(body), (torch.randn(2, 5, 3),), [SliceIndices()])
    assert outcome.applied == []
    assert any(reason in s.reason for s in outcome.skips), [s.reason for s in outcome.skips]


@pytest.mark.parametrize("name", FIRES)
@settings(max_examples=4, deadline=None)
@given(sizes=st.tuples(st.sampled_from([0, 1, 2, 3]), st.sampled_from([3, 4, 5, 7]),
                       st.sampled_from([0, 1, 2, 3, 5])))
def test_same_values_and_gradients(name: str, sizes: tuple[int, int, int]) -> None:
    x = torch.randn(sizes)
    fast = looplift.apply_passes(Model(FIRES[name]), (x,), measure=False)
    reasons = [d["reason"] for d in fast.report.to_dict()["declined"]]
    assert not [r for r in reasons if "differs" in r or "could not" in r], reasons


def test_keeps_the_contract(keeps_contract: Any) -> None:
    """A gather is fresh, a slice is a view: writing to the result must not reach the input."""
    for body in (every_second, with_offset, all_of_it, gathered):
        keeps_contract(Model(body), (torch.randn(2, 5, 3),))


def test_is_idempotent(run: Any) -> None:
    outcome = run(Model(every_second), (torch.randn(2, 5, 3),), [SliceIndices(), SliceIndices()])
    assert len(outcome.applied) == 1


def test_a_changed_buffer_is_seen() -> None:
    model = Model(buffered)
    x = torch.randn(2, 5, 3)
    fast = looplift.apply_passes(model, (x,), measure=False)
    model.table.copy_(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(fast(x), model(x))
