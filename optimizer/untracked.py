"""Writes that autograd does not see: under `no_grad`, or through `detach()` or `.data`.

The tensor has another value then, and the gradient that it had. In a graph, which holds no
writes, the new value is another tensor, without that gradient.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, get_proxy_mode, get_proxy_slot
from torch.utils import _pytree as pytree

from .facts import aten, is_op, is_view

Frames = Sequence[traceback.FrameSummary]


class Functional(FunctionalTensorMode):  # type: ignore[no-untyped-call]
    """PyTorch's functionalisation before dispatch, which notes the writes autograd does not see."""

    def __init__(self) -> None:
        super().__init__(pre_dispatch=True, export=True, _allow_token_discovery=True)
        self.written: list[tuple[Node, Frames]] = []  # of what memory, where
        self.detaches = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.detaches |= func is aten.detach.default
        if (self.detaches or not torch.is_grad_enabled()) and func is not aten.detach_.default:
            for tensor in _written(func, args, kwargs or {}):
                self._note(tensor)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _note(self, tensor: FunctionalTensor) -> None:
        node, unseen = node_of(tensor), not torch.is_grad_enabled()
        while node is not None and is_view(node):
            unseen |= is_op(node, aten.detach.default)
            node = cast(Node, node.args[0])
        if unseen and node is not None:
            self.written.append((node, traceback.extract_stack()))

    def first(self, graph: Graph, needs_gradient: Sequence[bool]) -> Frames | None:
        """Where the first of these writes to a tensor with a gradient is, in the finished `graph`.

        `needs_gradient` tells it of each placeholder.
        """
        written, enabled = dict(reversed(self.written)), True
        needs, has = iter(needs_gradient), set()
        for node in graph.nodes:
            if node.target is torch._C._set_grad_enabled:
                enabled = bool(node.args[0])
            elif node.op == "placeholder":
                has.update([node] if next(needs) else [])
            elif enabled and not is_op(node, aten.detach.default) and _is_float(node) \
                    and not has.isdisjoint(node.all_input_nodes):
                has.add(node)
        return next((at for node, at in reversed(written.items()) if node in has), None)


def node_of(tensor: FunctionalTensor | FakeTensor) -> Node | None:
    """The node of the graph being traced that a tensor stands for, if it is of the graph.

    A fake one is what an operation makes of tensors that the trace was not given.
    """
    mode = get_proxy_mode()
    if mode is None or not isinstance(mode.tracer, PythonKeyTracer):
        return None
    plain: Tensor = tensor
    if isinstance(tensor, FunctionalTensor):
        torch._sync(tensor)  # type: ignore[attr-defined, no-untyped-call]
        plain = torch._from_functional_tensor(tensor.elem)
    proxy = get_proxy_slot(plain, mode.tracer, None)
    return None if proxy is None else proxy.proxy.node


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[FunctionalTensor]:
    """The tensors among its arguments that an operation writes to."""
    if not isinstance(func, torch._ops.OpOverload) or not func._schema.is_mutable:
        return
    for position, declared in enumerate(func._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(declared.name)
            yield from (t for t in pytree.tree_leaves(given) if isinstance(t, FunctionalTensor))


def _is_float(node: Node) -> bool:
    return any(isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
               for t in pytree.tree_leaves(node.meta.get("val")))
