"""The step of a fused scan: Python source, and its graph of core operations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from textwrap import dedent
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from .facts import aten

VMAP = [getattr(torch._C.DispatchKey, name) for name in (
    "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode", "FuncTorchBatched",
    "FuncTorchVmapMode")]
Step = Callable[..., list[Tensor]]
Sizes = tuple[int, ...]
Counts = tuple[int, int, int]  # of carries, slices and invariants

COMPOSED = [  # not core, or core but not simple
    aten.gelu, aten.gelu_backward, aten.elu, aten.elu_backward, aten.leaky_relu,
    aten.leaky_relu_backward, aten.hardtanh, aten.hardsigmoid, aten.hardswish,
    aten._softmax_backward_data, aten._log_softmax_backward_data, aten.native_layer_norm_backward,
    aten.logsumexp, aten.mv, aten.dot, aten.addmv, aten.baddbmm,
]


def _mean(x: Tensor, axes: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    every = list(range(x.dim()))
    axes = [axes] if isinstance(axes, int) else axes if axes else every
    return x.sum(axes, keepdim).div(math.prod(x.shape[a] for a in axes))


def _var(x: Tensor, axes: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    axes = list(axes) if axes else list(range(x.dim()))
    apart = x - _mean(x, axes, True)
    count = math.prod(x.shape[a] for a in axes) - (1 if correction is None else correction)
    return (apart * apart).sum(axes, keepdim).div(count)


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = a @ b
    return (c if beta == 1 else c * beta) + (product if alpha == 1 else product * alpha)


def _softmax(x: Tensor, axis: int, half_to_float: bool) -> Tensor:
    powers = torch.exp(x - x.amax(axis, True))
    return powers / powers.sum(axis, True)


def _log_softmax(x: Tensor, axis: int, half_to_float: bool) -> Tensor:
    apart = x - x.amax(axis, True)
    return apart - apart.exp().sum(axis, True).log()


def _layer_norm(
    x: Tensor, sizes: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    axes = list(range(x.dim() - len(sizes), x.dim()))
    mean = _mean(x, axes, True)
    apart = x - mean
    scale = torch.rsqrt(_mean(apart * apart, axes, True) + eps)
    made = apart * scale
    made = made if weight is None else made * weight
    return (made if bias is None else made + bias), mean, scale


def _addcmul(c: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return c + (a if value == 1 else value * a) * b


KEPT = (aten.slice_scatter.default, aten.select_scatter.default)  # which the kernel has rules for
RULES = {
    **core_aten_decompositions(), **get_decompositions(COMPOSED),
    aten.mean.dim: _mean, aten.mean.default: _mean, aten.addmm.default: _addmm,
    aten.addcmul.default: _addcmul, aten.var.correction: _var, aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax, aten.native_layer_norm.default: _layer_norm,
}
for kept in KEPT:
    RULES.pop(kept, None)
RENAMED: dict[Any, Any] = {
    aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default,
    aten.squeeze_.dim: aten.squeeze.dim,  # of a product that has no other reader
}


def placed(source: str, first: str, dtype: torch.dtype) -> str:
    """A step that makes its constants where its `first` argument is, and of its dtype."""
    source = source.replace(str(dtype), f"{first}.dtype")
    return re.sub(r"torch\.device\([^()]*\)", f"{first}.device", source)


@lru_cache(maxsize=256)
def step_function(source: str) -> Step:
    """The function that `source` defines."""
    scope: dict[str, Any] = {"torch": torch, "inf": float("inf"), "nan": float("nan")}
    exec(dedent(source), scope)
    return scope["step"]  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def traced(source: str, sizes: tuple[Sizes, ...]) -> GraphModule:
    """The step in core operations, on arguments of these sizes."""
    made: GraphModule = aside(lambda: functional_graph(step_function(source), sizes))
    return made


def aside(function: Callable[[], Any]) -> Any:
    """A function's result, in a thread of its own: the modes and keys that dispatch operators
    for the caller, who may be tracing or differentiating, do not count there."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def over_steps(function: Callable[..., Any], moves: Sequence[bool], args: Sequence[Tensor]) -> Any:
    """`torch.vmap` over axis 0 of the arguments that move, also within a call of an operator
    that came through a dispatch mode, which switches it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in VMAP:
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        return torch.vmap(function, in_dims=tuple(0 if m else None for m in moves))(*args)


def functional_graph(
    function: Callable[..., Any], sizes: Sequence[Sizes], kept: Sequence[OpOverload] = ()
) -> GraphModule:
    """A function of tensors of `sizes` in core operations and `kept` ones, none of which writes
    in place."""
    rules = {target: rule for target, rule in RULES.items() if target not in kept}
    function = torch.func.functionalize(function)
    made = make_fx(function, decomposition_table=rules)(*halves(sizes))
    reshaped(made)
    return made


def halves(sizes: Sequence[Sizes]) -> list[Tensor]:
    """Arguments to trace with."""
    return [torch.full(size, 0.5, dtype=torch.float32, device="cpu") for size in sizes]


def reshaped(graph_module: GraphModule) -> None:
    """Let views be copies, whatever strides arguments have; without what nobody uses."""
    for node in graph_module.graph.nodes:
        node.target = RENAMED.get(node.target, node.target)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
