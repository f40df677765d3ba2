"""The corpus: loops of real packages, and loops as people write them.

Every entry builds a module with random weights at a small configuration, and inputs at any
length. `loops` is how many of its Python loops have three trips or more, which looplift
should find; loops over layers with parameters of their own count, since they should have
their reason.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, WIDTH = 2, 32


class Calls(nn.Module):
    """A function as a module; of a tuple that it returns, the tensors."""

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        super().__init__()
        self.function, self.settings = function, settings

    def forward(self, *args: Tensor) -> Any:
        result = self.function(*args, **self.settings)
        return tuple(x for x in result if x is not None) if isinstance(result, tuple) else result


class Selects(nn.Module):
    """A model whose outputs are a dataclass; `pick` names the one to return."""

    def __init__(self, model: nn.Module, pick: str, **settings: Any) -> None:
        super().__init__()
        self.model, self.pick, self.settings = model, pick, settings

    def forward(self, *args: Tensor) -> Any:
        return getattr(self.model(*args, **self.settings), self.pick)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def sequence(length: int) -> tuple[Tensor, ...]:
    return (noise(BATCH, length, WIDTH),)


def tokens(length: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 64, (BATCH, length)),)


@dataclass(frozen=True)
class Entry:
    """A model: its package, how it is built, its inputs, and the loops in it."""

    name: str
    package: str | None
    build: Callable[[], Any]
    inputs: Callable[[int], tuple[Tensor, ...]] = sequence
    lengths: tuple[int, ...] = (24, 96)
    loops: int = 1


ENTRIES: list[Entry] = []


def entry(
    name: str, package: str | None = None, **given: Any
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def add(build: Callable[[], Any]) -> Callable[[], Any]:
        ENTRIES.append(Entry(name, package, build, **given))
        return build

    return add


def modeling(model: str) -> Any:
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def config(model: str, name: str, **settings: Any) -> Any:
    package = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    return getattr(package, name)(**settings)


# transformers


def mamba_config(**more: Any) -> Any:
    return config("mamba", "MambaConfig", vocab_size=64, hidden_size=WIDTH, state_size=8,
                  num_hidden_layers=2, use_cache=False, use_associative_scan=False, **more)


@entry("Mamba mixer", "transformers", lengths=(24, 96, 1024))
def mamba() -> Any:
    return modeling("mamba").MambaMixer(mamba_config(), layer_idx=0)


@entry("MambaForCausalLM, 2 layers", "transformers", inputs=tokens, loops=2)
def mamba_lm() -> Any:
    return Selects(modeling("mamba").MambaForCausalLM(mamba_config()), "logits")


@entry("Jamba mixer", "transformers")
def jamba() -> Any:
    settings = config("jamba", "JambaConfig", vocab_size=64, hidden_size=WIDTH, mamba_d_state=8,
                      mamba_dt_rank=4, num_hidden_layers=2, use_cache=False)
    return modeling("jamba").JambaMambaMixer(settings, layer_idx=0)


class RgLru(nn.Module):
    """The recurrence of RG-LRU; its module also keeps the last state in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scan = modeling("recurrent_gemma").RecurrentGemmaRglru._rnn_scan

    def forward(self, states: Tensor, gate: Tensor, reset: Tensor) -> Any:
        return self.scan(None, states, torch.sigmoid(gate), reset, None)


def rg_lru_inputs(length: int) -> tuple[Tensor, ...]:
    return (*sequence(length), *sequence(length), torch.zeros(BATCH, length, 1, dtype=torch.bool))


@entry("RecurrentGemma RG-LRU scan", "transformers", inputs=rg_lru_inputs)
def rg_lru() -> Any:
    return RgLru()


@entry("RecurrentGemma RG-LRU", "transformers", inputs=lambda length: (
    *sequence(length), torch.arange(length).expand(BATCH, length)))
def rg_lru_module() -> Any:
    model = modeling("recurrent_gemma").RecurrentGemmaRglru(
        config("recurrent_gemma", "RecurrentGemmaConfig", hidden_size=WIDTH, lru_width=WIDTH,
               num_attention_heads=2, num_hidden_layers=1))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def delta_inputs(length: int) -> tuple[Tensor, ...]:
    query, key, value = (noise(BATCH, length, 2, 16) for _ in range(3))
    decay, beta = -torch.rand(BATCH, length, 2), torch.rand(BATCH, length, 2)
    return query, key, value, decay, beta


