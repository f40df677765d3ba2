"""A scan as a call of `fused_scan`: its step as source, on real numbers of one dtype."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from .affine_step import at_once
from .builder import Builder, duplicate, output_node, placeholders
from .emit import sourced
from .facts import aten, body_of, is_tensor, stacked_as, trips, value
from .fused import HALVES
from .integers import INTEGERS, fit
from .lookups import RULES as LOOKUPS
from .lookups import ranges
from .packing import step_sizes
from .pairs import in_pairs, is_complex, parted
from .pointwise import Unsupported, no_rule
from .sink import Sunk, sunk
from .step import CHECKED, placed
from .systems import TELLING
from .unroll import inner_trips, unrolled

Tensors = Sequence[Tensor]
Runs = Callable[[str, Tensors, Tensors, Tensors], None]  # raises Unsupported if it doesn't
CPU = torch.device("cpu")
NUMBERED = (torch.bool, *INTEGERS)  # dtypes whose values a kernel holds as floating numbers
PROMOTED = (*INTEGERS, torch.int16, torch.int8, torch.uint8)
BY_INTEGERS = (*LOOKUPS, aten.scatter.src, aten.scatter_reduce.two, aten.index_copy.default,
               aten.index_fill.int_Tensor, aten.take_along_dim.default)
FIXED = 2  # greater whole numbers may be a length
SCALED = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
FEW = 8  # steps: a kernel takes seconds to build
FEWEST = 5  # iterations on one value: Newton–Schulz has no more


@dataclass(frozen=True)
class Fusible:
    """What a scan's steps read, their source, and numbers that are their last invariants; None
    for the distance from one to the next number of their `dtype`. The last outputs, as many as
    `checks`, tell a call of the kernel where an operation would have raised."""

    given: Sunk
    step: str
    dtype: torch.dtype
    numbers: tuple[float | None, ...]
    checks: int


def fusible(scan: Node, runs: Runs) -> Fusible | Unsupported:
    """The scan with its producers in its steps, or without them if only so it `runs`."""
    if not cast(list[Node], scan.args[1]):
        return Unsupported("it carries nothing from step to step")
    for producers in (True, False):
        try:
            return _fusible(sunk(scan, producers), runs)
        except Unsupported as error:
            reason = error
    return reason


def missed(scan: Node) -> int | None:
    """The number of steps that a scan lacks a kernel for, if it has fewer."""
    fewest = FEWEST if only_iterates(scan) else FEW
    steps = trips(scan) * max(inner_trips(body_of(scan)), default=1)
    return fewest if steps < fewest else None


def only_iterates(scan: Node) -> bool:
    """Whether its steps read nothing of their own."""
    carries, slices = (len(cast(list[Node], scan.args[k])) for k in (1, 2))
    return not any(h.users for h in placeholders(body_of(scan))[carries : carries + slices])


def all_at_once(step: str, carries: Tensors, slices: Tensors, invariants: Tensors) -> None:
    """Whether all steps run at once, as an affine recurrence."""
    counts = len(carries), len(slices), len(invariants)
    found = at_once(step, step_sizes(carries, slices, invariants), counts)
    if isinstance(found, Unsupported):
        raise found


def call(build: Builder, found: Fusible) -> list[Node]:
    """The results of the scan; masks among its arguments count as 0 and 1."""
    given = found.given
    starts = cast(list[Node], given.scan.args[1])
    results = cast(tuple[Node, ...], output_node(given.body).args[0])
    slices, invariants = given.read(build)
    carries, slices, invariants = (
        [part for node in nodes for part in _real(build, node, found.dtype)]
        for nodes in (starts, slices, invariants))
    invariants += [_number(build, number, carries[0]) for number in found.numbers]
    stacked = {int(cast(int, r.args[1])): stacked_as(r)[1] for r in given.scan.users}
    axes = [stacked.get(k, 0) for k, r in enumerate(results) if k >= len(starts)
            for _ in range(1 + is_complex(r))] + [0] * found.checks
    made = iter(build.several(torch.ops.looplift.fused_scan.default, found.step, carries, slices,
                              invariants, axes, False))
    return [_result(build, result, made, stacked.get(k, 0) * (k >= len(starts)))
            for k, result in enumerate(results)]


def _real(build: Builder, node: Node, dtype: torch.dtype) -> list[Node]:
    """A value as a step takes it: the two parts of a complex one, a mask as numbers."""
    if is_complex(node):
        both = build.call(aten.view_as_real.default, build.call(aten.resolve_conj.default, node))
        return [build.call(aten.select.int, both, -1, k) for k in (0, 1)]
    return [node if value(node).dtype == dtype else build.call(aten.to.dtype, node, dtype)]


def _number(build: Builder, number: float | None, like: Node) -> Node:
    """A number as PyTorch's operations take it, in single precision for halves; or the eps."""
    dtype = value(like).dtype

    def full(number: float, dtype: torch.dtype) -> Node:
        return build.call(aten.full.default, [], number, dtype=dtype, device=value(like).device)

    if number is not None:
        return full(number, torch.float32 if dtype in HALVES else dtype)
    after = build.call(aten.nextafter.default, full(1, dtype), full(2, dtype))
    return build.call(aten.sub.Tensor, after, full(1, dtype))


