"""Rows looked up by integers that steps carry: PyTorch's values, gradients and exceptions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import looplift
import pytest
import torch
from looplift.optimizer import fused, lookups
from looplift.optimizer.composed import Early
from looplift.optimizer.fused import build_kernel, fused_scan
from looplift.optimizer.loop import plain_loop
from looplift.optimizer.pointwise import Unsupported
from looplift.optimizer.step import checks, step_function
from looplift.tests.corpus.models import Viterbi
from torch import Tensor, nn
from torch.testing import assert_close

aten = torch.ops.aten
LOOKUPS = {  # of x [3, 3, 3] by i and j [3, 2]
    "embedding": "torch.ops.aten.embedding.default(x[0], i)",
    "embedding with padding": "torch.ops.aten.embedding.default(x[0], i, 1)",
    "gather": "torch.ops.aten.gather.default(x, 1, i[:, :, None].expand(-1, -1, 2))",
    "gather along the last axis": "torch.ops.aten.gather.default(x, -1, i[:, None])",
    "gather along the first axis": "torch.ops.aten.gather.default(x, 0, i[:1, :, None])",
    "index_select": "torch.ops.aten.index_select.default(x, -2, i[0])",
    "index_select by a number": "torch.ops.aten.index_select.default(x, 0, i[0, 0])",
    "index": "torch.ops.aten.index.Tensor(x, [i])",
    "index of a later axis": "torch.ops.aten.index.Tensor(x, [None, j - 3, None])",
    "index of two axes": "torch.ops.aten.index.Tensor(x, [i[:, None], j[0]])",
    "index of all axes": "torch.ops.aten.index.Tensor(x, [i, j, i])",
    "index_add": "torch.ops.aten.index_add.default(x, 1, i[0], x[:, :2], alpha=0.5)",
    "index_put": "torch.ops.aten.index_put.default(x, [i], x[:, :2, None], True)",
    "index_put at two axes": "torch.ops.aten.index_put.default(x, [None, i, j], x[0, 0, :2], True)",
    "index_fill": "torch.ops.aten.index_fill.int_Scalar(x, -1, j[1], 2.5)",
    "scatter_add":
        "torch.ops.aten.scatter_add.default(x, 2, i[:, None].expand(-1, 3, -1), x[..., :2])",
    "scatter_add of fewer": "torch.ops.aten.scatter_add.default(x, 2, i[:, None], x[:, :1, :2])",
    "scatter": "torch.ops.aten.scatter.value(x, 1, i[..., None].expand(-1, -1, 3), 2.5)",
    "index of axes that are apart": "torch.ops.aten.index.Tensor(x, [i, None, j])",
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_values_and_gradients_are_those_of_pytorch(name: str) -> None:
    x = torch.randn(3, 3, 3, dtype=torch.float64)
    x[2, 2, 2], x[1, 0, 1] = torch.inf, torch.nan
    i, j = torch.randint(0, 3, (3, 2)), torch.randint(0, 3, (3, 2))
    found: list[tuple[Tensor, Tensor]] = []
    for early in (False, True):
        given = x.clone().requires_grad_()
        with Early() if early else torch.enable_grad():
            made = eval(LOOKUPS[name], {"torch": torch, "x": given, "i": i, "j": j})
        (grad,) = torch.autograd.grad(made, given, torch.ones_like(made))
        found.append((made, grad))
    assert_close(found[1], found[0], rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in LOOKUPS if name.split()[-1] not in (
    "apart", "fewer")])
def test_in_a_kernel(name: str) -> None:
    step = f"""
def step(h, x):
    i = torch.ops.aten.argmax.default(h, -1)
    j = torch.ops.aten.argmin.default(h, -1)
    y = {LOOKUPS[name]}
    h_1 = torch.tanh(h * 0.7 + x[:, :2])
    checked = torch.sum(h, -1) * 0
    return [h_1, y, checked]
