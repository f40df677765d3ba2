"""A step's graph → a Triton kernel that walks all steps with the carries in registers.

All free axes are taken as one; each program runs a block of their elements, and all steps. A
value is a block of registers: the elements, then its inner axes, those of size 1 left out, each
of the others padded to a power of two. What is beyond its size holds anything, and is masked
where it would be seen: in reductions, products and stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from .axes import RESHAPES, Axes, reduced
from .facts import aten
from .kernel import free_parts
from .kernel_loops import contiguous
from .pointwise import COMMON, Language, Unsupported, is_mask
from .step import Counts, Sizes, moving, remembered
from .writer import View, Writer

MOST = 1 << 15  # numbers of one value in a program: 128 registers of each of 256 threads
KEPT = 1 << 12  # numbers of an invariant that is read once, not at each step
TABLE = 64  # numbers of a constant tensor
LANES = 32  # elements of a program whose values have no inner axes: one for each thread of a warp

LARGER = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
SMALLER = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
TRITON = Language(
    functions={
        **COMMON,
        **{name: f"libdevice.{name}({{0}})" for name in (
            "exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "erf", "expm1", "log1p", "floor",
            "ceil", "trunc", "tan", "sinh", "cosh", "asin", "acos", "atan", "erfc", "erfinv",
            "exp2", "log2", "log10")},
        **{name: f"libdevice.{name}({{0}}, {{1}})" for name in (
            "atan2", "fmod", "hypot", "copysign", "pow")},
        "round": "libdevice.rint({0})", "abs": "tl.abs({0})", "neg": "-{0}",
        "reciprocal": "1.0 / {0}", "sigmoid": "1.0 / (1.0 + libdevice.exp(-{0}))",
        **dict.fromkeys(("maximum", "clamp_min"), LARGER),
        **dict.fromkeys(("minimum", "clamp_max"), SMALLER),
        "relu": LARGER.format("{0}", "tl.full([1], 0.0, S)"),
        "sign": "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0)).to(S)",
    },
    choose="tl.where({mask}, {yes}, {no})", full="tl.full([1], {}, S)",
    inf="float('inf')", nan="float('nan')",
    whole="tl.where(tl.abs({0}) < {most}, libdevice.trunc({0}) + 0.0, {least})",
)
REDUCED = {"sum": ("0.0", "tl.sum({0}, {1})"),
           "amax": ("-float('inf')", "tl.reduce({0}, {1}, larger)"),
           "amin": ("float('inf')", "tl.reduce({0}, {1}, smaller)")}
HEAD = f"""import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def larger(a, b):
    return {LARGER.format("a", "b")}


@triton.jit
def smaller(a, b):
    return {SMALLER.format("a", "b")}