def _result(build: Builder, was: Node, made: Iterator[Node], axis: int) -> Node:
    """A result of the scan, of those of the call."""
    parts = [build.move(next(made), axis, 0) for _ in range(1 + is_complex(was))]
    if len(parts) > 1:
        return build.call(aten.complex.default, *parts)
    if value(was).dtype in INTEGERS:
        return build.call(aten.to.dtype, *parts, value(was).dtype)
    return build.call(aten.ne.Scalar, *parts, 0) if value(was).dtype is torch.bool else parts[0]


def _fusible(given: Sunk, runs: Runs) -> Fusible:
    body = unrolled(given.body)
    for node in body.graph.nodes:
        if node.op == "call_function" and not isinstance(node.target, OpOverload) \
                and node.target is not operator.getitem:
            raise no_rule(node.target)
    if any(node.op == "get_attr" for node in body.graph.nodes):
        raise Unsupported("it reads a constant tensor")
    pairs = in_pairs(body)
    carries, slices, invariants = (
        [part for t in ts for part in parted(t)]
        for ts in given.values())
    heads, held = placeholders(pairs), len(carries)
    results = cast(tuple[Node, ...], output_node(pairs).args[0])
    tensors = [n for n in pairs.graph.nodes if is_tensor(n) and n.users]
    dtype = _dtype(heads, tensors)
    carries, slices, invariants = ([t.to(dtype) if t.dtype in NUMBERED else t for t in ts]
                                   for ts in (carries, slices, invariants))
    read = {n for h in heads[held:] for n in _numbers(h, dtype)}
    kinds = {(value(n).device, value(n).dtype) for n in tensors
             if n not in read and value(n).dtype not in NUMBERED}
    if len({*kinds, (carries[0].device, dtype)}) > 1:
        told = ", ".join(sorted(str(dtype).removeprefix("torch.") for _, dtype in kinds))
        raise Unsupported(f"its values are not all of one floating dtype on one device ({told})")
    states = dict(zip(heads[:held], results, strict=False))
    _refuse_integers(given, heads, states, [n for n in tensors if n not in read], dtype)
    body, numbers = with_arguments(in_numbers(pairs))
    checks = check(body)
    step, needs = sourced(body, "step")
    if needs:
        raise Unsupported("it reads a constant tensor")
    step = placed(step, placeholders(body)[0].name, dtype)
    scalars = [carries[0].new_empty(()) for _ in numbers]
    runs(step, carries, slices, [*invariants, *scalars])
    return Fusible(given, step, dtype, numbers, checks)


