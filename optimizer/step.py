"""The step of a fused scan: Python source, and its graph of core operations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from textwrap import dedent
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from .facts import aten
from .pointwise import Unsupported

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


def _listed(x: Tensor, axes: Any) -> list[int]:
    """The axes that an operation is given: a list, one, or none for all."""
    return [axes] if isinstance(axes, int) else list(axes or range(x.dim()))


def _mean(x: Tensor, axes: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    axes = _listed(x, axes)
    return x.sum(axes, keepdim).div(math.prod(x.shape[a] for a in axes))


def _var(x: Tensor, axes: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    axes = _listed(x, axes)
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


def _addcdiv(c: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return c + (a if value == 1 else value * a) / b


def _log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    small = torch.exp(-x.abs())
    return x.clamp(max=0) - torch.log1p(small), small


def _log_sigmoid_backward(grad: Tensor, x: Tensor, small: Tensor) -> Tensor:
    negative = (x < 0).to(x)
    return grad * (negative - (2 * negative - 1) * (small / (small + 1)))


def _norm(
    x: Tensor, order: Any = 2, axes: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    axes = _listed(x, axes)
    if dtype is not None or order not in (1, 2, math.inf):
        return NotImplemented
    if order == math.inf:
        return x.abs().amax(axes, keepdim)
    return x.abs().sum(axes, keepdim) if order == 1 else (x * x).sum(axes, keepdim).sqrt()


def _pad(x: Tensor, sizes: Sequence[int], number: Any = 0) -> Tensor:
    for axis, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True), start=1):
        x = x.narrow(-axis, max(-before, 0), x.shape[-axis] - max(-before, 0) - max(-after, 0))

        def filled(count: int, x: Tensor = x, axis: int = axis) -> list[Tensor]:
            place = x.dim() - axis
            sizes = [*x.shape[:place], count, *x.shape[place + 1 :]]
            return [x.new_full(sizes, number)] if count > 0 else []

        x = torch.cat([*filled(before), x, *filled(after)], -axis)
    return x


def _roll(x: Tensor, shifts: Sequence[int], axes: Sequence[int] = ()) -> Tensor:
    if not axes:
        return _roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, axis in zip(shifts, axes, strict=True):
        kept = -shift % x.shape[axis]
        if kept:
            first, last = torch.tensor_split(x, [kept], axis)
            x = torch.cat([last, first], axis)
    return x


def _repeat(x: Tensor, times: Sequence[int]) -> Any:
    x = x.reshape([*[1] * (len(times) - x.dim()), *x.shape])
    for axis, count in enumerate(times):
        x = torch.cat([x] * count, axis) if count > 1 else x
    return x if 0 not in times else NotImplemented


KEPT = (aten.slice_scatter.default, aten.select_scatter.default)  # which the kernel has rules for
RULES = {
    **core_aten_decompositions(), **get_decompositions(COMPOSED),
    aten.mean.dim: _mean, aten.mean.default: _mean, aten.addmm.default: _addmm,
    aten.addcmul.default: _addcmul, aten.var.correction: _var, aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax, aten.native_layer_norm.default: _layer_norm,
    aten.addcdiv.default: _addcdiv,
    aten.log_sigmoid_forward.default: _log_sigmoid, aten.roll.default: _roll,
    aten.log_sigmoid_backward.default: _log_sigmoid_backward, aten.repeat.default: _repeat,
    aten.linalg_vector_norm.default: _norm, aten.constant_pad_nd.default: _pad,
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


class AnyDtype(TorchFunctionMode):
    """Takes apart what would be traced with a number that depends on the dtype of the trace."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.rms_norm, torch.nn.functional.rms_norm):
            return _rms_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _rms_norm(
    x: Tensor, sizes: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if eps is None:
        raise Unsupported("the loop computes rms_norm with an eps that its dtype gives")
    made = x * torch.rsqrt(_mean(x * x, list(range(-len(sizes), 0)), True) + eps)
    return made if weight is None else made * weight


def functional_graph(
    function: Callable[..., Any], sizes: Sequence[Sizes], kept: Sequence[OpOverload] = ()
) -> GraphModule:
    """A function of tensors of `sizes` in core operations and `kept` ones, none of which writes
    in place."""
    rules = {target: rule for target, rule in RULES.items() if target not in kept}
    try:
        with AnyDtype():
            made = make_fx(torch.func.functionalize(function), decomposition_table=rules)(
                *halves(sizes))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise Unsupported("the loop factorizes matrices or solves linear systems") from error
    reshaped(made)
    return made


def halves(sizes: Sequence[Sizes]) -> list[Tensor]:
    """Arguments to trace with."""
    return [torch.full(size, 0.5, dtype=torch.float32, device="cpu") for size in sizes]


def _writes_to_its_own(node: Node) -> bool:
    """Whether an operation writes to a result that nobody else reads."""
    target, given = node.target, node.args[0] if node.args else None
    return isinstance(target, OpOverload) and target._schema.name.endswith("_") \
        and isinstance(given, Node) and len(given.users) == 1 and given.op == "call_function" \
        and not any(r.alias_info for r in cast(OpOverload, given.target)._schema.returns)


def reshaped(graph_module: GraphModule) -> None:
    """Let views be copies, whatever strides arguments have; without what nobody uses."""
    for node in graph_module.graph.nodes:
        node.target = RENAMED.get(node.target, node.target)
        if _writes_to_its_own(node):  # as what PyTorch composes does
            name = node.target._schema.name.removeprefix("aten::").removesuffix("_")
            node.target = getattr(getattr(aten, name), node.target._overloadname)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
