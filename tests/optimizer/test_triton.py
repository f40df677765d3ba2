"""Kernels for GPUs: what they compute, on what Triton means in PyTorch; that Triton compiles them
where it is installed; that they run where there is a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from looplift import apply_passes
from looplift.optimizer import fused, triton_run
from looplift.optimizer.backward import backward_of
from looplift.optimizer.fused import build_kernel, fused_scan
from looplift.optimizer.pointwise import Unsupported
from looplift.optimizer.step import Counts, Sizes
from looplift.optimizer.triton_kernel import triton_kernel
from looplift.optimizer.walk import result_sizes
from looplift.passes.fuse_recurrences import FuseRecurrences
from looplift.passes.reroll_loops import RerollLoops
from torch import Tensor

from .. import triton_on_torch
from . import test_fused as cases
from . import test_systems
from .test_fused import random

STEPS = [
    (cases.GATED, ((4, 64), (4, 64), (4, 64), (64,)), (1, 2, 1)),
    (cases.GRU, (*((4, 48),) * 4, (144, 48), (144,)), (1, 3, 2)),
    (cases.LSTM, ((4, 16), (4, 16), (4, 64), (16, 64)), (2, 1, 1)),
    (cases.DELTA, ((2, 3, 8, 16), (2, 3), (2, 3, 8), (2, 3, 16), (2, 3, 8)), (1, 4, 0)),
    (cases.SELECTIVE, ((2, 24, 16), (2, 24), (2, 24), (2, 16), (2, 16), (24, 16)), (1, 4, 1)),
    (cases.SHIFTED, ((3, 5), (3,), (5,), (5,)), (1, 1, 2)),
    (cases.NORMED, ((3, 6), (3, 6), (6,), (6,), (6, 6)), (1, 1, 3)),
    (cases.SWAPPED, ((4, 4), (4, 4), (4, 4)), (2, 1, 0)),
    (cases.GROUPED, ((3, 6), (3, 6), (6, 6)), (1, 1, 1)),
    (test_systems.step_of("solve"), ((5, 3, 3), (5, 3, 3), (3, 3)), (1, 1, 1)),
    (test_systems.step_of("cholesky"), ((5, 3, 3), (5, 3, 3), (3, 3)), (1, 1, 1)),
]


@pytest.fixture
def launches() -> Iterator[mock.Mock]:
    """Runs fused scans on the CPU as on a GPU; what was launched."""
    torch.manual_seed(0)

    with triton_on_torch.in_place_of_kernels() as launched:
        yield launched


@pytest.mark.parametrize("case", [
    *(partial(cases.test_lanes_of_all_sizes, lanes, reverse)
      for lanes in ((1,), (), (3, 5), (2, 3, 1), (2, 2, 3, 2, 5)) for reverse in (False, True)),
    cases.test_slices_and_invariants_that_lie_anyhow_and_broadcast,
    cases.test_all_operations_in_one_step,
    *(partial(cases.test_cells, batch, size, reverse)
      for batch, size in ((4, 16), (3, 7), (1, 5)) for reverse in (False, True)),
    *(partial(cases.test_states_that_are_matrices, sizes)
      for sizes in ((2, 3, 8, 16), (1, 2, 5, 3), (2, 1, 4, 33), (3, 2, 1, 1))),
    *(partial(cases.test_selective_state_spaces, sizes, turned)
      for sizes in ((2, 24, 16), (1, 5, 3), (3, 1, 4), (2, 4, 4)) for turned in (False, True)),
    cases.test_reductions_joins_and_views, cases.test_sizes_that_coincide,
    *(partial(cases.test_a_backward_in_chunks, reverse) for reverse in (False, True)),
    *(partial(cases.test_nan_and_infinities_go_where_they_go_in_the_loop, number)
      for number in (float("nan"), float("inf"), -float("inf"))),
    *(partial(cases.test_operations_on_axes, expression) for expression in cases.SHAPED),
    *(partial(cases.test_updates_that_nobody_reads_have_no_gradient, name, reverse, torch.nan)
      for name in cases.UNREAD for reverse in (False, True)),
    *(partial(test_systems.test_in_a_kernel, name, True) for name in test_systems.STEPS),
], ids=lambda case: f"{getattr(case, 'func', case).__name__}{getattr(case, 'args', '')}")
def test_what_the_loop_computes(case: Callable[[], None], launches: mock.Mock) -> None:
    case()
    assert launches.called


def test_many_programs_of_many_warps(launches: mock.Mock) -> None:
    slices = [random(3, 3, 130, dtype=torch.float32, grad=True) for _ in range(2)]
    cases.same(cases.GATED, [random(3, 130, dtype=torch.float32, grad=True)], slices,
               [random(130, dtype=torch.float32, grad=True)], 1, tolerance=2e-4)


def test_a_loop_of_a_model_becomes_a_kernel(launches: mock.Mock) -> None:
    class Gated(torch.nn.Module):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            states = []
            for t in range(x.shape[1]):
                h = torch.sigmoid(x[:, t]) * h + x[:, t].cos()
                states.append(h)
            return torch.stack(states, 1)

    fast = apply_passes(Gated(), (random(2, 20, 3, grad=True), random(2, 3)), measure=False,
                        passes=(RerollLoops(), FuseRecurrences()))
    assert "fused_scan" in fast.code
    assert launches.called


@pytest.mark.parametrize(("step", "sizes", "reason"), [
    ("return [h @ h.mT + x]", ((256, 256), (256, 256)), "needs 16777216 registers"),
    ("return [h + torch.arange(65) * x]", ((65,), (65,)), "a constant tensor of 65 numbers"),
    ("return [h + x]", ((0,), (0,)), "has no elements"),
    ("return [h.sort(-1)[0] + x]", ((5,), (5,)), "computes sort"),
])
def test_what_has_no_kernel(step: str, sizes: tuple[Sizes, ...], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        triton_kernel(f"def step(h, x):\n    {step}\n", sizes, (1, 1, 0))


def test_without_triton_the_plain_loop_runs() -> None:
    step, carry, x = "def step(h, x):\n    return [h * x]\n", random(3), random(4, 3)
    with mock.patch.object(fused, "GPUS", ("cpu",)), \
            mock.patch.object(triton_run, "is_there", return_value=False):
        with pytest.raises(Unsupported, match="no Triton that builds"):
            build_kernel(step, [carry], [x], [])
        torch.testing.assert_close(fused_scan(step, [carry], [x], [], [])[0], carry * x.prod(0))


def test_a_kernel_that_can_not_be_built_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    step, carry, x = "def step(h, x):\n    return [h + x]\n", random(3), random(4, 3)
    with mock.patch.object(fused, "GPUS", ("cpu",)), \
            mock.patch.object(triton_run, "is_there", return_value=True), \
            mock.patch.object(triton_run, "failed", set()), \
            mock.patch.object(triton_run, "_module", side_effect=RuntimeError("no registers")):
        for _ in range(2):
            torch.testing.assert_close(fused_scan(step, [carry], [x], [], [])[0],
                                       carry + x.sum(0))
    assert [r.message for r in caplog.records] == [
        "a loop runs step by step, its kernel can't be built: no registers"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("step", "sizes", "counts"), STEPS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_triton_compiles_them(
    step: str, sizes: tuple[Sizes, ...], counts: Counts, dtype: str
) -> None:
    """For a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget

    back = backward_of(step, sizes, counts, (True,) * len(sizes))
    inner = counts[0] + len(back.sums), len(back.slices), len(back.invariants)
    for made in (triton_kernel(step, sizes, counts), triton_kernel(back.step, back.sizes, inner)):
        kernel = triton_run._module(made.source).kernel
        real = triton.language.float32 if dtype == "fp32" else triton.language.float64
        constants = {"S": real, "BLOCK": made.block}
        kinds = {name: f"*{dtype}" if name[0] == "p" else "i32" for name in kernel.arg_names}
        kinds |= dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(kernel, kinds, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                                  options={"num_warps": made.warps})
        assert compiled.asm["cubin"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("step", "sizes", "counts"), STEPS)
@pytest.mark.parametrize("reverse", [False, True])
def test_on_a_gpu(
    step: str, sizes: tuple[Sizes, ...], counts: Counts, reverse: bool
) -> None:
    held, read, _ = counts
    given = [torch.randn((*[9] * (held <= k < held + read), *size), device="cuda",
                         dtype=torch.float64, requires_grad=True) for k, size in enumerate(sizes)]
    outputs = len(result_sizes(step, sizes)) - held
    with mock.patch.object(triton_run, "_launched", wraps=triton_run._launched) as launched:
        cases.same(step, given[:held], given[held : held + read], given[held + read :], outputs,
                   reverse)
    assert launched.call_count == 2
