"""Image and text encoder of a small vision-language model, naive and by hand.

Story: seed 002, which counts what one 512×512 request costs: 1024 patches of 16×16 become the
sequence of the image encoder, while the text encoder sees only 50 tokens.

Naive: patches are cut by two nested Python loops and embedded one at a time, so a layer built for
1024 rows is called 1024 times with one; attention writes out its score matrix; the text encoder
also loops over its heads.
By hand: one reshape and one linear for all patches, all heads at once in one fused attention call.
The query, key and value layers stay apart: they are separate parameters, and gluing them together
on every call would read and write each weight once more, which the 50 rows of text never pay back.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ImageConfig:
    """Sizes of an image encoder; ``height``, ``width`` and ``patch`` count pixels."""

    batch: int
    height: int
    width: int
    patch: int
    dim: int
    heads: int
    hidden: int
    depth: int
    channels: int = 3

    @property
    def patches(self) -> int:
        return (self.height // self.patch) * (self.width // self.patch)


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a text encoder; ``sequence`` counts tokens."""

    batch: int
    sequence: int
    vocabulary: int
    dim: int
    heads: int
    hidden: int
    depth: int


# The seed's model is deeper; its layers are alike, so two of them show what the others would.
IMAGE_SIZES = {
    "tiny": ImageConfig(2, height=6, width=8, patch=2, dim=10, heads=2, hidden=14, depth=1),
    "small": ImageConfig(2, height=64, width=64, patch=8, dim=64, heads=4, hidden=256, depth=2),
    "full": ImageConfig(
        1, height=512, width=512, patch=16, dim=768, heads=12, hidden=3072, depth=2
    ),
}
TEXT_SIZES = {
    "tiny": TextConfig(2, sequence=5, vocabulary=11, dim=24, heads=4, hidden=14, depth=1),
    "small": TextConfig(2, sequence=32, vocabulary=256, dim=64, heads=4, hidden=160, depth=2),
    "full": TextConfig(1, sequence=50, vocabulary=4096, dim=960, heads=15, hidden=2560, depth=2),
}


class PatchEmbedding(nn.Module):
    """Image (b, c, h, w) → tokens (b, rows·columns, dim): cut, embedded and appended one by one."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.project = nn.Linear(config.channels * config.patch**2, config.dim)
        self.position = nn.Parameter(0.02 * torch.randn(config.patches, config.dim))

    def forward(self, image: Tensor) -> Tensor:
        p = self.patch
        tokens = []
        for i in range(image.shape[2] // p):
            for j in range(image.shape[3] // p):
                patch = image[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten(1)
                tokens.append(self.project(patch))
        return torch.stack(tokens, dim=1) + self.position


class PatchEmbeddingByHand(PatchEmbedding):
    """All patches as the rows of one matrix, embedded by one linear."""

    def forward(self, image: Tensor) -> Tensor:
        p, (batch, channels) = self.patch, image.shape[:2]
        rows, columns = image.shape[2] // p, image.shape[3] // p
        whole = image[:, :, : rows * p, : columns * p]  # the loop leaves a narrow rim uncut, too
        grid = whole.reshape(batch, channels, rows, p, columns, p)
        patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        tokens: Tensor = self.project(patches)
        return tokens + self.position


class Attention(nn.Module):
    """Self-attention of tokens (b, s, dim) over ``heads`` heads, scores (b, heads, s, s) kept."""

    def __init__(self, dim: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.output = nn.Linear(dim, dim, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.mix(self.query(tokens), self.key(tokens), self.value(tokens))
        output: Tensor = self.output(mixed)
        return output

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Values (b, s, dim), averaged in each head by the softmax of query · key."""
        query, key, value = (self.split_heads(part) for part in (query, key, value))
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
        mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
        return mixed.transpose(1, 2).flatten(2)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """Tokens (b, s, dim) as (b, heads, s, dim / heads)."""
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


class AttentionByHand(Attention):
    """The same attention in one fused call; the score matrix is never stored."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(
            self.split_heads(query), self.split_heads(key), self.split_heads(value)
        )
        return mixed.transpose(1, 2).flatten(2)


class CausalAttention(Attention):
    """Attention to earlier tokens only, with rotary positions, computed head after head."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.dim, config.heads, bias=False)
        half = config.dim // config.heads // 2
        frequency = 10_000.0 ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(config.sequence), frequency).repeat(1, 2)
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sequence, width = query.shape[1], query.shape[2] // self.heads
        later = torch.ones(sequence, sequence, dtype=torch.bool, device=query.device).triu(1)
        mixed = []
        for head in range(self.heads):
            channels = slice(head * width, (head + 1) * width)
            head_query = self.rotate(query[:, :, channels])
            head_key = self.rotate(key[:, :, channels])
            scores = torch.matmul(head_query, head_key.transpose(-2, -1)) / math.sqrt(width)
            weights = torch.softmax(scores.masked_fill(later, -math.inf), dim=-1)
            mixed.append(torch.matmul(weights, value[:, :, channels]))
        return torch.cat(mixed, dim=-1)

    def rotate(self, part: Tensor) -> Tensor:
        """Query or key (..., s, width) with channel pairs (i, i + width / 2) turned by position."""
        first, second = part.chunk(2, dim=-1)
        sequence = part.shape[-2]
        turned = torch.cat((-second, first), dim=-1)
        return part * self.cosine[:sequence] + turned * self.sine[:sequence]


