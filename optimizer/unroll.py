"""A step with the loops inside it written out, for a kernel of the loop around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .builder import output_node, placeholders
from .facts import SCAN, body_of, is_op, is_scan, trips, value
from .pointwise import Unsupported
from .step import step_function

LONGEST = 32  # steps of a loop that is written out; short enough to be no length of an input
LARGEST = 160  # operations of a step whose inner loops are written out
FUSED = torch.ops.looplift.fused_scan.default


def unrolled(body: GraphModule) -> GraphModule:
    """The body with its loops, fused ones too, written out. Raises `Unsupported` if it is large."""
    loops = inner_trips(body)
    if not loops:
        return body
    if max(loops) > LONGEST or _operations(body) > LARGEST:
        raise Unsupported(f"a step of it is a loop of {max(loops)} steps")
    heads = placeholders(body)
    values = [value(head) for head in heads]
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    with mode, torch.no_grad():
        made = make_fx(_WritingOut(body).run)(*values)
    made.graph.eliminate_dead_code()
    for head, was in zip(placeholders(made), heads, strict=True):
        head._rename(was.name)
        head.target = was.name
    end = output_node(made)
    end.args = (tuple(end.args[0]),)  # type: ignore[arg-type]
    made.recompile()
    return made


def inner_trips(body: GraphModule) -> list[int]:
    """How many steps the loops in a body have."""
    return [_steps(n) for n in body.graph.nodes if is_scan(n) or is_op(n, FUSED)]


def _steps(loop: Node) -> int:
    return trips(loop) if is_scan(loop) else int(value(cast(Any, loop.args[2])[0]).shape[0])


def _operations(body: GraphModule) -> int:
    """How many operations a body is, its loops written out."""
    return sum(
        _steps(n) * _operations(body_of(n)) if is_scan(n) else
        _steps(n) * str(n.args[0]).count("\n") if is_op(n, FUSED) else 1
        for n in body.graph.nodes if n.op == "call_function")


class _WritingOut(Interpreter):
    """Runs a body; its loops step by step."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is SCAN:
            body, carries, slices, invariants, *_ = args
            return _in_turn(_WritingOut(body).run, carries, slices, invariants)
        if target is FUSED:
            step, carries, slices, invariants, axes, reverse = args
            held = len(carries)
            results = _in_turn(step_function(step), carries, slices, invariants, reverse)
            return [*results[:held], *(r.movedim(0, a) for r, a in
                                       zip(results[held:], axes, strict=True))]
        return super().call_function(target, args, kwargs)


def _in_turn(
    step: Callable[..., Sequence[Tensor]], carries: Sequence[Tensor], slices: Sequence[Tensor],
    invariants: Sequence[Any], reverse: bool = False,
) -> list[Tensor]:
    held, order = len(carries), range(slices[0].shape[0])
    collected = []
    for k in reversed(order) if reverse else order:
        results = step(*carries, *(s.select(0, k) for s in slices), *invariants)
        carries = results[:held]
        collected.append(results[held:])
    columns = zip(*(collected[::-1] if reverse else collected), strict=True)
    return [*carries, *map(torch.stack, columns)]
