"""Ring dilated attention: head groups attend within segments to every r-th token (`seeds/001`).

Naive: positions are tables even where they are a plain slice, and a loop over the blocks of the
ring folds keys and values in one by one. By hand: strided slices in and out; the ring stays.
The story's warning is kept too: `as_published` is equal, and won alone, but not in a model.

Shapes: B batch, T length, H heads, D features per head, S segments of L tokens, P picked of L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of one model and of its example input, (batch, length, heads · head_dim).

    Head group i attends within segments of segment_lengths[i] tokens, or the whole length if
    that is shorter, to every rates[i]-th of them from i % rates[i] on.
    """

    batch: int
    length: int
    heads: int
    head_dim: int
    segment_lengths: tuple[int, ...]
    rates: tuple[int, ...] = (1, 2, 2, 4)  # offsets 0, 1, 0, 3: with a stride and without
    ring_size: int = 8


CONFIGS = {
    "tiny": AttentionConfig(2, 72, 3, 4, (12, 36, 24), rates=(1, 3, 2), ring_size=6),
    "small": AttentionConfig(1, 512, 4, 16, (128, 256, 256, 512), ring_size=32),
    "full": AttentionConfig(1, 2048, 8, 64, (512, 1024, 1024, 2048)),
}
LENGTHS = (2048, 8192, 16384)  # of `full`, by `example_inputs("full", length=...)`


class DilatedAttention(nn.Module):
    """The naive model: (B, T, H · D) to the same; a token a head did not pick gets zeros."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.heads * config.head_dim
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        heads = (config.heads, config.head_dim)
        query, key, value = (p(x).unflatten(2, heads) for p in (self.query, self.key, self.value))
        share = config.heads // len(config.rates)
        outputs = []
        for group, rate in enumerate(config.rates):
            segment_length = min(config.segment_lengths[group], x.shape[1])
            if x.shape[1] % segment_length:
                message = f"length {x.shape[1]} is no multiple of segment length {segment_length}"
                raise ValueError(message)
            own = slice(group * share, (group + 1) * share)
            parts = (query[:, :, own], key[:, :, own], value[:, :, own])
            segments = [p.unflatten(1, (-1, segment_length)) for p in parts]
            offset = group % rate
            attended = self.attend(*(self.pick(s, offset, rate) for s in segments))
            outputs.append(self.restore(attended, segments[0], offset, rate).flatten(1, 2))
        projected: Tensor = self.output(torch.cat(outputs, dim=2).flatten(2))
        return projected

    def pick(self, segments: Tensor, offset: int, rate: int) -> Tensor:
        """Every rate-th token from offset on: (B, S, L, H, D) to (B, S, P, H, D)."""
        return segments.index_select(2, self.positions(segments, offset, rate))

    def restore(self, attended: Tensor, segments: Tensor, offset: int, rate: int) -> Tensor:
        """The inverse of `pick`: (B, S, P, H, D) put into zeros shaped as segments."""
        positions = self.positions(segments, offset, rate)
        return torch.zeros_like(segments).index_copy(2, positions, attended)

    def positions(self, segments: Tensor, offset: int, rate: int) -> Tensor:
        """Which tokens of a segment are picked, (P,): none where it is shorter than offset."""
        end = max(offset, segments.shape[2])
        return torch.arange(offset, end, rate, device=segments.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention over P, (B, S, P, H, D) each, block by block as on a ring.

        The online softmax of Milakov & Gimelshein (2018): a running maximum, and numerator and
        denominator scaled anew whenever it grows.
        """
        query, key, value = (tensor.transpose(2, 3) for tensor in (query, key, value))
        picked = key.shape[3]
        block = max(1, math.ceil(picked / self.config.ring_size))
        maximum = torch.full_like(query[..., :1], -math.inf)
        denominator = torch.zeros_like(maximum)
        numerator = torch.zeros_like(query)
        for start in range(0, picked, block):
            key_block = key[:, :, :, start : start + block]
            value_block = value[:, :, :, start : start + block]
            scores = query @ key_block.transpose(3, 4) / math.sqrt(self.config.head_dim)
            larger = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
            correction = torch.exp(maximum - larger)
            weights = torch.exp(scores - larger)
            denominator = denominator * correction + weights.sum(dim=-1, keepdim=True)
            numerator = numerator * correction + weights @ value_block
            maximum = larger
        return (numerator / denominator).transpose(2, 3)


class SlicedAttention(DilatedAttention):
    """By hand: positions are strided slices, read as views and written in place."""

    def pick(self, segments: Tensor, offset: int, rate: int) -> Tensor:
        return segments[:, :, offset::rate]

    def restore(self, attended: Tensor, segments: Tensor, offset: int, rate: int) -> Tensor:
        if rate == 1:
            return attended
        out = torch.zeros_like(segments)
        out[:, :, offset::rate] = attended
        return out


class OnePassAttention(SlicedAttention):
    """By hand, and further than the story went: one fused attention in place of the ring."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(2, 3) for tensor in (query, key, value))
        return functional.scaled_dot_product_attention(query, key, value).transpose(2, 3)


class UnfoldedAttention(DilatedAttention):
    """Equal, and no faster in the whole model (the story: 0.2x to 1.0x): gather in, scatter out."""

    def pick(self, segments: Tensor, offset: int, rate: int) -> Tensor:
        if offset == 0:
            return segments.unfold(2, 1, rate).squeeze(-1)
        return torch.gather(segments, 2, self.table(segments, offset, rate))

    def restore(self, attended: Tensor, segments: Tensor, offset: int, rate: int) -> Tensor:
        table = self.table(segments, offset, rate)
        return torch.zeros_like(segments).scatter(2, table, attended)

    def table(self, segments: Tensor, offset: int, rate: int) -> Tensor:
        """The position of every picked element, (B, S, P, H, D)."""
        positions = self.positions(segments, offset, rate)
        batch, count, _, heads, features = segments.shape
        return positions.view(1, 1, -1, 1, 1).expand(batch, count, -1, heads, features)


def build(config: AttentionConfig, form: type[DilatedAttention]) -> DilatedAttention:
    """A model with the same random weights on every call, whichever its form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return form(config)


def model(size: str = "small") -> nn.Module:
    return build(CONFIGS[size], DilatedAttention)


def by_hand(size: str = "small") -> nn.Module:
    return build(CONFIGS[size], SlicedAttention)


def by_hand_in_one_pass(size: str = "small") -> nn.Module:
    return build(CONFIGS[size], OnePassAttention)


def as_published(size: str = "small") -> nn.Module:
    """Equal to `model`, and no faster; see `UnfoldedAttention`."""
    return build(CONFIGS[size], UnfoldedAttention)


def example_inputs(size: str = "small", length: int | None = None) -> tuple[Tensor, ...]:
    """One random x, (batch, length, heads · head_dim), the same on every call."""
    config = CONFIGS[size]
    generator = torch.Generator().manual_seed(0)
    steps = config.length if length is None else length
    return (torch.randn(config.batch, steps, config.heads * config.head_dim, generator=generator),)