@entry("Qwen3-Next gated delta rule, recurrent", "transformers", inputs=delta_inputs)
def gated_delta() -> Any:
    rule = modeling("qwen3_next").torch_recurrent_gated_delta_rule
    return Calls(rule, output_final_state=True, use_qk_l2norm_in_kernel=True)


@entry("Qwen3-Next gated delta rule, chunked", "transformers", inputs=delta_inputs)
def gated_delta_chunked() -> Any:
    rule = modeling("qwen3_next").torch_chunk_gated_delta_rule
    return Calls(rule, chunk_size=8, output_final_state=True, use_qk_l2norm_in_kernel=True)


class Lightning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        settings = config("minimax", "MiniMaxConfig", hidden_size=WIDTH, num_attention_heads=2,
                          num_key_value_heads=2, head_dim=16, num_hidden_layers=2, block_size=8,
                          vocab_size=64)
        self.attention = modeling("minimax").MiniMaxLightningAttention(settings, layer_idx=0)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, (None, None), None)[0]


@entry("MiniMax lightning attention", "transformers")
def lightning() -> Any:
    return Lightning()


@entry("SuperGlue Sinkhorn", "transformers", lengths=(8, 32), inputs=lambda length: (
    noise(BATCH, length, length), torch.ones(1)))
def superglue() -> Any:
    return Calls(modeling("superglue").log_optimal_transport, iterations=20)


@entry("Nyströmformer inverse", "transformers", lengths=(8, 32), inputs=lambda length: (
    torch.softmax(noise(BATCH, 2, length, length), -1),))
def nystromformer() -> Any:
    attention = modeling("nystromformer").NystromformerSelfAttention(
        config("nystromformer", "NystromformerConfig", hidden_size=WIDTH, num_attention_heads=2))
    return Calls(attention.iterative_inv)


# Other packages


def mambapy_config(**more: Any) -> Any:
    return importlib.import_module("mambapy.mamba").MambaConfig(
        d_model=WIDTH, n_layers=2, d_state=8, pscan=False, **more)


class SpikingLayers(nn.Module):
    """Two layers of spiking neurons, which keep their state in attributes."""

    def __init__(self, leaky: Any) -> None:
        super().__init__()
        self.enter, self.first = nn.Linear(WIDTH, WIDTH), leaky(beta=0.9)
        self.leave, self.second = nn.Linear(WIDTH, WIDTH), leaky(beta=0.8)

    def forward(self, x: Tensor) -> Tensor:
        one, two, outputs = self.first.reset_mem(), self.second.reset_mem(), []
        for t in range(x.shape[1]):
            spikes, one = self.first(self.enter(x[:, t]), one)
            spikes, two = self.second(self.leave(spikes), two)
            outputs.append(two + spikes)
        return torch.stack(outputs, 1)


@entry("snntorch Leaky, 2 layers", "snntorch")
def snntorch_layers() -> Any:
    return SpikingLayers(importlib.import_module("snntorch").Leaky)


@entry("mambapy selective_scan_seq", "mambapy")
def mambapy_block() -> Any:
    return importlib.import_module("mambapy.mamba").MambaBlock(mambapy_config())


@entry("mambapy Mamba, 2 layers", "mambapy", loops=2)
def mambapy_model() -> Any:
    return importlib.import_module("mambapy.mamba").Mamba(mambapy_config())


