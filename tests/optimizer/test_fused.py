"""The fused scan: the plain loop's values and gradients, for all operations and layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from looplift.optimizer import fused
from looplift.optimizer.fused import fused_scan
from looplift.optimizer.loop import plain_loop
from looplift.optimizer.pointwise import Unsupported, cpp, step_function
from torch import Tensor
from torch.testing import assert_close

GATED = """
def step(h, x, gate, bias):
    now = torch.sigmoid(gate) * h + torch.tanh(x + bias)
    return [now, now * 2 - h]
"""
OPERATIONS = [
    "torch.exp(h * 0.1)", "torch.log(h.abs() + 1)", "torch.sqrt(h * h + 1)",
    "torch.rsqrt(h * h + 1)", "torch.reciprocal(h * h + 1)", "torch.sin(h) + torch.cos(h)",
    "torch.erf(h)", "torch.expm1(h * 0.1)", "torch.log1p(h.abs())", "torch.relu(h)",
    "torch.nn.functional.silu(h)", "torch.nn.functional.softplus(h)", "torch.nn.functional.gelu(h)",
    "torch.nn.functional.leaky_relu(h)", "torch.nn.functional.elu(h)", "h.clamp(-0.5, 0.5)",
    "h.clamp(min=-0.25)", "torch.maximum(h, x)", "torch.minimum(h, x)", "-h", "1 - h", "h / 3",
    "h ** 2 - h ** 3", "(h * h + 1) ** 0.5", "(h * h + 1) ** -1", "(h.abs() + 1) ** 1.7",
    "torch.where(h > 0, h, x)", "torch.where((h > 0) & (x < 1), h, 0.5)",
    "torch.where(~(h >= x), h, x)", "torch.where((h == x) | (h != x), h, x)",
    "(h > 0.1).to(h) * h", "torch.addcmul(h, h, x, value=0.5)", "torch.add(h, x, alpha=2)",
    "torch.sub(h, x, alpha=2)", "torch.rsub(h, x)", "torch.lerp(h, x, 0.3)",
    "h + torch.zeros_like(h) + torch.ones_like(h) + torch.full_like(h, 2.0)",
]


def random(*sizes: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(sizes, dtype=dtype).requires_grad_(grad)


def plain(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    reverse: bool = False,
) -> Sequence[Tensor]:
    body: Any = step_function(step)
    turned = [s.flip(0) if reverse else s for s in slices]
    results = plain_loop(body, carries, turned, invariants)
    held = len(carries)
    return [*results[:held], *(r.flip(0) if reverse else r for r in results[held:])]


def same(
    step: str, carries: list[Tensor], slices: list[Tensor], invariants: list[Tensor],
    outputs: int, reverse: bool = False, tolerance: float = 1e-11,
) -> None:
    """Values, and gradients to everything that has one."""
    wanted = [t for t in (*carries, *slices, *invariants) if t.requires_grad]
    results = []
    for found in (plain(step, carries, slices, invariants, reverse),
                  fused_scan(step, carries, slices, invariants, outputs, reverse)):
        weights = [torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape)
                   for r in found]
        grads = torch.autograd.grad(found, wanted, weights, allow_unused=True) if wanted else ()
        results.append(([*found], [torch.zeros_like(w) if g is None else g
                                   for w, g in zip(wanted, grads, strict=True)]))
    assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def torch_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lanes", [(1,), (), (3, 5), (2, 150), (2, 3, 1), (2, 2, 3, 2, 5)])
def test_lanes_of_all_sizes(lanes: tuple[int, ...], reverse: bool) -> None:
    for steps in (1, 7):
        slices = [random(steps, *lanes, grad=True) for _ in range(2)]
        bias = random(*lanes[-1:], grad=True)
        same(GATED, [random(*lanes, grad=True)], slices, [bias], 1, reverse)


def test_slices_and_invariants_that_lie_anyhow_and_broadcast() -> None:
    h = random(3, 4, grad=True).T.contiguous().T.detach().requires_grad_()
    by_batch = random(3, 7, 4, grad=True)
    turned = random(4, 3, 7, grad=True)
    rows, columns = random(7, 3, 1, grad=True), random(7, 4, grad=True)
    for x, gate in ((by_batch.transpose(0, 1), turned.permute(2, 1, 0)), (rows, columns)):
        for bias in (random(4, grad=True), random(3, 1, grad=True), random(grad=True)):
            same(GATED, [h], [x, gate], [bias], 1)


def test_single_precision_and_many_lanes() -> None:
    slices = [random(20, 4, 300, dtype=torch.float32, grad=True) for _ in range(2)]
    same(GATED, [random(4, 300, dtype=torch.float32, grad=True)], slices,
         [random(300, dtype=torch.float32, grad=True)], 1, tolerance=2e-4)


def test_all_operations_in_one_step() -> None:
    """Each operation has a carry of its own, so that none hides another."""
    count = len(OPERATIONS)
    names = [f"h{k}" for k in range(count)]
    lines = [f"    h, n{k} = h{k}, None\n    n{k} = {text}" for k, text in enumerate(OPERATIONS)]
    step = "\n".join([f"def step({', '.join(names)}, x):", *lines,
                      f"    return [{', '.join(f'0.5 * n{k}' for k in range(count))}]"])
    same(step, [random(37, grad=True) for _ in names], [random(3, 37, grad=True)], [], 0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinities_go_where_they_go_in_the_loop(number: float) -> None:
    x, gate = random(5, 40), random(5, 40)
    x[2, 7], gate[1, 3], gate[3, 20] = number, number, number
    other = "torch.relu(x).clamp(-1, 2) + torch.maximum(x, bias)"
    step = GATED.replace("torch.tanh(x + bias)", other)
    want, got = (run(step, [random(40) * 0 + 1], [x, gate], [random(40) * 0])
                 for run in (plain, lambda *a: fused_scan(*a, 1, False)))
    assert_close(list(got), list(want), equal_nan=True)


def test_gradients_of_gradients() -> None:
    given = (random(3, grad=True), random(4, 3, grad=True), random(4, 3, grad=True),
             random(3, grad=True))

    def run(h: Tensor, x: Tensor, gate: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(fused_scan(GATED, [h], [x, gate], [bias], 1, False))

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_it_is_a_proper_operator() -> None:
    given = ([random(3, grad=True)], [random(4, 3, grad=True), random(4, 3)], [random(3)])
    torch.library.opcheck(fused_scan, (GATED, *given, 1, False))


@pytest.mark.parametrize(("expression", "reason"), [
    ("h @ h", "has no rule for"), ("torch.cumsum(h, 0)", "has no rule for"),
    ("h.long().to(h)", "torch.int64 numbers"), ("h > 0", "returns what is no number"),
    ("h + torch.rand_like(h)", "has no rule for"),
])
def test_what_it_has_no_rule_for(expression: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        cpp(f"def step(h, x):\n    return [{expression}]\n", 1, 1, 0)


def test_without_a_compiler_the_plain_loop_runs() -> None:
    with mock.patch.object(fused, "_library", return_value=None):
        slices = [random(7, 3, 5, grad=True) for _ in range(2)]
        same(GATED, [random(3, 5, grad=True)], slices, [random(5, grad=True)], 1, reverse=True)


def test_a_compiler_that_fails_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    step = GATED.replace("* 2", "* 2.125")
    with mock.patch("torch._inductor.codecache.CppCodeCache.load", side_effect=OSError("no g++")):
        assert not fused.is_built(step, 1, 2, 1, 1)
    assert "no fused loops here, plain ones run: no g++" in caplog.text


def test_mixed_dtypes_run_plainly() -> None:
    given = [random(3)], [random(4, 3), random(4, 3, dtype=torch.float32)], [random(3)]
    assert_close(fused_scan(GATED, *given, 1, False), list(plain(GATED, *given)))


def test_the_kernel_is_built_once() -> None:
    with mock.patch("torch._inductor.codecache.CppCodeCache.load", wraps=None) as load:
        for _ in range(2):
            fused.is_built(GATED.replace("* 2", "* 2.25"), 1, 2, 1, 1)
    assert load.call_count == 1
