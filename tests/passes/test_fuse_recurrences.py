"""fuse-recurrences: what fires, what does not and why, and that it changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import looplift
import pytest
import torch
from looplift.optimizer import unroll
from looplift.passes import ORDER
from torch import Tensor, nn
from torch.testing import assert_close

Forward = Callable[[Any, Tensor], Any]
STEPS = 40


class Model(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decay = nn.Parameter(torch.rand(4))
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def gated(m: Any, x: Tensor) -> Tensor:
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        gate = torch.sigmoid(m.a(x[:, t]))
        h = gate * h + (1 - gate) * torch.tanh(m.b(x[:, t]) + m.decay * h)
        outputs.append(h)
    return torch.stack(outputs, 1)


def last_of_two(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two carries, an oscillator that is damped; only the end is used."""
    p, q = x[:, 0], torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        p, q = m.decay * p - 0.1 * q + x[:, t], 0.1 * p + m.decay * q
    return p, q


def spiking(m: Any, x: Tensor) -> Tensor:
    v, spikes = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        v = 0.9 * v + m.a(x[:, t])
        spike = (v > 0.5).to(x)
        v = torch.where(v > 0.5, v - 0.5, v)
        spikes.append(spike + v)
    return torch.stack(spikes)


def backwards(m: Any, x: Tensor) -> Tensor:
    out, h = torch.zeros_like(x), x[:, -1]
    for t in reversed(range(x.shape[1])):
        h = torch.where(x[:, t] > 0, h * m.decay, h) + x[:, t]
        out[:, t] = h
    return out


def running_greatest(m: Any, x: Tensor) -> Tensor:
    """A softmax on the way: sums of exponentials, kept in range by the greatest so far."""
    top, total = torch.full_like(x[:, 0], -1e30), torch.zeros_like(x[:, 0])
    outputs = []
    for t in range(x.shape[1]):
        now = torch.maximum(top, x[:, t])
        total = total * torch.exp(top - now) + torch.exp(x[:, t] - now)
        top = now
        outputs.append(top + torch.log(total))
    return torch.stack(outputs, -1)


def scaled(m: Any, x: Tensor) -> Tensor:
    """A number of every step, which bfloat16 would round to 0.98828125."""
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = 0.99 * h + x[:, t].abs() + m.decay
        outputs.append(h)
    return torch.stack(outputs, 1)


def gates(m: Any, x: Tensor) -> Tensor:
    """A product of the state in every step."""
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        gate = torch.sigmoid(m.a(h) + x[:, t])
        h = gate * h + (1 - gate) * torch.tanh(m.b(gate * h) + x[:, t])
        outputs.append(h)
    return torch.stack(outputs, 1)


def recurrent_cells(m: Any, x: Tensor) -> Tensor:
    """PyTorch's own cells; the decay stands for their biases."""
    h = c = torch.zeros_like(x[:, 0])
    weight, bias = torch.cat([m.a.weight] * 4), torch.cat([m.decay] * 4)
    for t in range(x.shape[1]):
        h = torch.gru_cell(x[:, t], h, weight[:12], m.b.weight.repeat(3, 1), bias[:12], bias[4:])
        h, c = torch.lstm_cell(h, (h, c), weight, weight, bias)
        h = torch.rnn_tanh_cell(h, c, m.a.weight, m.b.weight, m.decay, m.a.bias)
        h = h + torch.rnn_relu_cell(x[:, t], h, m.a.weight, m.b.weight)
    return h


def modules_of_one_step(m: Any, x: Tensor) -> Tensor:
    """PyTorch's recurrent modules, called at each step; of two layers, or without biases."""
    h = c = x.new_zeros(1, x.shape[0], 4)
    both, outputs = torch.cat([h, c]), []
    weight, bias = torch.cat([m.a.weight] * 4), torch.cat([m.decay] * 4)
    three = [weight[:12], m.b.weight.repeat(3, 1), bias[:12], bias[4:]]
    for t in range(x.shape[1]):
        y, h, c = torch.lstm(x[:, t : t + 1], (h, c), [weight, weight, bias, bias], True, 1, 0.0,
                             True, False, True)
        y, both = torch.gru(y.mT.mT, both, [*three, *three], True, 2, 0.0, True, False, True)
        y, c = torch.rnn_tanh(y.transpose(0, 1), c, [m.a.weight, m.b.weight], False, 1, 0.1, True,
                              False, False)
        outputs.append(y[0] + h[0])
    return torch.stack(outputs, 1)


