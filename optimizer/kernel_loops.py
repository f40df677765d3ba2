"""Operations of a kernel's step → C++ loops over their elements.

`v` counts the vectors of a block where vectors hold the lane, `r` its rows where they hold the
last axis; `i0`, `i1`, … run over the other axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .pointwise import Unsupported
from .step import Sizes

COMBINED = {"sum": ("V(S(0))", "{0} + {1}"),
            "amax": ("V(-std::numeric_limits<S>::infinity())", "at::vec::maximum({0}, {1})"),
            "amin": ("V(std::numeric_limits<S>::infinity())", "at::vec::minimum({0}, {1})")}


TABLE = "table"  # what constant arrays are called


@dataclass(frozen=True)
class Place:
    """Where a value's elements lie: [i, j] at offset + i · strides[0] + j · strides[1]."""

    buffer: str
    sizes: Sizes
    strides: Sizes
    lane: bool
    offset: int = 0
    extent: int = 0  # elements of a buffer of the kernel's own; 0: an argument's memory
    mask: bool = False  # whether its numbers, 0 and 1, are one

    def viewed(self, view: Callable[[Tensor], Tensor]) -> Place:
        """The place of a view; `view` makes it of a tensor that lies so."""
        made = view(torch.empty_strided(self.sizes, self.strides, device="meta"))
        return replace(self, sizes=tuple(made.shape), strides=tuple(made.stride()),
                       offset=self.offset + int(made.storage_offset()))

    def along(self, sizes: Sizes) -> Read:
        """The place along the axes of `sizes` that have more than one element."""
        spare = len(sizes) - len(self.sizes)
        strides = [0] * spare + [s if n > 1 else 0
                                 for n, s in zip(self.sizes, self.strides, strict=True)]
        return Read(self, tuple(s for s, n in zip(strides, sizes, strict=True) if n > 1))

    @property
    def row(self) -> str:
        """From one row to the next."""
        if self.buffer.startswith(TABLE):
            return "0"
        return str(self.extent) if self.extent else f"q{self.buffer[1:]}"

    def element(self, index: str) -> str:
        """One element's block of vectors."""
        if not self.lane:
            return f"V({self.buffer}[{index}])"
        if self.extent:
            return f"{self.buffer}[{index} * N + v]"
        return f"load<S, whole>({self.buffer} + {index} * m{self.buffer[1:]} + v * W, n)"


@dataclass(frozen=True)
class Read:
    """A place, and its strides along the axes of the loop that reads it."""

    place: Place
    strides: Sizes

    @property
    def key(self) -> tuple[str, Sizes, int]:
        return self.place.buffer, self.strides, self.place.offset

    def index(self, axes: int) -> str:
        """Of the element where the first `axes` axes of the loop are."""
        terms = [f"i{a} * {stride}" for a, stride in enumerate(self.strides[:axes]) if stride]
        return " + ".join([str(self.place.offset), *terms])

    def pointer(self) -> tuple[str, int]:
        """Where a vector along the last axis begins, and the stride of its elements."""
        place = self.place
        if place.lane:
            raise Unsupported("it mixes what lies along an axis of its own")
        stride = self.strides[-1] if self.strides else 0
        moved = f" + j * {stride}" if stride else ""
        return f"{place.buffer} + r * {place.row} + {self.index(len(self.strides) - 1)}{moved}", \
            stride


@dataclass
class Member:
    """One operation of a loop: `text` on registers, kept as `name`, or written `into` a place."""

    reads: list[Read]
    text: Callable[[list[str]], str]
    into: Read
    name: str = ""  # of a register, which is written too if another loop reads it
    combine: str = ""  # of a reduction


