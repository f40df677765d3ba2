"""A temporal eigenstate network: attention replaced by decaying, rotating states (`seeds/004`).

Naive: two projections and the energy run inside the loop over time steps, on (B, K) each.
By hand: the projections run once over all steps; the loop only evolves, into preallocated buffers.

Shapes: B batch, T length, K eigenstates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class EigenstateConfig:
    """Sizes of one network and of its example input, (batch, length, dim)."""

    batch: int
    length: int
    dim: int
    layers: int
    eigenstates: int
    coupling: bool = False


CONFIGS = {
    # length = eigenstates: a reduction over the wrong one of the two keeps its shape
    "tiny": EigenstateConfig(batch=2, length=6, dim=10, layers=2, eigenstates=6),
    "small": EigenstateConfig(batch=2, length=64, dim=64, layers=2, eigenstates=16),
    "full": EigenstateConfig(batch=4, length=1024, dim=512, layers=4, eigenstates=64),
}
LENGTHS = (128, 512, 1024, 4096)  # of `full`, by `example_inputs("full", length=...)`


class EigenstateLayer(nn.Module):
    """The naive layer: (B, T, dim) to (B, T, dim) and the energy of the states, (B, T)."""

    def __init__(self, config: EigenstateConfig) -> None:
        super().__init__()
        dim, count = config.dim, config.eigenstates
        self.norm = nn.LayerNorm(dim)
        self.input_projection = nn.Linear(dim, count)
        self.output_projection = nn.Linear(count, dim)
        self.decay = nn.Parameter(torch.linspace(0.0, 4.0, count))  # |λ| from 0.5 to 0.98
        self.frequency = nn.Parameter(torch.linspace(0.0, 3.0, count))  # radians per step
        self.coupling: nn.Parameter | None = None
        if config.coupling:
            mixing = torch.eye(count) + 0.1 / count * torch.randn(count, count)
            self.coupling = nn.Parameter(mixing)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        evolved, energy = self.evolve(self.norm(x))
        x = x + evolved
        return x + self.feed_forward(self.feed_forward_norm(x)), energy

    def evolve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the states over x, (B, T, dim); return outputs (B, T, dim) and energy (B, T)."""
        real = x.new_zeros(x.shape[0], self.decay.shape[0])
        imaginary = torch.zeros_like(real)
        decay, cosine, sine = self.eigenvalues()
        outputs, energies = [], []
        for t in range(x.shape[1]):
            beta = self.input_projection(x[:, t, :])
            real, imaginary = self.feed_back(real), self.feed_back(imaginary)
            real, imaginary = (
                decay * (real * cosine - imaginary * sine) + beta,
                decay * (real * sine + imaginary * cosine),
            )
            outputs.append(self.output_projection(real))
            energies.append(real.pow(2).sum(dim=1) + imaginary.pow(2).sum(dim=1))
        return torch.stack(outputs, dim=1), torch.stack(energies, dim=1)

    def eigenvalues(self) -> tuple[Tensor, Tensor, Tensor]:
        """|λ|, below 1 whatever the parameter is, and the cosine and sine of its angle: (K,)."""
        return torch.sigmoid(self.decay), torch.cos(self.frequency), torch.sin(self.frequency)

    def feed_back(self, state: Tensor) -> Tensor:
        """What the next step starts from: the state (B, K), its eigenstates mixed if coupled."""
        return state if self.coupling is None else state @ self.coupling

    def feed_forward(self, x: Tensor) -> Tensor:
        contracted: Tensor = self.contract(functional.gelu(self.expand(x)))
        return contracted


