"""Affine recurrences at once: the loop's values, and no larger an error than the loop's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looplift.optimizer import fused
from looplift.optimizer.affine_step import AtOnce, at_once
from looplift.optimizer.compiled import compiled
from looplift.optimizer.fused import fused_scan
from looplift.optimizer.loop import plain_loop
from looplift.optimizer.pointwise import Unsupported
from looplift.optimizer.step import placed, step_function
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

SIZE, ROW = (2, 3), (3,)
# semirings in the order of solution; the lines of a step; sizes of carries, slices, invariants
AFFINE: dict[str, tuple[list[str], str, int, int, int]] = {
    "decay": (["a sum"], "n = a * h + x; return [n, n * 2 - h]", 1, 1, 1),
    "decay of each step": (["a sum"], "n = torch.exp(-y * y) * h + x; return [n, n]", 1, 2, 0),
    "before": (["a sum"], "n = torch.lerp(h, x, torch.sigmoid(a)); return [n, h]", 1, 1, 1),
    "rotation": (["a sum"], "n, m = a * h - b * g + x, b * h + a * g; return [n, m, n * m]",
                 2, 1, 2),
    "second order": (["a sum"], "y = x - a * h + 0.3 * g; return [y, h, y]", 2, 1, 1),
    "reset": (["a sum"], "n = torch.where(x > 0.5, torch.zeros_like(h), a * h) + x; "
              "return [n, n]", 1, 1, 1),
    "held": (["a sum"], "n = torch.where(x > 0, (x - h) / 2, h); return [n, n]", 1, 1, 0),
    "masked": (["a sum"], "n = h.masked_fill(x > 0.5, 0.25) * a + x; return [n, n]", 1, 1, 1),
    "masks that count": (["a sum"], "n = h * (x > 0) + h * (x > 1) + (x > 0) + (x > 1); "
                      "return [n, n]", 1, 1, 1),
    "Fibonacci": (["a sum"], "n, m = h + g, h + x; return [n, m, n]", 2, 1, 0),
    "product": (["a sum"], "n = h * x; return [n, n]", 1, 1, 0),
    "nothing read of it": (["a sum"], "n = 1 - h - x; return [n, a]", 1, 1, 1),
    "sums of sums": (["a sum"] * 2, "n = h + x; m = 0.5 * g + n; return [n, m, m, h]", 2, 1, 0),
    "one step late": (["a sum"] * 2, "n = 0.5 * h + x + g; return [n, x, n, g]", 2, 1, 0),
    "greatest": (["a maximum"], "n = torch.maximum(h, x); return [n, n]", 1, 1, 0),
    "waiting time": (["a maximum"], "n = torch.relu(h + x - a); return [n, n]", 1, 1, 1),
    "not below": (["a maximum"], "n = (x + h).clamp(min=-0.5); return [n, n]", 1, 1, 0),
    "not above": (["a minimum"], "n = (h - x).clamp(max=0.5); return [n, n]", 1, 1, 0),
    "least": (["a minimum"], "n = torch.minimum(h - a, x); return [n, n]", 1, 1, 1),
    "greatest while": (["a maximum"], "n = torch.where(x > 0, torch.maximum(h + a, x), h); "
                       "return [n, n]", 1, 1, 1),
    "log-sum-exp": (["a log-sum-exp"], "n = torch.logaddexp(h + a, x); return [n, n]", 1, 1, 1),
    "exponential sums": (["a maximum", "a sum"], "n = torch.maximum(h + a, x); "
                         "m = torch.exp(h + a - n) * g + torch.exp(x - n); "
                         "return [n, m, m]", 2, 1, 1),
}
OTHER = {
    "tanh of what it carries": ("return [torch.tanh(h + x)]", 1),
    "mul of what it carries": ("return [h * h + x]", 1),
    "div of what it carries": ("return [x / h]", 1),
    "element by element": ("return [h.sum() + x]", 1),
    "minimum of what it carries": ("return [torch.minimum(torch.maximum(h, x), a)]", 1),
    "gt of what it carries": ("return [torch.where(h > 0, h, x)]", 1),
    "5 of what it carries": ("return [g, i, j, k, h + x]", 5),
}
NAMES = ("h", "g", "i", "j", "k")


def stepped(lines: str, held: int, read: int = 1, fixed: int = 1) -> str:
    heads = [*NAMES[:held], *("x", "y")[:read], *("a", "b")[:fixed]]
    return f"def step({', '.join(heads)}):\n    {lines}\n"


def looped(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    reverse: bool,
) -> list[Tensor]:
    turned = [s.flip(0) for s in slices] if reverse else slices
    body: Any = step_function(step)
    found = plain_loop(body, carries, turned, invariants)
    held = len(carries)
    return [*found[:held], *(r.flip(0) if reverse else r for r in found[held:])]


@pytest.mark.parametrize("name", AFFINE)
def test_all_steps_at_once_are_the_loop(name: str) -> None:
    rings, lines, held, read, fixed = AFFINE[name]
    step = stepped(lines, held, read, fixed)
    sizes = (*[SIZE] * (held + read), *[ROW] * fixed)
    found = at_once(step, sizes, (held, read, fixed))
    assert isinstance(found, AtOnce)
    assert [block.ring.name for block in found.blocks] == rings
    torch.manual_seed(0)
    for steps in (1, 2, 3, 4, 5, 6, 7, 37, 128):
        carries = [torch.randn(SIZE, dtype=torch.float64) for _ in range(held)]
        slices = [torch.randn(steps, *SIZE, dtype=torch.float64) for _ in range(read)]
        invariants = [torch.rand(ROW, dtype=torch.float64) * 0.6 for _ in range(fixed)]
        for reverse in (False, True):
            want = looped(step, carries, slices, invariants, reverse)
            assert_close(found.run(carries, slices, invariants, reverse), want,
                         rtol=1e-11, atol=1e-11)


def test_a_step_that_takes_its_carry_apart_has_a_reason() -> None:
    step = "def step(h, x):\n    p, q = h.split([1, 2], 1)\n    return [torch.cat([q, p], 1) + x]\n"
    found = at_once(step, (SIZE, SIZE), (1, 1, 0))
    assert isinstance(found, Unsupported)
    assert "element by element" in str(found)


@pytest.mark.parametrize("reason", OTHER)
def test_other_steps_have_a_reason(reason: str) -> None:
    lines, held = OTHER[reason]
    found = at_once(stepped(lines, held), (*[SIZE] * (held + 1), ROW), (held, 1, 1))
    assert isinstance(found, Unsupported)
    assert reason in str(found)


TWO = ("{0} + {1}", "{0} - {1}", "{0} * {1}", "torch.maximum({0}, {1})", "torch.minimum({0}, {1})",
       "torch.where(x > 0, {0}, {1})", "torch.add({0}, {1}, alpha=0.5)", "{0} / ({1} * {1} + 1)",
       "torch.logaddexp({0}, {1})")
ONE = ("-{0}", "{0} * 0.5", "0.3 - {0}", "{0}.clamp(min=0.1)", "{0}.clamp(max=0.2)", "relu({0})",
       "{0}.masked_fill(x > 1, 0.25)", "{0} * (x > 0)", "torch.lerp({0}, x, a)", "{0}.clone()")


@st.composite
def random_steps(draw: Any) -> str:
    """Two carries, a slice and an invariant, and what a few operations make of them."""
    names = ["h", "g", "x", "a"]
    lines = []
    for k in range(draw(st.integers(1, 6))):
        template = draw(st.sampled_from(ONE + TWO))
        operands = [draw(st.sampled_from(names)) for _ in range(2)]
        lines.append(f"v{k} = " + template.replace("relu", "torch.relu").format(*operands))
        names.append(f"v{k}")
    nexts = [draw(st.sampled_from(names)) for _ in range(2)]
    shown = [draw(st.sampled_from(names)) for _ in range(2)]
    return stepped("; ".join([*lines, f"return [{', '.join(nexts + shown)}]"]), 2)


@settings(max_examples=100, deadline=None)
@given(random_steps(), st.integers(1, 20), st.booleans())
def test_random_steps_at_once_are_the_loop(step: str, steps: int, reverse: bool) -> None:
    sizes = (SIZE, SIZE, SIZE, SIZE)
    found = at_once(step, sizes, (2, 1, 1))
    if isinstance(found, Unsupported):
        return
    torch.manual_seed(steps)
    carries = [torch.randn(SIZE, dtype=torch.float64) for _ in range(2)]
    slices, invariants = [torch.randn(steps, *SIZE, dtype=torch.float64)], [torch.rand(
        SIZE, dtype=torch.float64)]
    made = found.run(carries, slices, invariants, reverse)
    want = looped(step, carries, slices, invariants, reverse)
    if made is not None and all(t.isfinite().all() for t in want):
        assert_close(made, want, rtol=1e-9, atol=1e-9 * max(float(t.abs().max()) for t in want))


def test_a_loop_runs_where_numbers_are_not_finite() -> None:
    """A reset forgets a NaN, 0 times NaN does not; a product of growth overflows before a small
    state has grown."""
    reset = stepped("n = torch.where(x > 9, torch.zeros_like(h), h) + x; return [n, n]", 1)
    x = torch.randn(200, 3)
    x[3, 0], x[9, 0] = float("nan"), 10.0
    growth = stepped("n = a * h; return [n, n]", 1)
    for step, start, slices, a in ((reset, torch.zeros(3), x, torch.zeros(3)),
                                   (growth, torch.full((3,), 1e-30), x, torch.full((3,), 2.0)),):
        found = at_once(step, (ROW, ROW, ROW), (1, 1, 1))
        assert isinstance(found, AtOnce)
        assert found.run([start], [slices], [a], False) is None
        with mock.patch.object(fused, "compiled", return_value=None):
            made = fused_scan(step, [start], [slices], [a], [0], False)
        assert_close(made, looped(step, [start], [slices], [a], False), equal_nan=True,
                     rtol=0, atol=0)
        assert made[1].isfinite().any()


def test_under_a_dispatch_mode() -> None:
    """Such a mode switches vmap off within an operator's call."""
    step = stepped("n = torch.sigmoid(a) * h + torch.tanh(x); return [n, n * x]", 1)
    tensors = [torch.zeros(3)], [torch.randn(200, 3)], [torch.rand(3)]
    with mock.patch.object(fused, "compiled", return_value=None), \
            mock.patch.object(fused, "plain", side_effect=AssertionError("a loop ran")):
        want = fused_scan(step, *tensors, [0], False)
        with FlopCounterMode(display=False):
            assert_close(fused_scan(step, *tensors, [0], False), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_constants_of_a_backward_are_of_the_dtype_that_it_runs_in(dtype: torch.dtype) -> None:
    """It is traced in single precision; gradients of pieces are written to zeros."""
    step = ("def step(h, x):\n    n = 0.5 * h + x.narrow(0, 1, 2)\n"
            "    return [n, x.narrow(0, 0, 2) + n]\n")
    h, x = torch.zeros(2, dtype=dtype), torch.randn(200, 3, dtype=dtype, requires_grad=True)
    with mock.patch.object(fused, "compiled", return_value=None):
        [got] = torch.autograd.grad(fused_scan(step, [h], [x], [], [0])[1].sum(), [x])
    [want] = torch.autograd.grad(looped(step, [h], [x], [], False)[1].sum(), [x])
    assert_close(got, want)


def test_a_step_makes_its_constants_where_it_runs() -> None:
    step = "x * torch.ones([], dtype=torch.float16, device=torch.device('cuda', index=0))"
    assert placed(step, "x", torch.float16) == "x * torch.ones([], dtype=x.dtype, device=x.device)"


DECAY = "def step(h, x, a):\n    n = a * h + x\n    return [n, n]\n"
RUNNING = ("def step(m, s, k, v):\n    n = torch.maximum(m, k)\n"
           "    t = torch.exp(m - n) * s + torch.exp(k - n) * v\n    return [n, t, t]\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("decay", "steps"), [
    ((0.0, 1e-3), 4096), ((-1.0, 0.0), 4096), ((1.0, 1.0), 4096), ((0.0, 1.0), 4096),
    ((0.999, 1.0), 65536),
])
def test_no_larger_an_error_than_the_loop(
    decay: tuple[float, float], steps: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    a = torch.empty(steps, 3).uniform_(*decay).to(dtype)
    compared(DECAY, [torch.randn(3).to(dtype)], [torch.randn(steps, 3).to(dtype), a])


def test_exponential_sums_of_many_steps() -> None:
    torch.manual_seed(0)
    start = [torch.full((3,), -1e30), torch.zeros(3)]
    compared(RUNNING, start, [30 * torch.randn(4096, 3), torch.randn(4096, 3)])


def compared(step: str, starts: list[Tensor], slices: list[Tensor]) -> None:
    """The errors against float64, of values and gradients: a loop's, a kernel's, and at once."""
    def errors(run: Any, dtype: torch.dtype) -> list[Tensor]:
        given = [t.to(dtype).requires_grad_() for t in (*starts, *slices)]
        made = run(given[: len(starts)], given[len(starts) :])[len(starts) :]
        grads = torch.autograd.grad(made, given, [torch.ones_like(m) for m in made])
        return [t.detach().double() for t in (*made, *grads)]

    def operator(carries: list[Tensor], slices: list[Tensor]) -> Any:
        return fused_scan(step, carries, slices, [], [0], False)

    def loop(carries: list[Tensor], slices: list[Tensor]) -> Any:
        return looped(step, carries, slices, [], False)

    dtype = slices[0].dtype
    wide, theirs = errors(loop, torch.float64), errors(loop, dtype)
    for found in (compiled, lambda source: None):
        with mock.patch.object(fused, "compiled", found):
            ours = errors(operator, dtype)
        for want, *both in zip(wide, theirs, ours, strict=True):
            before, after = ((want - t).abs().max() for t in both)
            assert after <= 2 * before + 4 * torch.finfo(dtype).eps * want.abs().mean()