def _dtype(heads: list[Node], tensors: list[Node]) -> torch.dtype:
    """What a step computes in: the dtype of its floating arguments, or else of other values;
    float64 holds more integers."""
    floating = [value(n).dtype for n in (*heads, *tensors) if value(n).is_floating_point()
                and (value(n).dim() or value(n).dtype is not torch.float64)]
    integers = any(value(n).dtype in INTEGERS for n in tensors)
    return floating[0] if floating else torch.float64 if integers else torch.float32


def _refuse_integers(
    given: Sunk, heads: list[Node], states: dict[Node, Node], tensors: list[Node],
    dtype: torch.dtype,
) -> None:
    """Raises `Unsupported` where a kernel's floating numbers would not hold the integers among
    `tensors`."""
    if not any(value(n).dtype in INTEGERS for n in tensors):
        return
    if dtype in HALVES:
        raise Unsupported("some of its values are integers, and others of half precision")
    outer = dict(zip(heads, _outer(given), strict=True))
    carried = {head: after for head, after in states.items() if value(head).dtype in INTEGERS}
    if not fit(tensors, outer, carried, trips(given.scan), dtype):
        raise Unsupported("its integers may be too large for floating numbers")


def _outer(given: Sunk) -> list[Node | None]:
    """What each real argument of a step is outside of the loop."""
    carries = cast(list[Node], given.scan.args[1])
    slices: list[Node | None] = [o.node for o in given.slices] or [None]
    return [part for n in (*carries, *slices, *(o.node for o in given.invariants))
            for part in [n] * (1 + (n is not None and is_complex(n)))]


def check(body: GraphModule) -> int:
    """Adds an output for each operation that may raise, NaN where it might; how many."""
    end = output_node(body)
    graph, found = body.graph, list[Node]()
    for node in [n for n in graph.nodes if n.target in TELLING]:
        with graph.inserting_before(end):
            result = node
            if not is_tensor(node):  # a sign and a logarithm
                result = graph.call_function(operator.getitem, (node, 1))
                result.meta["val"] = node.meta["val"][1]
            fewer = value(node.all_input_nodes[0]).dim() - value(result).dim()  # axes
            target, last = (aten.add.Tensor, 0) if fewer == 2 else (
                aten.sum.dim_IntList, [-1] if fewer == 1 else [-2, -1])
            made = graph.create_node("call_function", target, (result, last),
                                     name=f"{CHECKED}_{len(found)}")
        made.meta["val"] = target(value(result), last)
        found.append(made)
    for index, least, size in [r for node in graph.nodes for r in ranges(node)]:
        with graph.inserting_before(end):
            inside = graph.call_function(aten.logical_and.default, (
                graph.call_function(aten.ge.Scalar, (index, least)),
                graph.call_function(aten.lt.Scalar, (index, size))))
            told = graph.call_function(aten.where.Scalar, (inside, 0.0, math.nan))
            found.append(graph.create_node(
                "call_function", aten.type_as.default, (told, placeholders(body)[0]),
                name=f"{CHECKED}_{len(found)}"))
    end.args = ((*cast(tuple[Node, ...], end.args[0]), *found),)
    return len(found)


def _numbers(head: Node, dtype: torch.dtype) -> list[Node]:
    """An argument that a kernel may take in the `dtype` of its other values, with what a step
    selects from it: a number, whole numbers, or a table of numbers; empty for any other."""
    if value(head).dim() == 1 and value(head).dtype is torch.float64:
        numbers = [u for u in head.users if value(u).dtype is not dtype]
        if all(n.target is aten.select.int and _is_number(n, dtype) for n in numbers):
            return [head, *numbers]
    return [head] if _is_number(head, dtype) or _promoted(head) else []


def _is_number(node: Node, dtype: torch.dtype) -> bool:
    """Whether a value is one number, which operations take in the `dtype` of the tensors that
    they combine it with."""
    return dtype is torch.float32 and value(node).dim() == 0 \
        and value(node).dtype in (torch.float64, torch.int64) \
        and all(any(value(n).dtype is dtype and value(n).dim() for n in user.all_input_nodes)
                or value(user).dtype is dtype for user in node.users)