class BufferedLayer(EigenstateLayer):
    """By hand: the same layer with the projections and the energy taken out of the loop."""

    def evolve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = self.states(self.input_projection(x))
        return self.output_projection(real), torch.sum(real.pow(2) + imaginary.pow(2), dim=-1)

    def states(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary states after every step, (B, T, K) each, of the same-shaped beta."""
        all_real, all_imaginary = torch.empty_like(beta), torch.empty_like(beta)
        real, imaginary = torch.zeros_like(beta[:, 0]), torch.zeros_like(beta[:, 0])
        decay, cosine, sine = self.eigenvalues()
        for t in range(beta.shape[1]):
            real, imaginary = self.feed_back(real), self.feed_back(imaginary)
            real, imaginary = (
                decay * (real * cosine - imaginary * sine) + beta[:, t],
                decay * (real * sine + imaginary * cosine),
            )
            all_real[:, t] = real
            all_imaginary[:, t] = imaginary
        return all_real, all_imaginary


class CumulativeSumLayer(BufferedLayer):
    """NOT equal: the textbook closed form cumsum(b / λ^t) · λ^t.

    Right for short inputs, so a check at a short length passes; for long ones λ^t underflows and
    the quotient overflows. In float32 at |λ| = 0.5 the outputs are NaN well before T = 256.
    """

    def states(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.arange(beta.shape[1], device=beta.device, dtype=beta.dtype).unsqueeze(1)
        powers = torch.polar(torch.sigmoid(self.decay) ** steps, self.frequency * steps)
        state = torch.cumsum(beta / powers, dim=1) * powers
        return state.real, state.imag


class HoistedCouplingLayer(BufferedLayer):
    """NOT equal: the coupling runs once over all states, where the naive loop feeds it back.

    Same shapes and nearly the same values: off by percents, more with every step.
    """

    def states(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = super().states(beta)
        return super().feed_back(real), super().feed_back(imaginary)

    def feed_back(self, state: Tensor) -> Tensor:
        return state


class LastDimensionEnergyLayer(BufferedLayer):
    """NOT equal: the naive `sum(dim=1)` became one `sum(dim=-1)`, on states kept as (B, K, T).

    The sum runs over time and gives (B, K) where (B, T) is due: no shape tells when T = K.
    """

    def evolve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = (s.transpose(1, 2) for s in self.states(self.input_projection(x)))
        energy = torch.sum(real.pow(2) + imaginary.pow(2), dim=-1)
        return self.output_projection(real.transpose(1, 2)), energy


class TanhFeedForwardLayer(BufferedLayer):
    """NOT equal: the tanh approximation stands in for the exact GELU, off by up to 5e-4."""

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.expand(x), approximate="tanh")
        contracted: Tensor = self.contract(hidden)
        return contracted


class EigenstateNetwork(nn.Module):
    """Layers in a row: (B, T, dim) to (B, T, dim) and the mean energy of the layers, (B, T)."""

    def __init__(self, config: EigenstateConfig, layer: type[EigenstateLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        energies = []
        for layer in self.layers:
            x, energy = layer(x)
            energies.append(energy)
        return x, torch.stack(energies).mean(dim=0)


def build(config: EigenstateConfig, layer: type[EigenstateLayer]) -> EigenstateNetwork:
    """A network with the same random weights on every call, whichever its layers' form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EigenstateNetwork(config, layer)


def model(size: str = "small") -> nn.Module:
    return build(CONFIGS[size], EigenstateLayer)


def by_hand(size: str = "small") -> nn.Module:
    return build(CONFIGS[size], BufferedLayer)


def model_with_coupling(size: str = "small") -> nn.Module:
    return build(replace(CONFIGS[size], coupling=True), EigenstateLayer)


def by_hand_with_coupling(size: str = "small") -> nn.Module:
    return build(replace(CONFIGS[size], coupling=True), BufferedLayer)


def as_published_cumsum(size: str = "small") -> nn.Module:
    """NOT equal to `model` at long lengths; see `CumulativeSumLayer`."""
    return build(CONFIGS[size], CumulativeSumLayer)


def as_published_coupling(size: str = "small") -> nn.Module:
    """NOT equal to `model_with_coupling`; see `HoistedCouplingLayer`."""
    return build(replace(CONFIGS[size], coupling=True), HoistedCouplingLayer)


def as_published_energy(size: str = "small") -> nn.Module:
    """NOT equal to `model`; see `LastDimensionEnergyLayer`."""
    return build(CONFIGS[size], LastDimensionEnergyLayer)


def as_published_gelu(size: str = "small") -> nn.Module:
    """NOT equal to `model`; see `TanhFeedForwardLayer`."""
    return build(CONFIGS[size], TanhFeedForwardLayer)


def example_inputs(size: str = "small", length: int | None = None) -> tuple[Tensor, ...]:
    """One random x, (batch, length, dim), the same on every call."""
    config = CONFIGS[size]
    generator = torch.Generator().manual_seed(0)
    steps = config.length if length is None else length
    return (torch.randn(config.batch, steps, config.dim, generator=generator),)
