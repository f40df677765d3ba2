"""The fused scan: the plain loop's values and gradients, for all operations and layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from looplift.optimizer import fused, packing, walk
from looplift.optimizer.compiled import compiled
from looplift.optimizer.double import Width, computing
from looplift.optimizer.fused import build_kernel, fused_scan, scan_operator
from looplift.optimizer.kernel import kernel
from looplift.optimizer.kernel_loops import contiguous
from looplift.optimizer.loop import plain_loop
from looplift.optimizer.packing import Lie, kernel_for
from looplift.optimizer.pointwise import Unsupported
from looplift.optimizer.step import step_function, traced
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
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
    "torch.trunc(h) + torch.round(h) + h", "torch.tan(h * 0.3)", "torch.sinh(h) - torch.cosh(h)",
    "torch.asin(torch.tanh(h) * 0.5) + torch.acos(torch.tanh(h) * 0.5)", "torch.atan(h)",
    "torch.erfc(h)", "torch.exp2(h)", "torch.log2(h.abs() + 1) + torch.log10(h.abs() + 1)",
    "torch.atan2(h, x)", "torch.fmod(h, 0.7)", "torch.hypot(h, x)", "torch.nan_to_num(h)",
    "torch.nn.functional.logsigmoid(h)", "torch.addcdiv(h, x, x.abs() + 1, value=0.5)",
]
SHAPED = [
    "h / h.norm(dim=-1, keepdim=True)", "torch.nn.functional.normalize(h, dim=-1) + h.norm()",
    "h * h.norm(p=1, dim=0) + h.norm(p=float('inf'), dim=1, keepdim=True)",
    "torch.nn.functional.cosine_similarity(h, x, dim=-1)[:, None] * h",
    "torch.nn.functional.pad(h, (1, 0))[:, :-1]",
    "torch.nn.functional.pad(h, (-1, 2), value=2.0)[:, 1:]",
    "torch.nn.functional.pad(h, (1, -1, 2, 0)).sum(0) * h[:1, :1]",
    "torch.ops.aten.pad.default(h[None], (2, 1, 0, 1), 'circular')[0, 1:, 3:] * h[:, :5]",
    "torch.ops.aten.pad.default(h[None], (2, 0, 1, 2), 'reflect')[0, 1:4, 1:6] * h",
    "torch.ops.aten.pad.default(h[None], (0, 3, 2, 0), 'replicate')[0, 1:4, 3:8] * h",
    "h.roll(1, -1)", "h.roll((1, -2), (0, 1))", "h.roll(2)",
    "h.repeat(1, 2)[:, 2:7]", "h.repeat(2, 1, 1).sum(0)",
    "torch.rms_norm(h, (5,), eps=1e-5) + torch.nn.functional.rms_norm(h, (5,), x[0], 1e-3)",
    "h.flip(-1) + h.flip((0, 1))", "h.cumsum(-1) + h.cumsum(0)",
    "torch.ops.aten.cumprod.default(h, 1)", "torch.ops.aten.prod.dim_int(h, 1, True) * h",
    "torch.ops.aten.prod.dim_int(h, 0) + torch.ops.aten.prod.default(0.1 * h)",
    "torch.remainder(h, 0.7)",
    "torch.remainder(h, x)", "torch.div(h, 0.3, rounding_mode='floor') * h",
    "torch.div(h, x, rounding_mode='trunc') + torch.div(x, h, rounding_mode='floor')",
    "torch.std_mean(h, 1, keepdim=True)[0] * torch.var_mean(h)[1]", "torch.copysign(h, x)",
    "torch.ops.aten.max.dim(h, -1, True)[0] + torch.ops.aten.min.dim(h, 0)[0]",
    "torch.ops.aten.max.default(h) - torch.ops.aten.min.default(h) * h",
    "torch.ops.aten.one_hot.default(torch.ops.aten.argmax.default(h, 1), 5).to(h) * h",
    "(torch.ops.aten.argmin.default(h, 0, True) == 1) * h + (torch.ops.aten.argmax.default(h) > 7)",
    "((h > 0).cumsum(1) == 2).to(h) * h + (h > x).cumsum(0).to(h)",
    "h[:, :, None].expand(3, 5, 5).tril(1).sum(1) + h.expand(2, 3, 5).triu(-1).sum(0)",
    "torch.diag_embed(h).sum(1) * torch.ops.aten.diagonal.default(h[:, :3], 1).sum()",
    "torch.where((h > 0).any(1, keepdim=True), h, x) * (h > -1).all()",
    "torch.where(torch.isinf(h) | torch.isfinite(x), h.trunc().long().to(h), x) + h",
    "torch.nn.functional.group_norm(h, 5) * torch.nn.functional.group_norm(h, 1, x[0], x[1])",
    "torch.ops.aten._native_batch_norm_legit.no_stats(h, None, None, True, 0.1, 1e-5)[0]",
    "torch.logaddexp2(h, x)",
    "torch.nn.functional.softshrink(h) + torch.nn.functional.hardshrink(h)", "(h.abs() + 1) ** x",
    "2 ** torch.tanh(h) + torch.erfinv(0.5 * torch.tanh(h))",
    "torch.ops.aten.gru.input(torch.stack([h, x]), x[None], [torch.cat([x] * 5)] * 2, False, 1, "
    "0.0, False, False, False)[0].sum(0)",
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
                  fused_scan(step, carries, slices, invariants, [0] * outputs, reverse)):
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


@pytest.mark.parametrize("expression", [
    "(1 - torch.ones_like(h)) * h", "h - (torch.ones_like(h) - 3)",
    "h / (torch.full_like(h, 2.0) * 3)"])
def test_what_is_computed_of_numbers_alone(expression: str) -> None:
    step = f"def step(h, x):\n    h = {expression} + x\n    return [h]\n"
    same(step, [random(5, grad=True)], [random(3, 5, grad=True)], [], 0)


@pytest.mark.parametrize("expression", SHAPED)
def test_operations_on_axes(expression: str) -> None:
    step = f"def step(h, x):\n    h = 0.5 * ({expression}) + x\n    return [h, h]\n"
    slices = [random(6, 3, 5, grad=True)]
    build_kernel(step, [random(3, 5)], slices, [])
    same(step, [random(3, 5, grad=True)], slices, [], 1)


GRU = """
def step(h, r, z, n, weight, bias):
    at_r, at_z, at_n = torch.nn.functional.linear(h, weight, bias).chunk(3, 1)
    z = torch.sigmoid(z + at_z)
    now = (1 - z) * torch.tanh(n + torch.sigmoid(r + at_r) * at_n) + z * h
    return [now, now]
