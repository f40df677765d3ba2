"""Graphs in normal form compute what the model does: values, dtypes, shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import looplift
import pytest
import torch
from looplift.optimizer.capture import capture
from looplift.optimizer.facts import Line, source_line, spelled
from looplift.optimizer.rewritten import Rewritten
from torch import Tensor, nn
from torch.testing import assert_close

X, NUMBERS = torch.rand(3, 4), torch.arange(12).reshape(3, 4)


class Program(nn.Module):
    """A function as a module."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Tensor) -> Any:
        return self.run(*args)


def every_other(x: Tensor) -> Tensor:
    made = x.new_zeros(3, 9)
    made[:, 1::2] = x
    return made


def grown(x: Tensor) -> Tensor:
    made = torch.tensor([])
    for t in range(x.shape[1]):
        made = torch.cat([made, x[:, t]])
    return made


def windows(x: Tensor, step: int, across: bool = False) -> Tensor:
    """Of what is written to a buffer, upwards or downwards, along the axis read or another."""
    made, seen = x.new_ones(4, 4), []
    for t in [0, 1, 2][::step]:
        made[t + (step < 0)] = x[t] + t
        seen.append((made[:, 1:3] if across else made[t : t + 2, 1:3]).clone())
    return torch.stack(seen)


def placed(x: Tensor) -> Tensor:
    made = x.new_zeros(3, 4, 4)
    made[:, 1, 2] = x[:, 0]
    return made


def appended(x: Tensor, parts: list[Tensor], begin: int) -> Tensor:
    """Windows of a sequence that grows by some parts."""
    seen = []
    for part in parts:
        x = torch.cat([x, part], -1)
        seen += [x[:, begin:].flatten(), x[:, begin - 1]]
    return torch.cat(seen)


def total(x: Tensor) -> Any:
    made: Any = 0
    for t in range(x.shape[1]):
        made = made + x[:, t]
    return made


CASES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "windows of what is written": (lambda x: windows(x, 1), X),
    "windows of what is written downwards": (lambda x: windows(x, -1), X),
    "windows across what is written": (lambda x: windows(x, 1, across=True), X),
    "windows of integers that are written": (lambda x: windows(x, -1), NUMBERS),
    "the end of what grows": (lambda x: appended(x, [x[:, :1], x[:, 2:3], x[:, 1:2]], -2), X),
    "the end of what grows by other dtypes": (
        lambda x: appended(x, [x[:, :1].float(), x[:, 2:3], x[:, 1:2].double()], -3), NUMBERS),
    "the end of what grows by more at once": (lambda x: appended(x, [x, x + 1, x * 2], -6), X),
    "a place that was written in what was just written": (lambda x: placed(x)[:, 1:2], X),
    "what was written at a place just written": (lambda x: placed(x)[:, 1:2, 2:3], X),
    "one of the places that a step wrote": (lambda x: every_other(x)[:, 3:4], X),
    "a place that a step wrote and one beside": (lambda x: every_other(x)[:, 1:3], X),
    "a place between": (lambda x: every_other(x)[:, 2:3], X),
    "an empty start of another dtype": (grown, NUMBERS),
    "an empty part of another dtype": (lambda x: torch.cat([torch.zeros(3, 0), x], 1), NUMBERS),
    "a cat of two dtypes in a cat": (
        lambda x: torch.cat([torch.cat([x + 2**24, x.float()]), x.double()]), NUMBERS),
    "all of a tensor of another dtype": (
        lambda x: torch.slice_scatter(torch.zeros(3, 4), x, 1), NUMBERS),
    "a part, read again": (
        lambda x: torch.slice_scatter(torch.zeros(3, 9), x, 1, 2, 6)[:, 3:5], NUMBERS),
    "a place, read again": (
        lambda x: torch.select_scatter(torch.zeros(3, 9), x[:, 0], 1, 2)[:, 2], NUMBERS),
    "a sum of a mask that begins as 0": (total, NUMBERS > 5),
    "the sign of a sum of nothing but -0": (lambda x: torch.signbit(total(x)), -torch.zeros(3, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_dtypes(name: str) -> None:
    run, x = CASES[name]
    model = Program(run)
    captured = capture(model, (x,))
    assert_close(Rewritten(model, captured, captured.graph_module)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(("width", "stacks"), [(1, 2), (2, 0)])
def test_windows_are_taken_apart_where_elements_are_appended_one_by_one(
    width: int, stacks: int
) -> None:
    """A network whose features grow by several at a time reads slices of them, as it did."""
    parts = [X[:, :width] + k for k in range(3)]
    graph = capture(Program(lambda x: appended(x, parts, -3)), (X,)).graph_module.graph
    found = graph.find_nodes(op="call_function", target=torch.ops.aten.stack.default)
    assert len(found) == stacks


def test_outputs_that_are_one_tensor_stay_one() -> None:
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        h = torch.zeros_like(x[0])
        for t in range(x.shape[0]):
            h = torch.tanh(h * 0.9 + x[t])
        return h.view_as(h), h, h, x, x

    fast = looplift.apply_passes(Program(forward), (X,), measure=False)
    assert fast.graph_module is not None
    view, h, again, x, same = fast(X)
    assert h is again
    assert view is not h
    assert x is same is X


def test_a_view_of_an_input_is_not_the_input() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.zeros_like(x[0])
        for t in range(x.shape[0]):
            h = torch.tanh(h * 0.9 + x[t])
        return h, x.expand(3, 4)

    fast = looplift.apply_passes(Program(forward), (X,), measure=False)
    assert fast.graph_module is not None
    with torch.no_grad():
        shown = fast(X)[1]
    assert shown is not X
    assert shown.data_ptr() == X.data_ptr()


@pytest.mark.parametrize(("operation", "name"), [
    (torch.ops.aten._native_batch_norm_legit_functional.default, "batch_norm"),
    (torch.ops.aten.native_layer_norm.default, "layer_norm"),
    (torch.ops.aten.linalg_inv_ex.default, "inv"), (torch.ops.aten._softmax.default, "softmax"),
    (torch.ops.aten.searchsorted.Tensor, "searchsorted"), (torch.ops.aten.exp.default, "exp"),
    (operator.getitem, "getitem"), (torch.ops.aten.max_pool2d_with_indices.default,
                                    "max_pool2d_with_indices"),
])
def test_operations_have_the_names_that_users_know(operation: Any, name: str) -> None:
    assert spelled(operation) == name


def test_an_operation_stands_at_the_models_own_line() -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    own, *beside = (Line(f"/site-packages/{file}.py", number, "text").as_frame() for number, file
                    in enumerate(("model/attention", "einx/_src/frontend/api", "einops/einops",
                                  "opt_einsum/contract", "torch_einops_utils/sequential")))
    assert source_line(node) is None
    for inner, file in ((beside[:3], "attention.py:0"), (beside, "sequential.py:4")):
        node.meta["stack_trace"] = "\n".join((own, *inner))
        assert str(source_line(node)) == file
