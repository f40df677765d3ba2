"""Inserts operations into a graph, each with its fake result, so that facts stay true."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import Module
from torch.utils import _pytree as pytree

from .facts import (
    SCAN,
    aten,
    body_of,
    flat_arguments,
    has_body,
    is_op,
    only_last,
    shape,
    stacked_as,
    value,
)
from .loop import plain_loop

COMPUTED = "computed"  # from what, and the result
NUMBERS = (bool, int, float, complex, str, torch.dtype, torch.device)


class Builder:
    """Adds nodes right before `at`; every node knows its shape, dtype and strides."""

    def __init__(
        self,
        graph_module: GraphModule,
        at: Node,
        mode: FakeTensorMode,
        stamp: dict[str, Any] | None = None,
    ) -> None:
        self.graph_module = graph_module
        self.at = at
        self.mode = mode
        self.stamp = stamp or {}
        self.made: list[Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One operation on nodes and constants."""
        with self.graph_module.graph.inserting_before(self.at):
            node = self.graph_module.graph.call_function(target, args, kwargs)
        self.made.append(node)
        node.meta.update(self.stamp)
        refresh(node, self.mode)
        return node

    def copy(self, node: Node, known: dict[Node, Node]) -> Node:
        """`node` of another graph (or place), with its arguments looked up in `known`."""
        with self.graph_module.graph.inserting_before(self.at):
            made = self.graph_module.graph.node_copy(node, lambda n: known.get(n, n))
        self.made.append(made)
        made.meta = dict(node.meta)
        return made

    def attribute(self, name: str, held: Any) -> Node:
        """A `get_attr` node for `held`, registered under a fresh name that starts with `name`."""
        fresh, count = name, 0
        if isinstance(held, GraphModule) and (same := self._same_body(held)) is not None:
            return self._get_attr(same)
        while hasattr(self.graph_module, fresh):
            count += 1
            fresh = f"{name}_{count}"
        if isinstance(held, torch.nn.Module):
            self.graph_module.add_module(fresh, held)
        else:
            self.graph_module.register_buffer(fresh, held, persistent=False)
        node = self._get_attr(fresh)
        node.meta.update(self.stamp)
        if isinstance(held, Tensor):
            with self.mode:
                node.meta["val"] = self.mode.from_tensor(held, static_shapes=True)
        return node

    def _get_attr(self, name: str) -> Node:
        with self.graph_module.graph.inserting_before(self.at):
            node = self.graph_module.graph.get_attr(name)
        self.made.append(node)
        return node

    def _same_body(self, body: GraphModule) -> str | None:
        """The name of a body that is the same, operation for operation."""
        wanted = structure(body)
        for name, held in self.graph_module.named_children():
            if isinstance(held, GraphModule) and structure(held) == wanted:
                return name
        return None

    def table(self, numbers: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Node:
        """A constant 1-d tensor."""
        return self.attribute("table", torch.tensor(numbers, dtype=dtype, device=device))

    def permute(self, node: Node, order: Sequence[int]) -> Node:
        """`node` with its axes in `order`; a permutation of a permutation is one, or none."""
        order = list(order)
        if is_op(node, aten.permute.default):
            inner = node.args[1]
            assert isinstance(inner, (list, tuple))
            rank = len(inner)
            source = node.args[0]
            assert isinstance(source, Node)
            return self.permute(source, [int(inner[o]) % rank for o in order])  # type: ignore[arg-type]
        if order == list(range(len(order))):
            return node
        return self.call(aten.permute.default, node, order)

    def move(self, node: Node, source: int, target: int) -> Node:
        """`node` with the axis `source` at `target`, the others in their order."""
        order = [d for d in range(len(shape(node))) if d != source]
        order.insert(target, source)
        return self.permute(node, order)

    def reshape(self, node: Node, sizes: Sequence[int]) -> Node:
        if tuple(sizes) == shape(node):
            return node
        return self.call(aten.reshape.default, node, list(sizes))

    def slice(self, node: Node, axis: int, start: int, stop: int, step: int = 1) -> Node:
        """`node[..., start:stop:step]` on `axis`, or `node` itself if that is all of it."""
        if start == 0 and stop >= shape(node)[axis] and step == 1:
            return node
        return self.call(aten.slice.Tensor, node, axis, start, stop, step)

    def scan(
        self, body: GraphModule, carries: Sequence[Node], slices: Sequence[Node],
        invariants: Sequence[Node],
    ) -> list[Node]:
        """A scan of `body`; its final carries, then its per-step outputs, stacked on axis 0.

        `body` takes the carries, one slice of each of `slices` (along their axis 0), and the
        invariants; it returns the next carries, then this step's outputs.
        """
        attribute = self.attribute("body", body)
        return self.several(SCAN, attribute, list(carries), list(slices), list(invariants))

    def loop(self, scan: Node, last: Sequence[int]) -> list[Node]:
        """A plain loop in place of `scan`; of the results in `last` the last step's alone."""
        return self.several(plain_loop, *scan.args, *([list(last)] if last else []))

    def several(self, target: Any, *args: Any) -> list[Node]:
        """One operation, by its several results."""
        node = self.call(target, *args)
        return [self.call(operator.getitem, node, i) for i in range(len(node.meta["val"]))]


def put_number(node: Node, number: float, like: torch.Tensor) -> None:
    """A tensor like `like`, filled with a number, in place of `node`."""
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    with node.graph.inserting_before(node):
        made = node.graph.call_function(aten.full.default, (list(like.shape), number), options)
    made.meta = {**node.meta, "val": like}
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def duplicate(graph_module: GraphModule) -> GraphModule:
    """A copy of a graph and of the bodies of its scans; constants are shared."""
    holder = Module()
    for name, held in graph_module.named_children():
        holder.add_module(name, duplicate(held) if isinstance(held, GraphModule) else held)
    for name, constant in graph_module.named_buffers(recurse=False):
        holder.register_buffer(name, constant, persistent=False)
    return GraphModule(holder, copy.deepcopy(graph_module.graph))


def build_constant(build: Builder, body: GraphModule, node: Node) -> Node:
    """What a body holds, a constant tensor or a body, in the graph around it."""
    return build.attribute(str(node.target), getattr(body, str(node.target)))


def refresh(node: Node, mode: FakeTensorMode, exact: bool = False) -> None:
    """Give `node` its fake result, computed anew only if what it is computed from has changed;
    of a loop its `exact_result` if it is to be `exact`."""
    sources = _sources(node, exact)
    before, result = node.meta.get(COMPUTED, ((), None))
    if result is None or result is not node.meta.get("val") or not _same(sources, before, result):
        node.meta["val"] = exact_result(node, value, mode) if exact and has_body(node) \
            else fake_result(node, mode)
    node.meta[COMPUTED] = sources, node.meta["val"]


def note_computed(node: Node) -> None:
    """Note that the fake result of `node` is true for its arguments as they are."""
    node.meta[COMPUTED] = _sources(node, False), node.meta.get("val")


def _sources(node: Node, exact: bool) -> list[Any]:
    """What the fake result of `node` depends on."""
    leaves = [n.meta.get("val") if isinstance(n, Node) else n
              for n in flat_arguments(node)[0]]
    if has_body(node):
        results = cast(tuple[Node, ...], output_node(body_of(node)).args[0])
        leaves += [exact, *map(value, results)]
    return [node.target, _stacks(node), *leaves]


def _same(now: Sequence[Any], before: Sequence[Any], result: Any) -> bool:
    """Whether these are equal numbers, and tensors that lie alike: in the same memory too, if
    the result is a view of it."""
    if len(now) == len(before) and all(map(operator.is_, now, before)):
        return True  # in most cases
    view = _is_strided(result) and storage(result) in {
        storage(t) for t in before if _is_strided(t)}

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, NUMBERS):
            return type(a) is type(b) and a == b
        return all(map(_is_strided, (a, b, result))) and _lies(a) == _lies(b) \
            and not (view and storage(a) != storage(b))

    return len(now) == len(before) and all(
        a is b or alike(a, b) for a, b in zip(now, before, strict=True))


