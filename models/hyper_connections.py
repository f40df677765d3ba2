"""Hyper-connections: a network with several residual streams that learns how to mix them.

Story: seed 003, where einops and small tensor iterations are replaced by plain torch for speed.
A layer reads its branch input from the streams (H_pre), mixes the streams among themselves (H_res)
and writes the branch output back to each (H_post). In the manifold-constrained form (mHC) H_res is
kept doubly stochastic: every row and column sums to one, so mixing neither grows nor shrinks.

Naive: einops for every change of shape and every product; Sinkhorn and Newton–Schulz iterations
spell out each step with fresh tensors.
By hand: streams become the rows of one matrix per group of tokens that share their weights, so that
H_pre and H_res are one bmm and H_post is one baddbmm; each iteration is a few fused calls.
Two of the seed's steps are not taken. ``matmul(residuals, H_res.T)`` would contract channels with
streams; the product meant is ``H_res.T @ residuals``. And buffers are not reused from one iteration
to the next: autograd still needs them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor, nn

Mode = Literal["hc", "mhc", "orthostochastic"]


@dataclass(frozen=True)
class Config:
    """Sizes and options of a network.

    A stream of ``dim`` channels is cut into ``num_fracs`` fractions of d channels. The pieces that
    are mixed are the lanes: m = num_fracs · num_streams, fraction first. Sequences are
    (b, sequence, dim), or (b, dim, *grid) where ``channel_first``. A ``dynamic`` network adds to
    each static weight a part computed from the token; by default only mode "hc" does.
    """

    batch: int
    sequence: int
    grid: tuple[int, int]
    dim: int
    layers: int
    mode: Mode = "mhc"
    num_streams: int = 4
    num_fracs: int = 1
    channel_first: bool = False
    dynamic: bool | None = None
    sinkhorn_iterations: int = 20
    sinkhorn_domain: Literal["log", "plain"] = "log"
    newton_schulz_iterations: int = 8

    @property
    def lanes(self) -> int:
        return self.num_fracs * self.num_streams

    @property
    def token_wise(self) -> bool:
        return self.mode == "hc" if self.dynamic is None else self.dynamic


# Three layers at least: streams begin equal and end summed, so a doubly stochastic H_res leaves the
# output alone in the first layer and in the last.
SIZES = {
    "tiny": Config(2, sequence=5, grid=(2, 3), dim=8, layers=3, sinkhorn_iterations=6),
    "small": Config(2, sequence=32, grid=(4, 8), dim=64, layers=3),
    "full": Config(4, sequence=256, grid=(16, 16), dim=512, layers=4),
}

# p(x) = a·x + b·x³ + c·x⁵, p(1) = 1 and p'(1) = p''(1) = 0: singular values in (0, 1] go to one.
QUINTIC = (15 / 8, -10 / 8, 3 / 8)


def sinkhorn_log(logits: Tensor, iterations: int) -> Tensor:
    """Doubly stochastic matrices (..., m, m) from logits, normalised as logarithms."""
    for _ in range(iterations):
        logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        logits = logits - torch.logsumexp(logits, dim=-2, keepdim=True)
    return logits.exp()


def sinkhorn_log_by_hand(logits: Tensor, iterations: int) -> Tensor:
    """x − logsumexp(x) is log-softmax, which is one call."""
    for _ in range(iterations):
        logits = logits.log_softmax(dim=-1).log_softmax(dim=-2)
    return logits.exp()


def sinkhorn_plain(logits: Tensor, iterations: int) -> Tensor:
    """Doubly stochastic matrices (..., m, m) from logits: rows, then columns, divided by sums."""
    matrix = torch.exp(logits - logits.amax(dim=(-2, -1), keepdim=True))
    for _ in range(iterations):
        matrix = matrix / matrix.sum(dim=-1, keepdim=True)
        matrix = matrix / matrix.sum(dim=-2, keepdim=True)
    return matrix


def sinkhorn_plain_by_hand(logits: Tensor, iterations: int) -> Tensor:
    """The matrix stays put; its row and column scales, two vectors, are inverted in turn."""
    matrix = torch.exp(logits - logits.amax(dim=(-2, -1), keepdim=True))
    transposed = matrix.transpose(-2, -1)
    column = torch.ones_like(matrix[..., :1])
    for _ in range(iterations):
        row = torch.matmul(matrix, column).reciprocal()
        column = torch.matmul(transposed, row).reciprocal()
    return row * matrix * column.transpose(-2, -1)


def orthostochastic(matrix: Tensor, iterations: int) -> Tensor:
    """Squared entries of the orthogonal matrix nearest to ``matrix`` (..., m, m)."""
    return orthogonalise(matrix, iterations) ** 2


def orthogonalise(matrix: Tensor, iterations: int) -> Tensor:
    """Newton–Schulz: all singular values of (..., m, m) sent towards one."""
    a, b, c = QUINTIC
    matrix = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = matrix @ matrix.transpose(-2, -1)
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return matrix


def orthostochastic_by_hand(matrix: Tensor, iterations: int) -> Tensor:
    """Squared entries of the hand-optimised iteration's result (..., m, m)."""
    return orthogonalise_by_hand(matrix, iterations).square()