def ring(m: Any, x: Tensor) -> Tensor:
    """A buffer that steps read and write in turns."""
    held, outputs = x.new_zeros(x.shape[0], 5, x.shape[2]), []
    for t in range(x.shape[1]):
        outputs.append(x[:, t] + m.decay * held[:, t % 5])
        held = held.clone()
        held[:, t % 5] = outputs[-1] + held[:, (t + 1) % 5].tanh()
    return torch.stack(outputs, 1)


def with_ones(m: Any, x: Tensor) -> Tensor:
    """What a step stacks with a constant."""
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        rows = torch.stack([torch.cos(h), torch.ones_like(h), torch.zeros_like(h)], -1)
        h = torch.tanh(rows.sum(-1) * m.decay + x[:, t])
        outputs.append(rows)
    return torch.stack(outputs, 1)


def normed(m: Any, x: Tensor) -> Tensor:
    h, total = x[:, 0], x[0, 0, 0]
    for t in range(x.shape[1]):
        h, total = nn.functional.layer_norm(h + x[:, t] * total, (4,)), total * 0.9 + h.amax()
    return h + total


def delta_rule(m: Any, x: Tensor) -> Tensor:
    state, outputs = torch.zeros(x.shape[0], 4, 4, dtype=x.dtype), []
    for t in range(x.shape[1]):
        key = nn.functional.normalize(m.a(x[:, t]), dim=-1)
        value = m.b(x[:, t]) - torch.einsum("bkv,bk->bv", state, key)
        state = state * m.decay + torch.einsum("bk,bv->bkv", key, value)
        outputs.append((x[:, t].unsqueeze(1) @ state).squeeze(1))
    return torch.stack(outputs, 1)