def _is_strided(held: Any) -> bool:
    return isinstance(held, FakeTensor) and held.layout is torch.strided


def _lies(tensor: FakeTensor) -> tuple[Any, ...]:
    """How a tensor lies in memory; itself if its sizes are symbols."""
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    fixed = all(type(n) is int for n in sizes)
    return (len(tensor.shape), sizes, tensor.dtype, tensor.fake_device) if fixed else (id(tensor),)


def storage(tensor: Tensor) -> int:
    """Which memory a strided tensor lies in; one that `torch.func` wraps too."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata)


def fake_result(node: Node, mode: FakeTensorMode) -> Any:
    """What `node` returns, as fake tensors; scans are answered from their body's outputs."""
    if node.op == "get_attr":
        return node.meta.get("val")
    if node.target in (SCAN, plain_loop):
        return scan_result(node, mode)
    args, kwargs = map_arg((node.args, dict(node.kwargs)), value)
    with mode, torch.no_grad():
        return _computed(node, args, kwargs)


def _computed(node: Node, args: Any, kwargs: Any) -> Any:
    """What `node` computes of these fake tensors.

    An operation that looks at numbers, as `istft` at its window, can't compute with fake ones: for
    inputs of the same sizes it keeps the result that it had when it was traced.
    """
    try:
        return _as_it_lies(node, node.target(*args, **kwargs))  # type: ignore[operator]
    except DataDependentOutputException:
        sources, result = node.meta.get(COMPUTED, ((), None))
        if _sizes(sources[2:]) != _sizes(pytree.tree_leaves((args, kwargs))):
            raise
        return result


