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


def _gru(build: Builder, x: Node, h: Node, parameters: Sequence[Node]) -> Node:
    from_x, from_h = (_parts(build, g, 3) for g in _gates(build, x, h, parameters))
    reset, update = (build.call(aten.sigmoid.default, build.call(aten.add.Tensor, a, b))
                     for a, b in zip(from_h[:2], from_x[:2], strict=True))
    kept = build.call(aten.mul.Tensor, from_h[2], reset)
    new = build.call(aten.tanh.default, build.call(aten.add.Tensor, from_x[2], kept))
    apart = build.call(aten.mul.Tensor, build.call(aten.sub.Tensor, h, new), update)
    return build.call(aten.add.Tensor, apart, new)


def _lstm(
    build: Builder, x: Node, h: Node, c: Node, parameters: Sequence[Node]
) -> tuple[Node, Node]:
    parts = _parts(build, build.call(aten.add.Tensor, *_gates(build, x, h, parameters)), 4)
    taken, kept, shown = (build.call(aten.sigmoid.default, parts[k]) for k in (0, 1, 3))
    new = build.call(aten.mul.Tensor, taken, build.call(aten.tanh.default, parts[2]))
    state = build.call(aten.add.Tensor, build.call(aten.mul.Tensor, kept, c), new)
    return build.call(aten.mul.Tensor, shown, build.call(aten.tanh.default, state)), state


def _simple(activation: Any) -> Callable[..., Node]:
    def cell(build: Builder, x: Node, h: Node, parameters: Sequence[Node]) -> Node:
        both = build.call(aten.add.Tensor, *_gates(build, x, h, parameters))
        return build.call(activation, both)

    return cell


_tanh, _relu = _simple(aten.tanh.default), _simple(aten.relu.default)


def _one(cell: Callable[..., Node]) -> Callable[[Node, Builder], Node]:
    """A cell's call: its input, its state, and its parameters one by one."""

    def rule(node: Node, build: Builder) -> Node:
        x, h, *parameters = cast(Sequence[Node], node.args)
        return cell(build, x, h, parameters)

    return rule


def _lstm_cell(node: Node, build: Builder) -> None:
    x, (h, c), *parameters = cast(Any, node.args)
    _give(node, _lstm(build, x, h, c, parameters))


def _give(node: Node, results: Sequence[Node]) -> None:
    """Put results in place of the items that are read of a tuple."""
    for item in [u for u in node.users if is_op(u, operator.getitem)]:
        item.replace_all_uses_with(results[cast(int, item.args[1])])
        node.graph.erase_node(item)


def _one_step(cell: Callable[..., Any]) -> Callable[[Node, Builder], None]:
    """A recurrent module's call on a sequence of one step: a cell for each layer."""

    def rule(node: Node, build: Builder) -> None:
        x, states, parameters, biased, layers, dropout, train, both_ways, batch_first = \
            cast(Any, node.args)
        time, count = int(batch_first), 4 if biased else 2
        if shape(x)[time] != 1 or both_ways or len(parameters) != layers * count \
                or (dropout and train and layers > 1):
            return
        states = states if isinstance(states, (list, tuple)) else [states]
        made = []
        x = build.call(aten.select.int, x, time, 0)
        for k in range(layers):
            held = [build.call(aten.select.int, s, 0, k) for s in states]
            found = cell(build, x, *held, parameters[k * count : (k + 1) * count])
            made.append(found if isinstance(found, tuple) else (found,))
            x = made[-1][0]
        _give(node, [build.call(aten.unsqueeze.default, x, time), *(
            build.call(aten.stack.default, list(s)) for s in zip(*made, strict=True))])

    return rule


CELLS: dict[Any, Callable[[Node, Builder], Node | None]] = {
    aten.gru_cell.default: _one(_gru), aten.lstm_cell.default: _lstm_cell,
    aten.rnn_tanh_cell.default: _one(_tanh), aten.rnn_relu_cell.default: _one(_relu),
    aten.gru.input: _one_step(_gru), aten.lstm.input: _one_step(_lstm),
    aten.rnn_tanh.input: _one_step(_tanh), aten.rnn_relu.input: _one_step(_relu),
}
