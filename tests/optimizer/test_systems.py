"""Small systems of equations in kernels: PyTorch's values, gradients and exceptions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import looplift
import pytest
import torch
from looplift.optimizer import fused
from looplift.optimizer.composed import Early
from looplift.optimizer.fused import build_kernel, fused_scan
from looplift.optimizer.loop import plain_loop
from looplift.optimizer.pointwise import Unsupported
from looplift.optimizer.step import checks, step_function
from looplift.optimizer.systems import MOST_ROWS
from torch import Tensor, nn
from torch.testing import assert_close

aten = torch.ops.aten
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "inverse": lambda a, p, b: (aten.linalg_inv.default(a), aten.inverse.default(p)),
    "solve": lambda a, p, b: aten.linalg_solve.default(a, b),
    "solve a vector": lambda a, p, b: aten.linalg_solve.default(a, b[..., 0]),
    "solve from the right": lambda a, p, b: aten.linalg_solve.default(a, b.mT, left=False),
    "solve for one right side": lambda a, p, b: aten.linalg_solve.default(a, b[0]),
    "determinants": lambda a, p, b: (*aten.linalg_slogdet.default(a), aten.logdet.default(a),
                                     aten.linalg_det.default(a)),
    "cholesky": lambda a, p, b: aten.linalg_cholesky.default(p + a.triu(1)),  # which is not read
    "upper cholesky": lambda a, p, b: aten.linalg_cholesky.default(p, upper=True),
    "triangular": lambda a, p, b: aten.linalg_solve_triangular.default(p, b, upper=False),
    "upper triangular": lambda a, p, b: aten.linalg_solve_triangular.default(p, b, upper=True),
    "triangular from the right": lambda a, p, b: aten.linalg_solve_triangular.default(
        p, b.mT, upper=False, left=False),
    "triangular with ones": lambda a, p, b: aten.linalg_solve_triangular.default(
        p, b, upper=False, unitriangular=True),
    "cholesky_solve": lambda a, p, b: aten.cholesky_solve.default(b, p),
    "upper cholesky_solve": lambda a, p, b: aten.cholesky_solve.default(b, p, True),
}


@pytest.mark.parametrize("rows", [1, 2, 3, MOST_ROWS])
@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_those_of_pytorch(name: str, rows: int) -> None:
    a, b = torch.randn(6, rows, rows, dtype=torch.float64), torch.randn(6, rows, 2).double()
    p = a @ a.mT + torch.eye(rows)
    found = []
    for early in (False, True):
        given = [t.clone().requires_grad_() for t in (a, p, b)]
        with Early() if early else torch.enable_grad():
            made = OPERATIONS[name](*given)
        results = list(made) if isinstance(made, tuple) else [made]
        grads = torch.autograd.grad([r for r in results if r.requires_grad], given,
                                    [r.detach().sin() for r in results if r.requires_grad],
                                    allow_unused=True)
        found.append((results, [torch.zeros_like(t) if g is None else g
                                for t, g in zip(given, grads, strict=True)]))
    assert_close(found[1], found[0], rtol=1e-7, atol=1e-7, equal_nan=True)


STEPS = {
    "inverse": "torch.ops.aten.linalg_inv.default(a)",
    "solve": "torch.ops.aten.linalg_solve.default(a, x)",
    "cholesky": "torch.ops.aten.linalg_cholesky.default(a @ a.mT + one)",
    "logdet": "torch.ops.aten.linalg_slogdet.default(a)[1][..., None, None] * x",
    "cholesky_solve": "torch.ops.aten.cholesky_solve.default(x, a)",
}


def step_of(name: str) -> str:
    return (f"def step(h, x, one):\n    a = one + 0.1 * torch.tanh(h)\n    y = {STEPS[name]}\n"
            "    h_1 = x + torch.tanh(y)\n    checked = torch.sum(y, [-2, -1])\n"
            "    return [h_1, y, checked]\n")


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_in_a_kernel(name: str, kernel: bool) -> None:
    given = [torch.randn(5, 3, 3), torch.randn(4, 5, 3, 3), 2 * torch.eye(3)]
    given = [t.double().requires_grad_() for t in given]
    h, x, one = given
    build_kernel(step_of(name), [h], [x], [one])
    with mock.patch.object(fused, "KINDS", fused.KINDS if kernel else ()):
        got = fused_scan(step_of(name), [h], [x], [one], [0, 0])
        want = plain_loop(step_function(step_of(name)), [h], [x], [one])
        assert_close(list(got), list(want), rtol=1e-9, atol=1e-9)
        grads = [torch.autograd.grad([r.sin().sum() for r in results], given)
                 for results in (got, want)]
    assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-8)


def test_gradients_of_gradients() -> None:
    given = [torch.randn(2, 2, 2), torch.randn(3, 2, 2, 2), 2 * torch.eye(2)]
    h, x, one = (t.double().requires_grad_() for t in given)

    def run(*tensors: Tensor) -> Any:
        return fused_scan(step_of("solve"), tensors[:1], tensors[1:2], tensors[2:], [0, 0])[1]

    assert torch.autograd.gradgradcheck(run, (h, x, one))


def test_larger_ones_have_no_kernel() -> None:
    x = torch.randn(4, 2, MOST_ROWS + 1, MOST_ROWS + 1)
    with pytest.raises(Unsupported, match="factorizes matrices or solves linear systems"):
        build_kernel(step_of("inverse"), [x[0]], [x], [x[0, 0]])


def test_a_step_that_does_not_tell_where_it_raises_runs_in_a_loop() -> None:
    step = "def step(h, x):\n    h_1 = torch.ops.aten.linalg_inv.default(h + x)\n    return [h_1]\n"
    with mock.patch.object(fused, "_run", side_effect=AssertionError("a kernel ran")):
        fused_scan(step, [torch.eye(2)], [torch.randn(3, 2, 2)], [], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["inverse", "cholesky", "logdet"])
def test_matrices_that_are_about_singular_are_left_to_the_loop(
    name: str, dtype: torch.dtype
) -> None:
    """Where LAPACK finds a pivot of zero depends on how it rounds."""
    operation = STEPS[name].replace("a @ a.mT + one", "a")
    step = f"def step(h, x, one):\n    a = x\n    y = {operation}\n" \
        "    checked = torch.sum(y, [-2, -1])\n    return [h + one, y, checked]\n"
    raised = 0
    for seed in range(40):
        torch.manual_seed(seed)
        low = torch.randint(-3, 4, (1, 1, 4, 3 + seed % 2)).to(dtype)
        low[..., -1, :] *= seed % 5 > 0  # a last pivot of zero, however it is rounded
        given = [torch.zeros(1, 4, 4, dtype=dtype), low @ low.mT, torch.eye(4, dtype=dtype)]
        found: list[Any] = []
        run: Any
        for run in (partial(plain_loop, step_function(step)), partial(fused_scan, step)):
            more = [[0, 0]] if found else []
            try:
                found.append(run(*([t] for t in given), *more)[1])
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                found.append(str(error))
        raised += isinstance(found[0], str)
        if isinstance(found[0], str):
            assert found[0] == found[1]
        else:  # of rank 3 these digits are noise, but the same
            assert_close(found[1], found[0], rtol=1e-3, atol=1e-3, equal_nan=True)
    assert (raised > 0) is (name != "logdet")


def test_gradients_of_matrices_that_are_about_singular_are_finite() -> None:
    h, x = torch.zeros(1, 2, 2).double(), torch.eye(2).double().expand(3, 1, 2, 2).clone()
    x[1, 0, 1, 1] = 1e-9
    x.requires_grad_()
    step = step_of("inverse").replace("one + 0.1 * torch.tanh(h)", "x + 0.0 * h")
    got = fused_scan(step, [h], [x], [h], [0, 0])[1]
    want = plain_loop(step_function(step), [h], [x], [h])[1]
    assert torch.equal(got, want)
    for one, other in zip(*(torch.autograd.grad(y.sum(), x) for y in (got, want)), strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_what_raises_nowhere_tells_nothing() -> None:
    step = "def step(h, x):\n    y = torch.ops.aten.cholesky_solve.default(x, h)\n    return [y]\n"
    assert checks(step) == ()
    assert checks(step_of("cholesky_solve")) == (2,)
    assert checks(step.replace("cholesky_solve", "cholesky")) is None


class Filter(nn.Module):
    """A Kalman filter (Kalman, 1960) for `wanted` dimensions of four seen in two."""

    def __init__(self, gain: str) -> None:
        super().__init__()
        self.gain = compile(gain, "gain", "eval")
        self.moved = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4))
        self.seen = nn.Parameter(torch.randn(2, 4))
        self.noise = nn.Parameter(torch.ones(2))

    def forward(self, y: Tensor) -> Tensor:
        x, p, outputs = y.new_zeros(y.shape[0], 4), torch.eye(4).expand(y.shape[0], 4, 4), []
        for t in range(y.shape[1]):
            x = x @ self.moved.T
            p = self.moved @ p @ self.moved.T + torch.eye(4)
            s = self.seen @ p @ self.seen.T + torch.diag(self.noise)
            k = eval(self.gain, {"torch": torch}, {"s": s, "h": p @ self.seen.T})
            x = x + (k @ (y[:, t] - x @ self.seen.T).unsqueeze(-1)).squeeze(-1)
            p = (torch.eye(4) - k @ self.seen) @ p
            outputs.append(torch.where(y[:, t, :1] > 9, 0.0, x))  # which may hide what raises
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("gain", [
    "h @ torch.linalg.inv(s)", "torch.linalg.solve(s, h.mT).mT",
    "torch.cholesky_solve(h.mT, torch.linalg.cholesky(s)).mT",
])
def test_kalman_filters_are_one_kernel_that_raises_as_they_do(gain: str) -> None:
    model, y = Filter(gain), torch.randn(3, 34, 2)
    fast = looplift.apply_passes(model, (y,), measure=False)
    assert "fused_scan" in fast.code
    assert "in zip(" not in fast.code
    found = []
    for run in (model, fast):
        given = y.clone().requires_grad_()
        out = run(given)
        found.append((out, torch.autograd.grad(out.sin().sum(), [given, *model.parameters()])))
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    raised = []
    with torch.no_grad():
        model.seen.zero_()
        model.noise.zero_()
    y[:] = 10.0
    for run in (model, fast):
        with pytest.raises(torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            run(y)
        raised.append(str(error.value))
    assert raised[0] == raised[1]


def test_missing_numbers_go_where_they_go_in_the_loop() -> None:
    model, y = Filter("h @ torch.linalg.inv(s)"), torch.randn(3, 34, 2)
    fast = looplift.apply_passes(model, (y,), measure=False, mode="inference")
    y[1, 5, 0] = torch.nan
    with torch.no_grad():
        assert_close(fast(y), model(y), rtol=1e-3, atol=1e-3, equal_nan=True)