class CausalAttentionByHand(CausalAttention):
    """All heads at once: one rotation each for queries and keys, one fused causal attention."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (self.split_heads(part) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(
            self.rotate(query), self.rotate(key), value, is_causal=True
        )
        return mixed.transpose(1, 2).flatten(2)


class GatedMlp(nn.Module):
    """Tokens (..., dim) → (..., dim) through ``hidden`` channels, SiLU of one gating the other."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.down(F.silu(self.gate(tokens)) * self.up(tokens))
        return output


class Block(nn.Module):
    """Pre-norm encoder block on tokens (b, s, dim)."""

    def __init__(
        self, attention: Attention, mlp: nn.Module, norms: tuple[nn.Module, nn.Module]
    ) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = norms
        self.attention = attention
        self.mlp = mlp

    def forward(self, tokens: Tensor) -> Tensor:
        attended: Tensor = tokens + self.attention(self.attention_norm(tokens))
        output: Tensor = attended + self.mlp(self.mlp_norm(attended))
        return output


class ImageEncoder(nn.Module):
    """Image (b, c, h, w) → one vector per patch (b, rows·columns, dim)."""

    embedding_type: ClassVar[type[PatchEmbedding]] = PatchEmbedding
    attention_type: ClassVar[type[Attention]] = Attention

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.embedding = self.embedding_type(config)
        self.blocks = nn.Sequential(*(self.block(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.dim)

    def block(self, config: ImageConfig) -> Block:
        dim, hidden = config.dim, config.hidden
        mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        attention = self.attention_type(dim, config.heads)
        return Block(attention, mlp, (nn.LayerNorm(dim), nn.LayerNorm(dim)))

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.norm(self.blocks(self.embedding(image)))
        return output


class ImageEncoderByHand(ImageEncoder):
    """The image encoder with one embedding call and fused attention."""

    embedding_type = PatchEmbeddingByHand
    attention_type = AttentionByHand


class TextEncoder(nn.Module):
    """Token ids (b, s), integers → one vector per token (b, s, dim)."""

    attention_type: ClassVar[type[CausalAttention]] = CausalAttention

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.Sequential(*(self.block(config) for _ in range(config.depth)))
        self.norm = nn.RMSNorm(config.dim)

    def block(self, config: TextConfig) -> Block:
        mlp = GatedMlp(config.dim, config.hidden)
        norms = (nn.RMSNorm(config.dim), nn.RMSNorm(config.dim))
        return Block(self.attention_type(config), mlp, norms)

    def forward(self, token_ids: Tensor) -> Tensor:
        output: Tensor = self.norm(self.blocks(self.embedding(token_ids)))
        return output


class TextEncoderByHand(TextEncoder):
    """The text encoder with all heads in one fused attention."""

    attention_type = CausalAttentionByHand


def model(size: str = "small") -> nn.Module:
    """The naive image encoder with random weights."""
    return ImageEncoder(IMAGE_SIZES[size])


def by_hand(size: str = "small") -> nn.Module:
    """The hand-optimised image encoder; takes the naive one's ``state_dict``."""
    return ImageEncoderByHand(IMAGE_SIZES[size])


def example_inputs(size: str = "small") -> tuple[Tensor, ...]:
    """One batch of images (b, c, h, w), the same at every call."""
    config = IMAGE_SIZES[size]
    shape = (config.batch, config.channels, config.height, config.width)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


def text_encoder(size: str = "small") -> nn.Module:
    """The naive text encoder with random weights."""
    return TextEncoder(TEXT_SIZES[size])


def text_encoder_by_hand(size: str = "small") -> nn.Module:
    """The hand-optimised text encoder; takes the naive one's ``state_dict``."""
    return TextEncoderByHand(TEXT_SIZES[size])


def text_inputs(size: str = "small") -> tuple[Tensor, ...]:
    """One batch of token ids (b, s), the same at every call."""
    config = TEXT_SIZES[size]
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(config.vocabulary, (config.batch, config.sequence), generator=generator),)