"""
LSTM = """
def step(h, c, x, weight):
    i, f, g, o = (x + h @ weight).split(h.shape[1], 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return [h, c, h]
"""
DELTA = """
def step(s, decay, k, v, q):
    s = s * decay[..., None, None]
    s = s + k.unsqueeze(-1) * (v - (s * k.unsqueeze(-1)).sum(-2)).unsqueeze(-2)
    return [s, (q.unsqueeze(-2) @ s).squeeze(-2)]
"""
SELECTIVE = """
def step(h, dt, x, b, c, a):
    h = torch.exp(dt[..., None] * a) * h + (dt * x)[..., None] * b[:, None]
    return [h, torch.einsum("bdn,bn->bd", h, c)]
"""
SHIFTED = """
def step(z, x, feedback, forward):
    z = torch.cat([(x - (z * feedback).sum(-1)).unsqueeze(-1), z[..., :-1]], -1)
    return [z, (z * forward).sum(-1)]
"""
NORMED = """
def step(h, x, weight, bias, matrix):
    h = torch.layer_norm(h + x, h.shape[-1:], weight, bias) + torch.softmax(h @ matrix, -1)
    return [h, h.amax(-1), h.mean(-1, keepdim=True), torch.logsumexp(h, -1), h.var(-1)]
"""
SWAPPED = """
def step(a, b, x):
    a, b = b.T + x, a.T
    return [a, b, torch.where(a > b, a, x[0]), a[1:, 1], a.sum() + b.reshape(-1)[::2].sum()]
"""
GROUPED = """
def step(h, x, weight):
    parts = h.view(h.shape[0], 2, -1).transpose(1, 2).reshape(h.shape[0], -1)
    h = torch.tanh(parts + x) @ weight
    return [h, h.view(h.shape[0], -1, 2).amin(1)]
"""


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("batch", "size"), [(4, 64), (3, 7), (1, 5), (9, 33)])
def test_cells(batch: int, size: int, reverse: bool) -> None:
    weight = random(3 * size, size) / size**0.5
    bias, slices = random(3 * size), [random(5, batch, size) for _ in range(3)]
    h, c = random(batch, size), random(batch, size)
    gates = random(batch, 5, 4 * size).transpose(0, 1)
    for t in (weight, bias, *slices, h, c, gates):
        t.requires_grad_()
    same(GRU, [h], slices, [weight, bias], 1, reverse)
    wide = (random(size, 4 * size) / size**0.5).requires_grad_()
    same(LSTM, [h, c], [gates], [wide], 1, reverse)


@pytest.mark.parametrize("sizes", [(2, 3, 8, 16), (1, 2, 5, 3), (2, 1, 4, 33), (3, 2, 1, 1)])
def test_states_that_are_matrices(sizes: tuple[int, ...]) -> None:
    b, h, k, v = sizes
    slices = [random(6, b, h).sigmoid(), random(6, b, h, k) / k, random(6, b, h, v),
              random(6, b, h, k)]
    same(DELTA, [random(b, h, k, v, grad=True)], [s.requires_grad_() for s in slices], [], 1)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("sizes", [(2, 24, 16), (1, 5, 3), (3, 1, 4), (2, 4, 4)])
def test_selective_state_spaces(sizes: tuple[int, ...], turned: bool) -> None:
    """With the channels in vectors, or, where time is the last axis in memory, the states."""
    b, d, n = sizes
    slices = [random(6, b, m) for m in (d, d, n, n)]
    slices = [s.movedim(0, -1).contiguous().movedim(-1, 0) if turned else s for s in slices]
    same(SELECTIVE, [random(*sizes, grad=True)],
         [s.sigmoid().detach().requires_grad_() for s in slices],
         [(-random(d, n).abs()).requires_grad_()], 1)


@pytest.mark.parametrize(("channels", "turned", "lane"), [
    (64, False, 64), (64, True, 64),  # copying them is quicker than one element at a time
    (4, True, None), (4, False, None),
])
@pytest.mark.parametrize("width", [8, 16])
def test_what_vectors_hold(
    channels: int, turned: bool, lane: int | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "vector_width", lambda: width)
    kernel_for.cache_clear()
    def lie(*sizes: int) -> Lie:  # with time last, the other axes of a step are far apart
        strides = contiguous(sizes)
        return Lie(sizes, tuple(s * 100 for s in strides) if turned else strides)

    given = [Lie((2, channels, 8), contiguous((2, channels, 8))), lie(2, channels),
             lie(2, channels), lie(2, 8), lie(2, 8), Lie((channels, 8), contiguous((channels, 8)))]
    made = kernel_for(SELECTIVE, tuple(given), (1, 4, 1))
    assert (made.lane if made.lane is None else made.free[made.lane]) == lane


def test_reductions_joins_and_views() -> None:
    same(SHIFTED, [random(4, 3, 4, grad=True)], [random(6, 4, 3, grad=True)],
         [(random(4) / 4).requires_grad_(), random(4, grad=True)], 1)
    for size in (37, 16, 3):
        same(NORMED, [random(4, size, grad=True)], [random(6, 4, size, grad=True)],
             [random(size, grad=True), random(size, grad=True), random(size, size, grad=True)], 4)
        same(SWAPPED, [random(size, size, grad=True), random(size, size, grad=True)],
             [random(6, size, size, grad=True)], [], 3, reverse=True)
    same(GROUPED, [random(5, 12, grad=True)], [random(6, 5, 12, grad=True)],
         [random(12, 12, grad=True)], 1)


def test_sizes_that_coincide() -> None:
    """No axis is taken for another that has the same number of elements."""
    same(GRU, [random(4, 4, grad=True)], [random(4, 4, 4, grad=True) for _ in range(3)],
         [random(12, 4, grad=True), random(12, grad=True)], 1)
    same(DELTA, [random(4, 4, 4, 4, grad=True)],
         [random(4, 4, 4).sigmoid(), *(random(4, 4, 4, 4, grad=True) / 4 for _ in range(3))], [], 1)
    outer = "def step(h, x):\n    h = (h.unsqueeze(0) * h.unsqueeze(1)).tanh().sum(0) + x\n" \
        "    return [h, h.unsqueeze(0) - h.unsqueeze(1)]\n"
    same(outer, [random(4, grad=True)], [random(4, 4, grad=True)], [], 1)


def test_single_precision_of_products() -> None:
    def given(*sizes: int) -> Tensor:
        return torch.randn(sizes).requires_grad_()

    same(GRU, [given(6, 48)], [given(9, 6, 48) for _ in range(3)],
         [(torch.randn(144, 48) / 7).requires_grad_(), given(144)], 1, tolerance=2e-4)


def test_gradients_that_are_zero_but_for_a_piece_have_the_dtype_of_the_others() -> None:
    step = '''
def step(h, x, weight):
    made = x @ weight
    return [torch.tanh(h), made[:, :2], made.amax(-1)]
'''
    same(step, [random(3, 5, grad=True)], [random(4, 3, 4, grad=True)],
         [random(4, 6, grad=True)], 2)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_backward_in_chunks(reverse: bool) -> None:
    """Carries that an output shows after the step, before it, and not at all."""
    before = "def step(h, x, w):\n    return [torch.tanh(h @ w + x), h]\n"
    hidden = "def step(h, k, x):\n    h = torch.sin(h * 0.9 + x)\n    k = torch.cos(k + h)\n" \
        "    return [h, k, h.sum(-1), k * x]\n"
    with mock.patch.object(walk, "CHUNK", 1), mock.patch.object(walk, "LEAST", 3):
        for steps in (1, 2, 10, 11):
            weight = (random(4, 16) / 2).requires_grad_()
            same(LSTM, [random(2, 4, grad=True), random(2, 4, grad=True)],
                 [random(steps, 2, 16, grad=True)], [weight], 1, reverse)
            same(before, [random(2, 4, grad=True)], [random(steps, 2, 4, grad=True)],
                 [(random(4, 4) / 2).requires_grad_()], 1, reverse)
            same(hidden, [random(2, 4, grad=True), random(2, 4, grad=True)],
                 [random(steps, 2, 4, grad=True)], [], 2, reverse)


UNREAD = {
    "pointwise": "def step(h, k, x, w, u):\n    apart = k - h\n"
                 "    return [h + w[0] * apart * x, k + (apart * x).sum(0), apart + u.sum()]\n",
    "products": "def step(h, k, x, w, u):\n"
                "    return [torch.tanh(h @ w + x @ u), k * 0.5 + h, h + k]\n",
    "products of both": "def step(h, k, x, w, u):\n"
                        "    return [torch.tanh(h @ w + x), k + (x @ w) * 0.1, h @ w]\n",
    "two steps before": "def step(h, k, x, w, u):\n"
                        "    return [torch.sin(h + k), torch.sqrt(k * x @ w), h * u.sum()]\n",
}


@pytest.mark.parametrize("number", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", UNREAD)
def test_updates_that_nobody_reads_have_no_gradient(
    name: str, reverse: bool, number: float
) -> None:
    for steps, chunk in ((1, 64), (2, 64), (7, 64), (7, 2)):
        given = [random(2, 4), random(2, 4), random(steps, 2, 4), random(4, 4), random(4, 4)]
        for place in range(min(steps, 2)):  # one state takes two steps to be seen
            last = place if reverse else steps - 1 - place
            given[2][last, 0, place] = number
        for tensor in given:
            tensor.requires_grad_()
        found = []
        with mock.patch.object(walk, "CHUNK", 1), mock.patch.object(walk, "LEAST", chunk):
            for run in (plain(UNREAD[name], given[:2], given[2:3], given[3:], reverse),
                        fused_scan(UNREAD[name], given[:2], given[2:3], given[3:], [0], reverse)):
                grads = torch.autograd.grad(run[2].sum(), given, allow_unused=True)
                found.append([torch.zeros_like(t) if g is None else g
                              for t, g in zip(given, grads, strict=True)])
        assert_close(found[1], found[0], rtol=1e-11, atol=1e-11, equal_nan=True)


def test_memory_that_is_used_again_is_none_that_anyone_sees() -> None:
    """The backward writes over what it computed itself, and over nothing else."""
    h, c, x = random(2, 3, grad=True), random(2, 3, grad=True), random(6, 2, 12, grad=True)
    weight = random(3, 12, grad=True)
    results = fused_scan(LSTM, [h, c], [x], [weight], [0], False)
    before = [t.detach().clone() for t in (*results, x, weight)]
    total = torch.cat([r.sin().flatten() for r in results]).sum()
    first = torch.autograd.grad(total, [h, c, x, weight], retain_graph=True)
    again = torch.autograd.grad(total, [h, c, x, weight])
    assert_close(first, again, rtol=0, atol=0)
    assert_close([t.detach() for t in (*results, x, weight)], before, rtol=0, atol=0)


def test_without_memory() -> None:
    """Meta tensors get the sizes of the results."""
    given = [torch.zeros(3, device="meta")], [torch.zeros(5, 3, device="meta")] * 2
    made = fused_scan(GATED, *given, [torch.zeros(3, device="meta")], [1])
    assert [(t.shape, t.device.type) for t in made] == [((3,), "meta"), ((3, 5), "meta")]


def test_a_gradient_that_is_a_sum_before_it_is_cut_down() -> None:
    """Each summand has its own way to the bias: it was counted twice."""
    step = """
def step(h, x, bias):
    v = x + bias
    v = (v + v).mean(1, True)
    return [torch.sigmoid(v) * h, v]
"""
    same(step, [random(4, 1, grad=True)], [random(3, 4, 1, grad=True)], [random(5, grad=True)], 1)


def test_what_is_negative_by_its_flag_alone() -> None:
    """The memory of such a tensor, the imaginary part of a conjugate, has the other sign."""
    x = torch.randn(7, 1, dtype=torch.complex128).conj().imag
    assert x.is_neg()
    same("def step(h, x):\n    h = torch.tanh(h) + x\n    return [h, h]", [random(1)], [x], [], 1)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinities_go_where_they_go_in_the_loop(number: float) -> None:
    x, gate = random(5, 40), random(5, 40)
    x[2, 7], gate[1, 3], gate[3, 20] = number, number, number
    other = "torch.relu(x).clamp(-1, 2) + torch.maximum(x, bias)"
    step = GATED.replace("torch.tanh(x + bias)", other)
    want, got = (run(step, [random(40) * 0 + 1], [x, gate], [random(40) * 0])
                 for run in (plain, lambda *a: fused_scan(a[0], a[1], a[2], a[3], [0])))
    assert_close(list(got), list(want), equal_nan=True)


@pytest.mark.parametrize("expression", [
    "torch.nn.functional.softplus(x * h)", "torch.log1p(x.exp())", "torch.nn.functional.gelu(x)",
    "torch.nn.functional.logsigmoid(x)", "torch.sigmoid(x * x)", "torch.softmax(x + h, 0)",
    "(x + h).amax(0)"])
def test_gradients_are_finite_where_the_loop_has_finite_ones(expression: str) -> None:
    """The formulas of the operations' gradients, not of what they are composed of: the exponential
    in softplus overflows."""
    step = f"def step(h, x):\n    return [0.5 * h + {expression}]\n"
    h = torch.ones(5, requires_grad=True)
    x = torch.linspace(-200, 200, 20).view(4, 5).requires_grad_()
    want, got = (torch.autograd.grad(results[0].sum(), [h, x]) for results in (
        plain(step, [h], [x], []), fused_scan(step, [h], [x], [], [], False)))
    assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("kernel", [True, False])
def test_slices_of_fewer_steps_are_refused(steps: int, kernel: bool) -> None:
    """A kernel would read what lies behind the shorter one."""
    step = "def step(h, x, y):\n    h = h + x + y\n    return [h, h]\n"
    with mock.patch.object(fused, "KINDS", fused.KINDS if kernel else ()), \
            pytest.raises(ValueError, match="not equally many"):
        fused_scan(step, [random(2)], [random(200, 2), random(steps, 2)], [], [0])


def test_gradients_of_gradients() -> None:
    given = (random(3, grad=True), random(4, 3, grad=True), random(4, 3, grad=True),
             random(3, grad=True))

    def run(h: Tensor, x: Tensor, gate: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(fused_scan(GATED, [h], [x, gate], [bias], [0], False))

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_gradients_of_gradients_of_products() -> None:
    given = random(2, 3, grad=True), random(2, 3, grad=True), random(4, 2, 12, grad=True), \
        random(3, 12, grad=True)

    def run(h: Tensor, c: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(fused_scan(LSTM, [h, c], [x], [weight], [0], False))

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_it_is_a_proper_operator() -> None:
    given = ([random(3, grad=True)], [random(4, 3, grad=True), random(4, 3)], [random(3)])
    torch.library.opcheck(scan_operator, (GATED, *given, [0], False))
    cell = [random(2, 3, grad=True)], [random(4, 2, 3, grad=True) for _ in range(3)], \
        [random(9, 3, grad=True), random(9, grad=True)]
    torch.library.opcheck(scan_operator, (GRU, *cell, [0], False))


def test_of_equals_the_first_is_chosen_and_gets_the_gradient() -> None:
    step = """
def step(h, x):
    most, place = torch.ops.aten.max.dim(x, 1)
    h = 0.5 * h + most + torch.ops.aten.min.dim(x, 1)[0]
    return [h, h * place]
"""
    x = torch.tensor([[1.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, -0.0, torch.nan, 5.0]])
    for given in (x[None, :2], x[None, :2].flip(2)):
        same(step, [random(2)], [given.double().requires_grad_()], [], 1)
    assert_close(list(fused_scan(step, [torch.ones(3)], [x[None]], [], [0])),
                 list(plain(step, [torch.ones(3)], [x[None]], [])), equal_nan=True)


def test_kernels_with_tables_of_their_own_in_one_process() -> None:
    """A static table of a template is one for all libraries that a process loads."""
    for k in (-2, 0, 1):
        step = f"def step(h, x):\n    return [(h[:, None] + x).tril({k}).sum(1) / 9]\n"
        same(step, [random(4)], [random(3, 4, 4)], [], 0)


@pytest.mark.parametrize(("expression", "reason"), [
    ("torch.special.gammaln(h)", "has no rule for"),
    ("torch.rms_norm(h, (4,))", "an eps that its dtype gives"),
    ("torch.cummax(h, 0)[0]", "has no rule for"),
    ("(h.long() << 1).to(h)", "torch.int64 numbers"), ("h.floor_divide(2)", "not implemented"),
    ("h + torch.rand_like(h)", "has no rule for"),
    ("torch.ops.aten.max.dim(h > 0, 0)[0].to(h).expand(4)", "has no rule for"),
    ("torch.ops.aten.argmax.default((h > 0).long()).to(h)", "has no rule for"),
    ("h.long().cumsum(0).to(h)", "has no rule for"),
    ("torch.ops.aten.prod.default(h > 0).to(h)", "has no rule for"),
    ("h.sort()[0]", "has no rule for"), ("h[torch.tensor([2, 1, 0, 0])]", "has no rule for"),
])
def test_what_it_has_no_rule_for(expression: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        build_kernel(f"def step(h, x):\n    return [{expression}]\n", [random(4)], [random(3, 4)],
                     [])


def test_numbers_that_are_no_integers_are_rounded_as_outside_of_a_kernel() -> None:
    """NaN, infinities and what is too large become the least of all integers, and none is -0."""
    step = "def step(h, x):\n    one = torch.ones_like(x)\n    return [h, " \
        "x.int().clamp(-3, 5).to(h), x.long().clamp(-3, 5).to(h), " \
        "torch.copysign(one, x.long().to(h)), (x.int() < 0).to(h)]\n"
    numbers = ["nan", "inf", "-inf", "3e9", "-3e9", "1e20", "-1e20", "-0.3", "0.3", "2.7", "-2.7"]
    x = torch.tensor(list(map(float, numbers)))
    build_kernel(step, [x], [x[None]], [])
    assert_close(fused_scan(step, [torch.ones(11)], [x[None]], [], [0] * 4),
                 list(plain(step, [torch.ones(11)], [x[None]], [])), rtol=0, atol=0)


def test_values_that_no_cache_holds() -> None:
    step = "def step(h, x):\n    return [h @ h + x.sum() * h]\n"
    with pytest.raises(Unsupported, match="KiB of a core's cache"):
        build_kernel(step, [random(600, 600)], [random(3, 2)], [])


@pytest.mark.parametrize(("sizes", "held"), [((2, 120, 121), "S"), ((64, 48, 50), "V")])
def test_states_larger_than_a_stack_or_than_so_many_lanes(
    sizes: tuple[int, ...], held: str
) -> None:
    step = "def step(h, x):\n    near = h.roll(1, -1) + h.roll(-1, -2) - 2 * h\n    " \
        "h = h + torch.tanh(0.1 * near) * x\n    return [h, h.sum((-1, -2))]\n"
    with mock.patch.object(fused, "compiled", wraps=compiled) as built:
        build_kernel(step, [random(*sizes)], [random(4, sizes[0], 1, 1)], [])
    assert f"std::unique_ptr<{held}[]>" in built.call_args.args[0]
    same(step, [random(*sizes, grad=True)], [random(4, sizes[0], 1, 1, grad=True)], [], 1)


def test_without_a_compiler_the_plain_loop_runs() -> None:
    with mock.patch.object(fused, "compiled", return_value=None):
        slices = [random(7, 3, 5, grad=True) for _ in range(2)]
        same(GATED, [random(3, 5, grad=True)], slices, [random(5, grad=True)], 1, reverse=True)


def test_a_compiler_that_fails_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    step = GATED.replace("* 2", "* 2.125")
    with mock.patch("torch._inductor.codecache.CppCodeCache.load", side_effect=OSError("no g++")), \
            pytest.raises(Unsupported, match=r"no C\+\+ compiler that builds"):
        build_kernel(step, [random(3)], [random(4, 3), random(4, 3)], [random(3)])
    assert "no fused loops here, plain ones run: no g++" in caplog.text


def test_mixed_dtypes_run_plainly() -> None:
    given = [random(3)], [random(4, 3), random(4, 3, dtype=torch.float32)], [random(3)]
    assert_close(fused_scan(GATED, *given, [0], False), list(plain(GATED, *given)))


def test_the_kernel_is_built_once() -> None:
    with mock.patch("torch._inductor.codecache.CppCodeCache.load", wraps=None) as load:
        for _ in range(2):
            build_kernel(GATED.replace("* 2", "* 2.25"), [random(3)], [random(4, 3), random(4, 3)],
                     [random(3)])
    assert load.call_count == 1


def test_a_step_that_is_traced_again_as_many_others_came_between() -> None:
    given = GATED.replace("* 2", "* 2.5"), [random(3)], [random(4, 3), random(4, 3)], [random(3)]
    build_kernel(*given)
    for cached in (traced, kernel, kernel_for):
        cached.cache_clear()
    build_kernel(*given)


def test_systems_have_no_kernel_whatever_numbers_a_step_is_traced_with() -> None:
    step = "def step(h, x):\n    return [torch.linalg.solve(h, x)]\n"
    with pytest.raises(Unsupported, match="factorizes matrices or solves linear systems"):
        build_kernel(step, [random(3, 3)], [random(4, 3, 3)], [])
    start, slices = [torch.eye(3, dtype=torch.float64)], [random(4, 3, 3)]
    assert_close(fused_scan(step, start, slices, [], []), list(plain(step, start, slices, [])))


def test_batches_of_many_sizes_share_kernels() -> None:
    sources: set[str] = set()
    with mock.patch.object(fused, "compiled", sources.add):
        for batch in range(1, 101):
            fused_scan(GATED, [torch.zeros(batch, 3)], [torch.zeros(5, batch, 3)] * 2,
                       [torch.zeros(3)], [1])
    assert len(sources) <= 7


def test_without_a_header_compiled_beforehand_kernels_are_built() -> None:
    step = GATED.replace("* 2", "* 2.375")
    with mock.patch("torch._inductor.codecache._precompile_header",
                    side_effect=OSError("no space")) as header:
        build_kernel(step, [random(3)], [random(4, 3), random(4, 3)], [random(3)])
    assert header.call_count <= 1  # none where an earlier run has left the kernel


def test_a_kernel_is_the_same_whatever_modes_are_on_when_it_is_first_asked_for() -> None:
    """One that copies views, and one without values."""
    step = "def step(h, x):\n    apart = torch.cat([h[:, 1::2], h[:, ::2]], 1)\n" \
        "    padded = torch.nn.functional.pad(h[:, :-1], (1, 0), value=-3.0)\n" \
        "    h = torch.tanh(apart * {} + padded + x)\n" \
        "    return [h]\n"
    h, x = random(3, 4, grad=True), random(5, 3, 4, grad=True)
    for number, mode in (("0.25", computing(Width.DOUBLE, None)), ("0.125", FakeTensorMode())):
        source = step.format(number)
        with mode:
            given = [torch.ones(t.shape, dtype=t.dtype, requires_grad=True) for t in (h, x)]
            made = fused_scan(source, given[:1], given[1:], [], [], False)
            torch.autograd.grad(made[0].sum(), given)
        same(source, [h], [x], [], 0)
