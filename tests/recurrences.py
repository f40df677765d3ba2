"""Recurrent models as people write them, one step after another: x (batch, time, width) → same.

`make bench` measures them and tests/passes/test_recurrences.py compares them; each is written
from the equations of its paper. There is one size of each, whatever `size` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional as F

WIDTH = 64


def example_inputs(size: str = "full", length: int = 64) -> tuple[Tensor]:
    """Four sequences; "tiny": two."""
    return (torch.randn(2 if size == "tiny" else 4, length, WIDTH),)


class Gru(nn.Module):
    """Gated recurrent unit (Cho et al., 2014), as PyTorch defines it."""

    def __init__(self, size: str = "full") -> None:
        super().__init__()
        self.of_x, self.of_h = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            reset_x, update_x, new_x = self.of_x(x[:, t]).chunk(3, -1)
            reset_h, update_h, new_h = self.of_h(h).chunk(3, -1)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            h = (1 - update) * new + update * h
            outputs.append(h)
        return torch.stack(outputs, 1)


class GruByHand(nn.Module):
    """The same by `nn.GRU`, on the loop's parameters."""

    def __init__(self, size: str = "full") -> None:
        super().__init__()
        self.of_x, self.of_h = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        held = [self.of_x.weight, self.of_h.weight, self.of_x.bias, self.of_h.bias]
        start = x.new_zeros(1, x.shape[0], WIDTH)
        outputs: Tensor = torch.gru(x, start, held, True, 1, 0.0, self.training, False, True)[0]
        return outputs


class GruCells(nn.Module):
    """The same, of PyTorch's cell."""

    def __init__(self, size: str = "full") -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            outputs.append(h)
        return torch.stack(outputs, 1)


class Lstm(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997), with a forget gate."""

    def __init__(self, size: str = "full") -> None:
        super().__init__()
        self.of_x, self.of_h = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros_like(x[:, 0])
        outputs = []
        for t in range(x.shape[1]):
            i, f, g, o = (self.of_x(x[:, t]) + self.of_h(h)).chunk(4, -1)
            i, f, o = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)
            c = f * c + i * torch.tanh(g)
            h = o * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, 1)


class Heads(nn.Module):
    """What the models with a matrix of state per head share: projections to heads."""

    def __init__(self, *sizes: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList(nn.Linear(WIDTH, heads * size) for size in sizes)

    def project(self, x: Tensor) -> list[Tensor]:
        return [p(x).unflatten(-1, (self.heads, -1)) for p in self.projections]


class GatedDeltaRule(Heads):
    """Gated DeltaNet (Yang et al., 2024), equation 10; S (batch, heads, keys, values)."""

    def __init__(self, size: str = "full") -> None:
        super().__init__(32, 32, 32, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, decay, rate = self.project(x)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        decay, rate = F.logsigmoid(decay), torch.sigmoid(rate)
        state = x.new_zeros(x.shape[0], self.heads, 32, 32)
        outputs = torch.zeros_like(v)
        for t in range(x.shape[1]):
            state = state * decay[:, t].exp().unsqueeze(-1)
            known = (state * k[:, t].unsqueeze(-1)).sum(-2)
            change = (v[:, t] - known) * rate[:, t]
            state = state + k[:, t].unsqueeze(-1) * change.unsqueeze(-2)
            outputs[:, t] = (state * q[:, t].unsqueeze(-1)).sum(-2)
        return outputs.flatten(2)


class GatedLinearAttention(Heads):
    """Gated linear attention (Yang et al., 2023), in its recurrent form."""

    def __init__(self, size: str = "full") -> None:
        super().__init__(32, 32, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.project(x)
        gate = torch.sigmoid(gate) ** (1 / 16)
        state, outputs = x.new_zeros(x.shape[0], self.heads, 32, 32), []
        for t in range(x.shape[1]):
            state = gate[:, t, :, :, None] * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(outputs, 1).flatten(2)


class Rwkv4(nn.Module):
    """RWKV-4's weighted average of values (Peng et al., 2023), kept in range as in its appendix."""

    def __init__(self, size: str = "full") -> None:
        super().__init__()
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decay, self.bonus = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.key(x), self.value(x)
        top, total = torch.full_like(keys[:, 0], -1e38), torch.zeros_like(keys[:, 0])
        weights, outputs, decay = torch.zeros_like(total), [], -torch.exp(self.decay)
        for t in range(x.shape[1]):
            k, v = keys[:, t], values[:, t]
            high = torch.maximum(top, k + self.bonus)
            old, new = torch.exp(top - high), torch.exp(k + self.bonus - high)
            outputs.append((old * total + new * v) / (old * weights + new))
            high = torch.maximum(top + decay, k)
            old, new = torch.exp(top + decay - high), torch.exp(k - high)
            total, weights, top = old * total + new * v, old * weights + new, high
        return torch.stack(outputs, 1)


