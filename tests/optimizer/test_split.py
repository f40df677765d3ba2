"""Reads that cover a tensor become one split; those that a caller may write to stay slices."""

from __future__ import annotations

from typing import Any

import looplift
import pytest
import torch
from looplift.optimizer.capture import capture
from looplift.optimizer.facts import aten, is_op
from looplift.optimizer.pipeline import run_passes
from torch import Tensor, nn


class Gates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        i, f, g = x.chunk(3, -1)
        return i.sigmoid() * g.tanh() + f


class Overlapping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3].exp() * x[:, 1:4].exp() + x[:, 3:6].exp()


class Halves(nn.Module):
    """Nested pieces: a half of a half."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        one, two = left.chunk(2, -1)
        return one.exp() * two.exp() + right.sum(-1, keepdim=True)


class Returned(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, two = (x * 2).chunk(2, -1)
        return one, two


def splits(model: nn.Module, x: Tensor) -> int:
    graph = run_passes(capture(model, (x,)), ()).graph_module.graph
    return sum(is_op(n, aten.split_with_sizes.default) for n in graph.nodes)


@pytest.mark.parametrize(("model", "count"), [
    (Gates(), 1), (Overlapping(), 0), (Halves(), 2), (Returned(), 0),
])
def test_splits(model: nn.Module, count: int) -> None:
    x = torch.randn(5, 6 if count == 0 or count == 1 else 8)
    assert splits(model, x) == count
    assert isinstance(looplift.verify(model, looplift.apply_passes(model, (x,), measure=False),
                                      (x,)), looplift.Equal)


def test_what_is_returned_can_be_written_to() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * 2
            return y[:, :3], y[:, 3:]

    x = torch.randn(2, 6, requires_grad=True)
    fast = looplift.apply_passes(Both(), (x,), measure=False, mode="training")
    one, two = fast(x)
    one.add_(1)  # torch forbids this on one of several views of a split
    (one.sum() + two.sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))  # type: ignore[arg-type]


def test_backward_is_one_cat() -> None:
    x = torch.randn(5, 6, requires_grad=True)
    fast = looplift.apply_passes(Gates(), (x,), measure=False, mode="training")
    names: set[Any] = set()
    todo = [fast(x).grad_fn]
    while todo:
        function = todo.pop()
        if function is not None:
            names.add(type(function).__name__)
            todo += [f for f, _ in function.next_functions]
    assert "SplitWithSizesBackward0" in names
    assert "SliceBackward0" not in names
