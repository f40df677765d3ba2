"""Random models with loops, as runnable source: what people write, in all combinations.

A program reads a tensor (batch, time, channels) step by step, computes a few operations on
values (batch, channels), may carry some of them, and writes its results in one of the usual
ways. Every choice is a hypothesis draw, so that a failing program shrinks to a few lines.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

# Operations on values (batch, channels): they keep the shape, and are smooth or piecewise smooth.
UNARY = (
    "torch.tanh({0})", "torch.sigmoid({0})", "{0} * 0.5", "functional.gelu({0})", "{0}.relu()",
    "{0} @ self.weight", "self.linear({0})", "functional.linear({0}, self.weight)",
    "torch.softmax({0}, -1)", "functional.layer_norm({0}, (D,))", "{0}.cumsum(-1) * 0.3",
    "{0}.flip(-1)", "{0}.sort(-1).values", "{0} - {0}.mean(-1, keepdim=True)",
    "{0} / (1 + {0}.abs().amax(-1, keepdim=True))", "{0}.clamp(-0.5, 0.5)", "{0}.roll(1, -1)",
    "torch.einsum('bd,de->be', {0}, self.weight)", "{0}.unsqueeze(1).expand(-1, 2, -1).sum(1)",
    "torch.where({0} > 0, {0}, self.bias)", "{0} + self.bias", "self.bias * {0}",
    "torch.tanh({0}.t().contiguous().t())", "{0}.reshape(-1).view(B, D)",
    "torch.cat([{0}, {0}], -1)[:, :D]",
    "functional.silu({0}) * self.gate", "self.block({0})", "{0} * self.scale[0]",
    "torch.stack([{0}, {0} * 2], 0).mean(0)", "{0}[:, self.order]",
    "{0}.masked_fill({0} > 1, 0.0)",
)
BINARY = (
    "{0} + {1}", "{0} * {1}", "{0} - 0.5 * {1}", "torch.maximum({0}, {1})",
    "torch.sigmoid({0}) * {1}", "torch.lerp({0}, {1}, 0.3)",
    "{0} * {1}.sum(-1, keepdim=True) * 0.1",
    "torch.addcmul({0}, {1}, self.bias)", "torch.where({0} > {1}, {0}, {1} * 0.5)",
    "torch.einsum('bd,be->bde', {0}, {1}).mean(1)",
    "torch.cat([{0}, {1}], 1).view(B, 2, D).sum(1)",
    "self.joint(torch.cat([{0}, {1}], -1))", "torch.cat([{0}, {1}], -1) @ self.joint.weight.t()",
    "functional.conv1d(torch.stack([{0}, {1}, {0}], 1), self.kernel, padding=1).mean(1)",
    "functional.conv1d(torch.cat([{0}[:, None], {1}[:, None]], 1), self.kernel[:, :2], "
    "padding=1)[:, 0]",
)
OWN = ("self.each[t]({0})", "torch.tanh(self.each[t]({0}))", "self.each[t]({0}).relu() + {0}")
NUMBERS = ("{0} * (t + 1)", "{0} + 0.1 * t", "{0} * self.schedule[t]", "{0} * 0.9 ** t",
           "torch.where({0} > 0, {0}, 0.1 * t)", "{0}.clamp(-0.5 * t, 0.1 * t + 1)",
           "torch.lerp({0}, {0}.tanh(), 1 / (t + 2))", "{0}.masked_fill({0} > 0.5, 0.1 * t)",
           "torch.add({0}, {0}.sin(), alpha=0.1 * t)")


@dataclass(frozen=True)
class Program:
    """Source of a module `Model`, and the shapes of its inputs."""

    source: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    batches: bool  # no step depends on another, and each leaves something behind
    trips: int
    varies: bool  # whether it is to be tried at other lengths, too

    def at_length(self, length: int) -> Program:
        """The same program on inputs of another length."""
        (batch, _, channels), *others = self.shapes
        return replace(self, shapes=((batch, length, channels), *others))

    def model(self) -> nn.Module:
        scope: dict[str, Any] = {}
        exec(compile(HEADER + self.source, "<program>", "exec"), scope)
        torch.manual_seed(0)
        made: nn.Module = scope["Model"](self.shapes[0][-1])
        return made.to(self.dtype)

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(s, generator=generator, dtype=self.dtype) for s in self.shapes)

    def __repr__(self) -> str:
        return f"{self.source}\n# {self.shapes} {self.dtype}"


HEADER = '''
import torch
from torch import nn
from torch.nn import functional


class Parts(nn.Module):
    own = False

    def __init__(self, D):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / D ** 0.5)
        self.bias = nn.Parameter(torch.randn(D) * 0.3)
        self.gate = nn.Parameter(torch.randn(D))
        self.scale = nn.Parameter(torch.rand(1) + 0.5)
        self.linear = nn.Linear(D, D)
        self.block = nn.Sequential(nn.Linear(D, 2 * D), nn.Tanh(), nn.Linear(2 * D, D))
        self.joint = nn.Linear(2 * D, D)
        self.kernel = nn.Parameter(torch.randn(2, 3, 3) / 3)
        if self.own:
            self.each = nn.ModuleList(nn.Linear(D, D) for _ in range(64))
        self.register_buffer("schedule", torch.linspace(0.5, 1, 64))
        self.register_buffer("order", torch.arange(D).flip(0))

'''


@st.composite
def programs(draw: st.DrawFn, carries: bool | None = None) -> Program:
    """A loop over time; `carries` says whether steps may depend on earlier ones."""
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    trips = draw(st.integers(3, 7))
    carried = draw(st.integers(0, 2)) if carries is None else int(carries) * draw(st.integers(1, 2))
    head, read, length, count = draw(reads(trips))
    writer = draw(st.sampled_from(sorted(WRITES)))
    start, write, result = WRITES[writer]
    body = [read]
    names = ["s"]
    starts = []
    for k in range(carried):
        names.append(f"h{k}")
        starts.append(f"h{k} = " + draw(st.sampled_from(
            ["x.new_zeros(B, D)", "torch.ones(B, D, dtype=x.dtype)", "first", "x[:, 0] * 0.5"])))
    body += draw(statements(names, "v"))
    if draw(st.integers(0, 3)) == 0:
        body += draw(inner_loops(names))
    alternates = draw(st.integers(0, 4)) == 0
    if alternates:
        even, odd = (draw(expressions(names)) for _ in range(2))
        body += [f"if t % 2 == 0:\n    w = {even}\nelse:\n    w = {odd}"]
        names.append("w")
    for k in range(carried):
        body.append(f"h{k} = {draw(carry_updates(names, k))}")
    body.append("y = " + draw(expressions(names)))
    if draw(st.integers(0, 5)) == 0:
        body.append("y = " + draw(st.sampled_from(NUMBERS)).format("y"))
    own = draw(st.integers(0, 7)) == 0
    if own:
        body.append("y = " + draw(st.sampled_from(OWN)).format("y"))
    body.append(write)
    results = [result]
    if carried and draw(st.booleans()):
        results.append("h0")
    returned = results[0] if len(results) == 1 else draw(st.sampled_from(
        [f"({', '.join(results)})", "{'y': " + results[0] + ", 'h': (" + results[1] + ",)}"]))
    if draw(st.integers(0, 5)) == 0 and len(results) == 1:
        returned = f"torch.tanh({returned}).sum(-1)"
    lines = [*starts, *([start] if start else []), head, textwrap.indent("\n".join(body), "    "),
             f"return {returned}"]
    forward = textwrap.indent("\n".join(
        ["B, T, D = x.shape", f"N = {count}", *lines]), "        ")
    source = (f"class Model(Parts):\n    own = {own}\n\n"
              f"    def forward(self, x, first):\n{forward}\n")
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    folds = not carried and writer not in CARRYING and trips >= (6 if alternates else 3)
    folds = folds and not (alternates and writer in OVERLAPPING)
    shapes = (batch, length, channels), (batch, channels)
    return Program(source, shapes, dtype, folds, trips, draw(st.integers(0, 3)) == 0)


@st.composite
def reads(draw: st.DrawFn, trips: int) -> tuple[str, str, int, str]:
    """The loop's head, the statement that reads `s`, the length of time that this needs for
    `trips`, and the number of trips in any length T."""
    every = "for t in range(N):"
    kind = draw(st.sampled_from(sorted(READS)))
    if kind == "window":
        step, width, begin = (draw(st.integers(1, 3)) for _ in range(3))
        reduce = draw(st.sampled_from(["sum(1)", "mean(1)", "amax(1)", "prod(1)"]))
        place = f"{step} * t + {begin}"
        return every, f"s = x[:, {place} : {place} + {width}].{reduce}", (
            step * (trips - 1) + begin + width), f"(T - {begin + width}) // {step} + 1"
    if kind == "strided":
        begin, step = draw(st.integers(0, 2)), draw(st.integers(1, 3))
        stop = begin + step * (trips - 1) + 1
        head = f"for t in range({begin}, T, {step}):"
        return head, "s = x[:, t]", stop, "None"
    head, read = READS[kind]
    more = 2 if kind == "neighbours" else draw(st.integers(0, 2)) if kind in LONGER else 0
    return head, read, trips + more, f"T - {more}"


READS = {
    "select": ("for t in range(N):", "s = x[:, t]"),
    "ellipsis": ("for t in range(N):", "s = x[..., t, :]"),
    "kept": ("for t in range(N):", "s = x[:, t:t + 1, :].squeeze(1)"),
    "back": ("for t in range(N):", "s = x[:, -1 - t]"),
    "from the end": ("for t in range(N):", "s = x[:, T - 1 - t, :]"),
    "reversed": ("for t in reversed(range(N)):", "s = x[:, t]"),
    "unbind": ("for t, s in enumerate(x.unbind(1)):", "s = s * 1.0"),
    "iterated": ("for t, s in enumerate(x.transpose(0, 1)):", "s = s + 0.1"),
    "chunk": ("for t, s in enumerate(x.chunk(N, 1)):", "s = s[:, 0]"),
    "split": ("for t, s in enumerate(x.split(1, dim=1)):", "s = s.squeeze(1)"),
    "time first": ("for t in range(N):", "s = x.transpose(0, 1)[t]"),
    "pairs": ("for t in range(N):", "s = x[:, t] - x[:, max(t - 1, 0)]"),
    "neighbours": ("for t in range(1, N + 1):", "s = x[:, t - 1] + x[:, t] * 2 - x[:, t + 1]"),
    "window": ("", ""),
    "strided": ("", ""),
}
LONGER = {"select", "ellipsis", "back", "from the end", "reversed", "time first", "pairs"}

WRITES = {  # before the loop, in it, and the result
    "stack": ("ys = []", "ys.append(y)", "torch.stack(ys, 1)"),
    "stack first": ("ys = []", "ys.append(y)", "torch.stack(ys)"),
    "stack last": ("ys = []", "ys += [y]", "torch.stack(ys, dim=-1)"),
    "cat": ("ys = []", "ys.append(y.unsqueeze(1))", "torch.cat(ys, dim=1)"),
    "cat channels": ("ys = []", "ys.append(y)", "torch.cat(ys, -1)"),
    "growing": ("ys = x.new_zeros(B, 0, D)", "ys = torch.cat([ys, y[:, None]], 1)", "ys"),
    "front": ("ys = []", "ys.insert(0, y)", "torch.stack(ys, 1)"),
    "buffer": ("out = x.new_zeros(B, 64, D)", "out[:, t] = y", "out"),
    "time first": ("out = torch.zeros(64, B, D, dtype=x.dtype)", "out[t] = y", "out"),
    "copied": ("out = torch.nn.functional.pad(x, (0, 0, 0, 64 - T))", "out[:, t] = y", "out"),
    "added": ("out = torch.ones(B, 64, D, dtype=x.dtype)", "out[:, t] += y", "out"),
    "slices": ("out = x.new_zeros(B, 128, D)", "out[:, 2 * t : 2 * t + 2] = y.unsqueeze(1)", "out"),
    "slices added": ("out = torch.ones(B, 128, D, dtype=x.dtype)",
                     "out[:, 2 * t : 2 * t + 2] += y.unsqueeze(1)", "out"),
    "overlapping": ("out = x.new_zeros(B, 128, D)", "out[:, 2 * t : 2 * t + 5] += y[:, None]",
                    "out"),
    "one further": ("out = torch.zeros(128, B, D, dtype=x.dtype)",
                    "out[t : t + 3] = torch.stack([y, y * 2, s]) + out[t : t + 3]", "out"),
    "half": ("out = x.new_zeros(B, 64, D)", "out[:, t, : (D + 1) // 2] = y[:, : (D + 1) // 2]",
             "out"),
    "last": ("", "", "y"),
    "sum": ("acc = x.new_zeros(B, D)", "acc = acc + y", "acc"),
    "maximum": ("acc = x.new_full((B, D), -9.0)", "acc = torch.maximum(acc, y)", "acc"),
}
OVERLAPPING = {"overlapping", "one further"}
CARRYING = {"sum", "maximum", "last"}  # something themselves, or drop all steps but the last


@st.composite
def expressions(draw: st.DrawFn, names: list[str]) -> str:
    if draw(st.booleans()):
        return draw(st.sampled_from(UNARY)).format(draw(st.sampled_from(names)))
    return draw(st.sampled_from(BINARY)).format(*(draw(st.sampled_from(names)) for _ in range(2)))


@st.composite
def statements(draw: st.DrawFn, names: list[str], prefix: str) -> list[str]:
    """Up to four assignments; the names they bind join `names`."""
    made = []
    for k in range(draw(st.integers(0, 4))):
        made.append(f"{prefix}{k} = {draw(expressions(names))}")
        names.append(f"{prefix}{k}")
    return made


@st.composite
def inner_loops(draw: st.DrawFn, names: list[str]) -> list[str]:
    """A loop in the loop, that carries `u` through a few iterations."""
    begin = f"u = {draw(expressions(names))}"
    update = draw(expressions(["u", *names]))
    names.append("u")
    return [begin, f"for k in range({draw(st.integers(2, 4))}):\n    u = torch.tanh({update})"]


@st.composite
def carry_updates(draw: st.DrawFn, names: list[str], k: int) -> str:
    """A new value for carry k, that stays of order one."""
    new = draw(expressions(names))
    return draw(st.sampled_from([
        "torch.tanh({new})", "0.5 * h{k} + 0.3 * ({new})", "self.scale * 0.5 * h{k} + {new}",
        "torch.sigmoid(self.gate) * h{k} + s", "({new}).tanh() + 0 * h{k}", "s",
    ])).format(new=new, k=k)
