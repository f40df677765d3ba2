"""Embedding a series by patches of two alternating sizes, and back again (`seeds/000`).

Naive: loops cut, embed, project and place one patch at a time; index tables part the two sizes.
By hand: the series is viewed as cycles of one large and one small patch, so each size is one
strided view and one linear, and the outputs are joined cycle by cycle.

Shapes: B batch, T length, C channels, N patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class PatchConfig:
    """Sizes of one model and of its example input, (batch, length, channels)."""

    batch: int
    length: int
    channels: int
    dim: int
    large: int = 8
    small: int = 4


CONFIGS = {
    "tiny": PatchConfig(batch=2, length=40, channels=3, dim=6),  # 7 patches, the last half empty
    "small": PatchConfig(batch=2, length=256, channels=3, dim=64),  # 43 patches
    "full": PatchConfig(batch=8, length=1024, channels=7, dim=512),  # 171 patches
}


class AlternatingPatches(nn.Module):
    """The naive model: (B, T, C) to (B, T, C), through N patches of `dim` features.

    Large and small patches are cut in turn, a large one first, until the series is covered;
    a last patch that runs past the end is filled up with zeros.
    """

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.large, self.small, self.channels = config.large, config.small, config.channels
        large, small = config.large * config.channels, config.small * config.channels
        dim = config.dim
        self.gate_large, self.embed_large = nn.Linear(large, dim), nn.Linear(large, dim)
        self.gate_small, self.embed_small = nn.Linear(small, dim), nn.Linear(small, dim)
        self.context = nn.Linear(dim, dim)
        self.output_large, self.output_small = nn.Linear(dim, large), nn.Linear(dim, small)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x)
        # every patch sees the mean of all, so one patch too many or too few shows everywhere
        patches = patches + self.context(patches.mean(dim=1, keepdim=True))
        return self.unpatch(patches, x.shape[1])

    def embed_large_patches(self, flat: Tensor) -> Tensor:
        """(..., large · C) to (..., dim)."""
        embedded: Tensor = functional.silu(self.gate_large(flat)) * self.embed_large(flat)
        return embedded

    def embed_small_patches(self, flat: Tensor) -> Tensor:
        """(..., small · C) to (..., dim)."""
        embedded: Tensor = functional.silu(self.gate_small(flat)) * self.embed_small(flat)
        return embedded

    def embed(self, x: Tensor) -> Tensor:
        """Patches of x, (B, T, C), embedded one by one: (B, N, dim)."""
        embedded = []
        position, large = 0, True
        while position < x.shape[1]:
            size = self.large if large else self.small
            patch = x[:, position : position + size]
            if patch.shape[1] < size:
                patch = functional.pad(patch, (0, 0, 0, size - patch.shape[1]))
            flat = patch.reshape(x.shape[0], size * self.channels)
            embed = self.embed_large_patches if large else self.embed_small_patches
            embedded.append(embed(flat))
            position, large = position + size, not large
        return torch.stack(embedded, dim=1)

    def unpatch(self, patches: Tensor, length: int) -> Tensor:
        """The series (B, length, C) that the patches, (B, N, dim), cover."""
        batch, count, _ = patches.shape
        large = patches.index_select(1, torch.arange(0, count, 2, device=patches.device))
        small = patches.index_select(1, torch.arange(1, count, 2, device=patches.device))
        pieces_large = [self.output_large(large[:, i]) for i in range(large.shape[1])]
        pieces_small = [self.output_small(small[:, i]) for i in range(small.shape[1])]
        covered = len(pieces_large) * self.large + len(pieces_small) * self.small
        out = patches.new_zeros(batch, covered, self.channels)
        cycle = self.large + self.small
        for i, piece in enumerate(pieces_large):
            start = i * cycle
            out[:, start : start + self.large] = piece.view(batch, self.large, self.channels)
        for i, piece in enumerate(pieces_small):
            start = i * cycle + self.large
            out[:, start : start + self.small] = piece.view(batch, self.small, self.channels)
        return out[:, :length]


class VectorizedPatches(AlternatingPatches):
    """By hand: whole cycles at once, for every length; only the right number of patches is kept."""

    def embed(self, x: Tensor) -> Tensor:
        cycle = self.large + self.small
        whole, left = divmod(x.shape[1], cycle)
        cycles = whole + (left > 0)
        count = 2 * whole + (left > 0) + (left > self.large)
        padded = functional.pad(x, (0, 0, 0, cycles * cycle - x.shape[1]))
        return self.embed_cycles(padded)[:, :count]

    def embed_cycles(self, x: Tensor) -> Tensor:
        """Two patches per cycle of x, (B, cycles · (large + small), C): (B, 2 · cycles, dim)."""
        cycle = self.large + self.small
        cycles = x.reshape(x.shape[0], x.shape[1] // cycle, cycle, self.channels)
        large = self.embed_large_patches(cycles[:, :, : self.large].flatten(2))
        small = self.embed_small_patches(cycles[:, :, self.large :].flatten(2))
        return torch.stack((large, small), dim=2).flatten(1, 2)

    def unpatch(self, patches: Tensor, length: int) -> Tensor:
        large = self.output_large(patches[:, ::2])
        small = self.output_small(patches[:, 1::2])
        # an odd number of patches ends in half a cycle: complete it, the crop takes it off again
        small = functional.pad(small, (0, 0, 0, large.shape[1] - small.shape[1]))
        cycles = torch.cat((large, small), dim=2)
        covered = cycles.shape[1] * (self.large + self.small)
        return cycles.reshape(patches.shape[0], covered, self.channels)[:, :length]


class MiscountedPatches(VectorizedPatches):
    """NOT equal: pads to a multiple of lcm(large, small), then takes whole cycles of their sum.

    Patches are dropped (length 16: 2 of 3, length 1024: 170 of 171) or invented (length 20: 4
    for 3); positions of dropped patches stay zero, so the shape is right at every length.
    """

    def embed(self, x: Tensor) -> Tensor:
        multiple, cycle = math.lcm(self.large, self.small), self.large + self.small
        x = functional.pad(x, (0, 0, 0, -x.shape[1] % multiple))
        return self.embed_cycles(x[:, : x.shape[1] // cycle * cycle])

    def unpatch(self, patches: Tensor, length: int) -> Tensor:
        out = super().unpatch(patches, length)
        return functional.pad(out, (0, 0, 0, length - out.shape[1]))


def build(config: PatchConfig, form: type[AlternatingPatches]) -> AlternatingPatches:
    """A model with the same random weights on every call, whichever its form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return form(config)


def model(size: str = "small") -> nn.Module:
    return build(CONFIGS[size], AlternatingPatches)


def by_hand(size: str = "small") -> nn.Module:
    return build(CONFIGS[size], VectorizedPatches)


def as_published(size: str = "small") -> nn.Module:
    """NOT equal to `model` at most lengths; see `MiscountedPatches`."""
    return build(CONFIGS[size], MiscountedPatches)


def example_inputs(size: str = "small", length: int | None = None) -> tuple[Tensor, ...]:
    """One random x, (batch, length, channels), the same on every call."""
    config = CONFIGS[size]
    generator = torch.Generator().manual_seed(0)
    steps = config.length if length is None else length
    return (torch.randn(config.batch, steps, config.channels, generator=generator),)