"""
    h, x = torch.randn(3, 2, 3).double(), torch.randn(5, 3, 3, 3).double()
    given = h.requires_grad_(), x.requires_grad_()
    build_kernel(step, [h], [x], [])
    want = plain_loop(step_function(step), [h], [x], [])
    with mock.patch.object(fused, "plain", side_effect=AssertionError("no kernel ran")):
        got = fused_scan(step, [h], [x], [], [0, 0])
        grads = [torch.autograd.grad(results[1].sin().sum() + results[0].sum(), given)
                 for results in (got, want)]
    assert_close(list(got), list(want), rtol=1e-12, atol=1e-12)
    assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


def test_integers_are_looked_up_too() -> None:
    table, i = torch.randint(-9, 9, (4, 5)), torch.randint(0, 4, (6,))
    with Early():
        made = aten.index.Tensor(table, [i])
    assert_close(made, table[i], rtol=0, atol=0)


class Decoder(nn.Module):
    """A recurrent network that reads the most likely of its own tokens."""

    def __init__(self, rows: int = 7, width: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(rows, width, padding_idx=2)
        self.cell, self.likely = nn.GRUCell(width, width), nn.Linear(width, rows)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        token, written = torch.zeros(len(state), dtype=torch.long), []
        for _ in range(9):
            state = self.cell(self.tokens(token), state)
            token = self.likely(state).argmax(-1)
            written.append(token)
        return torch.stack(written, 1), state


class Started(nn.Module):
    """A decoder whose first tokens are given, as are the kinds of those that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.likely = nn.Embedding(7, 6), nn.Linear(6, 7)
        self.after = nn.Parameter(torch.randn(7, 3, 7))

    def forward(self, state: Tensor, token: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        seen = []
        for t in range(kinds.shape[1]):
            seen.append(token)
            token = (self.likely(state) + self.after[token, kinds[:, t]]).argmax(-1)
            state = torch.tanh(state + self.tokens(token))
        return torch.stack(seen, 1), state


class Walker(nn.Module):
    """Places on a ring, moved by what is read there, counted from the end where negative."""

    def forward(self, x: Tensor, field: Tensor) -> Tensor:
        place, rows, read = torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)), []
        for t in range(x.shape[1]):
            read.append(field[rows, place] * x[:, t])
            place = torch.where(read[-1] > 0, (place + 1) % 4, place.clamp(0, 2) - 3)
        return torch.stack(read, 1)


