"""A step with the loops inside it written out, for a kernel of the loop around them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .builder import output_node, placeholders, put_number
from .facts import SCAN, apart, aten, body_of, is_op, is_scan, trips, value
from .fused import plain
from .loop import plain_loop
from .pointwise import Unsupported
from .schedules import WITH_TENSOR

LONGEST = 32  # steps of a loop that is written out; short enough to be no length of an input
LARGEST = 160  # operations of a step whose inner loops are written out
# operations of two tensors, and the form whose second argument is a number
WITH_NUMBER = {two: one for one, two in reversed(WITH_TENSOR.items())}
FUSED = torch.ops.looplift.fused_scan.default


def unrolled(body: GraphModule) -> GraphModule:
    """The body with its loops, fused ones too, written out. Raises `Unsupported` if it is large."""
    loops = inner_trips(body)
    if not loops:
        return body
    if max(loops) > LONGEST:
        raise Unsupported(f"a step of it is a loop of {max(loops)} steps")
    if (count := _operations(body)) > LARGEST:
        raise Unsupported(f"a step of it is {count} operations, its loops written out")
    heads = placeholders(body)
    mode = next(v.fake_mode for v in map(value, heads) if isinstance(v, FakeTensor))
    with mode, torch.no_grad():
        made = make_fx(_WritingOut(body).run, {aten.unbind.int: _unbound})(*apart(heads))
    _put_numbers(made)
    made.graph.eliminate_dead_code()
    for head, was in zip(placeholders(made), heads, strict=True):
        head._rename(was.name)
        head.target = was.name
    end = output_node(made)
    end.args = (tuple(end.args[0]),)  # type: ignore[arg-type]
    made.recompile()
    return made


def _put_numbers(body: GraphModule) -> None:
    """Give operations that take tensors and numbers alike a number for one of a constant tensor,
    the schedule of a loop that was written out, and others a tensor filled with it."""
    for read in body.graph.find_nodes(op="call_function", target=aten.select.int):
        source, axis, index = cast(tuple[Node, int, int], read.args)
        if source.op != "get_attr" or value(read).dim():
            continue
        number = getattr(body, str(source.target)).select(axis, index).item()
        for user in list(read.users):
            if user.target in WITH_NUMBER and user.args[1] is read \
                    and isinstance(first := user.args[0], Node) and first is not read \
                    and value(user).dtype in (value(first).dtype, torch.bool):
                user.target = WITH_NUMBER[user.target]
                user.args = (first, number, *user.args[2:])
            elif is_op(user, aten._to_copy.default):
                put_number(user, number, value(user))
        if read.users:
            put_number(read, number, value(read))


def inner_trips(body: GraphModule) -> list[int]:
    """How many steps the loops in a body have."""
    return [trips(n) for n in body.graph.nodes if is_scan(n) or is_op(n, FUSED)]


def _operations(body: GraphModule) -> int:
    """How many operations a body is, its loops written out."""
    return sum(
        trips(n) * _operations(body_of(n)) if is_scan(n) else
        trips(n) * str(n.args[0]).count("\n") if is_op(n, FUSED) else 1
        for n in body.graph.nodes if n.op == "call_function")


def _unbound(tensor: Tensor, axis: int = 0) -> list[Tensor]:
    return [tensor.select(axis, k) for k in range(tensor.shape[axis])]


class _WritingOut(Interpreter):
    """Runs a body; its loops step by step."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is SCAN:
            body, *given = args
            return plain_loop(_WritingOut(body).run, *given)
        if target is FUSED:
            return plain(*args)
        return super().call_function(target, args, kwargs)