def _sizes(leaves: Sequence[Any]) -> list[Any]:
    return [(s.shape, s.dtype) if isinstance(s, Tensor) else s for s in leaves]


def _as_it_lies(node: Node, result: Any) -> Any:
    """The result of `node`; a loop's results are stacked as the permute that reads them says."""
    return result.new_empty(result.shape) if _stacks(node) else result


def _stacks(node: Node) -> bool:
    """Whether `node` is a permute that says how a loop stacks its results."""
    source = node.args[0] if is_op(node, aten.permute.default) else None
    return isinstance(source, Node) and source.target is operator.getitem \
        and has_body(source.args[0]) and stacked_as(source)[0] is node


def scan_result(node: Node, mode: FakeTensorMode) -> tuple[Tensor, ...]:
    """Carries as they are, per-step outputs stacked on a new first axis."""
    body = node.graph.owning_module.get_submodule(str(node.args[0].target))  # type: ignore[union-attr]
    carries, slices = node.args[1], node.args[2]
    steps = value(slices[0]).shape[0]  # type: ignore[index, arg-type]
    results = [value(n) for n in output_node(body).args[0]]  # type: ignore[union-attr, arg-type]
    held = len(carries)  # type: ignore[arg-type]
    with mode, torch.no_grad():
        return tuple(r.new_empty(r.shape if k < held or k in only_last(node)
                                 else (steps, *r.shape)) for k, r in enumerate(results))


def exact_result(loop: Node, known: Callable[[Node], Any], mode: FakeTensorMode) -> tuple[Any, ...]:
    """What a scan or loop returns, its final carries lying in memory as they do after a run.

    `known` gives the fake values of its arguments. The strides of a carry can change in the
    first steps; after three they stay.
    """
    body = body_of(loop)
    carries, slices, fixed = ([known(n) for n in cast(list[Node], loop.args[i])] for i in (1, 2, 3))
    held, steps = len(carries), slices[0].shape[0]
    results: list[Any] = []
    with mode, torch.no_grad():
        for _ in range(min(steps, 3)):
            given = [*carries, *(s.select(0, 0) for s in slices), *fixed]
            env: dict[Node, Any] = dict(zip(placeholders(body), given, strict=True))
            for node in body.graph.nodes:
                if node.op == "get_attr":
                    env[node] = node.meta.get("val")
                elif has_body(node):
                    env[node] = exact_result(node, env.__getitem__, mode)
                elif node.op == "call_function":
                    args, kwargs = map_arg((node.args, dict(node.kwargs)), env.__getitem__)
                    env[node] = _computed(node, args, kwargs)
            results = [env[n] for n in cast(tuple[Node, ...], output_node(body).args[0])]
            carries = results[:held]
        return (*carries, *(r if k in only_last(loop) else r.new_empty((steps, *r.shape))
                            for k, r in enumerate(results[held:], held)))


def structure(graph_module: GraphModule) -> tuple[Any, ...]:
    """What a graph computes, without its nodes' names: equal for graphs that are the same."""
    numbers: dict[Node, str] = {}
    lines = []
    for number, node in enumerate(graph_module.graph.nodes):
        numbers[node] = f"%{number}"
        args = map_arg((node.args, dict(node.kwargs)), numbers.__getitem__)
        target = node.target if node.op == "call_function" else ""
        held: Any = node.meta.get("val")
        if node.op == "get_attr":
            found = getattr(graph_module, str(node.target))
            held = structure(found) if isinstance(found, GraphModule) else id(found)
        elif isinstance(held, Tensor):
            held = (tuple(held.shape), held.dtype)
        else:
            held = None
        lines.append((node.op, target, repr(args), held))
    return tuple(lines)


def output_node(graph_module: GraphModule) -> Node:
    return cast(Node, next(iter(reversed(graph_module.graph.nodes))))


def placeholders(graph_module: GraphModule) -> list[Node]:
    return [n for n in graph_module.graph.nodes if n.op == "placeholder"]
