"""Operations that a kernel has no rule for, composed of those that it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.overrides import TorchFunctionMode

from .facts import aten
from .lookups import RULES as LOOKUPS
from .pointwise import Unsupported
from .systems import SYSTEMS

MOST_PIECES = 64  # of an axis that is put together element by element

COMPOSED = [  # not core, or core but not simple
    aten.gelu, aten.gelu_backward, aten.elu, aten.elu_backward, aten.leaky_relu,
    aten.leaky_relu_backward, aten.hardtanh, aten.hardsigmoid, aten.hardswish,
    aten._softmax_backward_data, aten._log_softmax_backward_data, aten.native_layer_norm_backward,
    aten.logsumexp, aten.mv, aten.dot, aten.addmv, aten.baddbmm, aten.logaddexp2,
    aten.native_group_norm_backward, aten._native_batch_norm_legit, aten.native_batch_norm_backward,
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


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, batch: int, channels: int, inner: int,
    groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    apart = x.reshape(batch, groups, channels // groups * inner)
    made, mean, scale = _layer_norm(apart, apart.shape[2:], None, None, eps)
    made = made.reshape(x.shape)
    scaled, moved = (None if t is None else t.reshape([channels, *[1] * (x.dim() - 2)])
                     for t in (weight, bias))
    made = made if scaled is None else made * scaled
    return made if moved is None else made + moved, mean.squeeze(2), scale.squeeze(2)


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


def _pad_with_itself(
    x: Tensor, sizes: Sequence[int], mode: str = "constant", number: Any = None
) -> Any:
    """`circular`, `reflect` and `replicate`."""
    if mode == "constant" or min(sizes, default=0) < 0:
        return NotImplemented
    for axis, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True), start=1):
        size = x.shape[-axis]
        if mode == "replicate":
            ends = [torch.cat([x.narrow(-axis, at, 1)] * count, -axis) if count else None
                    for at, count in ((0, before), (size - 1, after))]
        elif mode == "reflect":
            ends = [_flip(x.narrow(-axis, at, count), [-axis])
                    for at, count in ((1, before), (size - 1 - after, after))]
        else:
            ends = [x.narrow(-axis, size - before, before), x.narrow(-axis, 0, after)]
        if any(end is NotImplemented for end in ends):
            return NotImplemented
        x = torch.cat([end for end in (ends[0], x, ends[1]) if end is not None], -axis)
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


def _flip(x: Tensor, axes: Sequence[int]) -> Any:
    for axis in axes:
        if x.shape[axis] > MOST_PIECES:
            return NotImplemented
        x = torch.cat(torch.split(x, 1, axis)[::-1], axis)
    return x


def _prefixes(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
    """All prefixes of an axis, combined, in O(log size) operations."""
    size, reach = (x.shape[axis], 1) if x.dim() else (0, 1)
    while reach < size:
        later = combine(x.narrow(axis, 0, size - reach), x.narrow(axis, reach, size - reach))
        x = torch.cat([x.narrow(axis, 0, reach), later], axis)
        reach *= 2
    return x


def _cumsum(x: Tensor, axis: int, *, dtype: Any = None) -> Any:
    if x.dtype is torch.bool and dtype is None:
        return _prefixes(torch.add, x.to(torch.float32), axis).long()
    kept = x.is_floating_point() and dtype is None
    return _prefixes(torch.add, x, axis) if kept else NotImplemented


def _cumprod(x: Tensor, axis: int, *, dtype: Any = None) -> Any:
    kept = x.is_floating_point() and dtype is None
    return _prefixes(torch.mul, x, axis) if kept else NotImplemented


def _prod(x: Tensor, axis: int, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if dtype is not None or not x.is_floating_point():
        return NotImplemented
    while (size := x.shape[axis]) > 1:
        half = size // 2
        product = x.narrow(axis, 0, half) * x.narrow(axis, half, half)
        x = torch.cat([product, x.narrow(axis, 2 * half, size % 2)], axis)
    return x if keepdim else x.squeeze(axis)


def _prod_of_all(x: Tensor, *, dtype: Any = None) -> Any:
    return _prod(x.reshape(-1), 0, dtype=dtype)


def _shrink_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    return torch.where((x >= -threshold) & (x <= threshold), 0.0, grad)


def _hardsigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    """PyTorch's, whose sixth is that of float32 in any dtype."""
    return torch.where((x > -3) & (x < 3), grad * 0.1666666716337204, 0.0)


def _smooth_l1_backward(
    grad: Tensor, x: Tensor, target: Tensor, reduction: int, beta: float
) -> Tensor:
    """PyTorch's, with NaN where an input is NaN."""
    apart = x - target
    grad = grad / apart.numel() if reduction == 1 else grad
    inside = apart * grad / beta if beta else apart * torch.inf
    return torch.where(apart <= -beta, -grad, torch.where(apart >= beta, grad, inside))


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x).expand(x.shape)