def orthogonalise_by_hand(matrix: Tensor, iterations: int) -> Tensor:
    """The same polynomial in three batched products, with its scalings and sums inside them."""
    a, b, c = QUINTIC
    matrix = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    batch = matrix.reshape(-1, *matrix.shape[-2:])
    for _ in range(iterations):
        gram = torch.bmm(batch, batch.transpose(1, 2))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        batch = torch.baddbmm(batch, polynomial, batch, beta=a)
    return batch.view(matrix.shape)


def branch(config: Config) -> nn.Module:
    """Norm and MLP of one layer on tokens (b, sequence, dim) or (b, dim, *grid)."""
    dim, hidden = config.dim, 4 * config.dim
    if config.channel_first:
        layers = (nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1))
        return nn.Sequential(nn.GroupNorm(1, dim), *layers)
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
    )


class HyperConnection(nn.Module):
    """One layer on streams (b·s, *shape of a token batch), which keep that shape.

    H_res (..., m, m), H_pre (..., m, f) and H_post (..., f, m) mix m lanes and f branch fractions;
    the leading dimensions are those of the tokens where the layer is dynamic, else there are none.
    """

    projections: ClassVar[dict[str, Callable[[Tensor, int], Tensor]]] = {
        "log": sinkhorn_log,
        "plain": sinkhorn_plain,
        "orthostochastic": orthostochastic,
    }

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        lanes, fracs, width = config.lanes, config.num_fracs, config.dim // config.num_fracs
        self.branch = branch(config)
        self.residual = nn.Parameter(torch.eye(lanes) + 0.1 * torch.randn(lanes, lanes))
        self.pre = nn.Parameter((1 + 0.1 * torch.randn(lanes, fracs)) / config.num_streams)
        self.post = nn.Parameter(1 + 0.1 * torch.randn(fracs, lanes))
        if config.token_wise:
            self.norm = nn.RMSNorm(width)
            self.dynamic_residual = nn.Parameter(torch.randn(width, lanes) / math.sqrt(width))
            self.dynamic_pre = nn.Parameter(torch.randn(width, fracs) / math.sqrt(width))
            self.dynamic_post = nn.Parameter(torch.randn(width, fracs) / math.sqrt(width))
            self.dynamic_scale = nn.Parameter(torch.full((3,), 0.01))

    def forward(self, streams: Tensor) -> Tensor:
        branch_input, lanes, post = self.width_connection(streams)
        return self.depth_connection(self.branch(branch_input), lanes, post)

    def width_connection(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Branch input (b, *shape), mixed lanes (b, ..., s, d) or (b, ..., f, s, d), and H_post."""
        s, f = self.config.num_streams, self.config.num_fracs
        if self.config.channel_first:
            streams = rearrange(streams, "b d ... -> b ... d")
        lanes = rearrange(streams, "(b s) ... (f d) -> b ... f s d", s=s, f=f)
        residual, pre, post = self.weights(rearrange(lanes, "b ... f s d -> b ... (f s) d"))
        tokens = "... " if self.config.token_wise else ""
        if f == 1:
            lanes = rearrange(lanes, "b ... 1 s d -> b ... s d")
            pre = rearrange(pre, "... s 1 -> ... s")
            post = rearrange(post, "... 1 s -> ... s")
            branch_input = einsum(pre, lanes, f"{tokens}s, ... s d -> ... d")
            lanes = einsum(residual, lanes, f"{tokens}s t, ... s d -> ... t d")
        else:
            residual = rearrange(residual, "... (f s) (g t) -> ... f s g t", f=f, g=f)
            pre = rearrange(pre, "... (f s) g -> ... f s g", f=f)
            post = rearrange(post, "... f (g s) -> ... f g s", g=f)
            branch_input = einsum(pre, lanes, f"{tokens}f s g, ... f s d -> ... g d")
            branch_input = rearrange(branch_input, "... g d -> ... (g d)")
            lanes = einsum(residual, lanes, f"{tokens}f s g t, ... f s d -> ... g t d")
        if self.config.channel_first:
            branch_input = rearrange(branch_input, "b ... d -> b d ...")
        return branch_input, lanes, post

    def depth_connection(self, output: Tensor, lanes: Tensor, post: Tensor) -> Tensor:
        """Streams (b·s, *shape): mixed lanes plus H_post times the branch output (b, *shape)."""
        if self.config.channel_first:
            output = rearrange(output, "b d ... -> b ... d")
        tokens = "... " if self.config.token_wise else ""
        if self.config.num_fracs == 1:
            lanes = lanes + einsum(output, post, f"... d, {tokens}s -> ... s d")
            streams = rearrange(lanes, "b ... s d -> (b s) ... d")
        else:
            output = rearrange(output, "... (f d) -> ... f d", f=self.config.num_fracs)
            lanes = lanes + einsum(output, post, f"... f d, {tokens}f g s -> ... g s d")
            streams = rearrange(lanes, "b ... g s d -> (b s) ... (g d)")
        return rearrange(streams, "b ... d -> b d ...") if self.config.channel_first else streams

    def weights(self, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H_res, H_pre and H_post for lanes (..., m, d)."""
        residual: Tensor = self.residual
        pre: Tensor = self.pre
        post: Tensor = self.post
        if self.config.token_wise:
            lanes = self.norm(lanes)
            scale = self.dynamic_scale
            by_lane = einsum(lanes, self.dynamic_residual, "... m d, d n -> ... m n")
            residual = residual + scale[0] * torch.tanh(by_lane)
            by_lane = einsum(lanes, self.dynamic_pre, "... m d, d f -> ... m f")
            pre = pre + scale[1] * torch.tanh(by_lane)
            by_lane = einsum(lanes, self.dynamic_post, "... m d, d f -> ... m f")
            post = post + scale[2] * torch.tanh(rearrange(by_lane, "... m f -> ... f m"))
        return self.constrain(residual, pre, post)

    def constrain(
        self, residual: Tensor, pre: Tensor, post: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unchanged in mode "hc"; else H_res on its manifold, H_pre in (0, 1), H_post in (0, 2)."""
        match self.config.mode:
            case "hc":
                return residual, pre, post
            case "mhc":
                project = self.projections[self.config.sinkhorn_domain]
                residual = project(residual, self.config.sinkhorn_iterations)
            case "orthostochastic":
                project = self.projections["orthostochastic"]
                residual = project(residual, self.config.newton_schulz_iterations)
        return residual, torch.sigmoid(pre), 2 * torch.sigmoid(post)


class HyperConnectionByHand(HyperConnection):
    """The same layer on groups of lanes (g, m, p).

    A group holds what shares one set of weights: g = b and p = tokens · d where these are static,
    g = b · tokens and p = d where they are dynamic.
    """

    projections: ClassVar[dict[str, Callable[[Tensor, int], Tensor]]] = {
        "log": sinkhorn_log_by_hand,
        "plain": sinkhorn_plain_by_hand,
        "orthostochastic": orthostochastic_by_hand,
    }

    def forward(self, streams: Tensor) -> Tensor:
        shape, fracs = streams.shape[1:], self.config.num_fracs
        lanes = self.group(streams, self.config.num_streams)
        residual, pre, post = self.weights(lanes)
        mixing = torch.cat((pre, residual), dim=-1).transpose(-2, -1)
        mixed = torch.bmm(mixing.expand(len(lanes), -1, -1), lanes)
        output = self.branch(self.ungroup(mixed[:, :fracs], 1, shape))
        adding = post.transpose(-2, -1).expand(len(lanes), -1, -1)
        lanes = torch.baddbmm(mixed[:, fracs:], adding, self.group(output, 1))
        return self.ungroup(lanes, self.config.num_streams, shape)

    def weights(self, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H_res, H_pre and H_post for lanes (g, m, p), the dynamic parts from one product."""
        if not self.config.token_wise:
            return self.constrain(self.residual, self.pre, self.post)
        columns = (self.dynamic_residual, self.dynamic_pre, self.dynamic_post)
        by_lane = torch.tanh(self.norm(lanes) @ torch.cat(columns, dim=1))
        residual, pre, post = torch.split(by_lane, [part.shape[1] for part in columns], -1)
        scale = self.dynamic_scale
        return self.constrain(
            torch.addcmul(self.residual, scale[0], residual),
            torch.addcmul(self.pre, scale[1], pre),
            torch.addcmul(self.post, scale[2], post.transpose(-2, -1)),
        )

    def group(self, batch: Tensor, streams: int) -> Tensor:
        """Batch (b·streams, *shape) as groups (g, f·streams, p)."""
        sizes = self.axes(batch.shape[1:], streams)
        axes = batch.reshape(-1, *sizes).permute(self.order)
        groups = axes.shape[0] * (axes.shape[1] if self.config.token_wise else 1)
        return axes.reshape(groups, self.config.num_fracs * streams, -1)

    def ungroup(self, groups: Tensor, streams: int, shape: torch.Size) -> Tensor:
        """Groups (g, f·streams, p) as a batch (b·streams, *shape)."""
        sizes = (-1, *self.axes(shape, streams))
        axes = groups.reshape([sizes[axis] for axis in self.order])
        inverse = sorted(range(5), key=self.order.__getitem__)
        return axes.permute(inverse).reshape(-1, *shape)

    def axes(self, shape: torch.Size, streams: int) -> tuple[int, ...]:
        """Sizes behind the batch's: streams, then fractions, d and tokens as they lie in memory."""
        fracs, width = self.config.num_fracs, self.config.dim // self.config.num_fracs
        tokens = shape.numel() // self.config.dim
        if self.config.channel_first:
            return streams, fracs, width, tokens
        return streams, tokens, fracs, width

    @property
    def order(self) -> tuple[int, ...]:
        """Permutation of (batch, *axes) that brings fractions and streams together, as lanes."""
        match self.config.channel_first, self.config.token_wise:
            case True, True:
                return 0, 4, 2, 1, 3
            case True, False:
                return 0, 2, 1, 3, 4
            case False, True:
                return 0, 2, 3, 1, 4
            case _:
                return 0, 3, 1, 2, 4


class HyperConnectionNetwork(nn.Module):
    """Layers between copying a batch (b, *shape) to every stream and summing the streams."""

    layer_type: ClassVar[type[HyperConnection]] = HyperConnection

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_streams = config.num_streams
        self.layers = nn.Sequential(*(self.layer_type(config) for _ in range(config.layers)))

    def forward(self, batch: Tensor) -> Tensor:
        streams = repeat(batch, "b ... -> (b s) ...", s=self.num_streams)
        streams = self.layers(streams)
        output: Tensor = reduce(streams, "(b s) ... -> b ...", "sum", s=self.num_streams)
        return output


class HyperConnectionNetworkByHand(HyperConnectionNetwork):
    """The network of hand-optimised layers."""

    layer_type = HyperConnectionByHand

    def forward(self, batch: Tensor) -> Tensor:
        streams: Tensor = self.layers(batch.repeat_interleave(self.num_streams, dim=0))
        return streams.reshape(-1, self.num_streams, *batch.shape[1:]).sum(dim=1)


def hyper_connections(size: str = "small", **options: Any) -> nn.Module:
    """The naive network with random weights; ``options`` are fields of ``Config``."""
    return HyperConnectionNetwork(replace(SIZES[size], **options))


def hyper_connections_by_hand(size: str = "small", **options: Any) -> nn.Module:
    """The hand-optimised network; takes the naive one's ``state_dict``."""
    return HyperConnectionNetworkByHand(replace(SIZES[size], **options))


def model(size: str = "small") -> nn.Module:
    """The naive network in its manifold-constrained form, by Sinkhorn in the log domain."""
    return hyper_connections(size)


def by_hand(size: str = "small") -> nn.Module:
    """The hand-optimised form of ``model``."""
    return hyper_connections_by_hand(size)


def example_inputs(size: str = "small", channel_first: bool = False) -> tuple[Tensor, ...]:
    """One batch (b, sequence, dim) or (b, dim, *grid), the same at every call."""
    config = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    tokens = (config.dim, *config.grid) if channel_first else (config.sequence, config.dim)
    return (torch.randn(config.batch, *tokens, generator=generator),)