def rotating(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Complex states, of complex and real values; reads and shows both kinds of both."""
    turn = torch.polar(m.decay, 3 * m.decay)
    h, outputs = torch.zeros(x.shape[0], 4, dtype=turn.dtype), []
    for t in range(x.shape[1]):
        h = turn * h + torch.where(x[:, t] > 0, x[:, t] * 1j, torch.exp(x[:, t] * 0.5j))
        h = h - 0.1 * h.conj() + m.a(x[:, t])
        outputs.append(h)
    return torch.stack(outputs, 1), h.real * torch.view_as_real(h).sum(-1)


def mixed_by_a_complex_matrix(m: Any, x: Tensor) -> Tensor:
    weight = torch.complex(m.a.weight, m.b.weight).conj() / 4
    turn = torch.complex(m.decay, m.decay).conj()
    h, outputs = torch.view_as_complex(x[:, 0].reshape(-1, 2, 2)).repeat(1, 2), []
    for t in range(x.shape[1]):
        h = torch.complex(x[:, t], -x[:, t]) / (1 + m.decay) + h.unsqueeze(1).matmul(weight)[:, 0]
        h = h * turn
        outputs.append(h.imag)
    return torch.stack(outputs, 1)


def heated(m: Any, x: Tensor) -> Tensor:
    """A step that writes numbers and pieces into what it returns."""
    u = x[:, 0]
    for _ in range(STEPS):
        new = u.clone()
        new[:, 1:-1] = u[:, 1:-1] + 0.2 * (u[:, 2:] - 2 * u[:, 1:-1] + u[:, :-2])
        new[:, 0] = 0.25
        u = new
    return u


def turned_in_rounds(m: Any, x: Tensor) -> Tensor:
    """Complex numbers that a loop in a step reads."""
    z = torch.complex(x, x.flip(1))
    h = z[:, 0]
    for t in range(x.shape[1]):
        if t % 4 == 0:
            h = h * 0.5
        h = m.decay * h + z[:, t]
    return h


FORWARDS = [heated, gated, last_of_two, spiking, backwards, running_greatest, gates,
            recurrent_cells, normed, delta_rule, rotating, mixed_by_a_complex_matrix,
            turned_in_rounds, modules_of_one_step, ring, with_ones]


@pytest.mark.parametrize("forward", FORWARDS)
def test_fires_with_the_same_values_and_gradients(forward: Forward) -> None:
    model, x = Model(forward).double(), torch.randn(3, STEPS, 4, dtype=torch.float64)
    fast = looplift.apply_passes(model, (x,), measure=False)
    assert "fused_scan" in fast.code
    assert "for " not in fast.code.replace("# ", "#")  # no loop is left
    told = fast.report.to_dict()
    assert not [d for d in told["declined"] if "differs" in d["reason"]]
    results = []
    for run in (model, fast):
        given = x.clone().requires_grad_()
        outputs = torch.utils._pytree.tree_leaves(run(given))
        shown = [torch.view_as_real(o) if o.is_complex() else o for o in outputs]
        grads = torch.autograd.grad([o.sin().sum() for o in shown], [given, *model.parameters()],
                                    allow_unused=True)
        results.append((outputs, grads, [o.stride() for o in outputs]))
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("forward", "dtype"), [
    (scaled, torch.bfloat16), (gated, torch.bfloat16), (delta_rule, torch.bfloat16),
    (spiking, torch.float16)])
def test_half_precision_is_computed_in_single(forward: Forward, dtype: torch.dtype) -> None:
    """No further from the truth than the model: it rounds every result, a kernel each output."""
    model, x = Model(forward).to(dtype), torch.randn(3, STEPS, 4).to(dtype)
    fast = looplift.apply_passes(model, (x,), measure=False)
    assert "fused_scan" in fast.code
    found = fast(x)
    assert found.dtype == dtype
    truth = model.double()(x.double())
    model.to(dtype)
    error, naive = ((run(x) - truth).abs().max() for run in (fast, model))
    assert error <= 2 * naive


def test_source(run: Any, golden: Any) -> None:
    golden("fuse_recurrences", run(Model(gated), (torch.randn(3, STEPS, 4),)))


def test_keeps_the_contract(keeps_contract: Any) -> None:
    keeps_contract(Model(gated), (torch.randn(3, STEPS, 4),))


def sorts(m: Any, x: Tensor) -> Tensor:
    h = x[:, 0]
    for t in range(x.shape[1]):
        h = torch.tanh(h.sort(-1)[0] + x[:, t])
    return h


def beyond_table(m: Any, x: Tensor) -> Tensor:
    """A comparison in float64, of 0.1 as well."""
    table, h, outputs = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), x[:, 0], []
    for t in range(x.shape[1]):
        h = torch.tanh(h * (h > table)) + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, 1)


def several_dtypes(m: Any, x: Tensor) -> Tensor:
    h = x[:, 0].double()
    for t in range(x.shape[1]):
        h = torch.tanh(h + x[:, t])
    return h


def fibonacci(m: Any, x: Tensor) -> Tensor:
    h, a, b = x[:, 0], torch.zeros(3, 1).long(), torch.ones(3, 1).long()
    for t in range(x.shape[1]):
        a, b = b, a + b
        h = torch.tanh(h + x[:, t] + b)
    return h


def doubled(m: Any, x: Tensor) -> Tensor:
    h, n = x[:, 0], torch.ones(3, 4).long()
    for t in range(x.shape[1]):
        n = torch.where(h > 0, n * 2, n)
        h = torch.tanh(h + x[:, t] + n)
    return h


def from_outside(m: Any, x: Tensor) -> Tensor:
    """Integers that somebody gives may have any size."""
    h, n = x[:, 0], (x[:, 1] * 1e9).long() + 1
    for t in range(x.shape[1]):
        n = torch.where(h > 0, n + 1, n - 1)
        h = torch.tanh(h + x[:, t] + n % 2)
    return h


def other_bits(m: Any, x: Tensor) -> Tensor:
    h, n = x[:, 0], torch.ones(3, 4).long()
    for t in range(x.shape[1]):
        n = torch.where(h > 0, n ^ 1, n)
        h = torch.tanh(h + x[:, t] + n)
    return h


def greatest_so_far(m: Any, x: Tensor) -> Tensor:
    h = x[:, 0]
    for t in range(x.shape[1]):
        h = torch.cummax(h * x[:, t], 1)[0]
    return h


def quotient(m: Any, x: Tensor) -> Tensor:
    h = torch.complex(x[:, 0], x[:, 1])
    for t in range(x.shape[1]):
        h = x[:, t] / (h + 3)
    return h


def complex_root(m: Any, x: Tensor) -> Tensor:
    h = torch.complex(x[:, 0], x[:, 1])
    for t in range(x.shape[1]):
        h = torch.sqrt(x[:, t] + h)
    return h


def reasons(model: nn.Module, x: Tensor, *without: str) -> list[str]:
    passes = tuple(p for p in ORDER if p.name not in without)
    fast = looplift.apply_passes(model, (x,), measure=False, mode="inference", passes=passes)
    assert "fused_scan" not in fast.code
    return [d["reason"] for d in fast.report.to_dict()["declined"]
            if d["pass_name"] == "fuse-recurrences"]


def scaled_after(m: Any, x: Tensor) -> Tensor:
    """What the scan reads is computed by an operation that kernels have no rule for."""
    h, outputs, turned = torch.zeros_like(x[:, 0]), [], torch.special.i0(m.a(x))
    for t in range(x.shape[1]):
        h = torch.tanh(h + turned[:, t])
        outputs.append(h)
    return torch.stack(outputs, 1)


def views_on_the_way(m: Any, x: Tensor) -> Tensor:
    """Producers that are permuted, cut, squeezed, divided and broadcast before they are read."""
    batch, steps, width = x.shape
    gate = torch.sigmoid(x).permute(2, 1, 0).unsqueeze(1)[:, :, :, :batch].squeeze(1)
    wide = torch.exp(x[:, :, None, :] * m.decay[:, None]).reshape(batch, steps, 2, 2 * width)
    h, outputs = torch.zeros(batch, 2, 2 * width, dtype=x.dtype), []
    for t in range(steps):
        h = h * gate[:, t].T.repeat(1, 2).unsqueeze(1) + wide[:, t] * m.decay.sum()
        outputs.append(h.tanh())
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("forward", [scaled_after, views_on_the_way])
def test_what_the_scan_reads(forward: Forward) -> None:
    test_fires_with_the_same_values_and_gradients(forward)


@pytest.mark.parametrize(("forward", "reason"), [
    (sorts, "the loop computes sort, which the kernel has no rule for"),
    (several_dtypes,
     "its values are not all of one floating dtype on one device (float32, float64)"),
    (beyond_table,
     "its values are not all of one floating dtype on one device (float32, float64)"),
    (fibonacci, "its integers may be too large for floating numbers"),
    (doubled, "its integers may be too large for floating numbers"),
    (from_outside, "its integers may be too large for floating numbers"),
    (other_bits, "the loop computes xor, which the kernel has no rule for"),
    (greatest_so_far, "the loop computes cummax, which the kernel has no rule for"),
    (quotient, "the loop divides by complex numbers"),
    (complex_root, "the loop computes sqrt of complex numbers"),
])
def test_skips(forward: Forward, reason: str) -> None:
    assert reason in reasons(Model(forward), torch.randn(3, STEPS, 4), "batch-timesteps")


def test_short_loops_are_not_worth_a_kernel() -> None:
    told = reasons(Model(gated), torch.randn(3, 7, 4))
    assert told == ["7 steps: a kernel is built for 8 and more"]


def layers_from_one_start(m: Any, x: Tensor) -> Tensor:
    """Layers, a loop in a step, whose states are one tensor at first."""
    states, outputs = [torch.zeros_like(x[:, 0])] * 5, []
    for t in range(x.shape[1]):
        f, new = x[:, t], list(states)
        for k in range(4, 0, -1):
            f = f - m.decay * states[k - 1]
            new[k] = states[k - 1] + 0.5 * f
        states = [f, *new[1:]]
        outputs.append(f)
    return torch.stack(outputs, 1)


def test_layers_whose_states_begin_as_one_tensor() -> None:
    model, x = Model(layers_from_one_start), torch.randn(3, STEPS, 4)
    fast = looplift.apply_passes(model, (x,), measure=False, verify=False)
    assert "fused_scan" in fast.code
    assert_close(fast(x), model(x))


def until_done(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flags that steps carry, first of all: which lanes go on, and which ever were large."""
    done = large = torch.zeros_like(x[:, 0], dtype=torch.bool)
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        outputs.append(done)
        new = m.decay * h + torch.tanh(x[:, t])
        h, large = torch.where(done, h, new), large.logical_or(new.abs() > 1)
        done = (done | (h > 1.2)) & ~(new < -1)
    return h, torch.stack(outputs, 1), large


def grown(m: Any, x: Tensor) -> Tensor:
    """Masks alone: what a cell and its neighbours were."""
    alive, outputs = x[:, 0] > 0, []
    for t in range(x.shape[1]):
        alive = (alive & ~alive.roll(1, -1)) | (x[:, t] > 1)
        outputs.append(alive)
    return torch.where(torch.stack(outputs, 1), x * m.decay, x)


@pytest.mark.parametrize("forward", [until_done, grown])
def test_masks_that_steps_carry(forward: Forward) -> None:
    model, x = Model(forward), torch.randn(3, STEPS, 4)
    fast = looplift.apply_passes(model, (x,), measure=False)
    assert "fused_scan" in fast.code
    assert not [d for d in fast.report.to_dict()["declined"] if "differs" in d["reason"]]
    assert_close(fast(x), model(x))


def viterbi(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The best score of each state, and the state before it."""
    score, before = x[:, 0], []
    for t in range(1, x.shape[1]):
        best, place = (score[:, :, None] + m.a.weight).max(1)
        score = best + x[:, t]
        before.append(place)
    return score, torch.stack(before, 1)


def counts(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a remainder, of whole numbers that steps read, and of how many are larger."""
    h, n = (x[:, 0] * 3).long().clamp(-9, 9), torch.zeros(3).long()
    for t in range(x.shape[1]):
        n = n + (x[:, t] > 0).sum(-1)
        h = (h + (x[:, t] * 3).long().clamp(-9, 9)) % 7 - (h // 2).abs().minimum(n.unsqueeze(-1))
    return x.sum(1), h + n.unsqueeze(-1)


def refractory(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A neuron that rests for three steps after a spike, and the steps since the last of them."""
    v, rest, since = torch.zeros_like(x[:, 0]), torch.zeros(3, 4).long(), torch.zeros(3, 4).int()
    for t in range(x.shape[1]):
        v = torch.where(rest > 0, v * m.decay, v + m.a(x[:, t]))
        spike = v > 0.3
        rest = torch.where(spike, 3, (rest - 1).clamp(min=0))
        since = torch.where(spike, 0, since + 1)
        v = v * torch.exp(-0.1 * since) - spike * 0.3 * m.decay
    return v, since.long()


def first_passage(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """When a walk crosses a bound, -1 where it doesn't."""
    v, hit = torch.zeros_like(x[:, 0]), torch.full((3, 4), -1)
    for t in range(x.shape[1]):
        v = v * m.decay + x[:, t]
        hit = torch.where((v > 1) & (hit < 0), t, hit)
    return v, hit


def chosen(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What is chosen is fed back, as one of its kind, and told as a number."""
    h, choices = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        choice = (m.a(h) + x[:, t]).argmax(-1)
        h = torch.tanh(m.b(nn.functional.one_hot(choice, 4).to(x)) * h + x[:, t])
        choices.append(choice)
    return h, torch.stack(choices)


@pytest.mark.parametrize("forward", [viterbi, chosen, counts, refractory, first_passage])
def test_integers(forward: Forward) -> None:
    model, x = Model(forward), torch.randn(3, STEPS, 4)
    fast = looplift.apply_passes(model, (x,), measure=False)
    assert "fused_scan" in fast.code
    assert_close(fast(x), model(x))
    assert fast(x)[1].dtype == torch.int64
    given = [x.clone().requires_grad_() for _ in range(2)]
    grads = [torch.autograd.grad(run(x)[0].sum(), x)
             for run, x in zip((model, fast), given, strict=True)]
    assert_close(grads[1], grads[0])


def test_integers_are_not_told_in_half_precision() -> None:
    """bfloat16 holds no integer above 256 exactly."""
    told = reasons(Model(chosen).bfloat16(), torch.randn(3, STEPS, 4).bfloat16())
    assert told == ["some of its values are integers, and others of half precision"]


def constant_gains(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = torch.tanh(h * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=x.dtype) + x[:, t])
    return h


def test_constants_that_every_step_makes_are_one() -> None:
    test_fires_with_the_same_values_and_gradients(constant_gains)
    x = torch.randn(3, STEPS, 4)
    code = looplift.apply_passes(Model(constant_gains), (x,), measure=False).code
    assert code.count("_constant") == 1


def test_no_compiler() -> None:
    with mock.patch("looplift.optimizer.fused.compiled", return_value=None):
        told = reasons(Model(gated), torch.randn(3, STEPS, 4))
    assert told == ["there is no C++ compiler that builds the kernel"]


def test_it_can_be_left_out() -> None:
    passes = tuple(p for p in ORDER if p.name != "fuse-recurrences")
    fast = looplift.apply_passes(Model(gated), (torch.randn(3, STEPS, 4),), passes=passes,
                                 measure=False, mode="inference")
    assert "for slice_0" in fast.code


def test_under_torch_compile() -> None:
    model, x = Model(gated), torch.randn(3, STEPS, 4)
    compiled = torch.compile(model, backend="looplift")
    assert_close(compiled(x), model(x))


def log_sinkhorn(m: Any, x: Tensor) -> Tensor:
    for _ in range(7):
        x = x - torch.logsumexp(x, dim=-1, keepdim=True)
        x = x - torch.logsumexp(x, dim=-2, keepdim=True)
    return x.exp()


def newton_schulz(m: Any, x: Tensor) -> Tensor:
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(-2, -1)
        x = 1.875 * x + (-1.25 * gram + 0.375 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("forward", [log_sinkhorn, newton_schulz])
def test_iterations_on_small_matrices_are_one_kernel(forward: Forward) -> None:
    """Their steps read nothing of their own, so nothing but a number says how many there are."""
    model, x = Model(forward), torch.randn(3, 9, 4, 4)
    fast = looplift.apply_passes(model, (x.requires_grad_(),), measure=False)
    assert "fused_scan" in fast.code
    assert "in range(" not in fast.code.partition("step = ")[2]
    one, other = (torch.autograd.grad(run(x).sin().sum(), x)[0] for run in (model, fast))
    assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert_close(other, one, rtol=1e-3, atol=1e-5)


def scheduled(m: Any, x: Tensor) -> Tensor:
    h, rates = x[:, 0] * 0.5, [0.01 + 0.001 * t**2 for t in range(x.shape[1])]
    for t, rate in enumerate(rates):
        h = torch.where(h > t * 0.01, h * (1 - rate), torch.tanh(h) / (t + 1)) + x[:, t] * rate**0.5
    return h


def sampled(m: Any, x: Tensor) -> Tensor:
    """A diffusion sampler: the time is a tensor that each step fills."""
    h = x[:, 0]
    for t in range(STEPS - 1, -1, -1):
        time = torch.full((x.shape[0], 1), t / STEPS, dtype=x.dtype)
        kind = torch.full((x.shape[0],), t // 10, dtype=torch.long)
        rate = torch.full_like(h, 0.1 * t) + h.new_full((4,), t)
        h = h - 0.1 * torch.tanh(m.a(h) * time + m.b.weight[kind] * rate)
    return h


def scaled_before(m: Any, x: Tensor) -> Tensor:
    """The first product joins the loop, with a number of its own."""
    h = x[:, 0] * 0.5
    for t in range(x.shape[1]):
        h = torch.tanh(m.decay * h + x[:, t]) * 0.1
    return h


def advantages(m: Any, x: Tensor) -> Tensor:
    """A mask times a number is of the default dtype, in a model of float64 as well."""
    out, last, alive = torch.zeros_like(x), torch.zeros_like(x[:, 0]), x > -1
    for t in reversed(range(x.shape[1])):
        last = x[:, t] - 0.99 * m.decay + 0.99 * 0.95 * alive[:, t] * last
        out[:, t] = last
    return out


def noisy(m: Any, x: Tensor) -> Tensor:
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(x[:, t]) + 0.9 * h) + 0.1 * torch.randn_like(h)
        outputs.append(h)
    return torch.stack(outputs, 1)


def dropped(m: Any, x: Tensor) -> Tensor:
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        h = torch.nn.functional.dropout(torch.tanh(m.a(x[:, t]) + m.b(h)), 0.3)
        outputs.append(h)
    return torch.stack(outputs, 1)


def kept_at_random(m: Any, x: Tensor) -> Tensor:
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        keep = torch.bernoulli(h.detach(), 0.6)
        h = keep * h + (1 - keep) * torch.tanh(x[:, t])
        outputs.append(h)
    return torch.stack(outputs, 1)


def chosen_at_random(m: Any, x: Tensor) -> Tensor:
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        h = nn.functional.gumbel_softmax(m.a(h) + x[:, t], tau=0.7, hard=True)
        outputs.append(h)
    return torch.stack(outputs, 1)


def written_over(m: Any, x: Tensor) -> Tensor:
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        noise = torch.empty_like(h).normal_(0.5, 2) + torch.empty(3, 4).uniform_(-1, 1)
        noise += h.new_empty(h.shape).log_normal_() + torch.empty_like(h).cauchy_().tanh()
        h = torch.tanh(m.a(h) + x[:, t] + 0.1 * noise + 0.1 * h.detach().clone().geometric_(0.5))
        outputs.append(h)
    return torch.stack(outputs, 1)


def leapfrog(m: Any, x: Tensor, steps: int = 5) -> Tensor:
    """Hamiltonian dynamics (Duane et al., 1987), accepted or not; the last kick is a half one."""
    q, outputs = m.decay.expand_as(x[:, 0]), []
    for t in range(x.shape[1]):
        p, before = x[:, t] - 0.05 * q * m.decay, q
        energy = (x[:, t] ** 2).sum(-1) + (m.decay * q * q).sum(-1)
        for k in range(steps):
            q = q + 0.1 * p
            p = p - (0.1 if k < steps - 1 else 0.05) * q * m.decay
        less = energy > (p * p).sum(-1) + (m.decay * q * q).sum(-1)
        q = torch.where(less[:, None], q, before)
        outputs.append(q)
    return torch.stack(outputs, 1)


def leapfrog_further(m: Any, x: Tensor) -> Tensor:
    return leapfrog(m, x, 10)


@pytest.mark.parametrize("forward", [leapfrog, leapfrog_further])
def test_numbers_of_each_step_of_an_inner_loop(forward: Forward) -> None:
    model, x = Model(forward), torch.randn(3, 40, 4)
    fast = looplift.apply_passes(model, (x,), measure=False, mode="inference")
    assert fast.code.count("fused_scan(") == 1
    assert " for " not in fast.code, fast.code
    assert_close(fast(x), model(x))


@pytest.mark.parametrize("forward", [scheduled, sampled, scaled_before, advantages, noisy, dropped,
                                     kept_at_random, chosen_at_random, written_over, leapfrog])
def test_numbers_of_each_step(forward: Forward) -> None:
    """Random ones are drawn before, in their order."""
    model, x = Model(forward), torch.randn(3, STEPS, 4)
    fast = looplift.apply_passes(model, (x,), measure=False)
    assert "fused_scan" in fast.code
    assert not [d for d in fast.report.to_dict()["declined"] if "differs" in d["reason"]]
    results = []
    for run in (model, fast):
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        made = run(given)
        results.append((made, torch.autograd.grad(made.sin().sum(), given), torch.rand(1)))
    assert_close(results[1], results[0])


def solved(m: Any, x: Tensor) -> Tensor:
    """A few steps of a solver between two inputs."""
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        drive = torch.sigmoid(m.a(x[:, t]))
        for _ in range(6):
            h = (h + drive + (torch.sigmoid(h.unsqueeze(-1) - m.b.weight) * m.b.weight).sum(1)) \
                / (1 + drive)
        outputs.append(h)
    return torch.stack(outputs, 1)


def integrated(m: Any, x: Tensor) -> Tensor:
    """Slopes that differ only in a number are a loop of their own, over a table."""
    def slope(h: Tensor, drive: Tensor) -> Any:
        return drive - torch.sin(h) * m.decay

    h, outputs, dt = torch.zeros_like(x[:, 0]), [], 0.1
    for t in range(x.shape[1]):
        first = slope(h, x[:, t])
        second = slope(h + dt / 2 * first, x[:, t])
        third = slope(h + dt / 2 * second, x[:, t])
        fourth = slope(h + dt * third, x[:, t])
        h = h + dt / 6 * (first + 2 * second + 2 * third + fourth)
        outputs.append(h)
    return torch.stack(outputs, 1)


def smoothed_backwards(m: Any, x: Tensor) -> Tensor:
    """Each step runs a short recurrence from the last to the first of its channels."""
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        h, last, parts = torch.tanh(m.a(h) + x[:, t]), torch.zeros(x.shape[0], 1), []
        for k in reversed(range(4)):
            last = 0.5 * last + h[:, k : k + 1]
            parts.append(last)
        h = torch.cat(parts[::-1], 1) * m.decay
        outputs.append(h)
    return torch.stack(outputs, 1)


def narrowed(m: Any, x: Tensor) -> Tensor:
    """A few steps whose bounds, weights and thresholds differ."""
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        for k in range(5):
            near = torch.lerp(h, torch.tanh(m.a(h) + x[:, t]), 1 / (k + 2)).clamp(-1, 1 - 0.1 * k)
            h = torch.where(near > 0.1 * k, near * m.decay, 0.01 * k)
        outputs.append(h)
    return torch.stack(outputs, 1)


def truncated(m: Any, x: Tensor) -> Tensor:
    """Truncated back-propagation: too few rounds for a kernel, but for the steps in each."""
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        if t % 4 == 0:
            h = h.detach()
        h = torch.tanh(m.a(x[:, t]) + m.b(h))
        outputs.append(h)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("without", [(), ("fuse-recurrences",), ("batch-timesteps",)])
@pytest.mark.parametrize("forward", [solved, integrated, smoothed_backwards, narrowed,
                                     truncated])
def test_short_loops_in_a_step_are_written_out(forward: Forward, without: tuple[str, ...]) -> None:
    model, x = Model(forward), torch.randn(3, STEPS, 4)
    passes = tuple(p for p in ORDER if p.name not in without)
    fast = looplift.apply_passes(model, (x,), measure=False, passes=passes)
    assert fast.code.count("fused_scan(") == (not without or without[0] != "fuse-recurrences")
    results = []
    for run in (model, fast):
        given = x.clone().requires_grad_()
        results.append((run(given), torch.autograd.grad(run(given).sin().sum(), [
            given, *model.parameters()], allow_unused=True)))
    assert_close(results[1], results[0])


def test_a_short_loop_in_a_kernel_is_not_told_of() -> None:
    told = looplift.apply_passes(Model(solved), (torch.randn(3, 20, 4),), measure=False,
                                 mode="inference").report.to_dict()
    assert "fuse-recurrences" in {r["pass_name"] for r in told["rewrites"]}
    assert not [d for d in told["declined"] if "a kernel is built for" in d["reason"]]


def filtered(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A Kalman filter's likelihood: its gains go into another loop, its variances stand apart."""
    mean, variance, terms = torch.zeros(3, 4), torch.ones(3, 4), []
    for t in range(x.shape[1]):
        spread, rest = variance + 0.5 + m.decay**2, x[:, t] - mean
        terms.append(rest * rest / spread + spread.log())
        gain = variance / spread
        mean = (mean + m.a(gain).sigmoid() * rest) * 0.9
        variance = (1 - gain) * variance * 0.8 + 0.1 * x[:, t] ** 2
    return torch.stack(terms, 1).sum(1), variance


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_kernels_that_differ_in_where_their_steps_lie_run_once(mode: str) -> None:
    model, x = Model(filtered), torch.randn(3, STEPS, 4)
    fast = looplift.apply_passes(model, (x,), measure=False, mode=mode)
    steps = [line for line in fast.code.splitlines() if "div = carry_0 /" in line]
    assert len(steps) == 1, fast.code
    given = [x.clone().requires_grad_() for _ in range(2)]
    grads = [torch.autograd.grad(run(x)[0].sum(), [x, model.decay])
             for run, x in zip((model, fast), given, strict=True)]
    assert_close(fast(x), model(x))
    assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def solved_at_length(m: Any, x: Tensor) -> Tensor:
    h = x[:, 0]
    for t in range(x.shape[1]):
        for _ in range(33):
            h = torch.tanh(h * m.decay)
        h = h + x[:, t]
    return h


def test_long_loops_in_a_step_are_not_written_out() -> None:
    model, x = Model(solved_at_length), torch.randn(3, 20, 4)
    fast = looplift.apply_passes(model, (x,), measure=False, mode="inference")
    assert "a step of it is a loop of 33 steps" in {
        d["reason"] for d in fast.report.to_dict()["declined"]}
    assert fast.code.count("fused_scan(") == 1


def test_loops_of_many_operations_in_a_step_are_not_written_out(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unroll, "LARGEST", 5)
    told = [d["reason"] for d in looplift.apply_passes(
        Model(solved), (torch.randn(3, 20, 4),), measure=False, mode="inference",
    ).report.to_dict()["declined"]]
    assert any(reason.endswith("operations, its loops written out") for reason in told), told


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_that_are_promoted(dtype: torch.dtype) -> None:
    def returns(m: Any, x: Tensor, done: Tensor) -> Tensor:
        value, values = x[:, -1], []
        for t in reversed(range(x.shape[1])):
            ended = done[:, t].int() if dtype is torch.bool else done[:, t]
            value = torch.tanh(x[:, t] + m.decay * (value * (1 - ended) + x[:, t] * ended))
            values.append(value)
        return torch.stack(values, 1)

    model = Model(lambda m, pair: returns(m, *pair))
    pair = torch.randn(3, STEPS, 4), (torch.rand(3, STEPS, 1) < 0.3).to(dtype)
    fast = looplift.apply_passes(model, (pair,), measure=False)
    assert "fused_scan" in fast.code
    assert "for " not in fast.code.replace("# ", "#")
    results = []
    for run in (model, fast):
        made = run(pair)
        results.append((made, torch.autograd.grad(made.sin().sum(), model.decay)))
    assert_close(results[1], results[0])


def spikes_alone(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neither what is returned of every step nor what only spikes feed has a gradient."""
    v, count, spikes = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        v = 0.9 * v + m.a(x[:, t])
        spike = (v > 0.5).to(x)
        v = v * (1 - spike)
        count = count + spike
        spikes.append(spike)
    return torch.stack(spikes), count, v


def test_what_has_no_gradient_has_none() -> None:
    model, x = Model(spikes_alone), torch.randn(3, STEPS, 4)
    fast = looplift.apply_passes(model, (x,), measure=False, mode="training")
    assert "fused_scan" in fast.code
    wants = [[o.requires_grad for o in run(x)] for run in (model, fast)]
    assert wants[0] == wants[1] == [False, False, True]
    assert_close(fast(x), model(x))
    grads = [torch.autograd.grad(run(x)[2].sum(), model.a.weight) for run in (model, fast)]
    assert_close(grads[1], grads[0])


def normalized(m: Any, x: Tensor) -> Tensor:
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(h) + x[:, t])
        outputs.append(h)
    shown = torch.stack(outputs, 1).transpose(1, 2)
    return nn.functional.batch_norm(shown, None, None, training=True)


def test_a_batch_norm_over_what_a_loop_shows() -> None:
    test_fires_with_the_same_values_and_gradients(normalized)


@pytest.mark.parametrize("without", ["", "fuse-recurrences"])
def test_a_last_state_does_not_hold_all_steps(without: str) -> None:
    """Who keeps it from call to call would keep the history too."""
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h, outputs = x[:, 0], []
        for t in range(x.shape[1]):
            h = torch.tanh(m.a(h) + x[:, t])
            outputs.append(h)
        return torch.stack(outputs, 1), h

    model, x = Model(forward), torch.randn(3, STEPS, 4)
    passes = [p for p in ORDER if p.name != without]
    fast = looplift.apply_passes(model, (x,), measure=False, passes=passes)
    assert "one permute" in str(fast.report)
    assert_close(fast(x), model(x))
    assert fast(x)[1].untyped_storage().nbytes() == 3 * 4 * 4