@dataclass
class Loop:
    """Operations on values of one size."""

    sizes: Sizes  # without those of 1
    lane: bool
    members: list[Member] = field(default_factory=list)

    def lines(self, needed: set[str]) -> list[str]:
        """C++; `needed`: buffers that another loop reads."""
        before: list[str] = []
        after: list[str] = []
        body: list[str] = []
        registers: dict[tuple[str, Sizes, int], str] = {}
        for member in self.members:
            names = [self._register(read, registers, body) for read in member.reads]
            text = member.text(names)
            if member.combine:
                self._accumulate(member, text, before, body, after)
            elif not member.name:
                body.append(self._written(member.into, text))
            else:
                body.append(f"const V {member.name} = {text};")
                registers[member.into.key] = member.name
                if member.into.place.buffer in needed:
                    body.append(self._written(member.into, member.name))
        sizes = self.sizes if self.lane else self.sizes[:-1]
        heads = [f"for (int64_t i{a} = 0; i{a} < {n}; ++i{a})" for a, n in enumerate(sizes)]
        if self.lane:
            heads += ["_Pragma(\"GCC unroll 4\") for (int v = 0; v < N; ++v)"]
            inside = [f"  {line}" for line in body]
        else:
            last = self.sizes[-1] if self.sizes else 1
            heads = ["for (int r = 0; r < R; ++r)", *heads]
            inside = [f"  sweep<S, {last}>([&](auto kind, int64_t j, int64_t n) {{",
                      "    constexpr bool full = decltype(kind)::value;",
                      *(f"    {line}" for line in body), "  });"]
        return [*before, *heads[:-1], heads[-1] + " {", *inside, "}", *after]

    def _register(
        self, read: Read, registers: dict[tuple[str, Sizes, int], str], body: list[str]
    ) -> str:
        if read.key not in registers:
            name = f"x{len(registers)}"
            registers[read.key] = name
            text = self._loaded(read)
            body.append(f"const V {name} = {f'({text} != V(S(0)))' if read.place.mask else text};")
        return registers[read.key]

    def _accumulate(
        self, member: Member, text: str, before: list[str], body: list[str], after: list[str]
    ) -> None:
        """A reduction: its result's buffer combines, or one of vectors if it is along them."""
        into, place = member.into, member.into.place
        start, combine = COMBINED[member.combine]
        if self.lane or (into.strides and into.strides[-1]):
            begin = start if place.lane else start.replace("V(", "(", 1)
            before.append(f"for (int64_t i = 0; i < {place.extent} * {'N' if place.lane else 'R'}; "
                          f"++i) {place.buffer}[i] = {begin};")
            body.append(self._written(into, combine.format(self._loaded(into), text)))
            return
        own = f"{place.buffer}sums"
        before += [f"V {own}[{place.extent} * R];",
                   f"for (int64_t i = 0; i < {place.extent} * R; ++i) {own}[i] = {start};"]
        where = f"{own}[r * {place.extent} + {into.index(len(self.sizes) - 1)}]"
        value = f"full ? {text} : V::set({start}, {text}, n)"
        body += [f"const V {place.buffer}in = {value};",
                 f"{where} = {combine.format(where, place.buffer + 'in')};"]
        after.append(f"for (int64_t i = 0; i < {place.extent} * R; ++i) {place.buffer}[i] = "
                     f"across({own}[i], [](V x, V y) {{ return {combine.format('x', 'y')}; }});")

    def _loaded(self, read: Read) -> str:
        """An operand as a vector."""
        if self.lane:
            return read.place.element(f"({read.index(len(self.sizes))})")
        pointer, stride = read.pointer()
        if stride == 1:
            return f"load<S, full>({pointer}, n)"
        return f"V(*({pointer}))" if stride == 0 else f"gather<S>({pointer}, {stride}, n)"

    def _written(self, into: Read, value: str) -> str:
        place = into.place
        if place.mask:
            value = f"V::blendv(V(S(0)), V(S(1)), {value})"
        if self.lane:
            index = f"({into.index(len(self.sizes))})"
            if place.extent:
                return f"{place.buffer}[{index} * N + v] = {value};"
            return f"store<S, whole>({value}, {place.buffer} + {index} * m{place.buffer[1:]} + " \
                "v * W, n);"
        pointer, stride = into.pointer()
        if not self.sizes or stride == 1:
            return f"store<S, full>({value}, {pointer}, n);"
        return f"scatter<S>({value}, {pointer}, {stride}, n);"


@dataclass
class Product:
    """One product of matrices, or of batches of them; `shared`: of one matrix for all rows."""

    made: Place
    left: Place
    right: Place
    lane: bool
    shared: bool

    @property
    def sizes(self) -> Sizes:
        return self.made.sizes

    def lines(self, needed: set[str]) -> list[str]:
        """C++."""
        made, left, right = self.made, self.left, self.right
        b, m, n = (1, *made.sizes)[-3:]
        k = left.sizes[-1]
        (ab, am, ak), (bb, bk, bn) = _three(left), _three(right)
        if not self.lane:
            if n == 1:
                bn = 1 if k == 1 or bk != 1 or ak != 1 else 0
            shared = "true" if self.shared else "false"
            return [f"product<S, R, {shared}, {b}, {m}, {n}, {k}, {ab}, {am}, {ak}, {bb}, {bk}, "
                    f"{bn}>({made.buffer}, {left.buffer} + {left.offset}, {left.row}, "
                    f"{right.buffer} + {right.offset}, {right.row});"]
        one = left.element(f"({left.offset} + b * {ab} + m * {am} + k * {ak})")
        two = right.element(f"({right.offset} + b * {bb} + k * {bk} + o * {bn})")
        return [
            f"for (int64_t b = 0; b < {b}; ++b)", f"for (int64_t m = 0; m < {m}; ++m)",
            f"for (int64_t o = 0; o < {n}; ++o) {{",
            "  V sums[N];", "  for (int v = 0; v < N; ++v) sums[v] = V(S(0));",
            f"  for (int64_t k = 0; k < {k}; ++k)",
            "    _Pragma(\"GCC unroll 4\") for (int v = 0; v < N; ++v)",
            f"      sums[v] = at::vec::fmadd({one}, {two}, sums[v]);",
            f"  for (int v = 0; v < N; ++v) {made.buffer}[((b * {m} + m) * {n} + o) * N + v] = "
            "sums[v];", "}",
        ]


def _three(place: Place) -> list[int]:
    """The strides of a matrix, or of a batch of them, as of a batch."""
    strides = [s if size > 1 else 0 for s, size in zip(place.strides, place.sizes, strict=True)]
    return [0] * (3 - len(strides)) + strides


def contiguous(sizes: Sequence[int], order: Sequence[int] | None = None) -> Sizes:
    """Strides of packed elements; `order`: the axes, the slowest first."""
    strides, step = [0] * len(sizes), 1
    for axis in reversed(order if order is not None else range(len(sizes))):
        strides[axis], step = step, step * sizes[axis]
    return tuple(strides)


def transfer(place: Place, k: int, out: bool) -> list[str]:
    """All elements from an argument's memory to a buffer, or back."""
    if place.lane:
        head = f"  for (int64_t i = 0; i < {place.extent}; ++i) for (int v = 0; v < N; ++v)"
        there, here = f"p{k} + i * m{k} + v * W", f"{place.buffer}[i * N + v]"
        move = f"store<S, whole>({here}, {there}, n);" if out \
            else f"{here} = load<S, whole>({there}, n);"
        return [head, f"    {move}"]
    head = f"  for (int r = 0; r < R; ++r) for (int64_t i = 0; i < {place.extent}; ++i)"
    there, here = f"p{k}[r * q{k} + i]", f"{place.buffer}[r * {place.extent} + i]"
    return [head, f"    {there} = {here};" if out else f"    {here} = {there};"]