def _promoted(head: Node) -> bool:
    """Whether a step takes integers as the floating numbers that it combines them with."""
    return value(head).dtype in PROMOTED and all(
        user.target in SCALED and len(user.all_input_nodes) == 2
        and value(user).dtype.is_floating_point for user in head.users)


def in_numbers(body: GraphModule) -> GraphModule:
    """The body with numbers in place of masks, as 0 and 1, and of integers, among its arguments
    and outputs."""
    made = duplicate(body)
    first, *_ = heads = placeholders(made)
    end = output_node(made)
    for head in heads:
        if value(head).dtype is torch.bool:
            with made.graph.inserting_after(heads[-1]):
                mask = made.graph.call_function(aten.ne.Scalar, (head, 0))
            mask.meta["val"] = value(head)
            for user in [u for u in head.users if u is not mask]:
                user.replace_input_with(head, mask)
    for user in [n for n in made.graph.nodes if n.target in BY_INTEGERS]:
        for given in user.all_input_nodes:
            if value(given).dtype in INTEGERS:
                with made.graph.inserting_before(user):
                    index = made.graph.call_function(
                        aten._to_copy.default, (given,), {"dtype": value(given).dtype})
                index.meta["val"] = value(given)
                user.replace_input_with(given, index)
    for node in made.graph.find_nodes(op="call_function", target=aten.floor_divide.default):
        # of floating numbers the same, and it has a gradient
        node.target, node.kwargs = aten.div.Tensor_mode, {"rounding_mode": "floor"}
    results = list(cast(tuple[Node, ...], end.args[0]))
    were = cast(tuple[Node, ...], output_node(body).args[0])
    with made.graph.inserting_before(end):
        for k, was in enumerate(were):
            if value(was).dtype in NUMBERED:
                results[k] = made.graph.call_function(aten.type_as.default, (results[k], first))
    end.args = (tuple(results),)
    return made


def with_arguments(body: GraphModule) -> tuple[GraphModule, tuple[float | None, ...]]:
    """The body with its numbers as its last arguments, and these: a step of 1 / T is then one
    kernel for all lengths, and the eps of an RMS norm that names none is its dtype's."""
    made = duplicate(body)
    found: dict[float | None, Node] = {}

    def argument(number: float | None) -> Node:
        if number not in found:
            with made.graph.inserting_after(placeholders(made)[-1]):
                found[number] = made.graph.placeholder(f"number_{len(found)}")
        return found[number]

    for node in list(made.graph.nodes):
        if node.target is aten.rms_norm.default and (*node.args, None, None)[3] is None:
            _spell_out(node, argument(None))
        scales = node.target in SCALED and value(node).is_floating_point()
        for number in node.args if scales else ():
            if isinstance(number, (int, float)) and (number % 1 or abs(number) > FIXED):
                node.args = tuple(argument(number) if a is number else a for a in node.args)
    return made, tuple(found)


def _spell_out(norm: Node, eps: Node) -> None:
    """An RMS norm as what it computes, with a number as its `eps`."""
    x, sizes, *rest = cast(tuple[Any, ...], norm.args)
    graph = norm.graph
    with graph.inserting_before(norm):
        square = graph.call_function(aten.mul.Tensor, (x, x))
        mean = graph.call_function(aten.mean.dim, (square, list(range(-len(sizes), 0)), True))
        scale = graph.call_function(
            aten.rsqrt.default, (graph.call_function(aten.add.Tensor, (mean, eps)),))
        made = graph.call_function(aten.mul.Tensor, (x, scale))
        if rest and rest[0] is not None:
            made = graph.call_function(aten.mul.Tensor, (made, rest[0]))
    made.meta.update(norm.meta)
    norm.replace_all_uses_with(made)
    graph.erase_node(norm)
