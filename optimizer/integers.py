"""How large the integers of a loop become: kernels hold them as floating numbers.

A counter that grows by one in each step, or the place of the largest value so far, stays far below
2²⁴, where float32 holds all integers and computes with them exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch.fx import Node

from .builder import output_node
from .facts import aten, body_of, is_scan, is_tensor, is_view, value
from .lookups import ranges
from .pointwise import SAME, constant, no_rule

INTEGERS = (torch.int64, torch.int32)
EXACT = {torch.float32: 1 << 24, torch.float64: 1 << 53}  # all integers up to it are numbers
STEPS = 1 << 16  # that a program for all lengths may have; where it has more, it is compared
ROUNDS = 4  # steps after which states may stay within bounds
DEPTH = 32  # operations before the loop that are followed


@dataclass(frozen=True)
class Bounds:
    """Where integers are: within `fixed`, or at most so far `beyond` the largest state in size
    before the step; None where nothing is there. Floating numbers that were rounded lie within
    (-inf, inf), and are exact."""

    fixed: tuple[float, float] | None
    beyond: float | None = None

    @property
    def size(self) -> float:
        """The largest in size of those that no state counts for."""
        return max(map(abs, self.fixed)) if self.fixed else 0

    def sizes(self, largest: float) -> list[float]:
        """How large its integers are where states are no larger than `largest`."""
        beyond = [] if self.beyond is None else [largest + self.beyond]
        return [*beyond, self.size] if self.is_finite else beyond

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.size)


STATE = Bounds(None, 0)
MASK = Bounds((0, 1))
ROUNDED = Bounds((-math.inf, math.inf))


def fit(
    body: Iterable[Node], given: Mapping[Node, Node | None], states: Mapping[Node, Node],
    steps: int, dtype: torch.dtype,
) -> bool:
    """Whether numbers of `dtype` hold the integers of a loop's body in all its steps.

    `given`: what each argument is outside of the loop; `states`: what the next step sees of each
    integer that is carried. Raises `Unsupported` for an operation that kernels have no rule for.
    """
    outside, body = _Known({}, dtype), list(body)
    begun = {head: outside.of(source) or _rows(head) for head, source in given.items()}
    known = _settled(begun, states, dtype) or _Known(
        {**begun, **dict.fromkeys(states, STATE)}, dtype, inside=True)
    start, after = [begun[head] for head in states], [known.of(node) for node in states.values()]
    found = [(known.of(n), value(n).dtype) for n in body if is_tensor(n)
             and value(n).dtype in INTEGERS and (n.op != "placeholder" or n.users)]
    if None in (*start, *after, *(b for b, _ in found)):
        return False
    first, grown = [b for b in start if b], [b for b in after if b]
    largest = max((b.size for b in (*first, *grown)), default=0)
    largest += max(steps, STEPS) * max((b.beyond or 0 for b in grown), default=0)
    if not math.isfinite(largest):
        return False
    return all(size <= min(EXACT[dtype], torch.iinfo(kind).max) for bounds, kind in found if bounds
               for size in bounds.sizes(largest))


def _settled(
    begun: Mapping[Node, Bounds | None], states: Mapping[Node, Node], dtype: torch.dtype
) -> _Known | None:
    """Bounds within which all states stay, whatever their steps combine, if a few steps show any:
    those of an automaton's cells."""
    held = {head: begun[head] for head in states}
    for _ in range(ROUNDS):
        known = _Known({**begun, **held}, dtype, inside=True)
        wider = {head: _hull([held[head], known.of(node)]) for head, node in states.items()}
        if None in wider.values():
            return None
        if wider == held:
            return known
        held = wider
    return None