@triton.jit
"""


@dataclass(frozen=True)
class Value:
    """A block of registers; `sizes` of its inner axes, 1 also where it is the same along one."""

    text: str
    sizes: Sizes
    lane: bool  # whether it has a number for each element of the block


@dataclass(frozen=True)
class TritonKernel:
    """Source of a module with a function `kernel`, and how to call it.

    Its arguments: for all carries, slices, invariants, final carries and outputs a tensor, its
    stride from step to step if it has steps, and the strides of the axes `strided` of a step;
    then the sizes of the `parts` that are free and their product, the number of steps, a dtype,
    and `block`, how many elements along the free parts a program runs, in so many `warps`.
    """

    source: str
    strided: tuple[tuple[int, ...], ...]
    parts: tuple[int, ...]
    block: int
    warps: int


@remembered
def triton_kernel(source: str, sizes: tuple[Sizes, ...], counts: Counts) -> TritonKernel:
    """The kernel of a step on arguments of `sizes`; raises `Unsupported` with a reason."""
    if not all(map(math.prod, sizes)):
        raise Unsupported("a value of it has no elements")
    axes, _ = free_parts(source, sizes, counts[0])
    return _TritonWriter(axes, counts).finished()


def padded(sizes: Sequence[int]) -> list[int]:
    """The axes of registers."""
    return [1 << (n - 1).bit_length() for n in sizes if n > 1]


class _TritonWriter(Writer):
    """What is known while a kernel is written."""

    language, reductions = TRITON, REDUCED

    def __init__(self, axes: Axes, counts: Counts) -> None:
        super().__init__(axes)
        self.counts = counts
        self.values: dict[Node, Value] = {}
        self.before: list[str] = []  # lines ahead of the loop
        self.lines: list[str] = []  # of a step
        self.largest = 1  # registers of a value for one element
        self.strided: list[tuple[int, ...]] = []
        for k, head in enumerate(self.heads):
            self._argument(k, head)
        self.write()
        self._results()

    def finished(self) -> TritonKernel:
        if self.largest > MOST:
            raise Unsupported(f"a value of it needs {self.largest} registers")
        held, read, fixed = self.counts
        given, count = held + read + fixed, len(self.strided)
        moves = moving(self.counts, count)
        below = [" * ".join(["1", *(f"n{q}" for q in self.axes.free[k + 1 :])])
                 for k in range(len(self.axes.free))]
        parts = [f"i{p} = lane // ({under}) % n{p}"
                 for p, under in zip(self.axes.free, below, strict=True)]
        names = [name for k, axes in enumerate(self.strided)
                 for name in (f"p{k}", *[f"d{k}"] * (k in moves), *(f"s{k}_{a}" for a in axes))]
        names += [*(f"n{p}" for p in self.axes.free), "LANES", "STEPS", "S: tl.constexpr",
                  "BLOCK: tl.constexpr"]
        body = ["lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
                "zero = tl.zeros([1], tl.int64)", *parts, *self.before,
                "for _ in range(0, STEPS):", *(f"    {line}" for line in self.lines),
                *(f"    a{k} += d{k}" for k in moves),
                *(f"tl.store(a{given + k}, x{k}, mask=m{given + k})" for k in range(held))]
        source = HEAD + f"def kernel({', '.join(names)}):\n" + "".join(
            f"    {line}\n" for line in body)
        sizes = tuple(self.axes.sizes[p] for p in self.axes.free)
        block = LANES if self.largest == 1 else max(64 // self.largest, 1)
        block = min(block, 1 << (math.prod(sizes) - 1).bit_length())
        warps = min(max(block * self.largest // 128, 1), 8)
        return TritonKernel(source, tuple(self.strided), sizes, block, warps)

    # registers

    def _named(self, text: str, sizes: Sequence[int], lane: bool) -> Value:
        """A value of its own."""
        self.largest = max(self.largest, math.prod(padded(sizes)))
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return Value(name, tuple(sizes), lane)

    def _index(self, axis: int, sizes: Sequence[int]) -> str:
        """The index along an axis, as registers of the axes `sizes`."""
        place = [":" if a == axis else "None" for a, n in enumerate(sizes) if n > 1]
        return f"tl.arange(0, {padded(sizes[axis : axis + 1])[0]})[{', '.join(['None', *place])}]"

    def _inside(self, sizes: Sequence[int], axes: Iterable[int]) -> list[str]:
        """Masks of the registers that hold elements, for those `axes` that have others too."""
        return [f"({self._index(a, sizes)} < {sizes[a]})" for a in axes if sizes[a] & sizes[a] - 1]

    def _aligned(self, value: Value, sizes: Sequence[int]) -> str:
        """A value as an operand of those with the axes `sizes`."""
        own = (1,) * (len(sizes) - len(value.sizes)) + value.sizes
        return _indexed(value.text, [n > 1 for n, size in zip(own, sizes, strict=True) if size > 1])

    def _whole(self, value: Value, sizes: Sequence[int]) -> Value:
        """A value with a number in each register of `sizes`."""
        text = self._aligned(value, sizes)
        if padded(value.sizes) == padded(sizes):
            return Value(text, tuple(sizes), value.lane)
        return self._named(f"tl.broadcast_to({text}, {_shape(sizes, value.lane)})", sizes,
                           value.lane)

    def _value(self, node: Node) -> Value:
        """A value as numbers, 0 and 1 if it is a mask, in all its registers."""
        value = Value(self.constants[node], (), False) if node in self.constants \
            else self.values[node]
        if is_mask(node):
            value = self._named(self.language.counted(value.text), value.sizes, value.lane)
        return self._whole(value, self.axes.inner(node))

    def _keep(self, node: Node, value: Value) -> None:
        """A node's value, from numbers."""
        text = self.language.as_mask(value.text)
        self.values[node] = self._named(text, value.sizes, value.lane) if is_mask(node) else value

    def _gathered(self, value: Value, index: list[str], sizes: Sequence[int]) -> Value:
        """The registers of a value whose numbers are the sum of `index`."""
        count, made = math.prod(padded(value.sizes)), math.prod(padded(sizes))
        lanes = "BLOCK" if value.lane else "1"
        place = " + ".join(["tl.zeros([1], tl.int32)", *index])
        place = f"tl.reshape(tl.minimum(tl.maximum({place}, 0), {count - 1}), [1, {made}])"
        text = f"tl.gather(tl.reshape({value.text}, [{lanes}, {count}]), " \
            f"tl.broadcast_to({place}, [{lanes}, {made}]), 1)"
        return self._named(f"tl.reshape({text}, {_shape(sizes, value.lane)})", sizes, value.lane)

    # memory

    def _pointer(self, k: int, node: Node) -> bool:
        """Pointers to an argument's or result's elements, and a mask of those that there are;
        whether it has one for each element of the block."""
        axes, inner = self.axes.of(node), self.axes.inner(node)
        alone = [False] * len(padded(inner))
        lane = k < self.counts[0] or k >= len(self.heads) \
            or any(p in self.axes.free for axis in axes for p in axis)
        terms = []
        for a, parts in enumerate(axes):
            if inner[a] > 1:
                terms.append(f"{self._index(a, inner)}.to(tl.int64) * s{k}_{a}")
            elif parts:
                at = " + ".join(" * ".join([f"i{p}", *(f"n{q}" for q in parts[place + 1 :])])
                                for place, p in enumerate(parts))
                terms.append(f"{_indexed(f'({at})', alone)} * s{k}_{a}")
        start = _indexed("lane" if lane else "zero", alone)
        masks = [f"({start} < LANES)", *self._inside(inner, range(len(inner)))]
        self.before += [f"a{k} = p{k} + {' + '.join([f'{start} * 0', *terms])}",
                        f"m{k} = {' & '.join(masks)}"]
        self.strided.append(tuple(a for a, parts in enumerate(axes) if parts))
        return lane

    def _argument(self, k: int, head: Node) -> None:
        inner, (held, read, _) = self.axes.inner(head), self.counts
        lane = self._pointer(k, head)
        registers = math.prod(padded(inner))
        once = k < held or (k >= held + read and registers <= KEPT)
        (self.before if once else self.lines).append(f"x{k} = tl.load(a{k}, mask=m{k}, other=0.0)")
        self.largest = max(self.largest, registers)
        self.values[head] = Value(f"x{k}", inner, lane)

    def _results(self) -> None:
        held, given = self.counts[0], len(self.heads)
        nexts = []
        for k, node in enumerate(self.axes.results):
            self._pointer(given + k, node)
            value = self._value(node)
            made = self._named(f"tl.broadcast_to({value.text}, {_shape(value.sizes, True)})",
                               value.sizes, True)
            if k < held:
                nexts.append(f"x{k} = {made.text}")
            else:
                self.lines.append(f"tl.store(a{given + k}, {made.text}, mask=m{given + k})")
        self.lines += nexts

    # what each node becomes

    def table(self, node: Node, held: Tensor) -> None:
        if held.numel() > TABLE:
            raise Unsupported(f"it reads a constant tensor of {held.numel()} numbers")
        sizes, steps = tuple(held.shape), contiguous(tuple(held.shape))
        place = " + ".join(f"{self._index(a, sizes)} * {steps[a]}"
                           for a, n in enumerate(sizes) if n > 1)
        text = self.language.number(0)
        for k, number in enumerate(held.reshape(-1).tolist()):
            text = self.language.choose.format(mask=f"(({place}) == {k})", no=text,
                                               yes=self.language.number(number))
        self._keep(node, self._named(text, sizes, False))

    def same(self, node: Node, source: Node) -> None:
        self.values[node] = self.values[source]

    def pointwise(self, node: Node, sources: list[Node], text: Callable[[list[str]], str]) -> None:
        values = [self.values[n] for n in sources]
        sizes = _broadcast(*(v.sizes for v in values))
        self.values[node] = self._named(text([self._aligned(v, sizes) for v in values]), sizes,
                                        any(v.lane for v in values))

    def product(self, node: Node) -> None:
        left, right = (self._value(cast(Node, n)) for n in node.args[:2])
        operands = Value(left.text, (*left.sizes, 1), left.lane), \
            Value(right.text, (*right.sizes[:-2], 1, *right.sizes[-2:]), right.lane)
        sizes = _broadcast(*(v.sizes for v in operands))
        text = " * ".join(self._aligned(v, sizes) for v in operands)
        terms = self._named(text, sizes, left.lane or right.lane)
        self.values[node] = self._reduced(terms, [len(sizes) - 2], self.axes.inner(node), "sum")

    def reduction(self, node: Node, name: str) -> None:
        value = self._value(cast(Node, node.args[0]))
        self.values[node] = self._reduced(value, reduced(node), self.axes.inner(node), name)

    def _reduced(
        self, value: Value, gone: Sequence[int], sizes: Sequence[int], name: str
    ) -> Value:
        """A value of `sizes`, without the axes `gone`."""
        start, text = REDUCED[name]
        masks, made = self._inside(value.sizes, gone), value.text
        if masks:
            made = self.language.choose.format(mask=" & ".join(masks), yes=made,
                                               no=self.language.full.format(start))
        for axis in sorted(gone, reverse=True):
            if value.sizes[axis] > 1:
                made = text.format(made, 1 + len(padded(value.sizes[:axis])))
        return self._named(made, sizes, value.lane)

    def view(self, node: Node, source: Node, view: View) -> None:
        sizes = self.axes.inner(node)
        if node.target is aten.expand.default:
            self.values[node] = self.values[source]
            return
        value = self._value(source)
        try:
            made = view(torch.empty_strided(value.sizes, _strides(value.sizes), device="meta"))
        except RuntimeError:  # its elements lie in another order
            if node.target not in RESHAPES:
                raise
            packed = contiguous(value.sizes)
            count, own = math.prod(value.sizes), _strides(value.sizes)
            number = self._index(0, (count,))
            value = self._gathered(value, [f"{number} // {p} % {n} * {o}" for p, n, o in
                                           zip(packed, value.sizes, own, strict=True) if n > 1],
                                   (count,))
            made = view(torch.empty(self.axes.inner(source), device="meta"))
        if tuple(made.shape) != sizes:
            raise Unsupported(f"{node.target} mixes axes that are apart elsewhere")
        steps = [s for s, n in zip(made.stride(), sizes, strict=True) if n > 1]
        old = [s for s, n in zip(_strides(value.sizes), value.sizes, strict=True) if n > 1]
        registers = math.prod(padded(value.sizes))
        moved = made.storage_offset() or math.prod(padded(sizes)) != registers
        if not moved and steps == list(contiguous(padded(sizes))):
            text = value.text
            if padded(sizes) != padded(value.sizes):
                text = f"tl.reshape({text}, {_shape(sizes, value.lane)})"
        elif not moved and sorted(steps) == sorted(old):
            order = [0, *(1 + old.index(step) for step in steps)]
            text = f"tl.permute({value.text}, {order})"
        else:
            index = [f"{self._index(a, sizes)} * {step}"
                     for (a, n), step in zip(enumerate(sizes), made.stride(), strict=True) if n > 1]
            text = self._gathered(value, [str(made.storage_offset()), *index], sizes).text
        self._keep(node, Value(text, sizes, value.lane))

    def assembled(self, node: Node, parts: list[tuple[Node, View]]) -> None:
        sizes = self.axes.inner(node)
        numbers = torch.arange(math.prod(sizes)).view(sizes)
        made = Value(self.language.number(0), (), False)
        for part, view in parts:
            spans = [_span(view(numbers) // step % n)
                     for step, n in zip(contiguous(sizes), sizes, strict=True)]
            counts = tuple(count for _, count, _ in spans)
            whole = self._value(part)
            value = Value(whole.text, counts, whole.lane)
            cut = [a for a, n in enumerate(sizes) if counts[a] < n]
            if any(counts[a] > 1 for a in cut):
                value = self._gathered(value, [
                    f"({self._index(a, sizes)} - {spans[a][0]}) // {spans[a][2]} * {step}"
                    for a, step in enumerate(_strides(counts)) if counts[a] > 1], sizes)
            masks = []
            for a in cut:
                start, count, step = spans[a]
                place = f"({self._index(a, sizes)} - {start})"
                masks += [f"({place} >= 0)", f"({place} < {count * step})",
                          f"({place} % {step} == 0)"]
            text = self._aligned(value, sizes)
            if masks:
                text = self.language.choose.format(mask=" & ".join(masks), yes=text,
                                                   no=self._aligned(made, sizes))
            masked = tuple(n if a in cut else 1 for a, n in enumerate(sizes))
            made = self._named(text, _broadcast(made.sizes, value.sizes, masked),
                               made.lane or value.lane)
        self._keep(node, made)


def _indexed(text: str, axes: Sequence[bool]) -> str:
    """Registers as an operand of such that have more axes: those it has itself."""
    places = ", ".join([":", *(":" if own else "None" for own in axes)])
    return text if all(axes) else f"{text}[{places}]"


def _broadcast(*sizes: Sizes) -> Sizes:
    """Sizes that all of `sizes` broadcast to."""
    return tuple(torch.broadcast_shapes(*sizes))  # type: ignore[no-untyped-call]


def _span(places: Tensor) -> tuple[int, int, int]:
    """The first index along an axis, how many there are, and from one to the next."""
    found = sorted(set(places.flatten().tolist()))
    return found[0], len(found), found[1] - found[0] if len(found) > 1 else 1


def _shape(sizes: Sequence[int], lane: bool) -> str:
    """The shape of a value's registers."""
    return f"[{', '.join(['BLOCK' if lane else '1', *map(str, padded(sizes))])}]"


def _strides(sizes: Sequence[int]) -> Sizes:
    """The strides of a value's axes in its registers."""
    return contiguous([1 << (n - 1).bit_length() for n in sizes])
