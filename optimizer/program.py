"""What a captured graph computes, told in a way that two captures can be compared by."""

from __future__ import annotations

from collections.abc import Hashable
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .builder import placeholders
from .capture import Capture
from .contract import results
from .facts import aten, is_pure, is_region_marker
from .schedules import FILLS

NUMBERS = {aten.zeros.default: 0, aten.ones.default: 1, aten.zeros_like.default: 0,
           aten.ones_like.default: 1, aten.new_zeros.default: 0, aten.new_ones.default: 1}


def program(captured: Capture) -> Hashable:
    """Equal for two captures of a model where one rewritten graph serves both.

    What the model holds but forward doesn't read counts for nothing: after a call it may hold
    what that call has left there. Nor does the order in which pure operations stand.
    """
    held, graph = len(captured.state), captured.graph_module.graph
    names = [s.name for s in captured.state] + [
        f"input {i}" for i in range(len(placeholders(captured.graph_module)) - held)]
    if any(map(is_region_marker, graph.nodes)):
        return object()  # there the order counts
    told: dict[Node, str] = {}
    for place, node in enumerate(placeholders(captured.graph_module)):
        state = captured.state[place] if place < held else None
        hangs = state and (id(state.place()[0]), state.get().requires_grad)
        told[node] = _digest(names[place], hangs, _described(node.meta.get("val")))
    in_order: list[str] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            told[node] = _digest(_contents(getattr(captured.graph_module, str(node.target))))
        elif node.op == "call_function":
            filled = _filled(node)
            args = filled or map_arg((node.args, dict(node.kwargs)), lambda n: "%" + told[n])
            target = "filled" if filled else node.target
            told[node] = _digest(target, args, None if is_pure(node) else len(in_order))
            in_order += [] if is_pure(node) else [told[node]]
    return (
        tuple(in_order),
        tuple(told[r] if isinstance(r, Node) else r for r in results(captured.graph_module)),
        tuple((s.shape, s.strides, s.offset, s.owner if s.owner is None or s.owner >= 0
               else names[-1 - s.owner]) for s in captured.seen),
        captured.tensor_inputs, str(captured.output_spec), captured.outputs,
        tuple((a.name, a.begin, str(a.spec)) for a in captured.assigned),
        tuple(names[place] for place in captured.written),
        tuple((position, names[place]) for position, place in sorted(captured.same_as.items())),
        repr(sorted(captured.constants.items())),
    )


def _filled(node: Node) -> Hashable:
    """Of a tensor of one number, like which tensor it may be: what it is, and the number."""
    target: Any = node.target
    if target not in (NUMBERS | FILLS) or any("state" in n.meta for n in node.all_input_nodes):
        return None
    number = NUMBERS[target] if target in NUMBERS else node.args[FILLS[target]]
    return _described(node.meta["val"]), number


def _digest(*parts: Any) -> str:
    return sha256(repr(parts).encode()).hexdigest()


def _described(fake: Any) -> Hashable:
    if not isinstance(fake, Tensor):
        return repr(fake)
    strides = fake.stride() if fake.layout is torch.strided else None
    return tuple(fake.shape), strides, fake.dtype, fake.device


def _contents(constant: Any) -> Hashable:
    if not isinstance(constant, Tensor) or constant.layout is not torch.strided:
        return id(constant)
    return _described(constant), constant.detach().cpu().contiguous().reshape(-1).view(
        torch.uint8).numpy().tobytes()