class _Known:
    """The bounds of values, from those of some."""

    def __init__(
        self, known: dict[Node, Bounds | None], dtype: torch.dtype, inside: bool = False
    ) -> None:
        self.known, self.dtype, self.inside = known, dtype, inside

    def of(self, leaf: Any, depth: int = 0) -> Bounds | None:
        """The bounds of a number or of a node's integers, None if they are not known."""
        if isinstance(leaf, (bool, int)):
            return Bounds((leaf, leaf))
        if not is_tensor(leaf):
            return None
        if value(leaf).dtype is torch.bool:
            return MASK
        if value(leaf).dtype not in INTEGERS:
            return None
        if leaf not in self.known:
            self.known[leaf] = None if depth > DEPTH else self._found(leaf, depth)
        return self.known[leaf]

    def _found(self, node: Node, depth: int) -> Bounds | None:
        if node.op == "get_attr":
            return _held(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._item(node) if node.op == "call_function" else None
        if (number := constant(node)) is not None:
            return self.of(number)
        name = node.target._schema.name.removeprefix("aten::")
        source: Any = node.args[0] if node.args else None
        if node.target in SAME or is_view(node) or name in ("to", "type_as", "lift_fresh"):
            return self._converted(node, source, depth)
        if name in ("argmax", "argmin"):
            return Bounds((0, max(value(source).numel() - 1, 0)))
        rule = RULES.get(name)
        if rule is None and self.inside:
            raise no_rule(node.target)
        if rule is None or set(node.kwargs) - {"dtype", "device", "layout", "pin_memory"}:
            return None
        operands = [self.of(a, depth + 1) for a in node.args]
        if name == "clamp" and not self.inside and len(operands) == 3 \
                and all(b and b.is_finite for b in operands[1:]):  # by integers, whatever they are
            operands[0] = operands[0] or ROUNDED
        return rule(node, operands)

    def _item(self, node: Node) -> Bounds | None:
        """Those of what the steps of a scan return, whatever they are given, or of the places
        that a largest value has: the second result of `max`."""
        source, *index = cast(tuple[Any, ...], node.args)
        if is_scan(source) and index[0] >= len(source.args[1]):
            results = cast(tuple[Node, ...], output_node(body_of(source)).args[0])
            return _Known({}, self.dtype).of(results[index[0]])
        if index == [1] and isinstance(source, Node) and source.target in (
                aten.max.dim, aten.min.dim, aten.topk.default, aten.sort.default):
            return Bounds((0, max(value(cast(Node, source.args[0])).numel() - 1, 0)))
        return None

    def _converted(self, node: Node, source: Node, depth: int) -> Bounds | None:
        """Those of a view or a copy, of floating numbers that it rounds too."""
        number, kind = constant(source), value(source).dtype
        if kind.is_floating_point and number is not None and math.isfinite(number):
            return self.of(int(number))
        if kind.is_floating_point:
            return ROUNDED if torch.promote_types(kind, self.dtype) == self.dtype else None
        bounds = self.of(source, depth + 1)
        narrower = bounds and not bounds.is_finite and kind != value(node).dtype
        return None if narrower else bounds


def _rows(index: Node) -> Bounds | None:
    """Those of an index whose elements are looked up, all or those that anybody reads, which
    raises where the bounds don't hold."""
    found = list[Bounds | None]()
    for user in index.users:
        told = [Bounds((least, size - 1)) for i, least, size in ranges(user) if i is index]
        whole = is_tensor(user) and value(user).numel() >= value(index).numel()
        bounds = told[0] if told else _rows(user) if is_view(user) else None
        if bounds and (told or whole):
            return bounds
        found.append(bounds)
    return _hull(found) if found else None


def _held(node: Node) -> Bounds | None:
    """Those of a constant tensor, which may be a schedule that goes on as it is."""
    held = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(held, torch.Tensor) or not held.numel() or node.meta.get("state"):
        return None
    longer = max(STEPS / held.numel(), 1) if held.numel() > 1 else 1
    return Bounds((int(held.min()) * longer, int(held.max()) * longer))


Operands = list[Bounds | None]
Rule = Callable[[Node, Operands], Bounds | None]


def _hull(operands: Operands) -> Bounds | None:
    if any(b is None for b in operands):
        return None
    fixed = [b.fixed for b in operands if b and b.fixed]
    beyond = [b.beyond for b in operands if b and b.beyond is not None]
    return Bounds((min(f[0] for f in fixed), max(f[1] for f in fixed)) if fixed else None,
                  max(beyond, default=None))


def _either(node: Node, operands: Operands) -> Bounds | None:
    return _hull(operands)


def _chosen(node: Node, operands: Operands) -> Bounds | None:
    return _hull(operands[1:])


def _first(node: Node, operands: Operands) -> Bounds | None:
    return operands[0]


def _filled(node: Node, operands: Operands) -> Bounds | None:
    return _hull([operands[0], operands[2]])


def _sum(node: Node, operands: Operands) -> Bounds | None:
    a, b = operands[:2]
    if a is None or b is None or not (a.is_finite and b.is_finite) \
            or (a.beyond is not None and b.beyond is not None):
        return None
    minus = node.target in (aten.sub.Tensor, aten.sub.Scalar)
    fixed = None
    if a.fixed and b.fixed:
        low, high = (-b.fixed[1], -b.fixed[0]) if minus else b.fixed
        fixed = a.fixed[0] + low, a.fixed[1] + high
    beyond = [x.beyond + y.size for x, y in ((a, b), (b, a)) if x.beyond is not None]
    return Bounds(fixed, max(beyond, default=None))


def _product(node: Node, operands: Operands) -> Bounds | None:
    a, b = operands[:2]
    if a is None or b is None or not (a.is_finite and b.is_finite):
        return None
    if a.fixed is None or a.beyond is not None:
        a, b = b, a
    if a.fixed is None or a.beyond is not None or (b.beyond is not None and a.size > 1):
        return None  # of two states, or of one that it multiplies
    corners = [x * y for x, y in product(a.fixed, b.fixed or (0,))]
    return Bounds((min(corners), max(corners)), b.beyond)


def _negative(node: Node, operands: Operands) -> Bounds | None:
    (a,) = operands
    return a and Bounds(a.fixed and (-a.fixed[1], -a.fixed[0]), a.beyond)


def _size(node: Node, operands: Operands) -> Bounds | None:
    (a,) = operands
    return a and Bounds(a.fixed and (0, a.size), a.beyond)


def _clamped(node: Node, operands: Operands) -> Bounds | None:
    a, low, high = (*operands, None, None)[:3]
    if a and low and high and low.fixed and high.fixed and low.beyond is None is high.beyond:
        return Bounds((min(low.fixed[0], high.fixed[0]), high.fixed[1]))
    return _hull([b for b, arg in zip(operands, node.args, strict=True) if arg is not None])


def _of_positive(rule: Callable[[Bounds, Bounds], Bounds]) -> Rule:
    """A rule for division by what is one and more."""
    def found(node: Node, operands: Operands) -> Bounds | None:
        a, b = operands[:2]
        if a is None or not a.is_finite or b is None or b.fixed is None or b.beyond is not None \
                or b.fixed[0] < 1:
            return None
        return rule(a, b)

    return found


def _total(node: Node, operands: Operands) -> Bounds | None:
    args: Any = node.args
    a, count = operands[0], value(args[0]).numel()
    if a is None or a.fixed is None or a.beyond is not None or not a.is_finite:
        return None
    return Bounds((min(a.fixed[0], 0) * count, max(a.fixed[1], 0) * count))


def _numbers(node: Node, operands: Operands) -> Bounds | None:
    ends = [a for a in node.args[:2] if isinstance(a, int)]
    return Bounds((min(0, *ends), max(STEPS, *ends))) if ends else None


RULES: dict[str, Rule] = {
    "add": _sum, "sub": _sum, "mul": _product, "neg": _negative, "abs": _size,
    "clamp": _clamped, "clamp_min": _clamped, "clamp_max": _either, "maximum": _either,
    "minimum": _either, "where": _chosen, "masked_fill": _filled, "amax": _first, "amin": _first,
    "gather": _first, "index_select": _first, "index": _first, "flip": _first, "roll": _first,
    "remainder": _of_positive(lambda a, b: Bounds((0, b.size))),
    "floor_divide": _of_positive(lambda a, b: Bounds(a.fixed and (
        min(a.fixed[0], 0), max(a.fixed[1], 0)), a.beyond)),
    "sum": _total, "cumsum": _total, "one_hot": lambda node, operands: MASK, "arange": _numbers,
}