class Mesh(nn.Module):
    """Masses and springs between some of them, whose forces are added up."""

    edges: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 4, 4]]))
        self.stiff = nn.Parameter(torch.rand(5, 1))

    def forward(self, place: Tensor) -> tuple[Tensor, Tensor]:
        speed, seen = torch.zeros_like(place), []
        for _ in range(8):
            a, b = self.edges[0], self.edges[1]
            apart = place[:, a] - place[:, b]
            force = torch.zeros_like(place).index_add(1, a, -self.stiff * apart)
            force = force.index_add(1, b, self.stiff * apart)
            speed = speed + 0.1 * force
            place = place + 0.1 * speed
            seen.append(place)
        return torch.stack(seen, 1), speed


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "decoder": (Decoder, (torch.randn(3, 6),), 1),
    "started": (Started, (torch.randn(4, 6), torch.tensor([1, 6, 0, 3]),
                          torch.randint(0, 3, (4, 8))), 1),
    "viterbi": (partial(Viterbi, 5), (torch.randn(3, 9, 5),), 2),
    "mesh": (Mesh, (torch.randn(2, 5, 3),), 1),
    "walker": (Walker, (torch.randn(3, 11), torch.randn(3, 4)), 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_loops_that_look_up_are_kernels(name: str, equal: Any) -> None:
    torch.manual_seed(0)
    model, given, loops = MODELS[name]
    fast = equal(model(), given)
    told = fast.report.to_dict()["rewrites"]
    assert len({r["where"] for r in told if r["pass_name"] == "fuse-recurrences"}) == loops
    assert_close(fast(*given), fast.original(*given))


@pytest.mark.parametrize("wrong", [-8, 7, 2**40])
def test_integers_that_are_given_may_be_out_of_range(wrong: int) -> None:
    model, given, _ = MODELS["started"]
    state, token, kinds = given
    fast = looplift.apply_passes(model().eval(), given, measure=False, mode="inference")
    assert_close(fast(state, token - 7, kinds), fast.original(state, token - 7, kinds))
    for run in (fast, fast.original):
        with pytest.raises(IndexError, match="out of bounds"):
            run(state, torch.tensor([1, 1, wrong, 1]), kinds)


@pytest.mark.parametrize("clamped", [False, True])
def test_integers_that_only_come_from_outside_have_no_bounds(clamped: bool) -> None:
    class Adds(nn.Module):
        def forward(self, place: Tensor, x: Tensor) -> Tensor:
            read: list[Tensor] = []
            place = place.clamp(min=0) if clamped else place
            for t in range(x.shape[1]):
                read.append(torch.where(place > t, x[:, t], 0.0))
                place = torch.where(x[:, t] > 0, place, place - 1)
            return torch.stack(read, 1)

    fast = looplift.apply_passes(Adds(), (torch.tensor([4, 5]), torch.randn(2, 12)), measure=False)
    reasons = {d["reason"] for d in fast.report.to_dict()["declined"]}
    assert "its integers may be too large for floating numbers" in reasons


def test_integers_that_are_clamped_before_the_loop_are_small(equal: Any) -> None:
    class Life(nn.Module):
        def forward(self, cells: Tensor) -> Tensor:
            cells, seen = cells.clamp(0, 1), []
            for _ in range(8):
                cells = ((cells.roll(1, -1) + cells.roll(-1, -1)) == 1).to(cells.dtype)
                seen.append(cells)
            return torch.stack(seen, 1)

    model, cells = Life(), torch.randint(0, 2, (3, 7))
    fast = equal(model, (cells,))
    assert "fused_scan" in fast.code
    cells[0] = torch.tensor([2**40, -(2**40), 0, 1, 2, 3, 4])
    assert_close(fast(cells), model(cells))


def test_integers_that_are_too_large_for_their_own_dtype_have_no_kernel() -> None:
    """float64 would hold what wraps around in int32."""
    class Squares(nn.Module):
        def forward(self, n: Tensor, x: Tensor) -> Tensor:
            n, h, seen = n.clamp(0, 70000), x[:, 0], []
            for t in range(x.shape[1]):
                h = torch.tanh(h) + x[:, t] + n * n
                n = torch.where(h > 0, n, 1)
                seen.append(h)
            return torch.stack(seen, 1)

    n, x = torch.tensor([3, 5], dtype=torch.int32), torch.randn(2, 12, dtype=torch.float64)
    fast = looplift.apply_passes(Squares(), (n, x), measure=False, mode="inference")
    assert "its integers may be too large for floating numbers" in {
        d["reason"] for d in fast.report.to_dict()["declined"]}
    with torch.no_grad():
        assert_close(fast(n + 65534, x), fast.original(n + 65534, x))


@pytest.mark.parametrize("axis", [0, 1])
def test_places_along_an_axis_of_one(axis: int) -> None:
    step = f"""
def step(h, x):
    most, place = torch.ops.aten.max.dim(h + x, {axis})
    h_1 = torch.tanh(h + x + most.unsqueeze({axis}))
    return [h_1, place.type_as(h)]
"""
    h, x = torch.randn(1, 4), torch.randn(3, 1, 4)
    build_kernel(step, [h], [x], [])
    with mock.patch.object(fused, "plain", side_effect=AssertionError("no kernel ran")):
        made = fused_scan(step, [h], [x], [], [0])
    assert_close(made, fused.plain(step, [h], [x], [], [0], False))


STEP = """
def step(n, h, x, table):
    place = torch.ops.aten._to_copy.default(n, dtype=torch.int64)
    read = h + torch.embedding(table, place) * x
    inside = torch.ops.aten.logical_and.default(place >= 0, place < 4)
    told = torch.ops.aten.where.Scalar(inside, 0.0, nan)
    checked = torch.ops.aten.type_as.default(told, n)
    return [n + 1, read, read, checked]
"""


@pytest.mark.parametrize("start", [-1, 0, 1])
def test_what_is_out_of_range_raises_as_pytorch_does(start: int) -> None:
    x, table = torch.randn(4, 2, 3), torch.randn(4, 3)
    given = [torch.tensor([0.0, start]), torch.zeros(2, 3)], [x], [table]
    build_kernel(STEP, *given)
    if start:
        with pytest.raises(IndexError, match="index out of range"):
            fused_scan(STEP, *given, [0, 0])
    else:
        with mock.patch.object(fused, "plain", side_effect=AssertionError("no kernel ran")):
            made = fused_scan(STEP, *given, [0, 0])
        assert_close(made[2], (table[:, None] * x).cumsum(0))


def test_a_step_that_does_not_tell_what_is_out_of_range_runs_in_a_loop() -> None:
    assert checks(STEP) == (3,)
    assert checks(STEP.replace("checked", "told")) is None
    assert checks(STEP.replace("torch.embedding(table, place)", "table")) == (3,)


def test_tables_of_many_rows_have_no_kernel() -> None:
    def build(rows: int, width: int) -> None:
        x = torch.zeros(4, 2, width)
        build_kernel(STEP, [x[0, :, 0], x[0]], [x], [torch.zeros(rows, width)])

    with pytest.raises(Unsupported, match="it looks up one of 4097 rows"):
        build(lookups.MOST_ROWS + 1, 3)
    with pytest.raises(Unsupported, match="a kernel would read 8000000 elements in each step"):
        build(4000, 1000)


@pytest.mark.parametrize("mask", ["torch.full([], True, dtype=torch.bool)",
                                  "torch.zeros([3], dtype=torch.bool)"])
def test_constant_masks(mask: str) -> None:
    step = f"""
def step(h, x):
    both = torch.logical_and(x > 0, {mask})
    h = torch.where(both, h + x, torch.where({mask}, h * 2, -h)) + {mask}
    return [h, h]
"""
    given = [torch.randn(2, 3)], [torch.randn(5, 2, 3)], list[Tensor]()
    build_kernel(step, *given)
    with mock.patch.object(fused, "plain", side_effect=AssertionError("no kernel ran")):
        made = fused_scan(step, *given, [0])
    assert_close(made, fused.plain(step, *given, [0], False))


class Pointing(nn.Module):
    """Each step takes the best place that no earlier one took."""

    def forward(self, scores: Tensor) -> Tensor:
        taken, found = torch.zeros_like(scores[:, 0], dtype=torch.bool), []
        for t in range(scores.shape[1]):
            best = scores[:, t].masked_fill(taken, -10.0).argmax(-1)
            taken = taken.scatter(1, best[:, None], True)
            found.append(best)
        return torch.stack(found, 1)


def test_places_of_masks_that_steps_carry() -> None:
    model, scores = Pointing(), torch.randn(3, 12, 12)
    fast = looplift.apply_passes(model, (scores,), measure=False, mode="inference")
    assert "failed to propose" not in str(fast.report)
    assert_close(fast(scores), model(scores), rtol=0, atol=0)