def _var_mean(
    x: Tensor, axes: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return (_var(x, axes, correction=correction, keepdim=keepdim),
            _mean(x, _listed(x, axes), keepdim))


def _any(x: Tensor, axes: Any = None, keepdim: bool = False) -> Tensor:
    return (x != 0).to(torch.float32).sum(_listed(x, axes), keepdim) > 0


def _isinf(x: Tensor) -> Any:
    return x.abs() == math.inf


def _other_sign(a: Tensor, b: Any) -> Any:
    return ((a > 0) & (b < 0)) | ((a < 0) & (b > 0))


def _remainder(a: Tensor, b: Any) -> Tensor:
    """PyTorch's: of the sign of the divisor."""
    b = b if isinstance(b, Tensor) else torch.full_like(a, b)
    rest = torch.fmod(a, b)
    return torch.where(_other_sign(rest, b), rest + b, rest)


def _div(a: Tensor, b: Any, *, rounding_mode: str | None = None) -> Tensor:
    """PyTorch's `div_floor_floating`, without its signs of zero; or its division cut off."""
    b = b if isinstance(b, Tensor) else torch.full_like(a, b)
    if rounding_mode != "floor":
        return a / b if rounding_mode is None else torch.trunc(a / b)
    rest = torch.fmod(a, b)
    quotient = (a - rest) / b
    quotient = torch.where(_other_sign(rest, b), quotient - 1, quotient)
    whole = torch.floor(quotient)
    whole = torch.where(quotient - whole > 0.5, whole + 1, whole)
    return torch.where(b == 0, a / b, whole)


def _numbered(x: Tensor, axis: int) -> Tensor:
    """The places along an axis, to broadcast against x."""
    size, axis = x.shape[axis], axis % x.dim()
    return torch.arange(size, dtype=x.dtype).reshape([size, *[1] * (x.dim() - 1 - axis)])


def _first(x: Tensor, axis: int, name: str) -> Tensor:
    """The place of the first element along an axis, which stays, that is NaN or the extreme."""
    found = (x == getattr(x, name)(axis, True)) | (x != x)
    return torch.where(found, _numbered(x, axis), float(x.shape[axis])).amin(axis, True)


def _extreme(name: str) -> Callable[..., Any]:
    """`max` and `min` along an axis: a gradient goes to the first of equals alone."""

    def extreme(x: Tensor, axis: int, keepdim: bool = False) -> Any:
        if not x.is_floating_point() or not x.dim():
            return NotImplemented
        place = _first(x.detach(), axis, name)
        most = torch.where(_numbered(x, axis) == place, x, 0.0).sum(axis, keepdim)
        return most, (place if keepdim else place.squeeze(axis)).long()

    return extreme


def _extreme_place(name: str) -> Callable[..., Any]:
    """`argmax` and `argmin`."""

    def found(x: Tensor, axis: int | None = None, keepdim: bool = False) -> Any:
        if not x.is_floating_point() or not x.dim() or (axis is None and keepdim):
            return NotImplemented
        if axis is None:
            return found(x.reshape(-1), 0)
        place = _first(x.detach(), axis, name)
        return (place if keepdim else place.squeeze(axis)).long()

    return found


def _diagonal(x: Tensor, offset: int = 0, axis: int = 0, other: int = 1) -> Tensor:
    axis, other = axis % x.dim(), other % x.dim()
    moved = x.movedim((axis, other), (-2, -1))
    up, right = max(-offset, 0), max(offset, 0)
    size = max(min(moved.shape[-2] - up, moved.shape[-1] - right), 0)
    square = moved.narrow(-2, up, size).narrow(-1, right, size)
    return torch.where(torch.eye(size) == 1, square, 0.0).sum(-1)


def _rms_norm(
    x: Tensor, sizes: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if eps is None:
        raise Unsupported("the loop computes rms_norm with an eps that its dtype gives")
    made = x * torch.rsqrt(_mean(x * x, list(range(-len(sizes), 0)), True) + eps)
    return made if weight is None else made * weight


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
    aten.flip.default: _flip, aten.cumsum.default: _cumsum, aten.var_mean.correction: _var_mean,
    aten.native_group_norm.default: _group_norm,
    aten.any.dim: _any, aten.any.dims: _any, aten.any.default: _any, aten.isinf.default: _isinf,
    aten.remainder.Tensor: _remainder, aten.remainder.Scalar: _remainder,
    **dict.fromkeys((aten.softshrink_backward.default, aten.hardshrink_backward.default),
                    _shrink_backward),
    aten.copy.default: _copy,
    aten.hardsigmoid_backward.default: _hardsigmoid_backward,
    aten.smooth_l1_loss_backward.default: _smooth_l1_backward,
    aten.div.Tensor_mode: _div, aten.div.Scalar_mode: _div,
}
for kept in KEPT:
    RULES.pop(kept, None)

# taken apart before they are differentiated: their own gradients ask for values, are counted
# otherwise, or have a number that depends on the dtype
EARLY: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.rms_norm, torch.nn.functional.rms_norm), _rms_norm),
    aten.cumprod.default: _cumprod,
    aten.prod.dim_int: _prod, aten.prod.default: _prod_of_all,
    aten.max.dim: _extreme("amax"), aten.min.dim: _extreme("amin"),
    aten.argmax.default: _extreme_place("amax"), aten.argmin.default: _extreme_place("amin"),
    aten.max.default: torch.amax, aten.min.default: torch.amin,
    aten.diagonal.default: _diagonal, aten.pad.default: _pad_with_itself, **SYSTEMS, **LOOKUPS,
}


class Early(TorchFunctionMode):
    """Takes `EARLY` operations apart."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = EARLY[func](*args, **(kwargs or {})) if func in EARLY else NotImplemented
        return func(*args, **(kwargs or {})) if made is NotImplemented else made