class Rwkv6(Heads):
    """RWKV-6's matrix of state (Peng et al., 2024), equation 19."""

    def __init__(self, size: str = "full") -> None:
        super().__init__(32, 32, 32, 32)
        self.bonus = nn.Parameter(torch.randn(2, 32, 1))

    def forward(self, x: Tensor) -> Tensor:
        r, k, v, w = self.project(x)
        decay = torch.exp(-torch.exp(w))
        state, outputs = x.new_zeros(x.shape[0], self.heads, 32, 32), []
        for t in range(x.shape[1]):
            new = k[:, t].unsqueeze(-1) @ v[:, t].unsqueeze(-2)
            outputs.append((r[:, t].unsqueeze(-2) @ (state + self.bonus * new)).squeeze(-2))
            state = decay[:, t].unsqueeze(-1) * state + new
        return torch.stack(outputs, 1).flatten(2)


class SelectiveScan(nn.Module):
    """Mamba's selective state space (Gu and Dao, 2023), algorithm 2, without its convolution."""

    def __init__(self, size: str = "full", states: int = 16, rank: int = 4) -> None:
        super().__init__()
        self.sizes = [rank, states, states]
        self.of_x, self.of_rank = nn.Linear(WIDTH, sum(self.sizes)), nn.Linear(rank, WIDTH)
        self.log_a = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(WIDTH, 1))
        self.skip = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rank, b, c = self.of_x(x).split(self.sizes, -1)
        dt, a = F.softplus(self.of_rank(rank)), -torch.exp(self.log_a)
        decay = torch.exp(dt.unsqueeze(-1) * a)
        new = (dt * x).unsqueeze(-1) * b.unsqueeze(2)
        state, outputs = x.new_zeros(x.shape[0], WIDTH, a.shape[1]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + new[:, t]
            outputs.append(torch.matmul(state, c[:, t].unsqueeze(-1)).squeeze(-1))
        return torch.stack(outputs, 1) + self.skip * x


class MatrixLstm(Heads):
    """mLSTM (Beck et al., 2024), equations 19–27, kept in range by its largest exponent."""

    def __init__(self, size: str = "full") -> None:
        super().__init__(32, 32, 32, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, take, keep = self.project(x)
        take, keep = take.squeeze(-1), F.logsigmoid(keep.squeeze(-1))
        state = x.new_zeros(x.shape[0], self.heads, 32, 32)
        weight, top, outputs = state[..., 0], state[..., 0, 0], []
        for t in range(x.shape[1]):
            high = torch.maximum(keep[:, t] + top, take[:, t])
            old, new = torch.exp(keep[:, t] + top - high), torch.exp(take[:, t] - high)
            top = high
            added = v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
            state = old[..., None, None] * state + new[..., None, None] * added
            weight = old[..., None] * weight + new[..., None] * k[:, t]
            shown = torch.maximum((weight * q[:, t]).sum(-1).abs(), torch.exp(-top))
            outputs.append((state @ q[:, t].unsqueeze(-1)).squeeze(-1) / shown.unsqueeze(-1))
        return torch.stack(outputs, 1).flatten(2)


class Spiking(nn.Module):
    """Leaky integrate-and-fire neurons, with a sigmoid for a spike so that it has a gradient."""

    def __init__(self, size: str = "full") -> None:
        super().__init__()
        self.current, self.leak = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        potential, spikes = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            potential = self.leak * potential + self.current(x[:, t])
            spikes.append(torch.sigmoid(5 * (potential - 1)))
            potential = potential - spikes[-1]
        return torch.stack(spikes, 1)


class RunningStatistics(nn.Module):
    """Each step in units of the exponential mean and variance of those before it."""

    def __init__(self, size: str = "full") -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((WIDTH,), -2.0))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, outputs = torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0]), []
        rate = torch.sigmoid(self.rate)
        for t in range(x.shape[1]):
            apart = x[:, t] - mean
            outputs.append(apart * torch.rsqrt(variance + 1e-5))
            mean = mean + rate * apart
            variance = (1 - rate) * (variance + rate * apart * apart)
        return torch.stack(outputs, 1)