class Streams(nn.Module):
    """A branch inside hyper-connections of four streams."""

    def __init__(self, manifold_constrained: bool) -> None:
        super().__init__()
        package = importlib.import_module("hyper_connections")
        prefix = "mc_" if manifold_constrained else ""
        begin = getattr(package, f"{prefix}get_init_and_expand_reduce_stream_functions")
        wrap, self.expand, self.reduce = begin(4)
        layers = [wrap(dim=WIDTH, branch=nn.Linear(WIDTH, WIDTH), layer_index=i) for i in range(2)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        x = self.expand(x)
        for layer in self.layers:
            x = layer(x)
        return self.reduce(x)


@entry("hyper-connections", "hyper_connections", loops=0)
def hyper_connections() -> Any:
    return Streams(manifold_constrained=False)


@entry("hyper-connections, manifold-constrained", "hyper_connections", loops=2)
def manifold_hyper_connections() -> Any:
    return Streams(manifold_constrained=True)


@entry("vit-pytorch ViT, 4 layers", "vit_pytorch", loops=1, lengths=(16, 32),
       inputs=lambda length: (noise(BATCH, 3, length, length),))
def vit() -> Any:
    try:
        importlib.import_module("torchvision")
    except ImportError:  # only its DINO uses torchvision, of which there may be no build
        stand_in = types.ModuleType("torchvision")
        stand_in.transforms = types.ModuleType("torchvision.transforms")  # type: ignore[attr-defined]
        sys.modules.setdefault("torchvision", stand_in)
        sys.modules.setdefault("torchvision.transforms", stand_in.transforms)
    return importlib.import_module("vit_pytorch.vit").ViT(
        image_size=32, patch_size=8, num_classes=10, dim=WIDTH, depth=4, heads=2, mlp_dim=64)


@entry("x-transformers, 3 layers", "x_transformers", inputs=tokens)
def x_transformer() -> Any:
    package = importlib.import_module("x_transformers")
    return package.TransformerWrapper(
        num_tokens=64, max_seq_len=128,
        attn_layers=package.Decoder(dim=WIDTH, depth=3, heads=2, attn_dim_head=16))


@entry("Muon Newton–Schulz", "muon", lengths=(16, 64), inputs=lambda length: (
    noise(length, 2 * length),))
def muon() -> Any:
    return Calls(importlib.import_module("muon").zeropower_via_newtonschulz5, steps=5)


# Loops as people write them


class CustomLSTM(nn.Module):
    """One LSTM layer with a single product for the four gates."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        batch, length, width = x.shape
        h = c = torch.zeros(batch, width, device=x.device, dtype=x.dtype)
        outputs = []
        for t in reversed(range(length)) if reverse else range(length):
            i, f, g, o = (self.input(x[:, t]) + self.hidden(h)).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        if reverse:
            outputs.reverse()
        return torch.stack(outputs, dim=1)


@entry("custom LSTM")
def custom_lstm() -> Any:
    return CustomLSTM()


class CustomGRU(nn.Module):
    """A GRU written gate by gate; the state starts with the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleDict({g: nn.Linear(2 * WIDTH, WIDTH) for g in "rzn"})

    def forward(self, x: Tensor) -> Any:
        h, outputs = None, []
        for x_t in x.unbind(1):
            if h is None:
                h = torch.zeros_like(x_t)
            both = torch.cat([x_t, h], -1)
            r, z = torch.sigmoid(self.gates["r"](both)), torch.sigmoid(self.gates["z"](both))
            n = torch.tanh(self.gates["n"](torch.cat([x_t, r * h], -1)))
            h = (1 - z) * n + z * h
            outputs.append(h.unsqueeze(1))
        return torch.cat(outputs, 1), h


@entry("custom GRU")
def custom_gru() -> Any:
    return CustomGRU()


class Bidirectional(nn.Module):
    """Two bidirectional LSTM layers, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = nn.ModuleList(CustomLSTM(w) for w in (WIDTH, 2 * WIDTH))
        self.backwards = nn.ModuleList(CustomLSTM(w) for w in (WIDTH, 2 * WIDTH))
        self.head = nn.Linear(4 * WIDTH, 3)

    def forward(self, x: Tensor) -> Any:
        for ahead, back in zip(self.forwards, self.backwards, strict=True):
            x = torch.cat([ahead(x), back(x, reverse=True)], -1)
        return self.head(x)


@entry("bidirectional LSTM, 2 layers", loops=4)
def bidirectional() -> Any:
    return Bidirectional()


class TimeSequence(nn.Module):
    """Two LSTM cells over a series of numbers, then on their own predictions."""

    def __init__(self, future: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(1, 51), nn.LSTMCell(51, 51)
        self.linear, self.future = nn.Linear(51, 1), future

    def forward(self, series: Tensor) -> Tensor:
        outputs = []
        h, c, h2, c2 = (torch.zeros(series.size(0), 51, dtype=series.dtype) for _ in range(4))
        for value in torch.split(series, 1, dim=1):
            h, c = self.first(value, (h, c))
            h2, c2 = self.second(h, (h2, c2))
            output = self.linear(h2)
            outputs += [output]
        for _ in range(self.future):
            h, c = self.first(output, (h, c))
            h2, c2 = self.second(h, (h2, c2))
            output = self.linear(h2)
            outputs += [output]
        return torch.cat(outputs, dim=1)


@entry("time_sequence_prediction", loops=2, inputs=lambda length: (noise(BATCH, length),))
def time_sequence() -> Any:
    return TimeSequence()


class RecursiveFilter(nn.Module):
    """A digital filter as audio libraries write it where they have no C++ for it: each sample from
    the outputs before it, read as a window of the waveform that it is written into."""

    def __init__(self, order: int = 3) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -0.4, 0.2, -0.1])[: order + 1])
        self.b = nn.Parameter(torch.rand(order + 1))

    def forward(self, waveform: Tensor) -> Tensor:
        order = len(self.a) - 1
        padded = nn.functional.pad(waveform, (order, 0))
        output = torch.zeros_like(padded)
        windows = padded.unfold(1, order + 1, 1) @ self.b.flip(0) / self.a[0]
        coefficients = (self.a / self.a[0]).flip(0)
        for i, sample in enumerate(windows.t()):
            window = output[:, i : i + order + 1].clone()
            output[:, i + order] = sample - window @ coefficients
        return output[:, order:]


@entry("recursive filter", inputs=lambda length: (noise(BATCH, length),))
def recursive_filter() -> Any:
    return RecursiveFilter()


class Forecast(nn.Module):
    """A series continued by a network of its last eight values, a value at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    def forward(self, series: Tensor, steps: Tensor) -> Tensor:
        for _ in range(len(steps)):
            series = torch.cat([series, self.network(series[:, -8:])], dim=1)
        return series


@entry("forecast of its own values",
       inputs=lambda length: (noise(BATCH, 12), torch.arange(length)))
def forecast() -> Any:
    return Forecast()


class Refractory(nn.Module):
    """Neurons that rest for three steps after a spike, counted in an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.leak = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v, rest, outputs = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]).long(), []
        for t in range(x.shape[1]):
            v = torch.where(rest > 0, v * self.leak, v + self.input(x[:, t]))
            spike = v > 1
            rest = torch.where(spike, 3, (rest - 1).clamp(min=0))
            outputs.append(torch.sigmoid(4 * (v - 1)))
            v = v - spike.to(v)
        return torch.stack(outputs, 1), rest


@entry("neurons with a refractory counter")
def refractory() -> Any:
    return Refractory()


class Greedy(nn.Module):
    """A decoder that reads the most likely of its own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.cell = nn.Embedding(64, WIDTH), nn.GRUCell(WIDTH, WIDTH)
        self.likely = nn.Linear(WIDTH, 64)

    def forward(self, state: Tensor, first: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        token, seen, states = first, [], []
        for _ in range(len(steps)):
            state = self.cell(self.tokens(token), state)
            token = self.likely(state).argmax(-1)
            seen.append(token)
            states.append(state)
        return torch.stack(seen, 1), torch.stack(states, 1)


@entry("greedy decoding", inputs=lambda length: (
    noise(BATCH, WIDTH), torch.randint(0, 64, (BATCH,)), torch.arange(length)))
def greedy() -> Any:
    return Greedy()


class Viterbi(nn.Module):
    """The most likely path of states, found backwards from where each came from."""

    def __init__(self, states: int = WIDTH) -> None:
        super().__init__()
        self.moves = nn.Parameter(torch.randn(states, states))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score, came = x[:, 0], []
        for t in range(1, x.shape[1]):
            most, place = (score.unsqueeze(2) + self.moves).max(1)
            score = most + x[:, t]
            came.append(place)
        best = score.argmax(1)
        path = [best]
        for place in reversed(came):
            best = place.gather(1, best.unsqueeze(1)).squeeze(1)
            path.append(best)
        return torch.stack(path[::-1], 1), score


@entry("Viterbi path", loops=2)
def viterbi() -> Any:
    return Viterbi()
