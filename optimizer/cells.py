"""PyTorch's recurrent cells in their parts, so that what does not depend on the state is batched.

The formulas are those of aten/src/ATen/native/RNN.cpp.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch.fx import Node

from .builder import Builder
from .facts import aten, is_op, shape


def _gates(build: Builder, x: Node, h: Node, parameters: Sequence[Node]) -> tuple[Node, Node]:
    """The input's and the state's linear parts; parameters: both weights, then both biases."""
    weights, biases = parameters[:2], [*parameters[2:], None, None][:2]
    return cast(tuple[Node, Node], tuple(
        build.call(aten.linear.default, source, weight, bias)
        for source, weight, bias in zip((x, h), weights, biases, strict=True)))


def _parts(build: Builder, gates: Node, count: int) -> list[Node]:
    size = shape(gates)[-1] // count
    return [build.slice(gates, len(shape(gates)) - 1, k * size, (k + 1) * size)
            for k in range(count)]


def gru_cell(node: Node, build: Builder) -> Node:
    x, h, *parameters = cast(Sequence[Node], node.args)
    from_x, from_h = (_parts(build, g, 3) for g in _gates(build, x, h, parameters))
    reset, update = (build.call(aten.sigmoid.default, build.call(aten.add.Tensor, a, b))
                     for a, b in zip(from_h[:2], from_x[:2], strict=True))
    kept = build.call(aten.mul.Tensor, from_h[2], reset)
    new = build.call(aten.tanh.default, build.call(aten.add.Tensor, from_x[2], kept))
    apart = build.call(aten.mul.Tensor, build.call(aten.sub.Tensor, h, new), update)
    return build.call(aten.add.Tensor, apart, new)


def lstm_cell(node: Node, build: Builder) -> None:
    """Its two results, in place of the items that are read of it."""
    x, (h, c), *parameters = cast(Any, node.args)
    parts = _parts(build, build.call(aten.add.Tensor, *_gates(build, x, h, parameters)), 4)
    taken, kept, shown = (build.call(aten.sigmoid.default, parts[k]) for k in (0, 1, 3))
    new = build.call(aten.mul.Tensor, taken, build.call(aten.tanh.default, parts[2]))
    state = build.call(aten.add.Tensor, build.call(aten.mul.Tensor, kept, c), new)
    output = build.call(aten.mul.Tensor, shown, build.call(aten.tanh.default, state))
    for item in [u for u in node.users if is_op(u, operator.getitem)]:
        item.replace_all_uses_with((output, state)[cast(int, item.args[1])])
        node.graph.erase_node(item)


def _simple(activation: Any) -> Callable[[Node, Builder], Node]:
    def cell(node: Node, build: Builder) -> Node:
        x, h, *parameters = cast(Sequence[Node], node.args)
        both = build.call(aten.add.Tensor, *_gates(build, x, h, parameters))
        return build.call(activation, both)

    return cell


CELLS: dict[Any, Callable[[Node, Builder], Node | None]] = {
    aten.gru_cell.default: gru_cell, aten.lstm_cell.default: lstm_cell,
    aten.rnn_tanh_cell.default: _simple(aten.tanh.default),
    aten.rnn_relu_cell.default: _simple(aten.relu.default),
}