class NeuralOde(nn.Module):
    """Euler steps of dh/dt = f(h) + x, with f of one hidden layer (Chen et al., 2018)."""

    def __init__(self, size: str = "full") -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs, step = torch.zeros_like(x[:, 0]), [], 1 / x.shape[1]
        for t in range(x.shape[1]):
            h = h + step * (self.out(torch.tanh(self.inside(h))) + x[:, t])
            outputs.append(h)
        return torch.stack(outputs, 1)


class Evolution(nn.Module):
    """The recurrence of models/eigenstate.py alone: decaying, rotating states."""

    def __init__(self, size: str = "full") -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(0.0, 4.0, WIDTH))
        self.angle = nn.Parameter(torch.linspace(0.0, 3.0, WIDTH))

    def eigenvalues(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.sigmoid(self.decay), torch.cos(self.angle), torch.sin(self.angle)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        decay, cosine, sine = self.eigenvalues()
        real = imaginary = torch.zeros_like(x[:, 0])
        reals, imaginaries = [], []
        for t in range(x.shape[1]):
            real, imaginary = (decay * (real * cosine - imaginary * sine) + x[:, t],
                               decay * (real * sine + imaginary * cosine))
            reals.append(real)
            imaginaries.append(imaginary)
        return torch.stack(reals, 1), torch.stack(imaginaries, 1)


class EvolutionByHand(Evolution):
    """The same into buffers made before the loop, as the seed's hand form has it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        decay, cosine, sine = self.eigenvalues()
        real = imaginary = torch.zeros_like(x[:, 0])
        reals, imaginaries = torch.empty_like(x), torch.empty_like(x)
        for t in range(x.shape[1]):
            real, imaginary = (decay * (real * cosine - imaginary * sine) + x[:, t],
                               decay * (real * sine + imaginary * cosine))
            reals[:, t] = real
            imaginaries[:, t] = imaginary
        return reals, imaginaries


class EvolutionAtOnce(Evolution):
    """The same by PyTorch's `associative_scan`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        decay, cosine, sine = self.eigenvalues()
        given = (decay * cosine).expand_as(x), (decay * sine).expand_as(x), x, torch.zeros_like(x)
        _, _, real, imaginary = associative_scan(rotated, given, 1, combine_mode="generic")
        return real, imaginary


def rotated(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Two steps `h ← a·h + b` of complex numbers as one; each the parts of a and b."""
    (a, a_i, b, b_i), (c, c_i, d, d_i) = left, right
    return a * c - a_i * c_i, a * c_i + a_i * c, c * b - c_i * b_i + d, c * b_i + c_i * b + d_i


MODELS: dict[str, type[nn.Module]] = {
    "GRU": Gru, "GRU of cells": GruCells, "LSTM": Lstm, "gated delta rule": GatedDeltaRule,
    "gated linear attention": GatedLinearAttention, "RWKV-4": Rwkv4, "RWKV-6": Rwkv6,
    "Mamba": SelectiveScan, "mLSTM": MatrixLstm, "spiking": Spiking,
    "running statistics": RunningStatistics, "neural ODE": NeuralOde, "eigenstates": Evolution,
}
