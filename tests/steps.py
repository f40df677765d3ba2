"""Random steps of fused scans: their values and gradients against the plain loop's.

    python tests/steps.py --minutes 5 --seed 0

Each step is drawn from its own seed, which is printed where the two differ.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

SIZES = (1, 2, 3, 3, 4, 4, 5, 8, 16, 17)
MOST = 3000  # elements of a value
UNARY = ("torch.tanh({0})", "torch.sigmoid({0})", "({0} * 0.3).exp()", "{0} * {0} * 0.2",
         "torch.relu({0})", "torch.nn.functional.softplus({0})", "({0}.abs() + 1).sqrt()", "-{0}",
         "{0}.clamp(-1, 1)", "torch.nn.functional.gelu({0})")
BINARY = ("{0} + {1}", "{0} - {1}", "{0} * {1}", "torch.maximum({0}, {1})", "{0} / ({1}.abs() + 1)",
          "torch.where({0} > {1}, {0}, {1} * 0.5)", "torch.addcmul({0}, {0}, {1}, value=0.5)",
          "({0} > {1}).to({0}.dtype) + {1}")
NEXT = ("{0} * 0.9 + {1}", "{0} * torch.sigmoid({1})",
        "torch.tanh(0.5 * {0} + {1})", "0.9 * {0} + 0.1 * torch.tanh({1})",
        "torch.sigmoid({1}) * {0}", "torch.tanh({1}).expand({2})")

Shape = tuple[int, ...]


@dataclass
class Step:
    """A step's source, and the sizes of its arguments."""

    draw: random.Random
    lines: list[str] = field(default_factory=list)
    values: list[tuple[str, Shape]] = field(default_factory=list)
    invariants: list[Shape] = field(default_factory=list)
    carries: list[Shape] = field(default_factory=list)
    slices: list[Shape] = field(default_factory=list)
    outputs: list[Shape] = field(default_factory=list)
    source: str = ""

    def run(self) -> Step:
        draw = self.draw
        base = [draw.choice(SIZES) for _ in range(draw.choice((1, 2, 2, 3, 3, 4)))]
        if draw.random() < 0.3:
            base = [base[0]] * len(base)  # sizes that coincide

        def part() -> Shape:
            sizes = [n if draw.random() < 0.7 else 1 for n in base]
            return tuple(sizes[draw.randrange(len(sizes)) :] if draw.random() < 0.4 else sizes)

        self.carries = [tuple(base) if draw.random() < 0.75 else part()
                        for _ in range(draw.choice((1, 1, 2, 3)))]
        self.slices = [part() if draw.random() < 0.6 else tuple(base)
                       for _ in range(draw.choice((1, 2, 3)))]
        self.values = [(f"{kind}{k}", shape) for kind, shapes in
                       (("c", self.carries), ("s", self.slices)) for k, shape in enumerate(shapes)]
        for _ in range(draw.randrange(3, 12)):
            self._operation()
        nexts = [self._next(k, shape) for k, shape in enumerate(self.carries)]
        if self.carries[1:2] == self.carries[:1] and draw.random() < 0.3:
            nexts[0] = "c1"
        shown = draw.sample(self.values, min(len(self.values), draw.choice((0, 1, 2, 3))))
        self.outputs = [shape for _, shape in shown]
        names = [f"{kind}{k}" for kind, shapes in
                 (("c", self.carries), ("s", self.slices), ("i", self.invariants))
                 for k in range(len(shapes))]
        self.source = "\n".join([
            f"def step({', '.join(names)}):", *(f"    {line}" for line in self.lines),
            f"    return [{', '.join([*nexts, *(name for name, _ in shown)])}]", ""])
        return self

    def _add(self, text: str, shape: Any) -> None:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        self.values.append((name, tuple(shape)))

    def _next(self, k: int, shape: Shape) -> str:
        fits = [name for name, own in self.values if name.startswith("v") and len(own) <= len(shape)
                and all(a in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False))]
        value = self.draw.choice(fits[-3:] or [f"c{k}"])
        return self.draw.choice(NEXT).format(f"c{k}", value, list(shape))

    def _operation(self) -> None:
        draw = self.draw
        x, shape = draw.choice(self.values[-6:] if draw.random() < 0.6 else self.values)
        kinds = [self._unary, self._binary, self._binary]
        if shape:
            kinds += [self._reduced, self._normed, self._product, self._cut, self._ordered]
        if len(shape) > 1:
            kinds += [self._viewed, self._squared]
        draw.choice(kinds)(x, shape)

    def _unary(self, x: str, shape: Shape) -> None:
        self._add(self.draw.choice(UNARY).format(x), shape)

    def _binary(self, x: str, shape: Shape) -> None:
        y, other = self.draw.choice(self.values)
        try:
            both = tuple(torch.broadcast_shapes(shape, other))  # type: ignore[no-untyped-call]
        except RuntimeError:
            return
        if math.prod(both) <= MOST:
            self._add(self.draw.choice(BINARY).format(x, y), both)

    def _reduced(self, x: str, shape: Shape) -> None:
        axis, kept = self.draw.randrange(len(shape)), self.draw.random() < 0.5
        name = self.draw.choice(("sum", "sum", "mean", "amax", "amin"))
        left = [1] if kept else []
        self._add(f"{x}.{name}({axis}, {kept}) * 0.5", (*shape[:axis], *left, *shape[axis + 1 :]))

    def _normed(self, x: str, shape: Shape) -> None:
        axis = self.draw.randrange(len(shape))
        self._add(self.draw.choice((
            f"torch.softmax({x}, {axis})", f"{x}.var(-1, keepdim=True, unbiased=False) + {x}",
            f"torch.nn.functional.layer_norm({x}, ({shape[-1]},))",
            f"torch.logsumexp({x}, {axis}, True).expand({list(shape)})")), shape)

    def _ordered(self, x: str, shape: Shape) -> None:
        """Operations that ask for the order along an axis."""
        axis = self.draw.randrange(len(shape))
        self._add(self.draw.choice((
            f"{x}.flip({axis})", f"{x}.cumsum({axis}) * 0.3", f"{x}.roll(1, {axis})",
            f"torch.ops.aten.prod.dim_int(torch.tanh({x}), {axis}, True) + 0.1 * {x}",
            f"torch.ops.aten.cumprod.default(torch.tanh({x}), {axis})",
            f"torch.where(({x} > 0).any({axis}, keepdim=True), {x}, 0.5 * {x})",
            f"torch.ops.aten.max.dim({x}, {axis}, True)[0] + 0.1 * {x}",
            f"{x} * torch.ones({list(shape)}, dtype={x}.dtype).tril()" if len(shape) > 1
            else f"{x} * torch.arange({shape[0]}, dtype={x}.dtype) / {shape[0]}")), shape)

    def _product(self, x: str, shape: Shape) -> None:
        size, width = shape[-1], self.draw.choice((shape[-1], 2, 5, 3 * shape[-1]))
        name = f"i{len(self.invariants)}"
        if self.draw.random() < 0.5:
            self.invariants.append((size, width))
            text = f"{x} @ ({name} / {size})"
        else:
            self.invariants += [(width, size), (width,)]
            text = f"torch.nn.functional.linear({x}, {name} / {size}, i{len(self.invariants) - 1})"
        self._add(text, (*shape[:-1], width))

    def _squared(self, x: str, shape: Shape) -> None:
        y, other = self.draw.choice(self.values)
        if len(other) == len(shape) and (other[:-2], other[-1]) == (shape[:-2], shape[-1]):
            self._add(f"{x} @ {y}.transpose(-1, -2) / {shape[-1]}", (*shape[:-1], other[-2]))

    def _cut(self, x: str, shape: Shape) -> None:
        axis = self.draw.randrange(len(shape))
        size, (before, after) = shape[axis], (shape[:axis], shape[axis + 1 :])
        start = self.draw.randrange(size)
        self._add(*self.draw.choice((
            (f"{x}.narrow({axis}, {start}, {size - start})", (*before, size - start, *after)),
            (f"{x}.select({axis}, {start})", (*before, *after)),
            (f"torch.cat([{x}.narrow({axis}, {start}, {size - start}), "
             f"{x}.narrow({axis}, 0, {start})], {axis})", shape),
            (f"{x}.chunk(2, {axis})[0]", (*before, -(-size // 2), *after)))))

    def _viewed(self, x: str, shape: Shape) -> None:
        order, axis = list(range(len(shape))), self.draw.randrange(len(shape) - 1)
        self.draw.shuffle(order)
        joined = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
        parted = [(*shape[:a], n, shape[a] // n, *shape[a + 1 :])
                  for a in range(len(shape)) for n in (2, 3, 4) if shape[a] % n == 0]
        self._add(*self.draw.choice((
            (f"{x}.permute({order})", [shape[a] for a in order]),
            (f"{x}.unsqueeze({axis})", (*shape[:axis], 1, *shape[axis:])),
            *((f"{x}.reshape({list(other)})", other) for other in (joined, *parted[:2])))))


def compare(seed: int, kernel: bool = True) -> str:
    """Values and gradients of one random step, in float64, by a `kernel`, and without one, where
    affine recurrences, which most backwards are, run at once; "ok", or why there is no kernel."""
    from looplift.optimizer import fused
    from looplift.optimizer.compiled import compiled
    from looplift.optimizer.loop import plain_loop
    from looplift.optimizer.pointwise import Unsupported
    from looplift.optimizer.step import step_function
    from looplift.passes.store_carries import storing

    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    step = Step(draw).run()
    steps, reverse = draw.choice((1, 2, 5)), draw.random() < 0.3

    def given(shape: Shape) -> Tensor:
        drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
        order = list(range(len(shape)))
        if draw.random() < 0.3:
            draw.shuffle(order)  # it lies otherwise
        back = [order.index(a) for a in range(len(shape))]
        return drawn.permute(order).contiguous().permute(back).requires_grad_()

    carries = [given(shape) for shape in step.carries]
    slices = [given((steps, *shape)) for shape in step.slices]
    invariants = [given(shape) for shape in step.invariants]
    if draw.random() < 0.3:  # an update that nobody reads
        for tensor in slices:
            tensor.data[0 if reverse else -1].reshape(-1)[0] = torch.nan
    arguments, body = [*carries, *slices, *invariants], step_function(step.source)
    try:
        if kernel:
            fused.build_kernel(step.source, carries, slices, invariants)
    except Unsupported as reason:
        return str(reason)
    turned = [s.flip(0) if reverse else s for s in slices]
    results: Any = plain_loop(body, carries, turned, invariants)
    held = len(carries)
    axes = [draw.randrange(len(shape) + 1) for shape in step.outputs]
    want = [*results[:held], *((r.flip(0) if reverse else r).movedim(0, axis)
                               for r, axis in zip(results[held:], axes, strict=True))]
    weights = [torch.randn(r.shape, dtype=r.dtype, generator=generator) for r in want]
    read = [draw.random() < 0.7 for _ in want]

    def gradients(found: Sequence[Tensor]) -> list[Tensor]:
        pairs = [(r, w) for r, w, has in zip(found, weights, read, strict=True)
                 if r.requires_grad and has]
        if not pairs:
            return []
        made = torch.autograd.grad([r for r, _ in pairs], arguments, [w for _, w in pairs],
                                   allow_unused=True)
        return [torch.zeros_like(a) if g is None else g
                for a, g in zip(arguments, made, strict=True)]

    grads = gradients(want)
    stored = [k for k in range(held) if draw.random() < 0.5]  # for the backward alone
    source, axes = storing(step.source, stored), [*axes, *[0] * len(stored)]
    ways = (compiled, fused.pays), (lambda source: None, lambda *_: True)
    for library, pays in ways if kernel else ways[1:]:
        with mock.patch.object(fused, "compiled", library), mock.patch.object(fused, "pays", pays):
            got = fused.fused_scan(source, carries, slices, invariants, axes, reverse)[: len(want)]
            torch.testing.assert_close(list(got), want, rtol=1e-8, atol=1e-9, equal_nan=True)
            torch.testing.assert_close(gradients(got), grads, rtol=1e-7, atol=1e-8, equal_nan=True)
    return "ok"


def main() -> None:
    from looplift.tests.triton_on_torch import in_place_of_kernels

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first step")
    parser.add_argument("--no-kernels", action="store_true", help="quick: build none")
    parser.add_argument("--triton", action="store_true", help="kernels for GPUs, run in PyTorch")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seed, end, tried, failed = given.seed, time.time() + 60 * given.minutes, 0, 0
    reasons: dict[str, int] = {}
    while time.time() < end:
        try:
            with in_place_of_kernels() if given.triton else nullcontext():
                said = compare(seed, not given.no_kernels)
            reasons[said] = reasons.get(said, 0) + 1
        except Exception as error:
            failed += 1
            first = str(error).strip().partition("\n")[0]
            print(f"seed {seed}: {type(error).__name__}: {first}\n"
                  f"{Step(random.Random(seed)).run().source}", flush=True)
        seed, tried = seed + 1, tried + 1
    print(f"{tried} steps, {failed} failed; {reasons}")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
