"""How large values and their differences are, and which of them are rounding noise."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .behaviour import Observation

SMALL = {True: 1e-3, False: 1e-5}  # of the largest gradient (or output): rounding noise below


def relative(want: Tensor, got: Tensor, scale: float = 0.0) -> float:
    """The largest difference of two tensors, relative to their largest value, or to `scale`.

    Where non-finite values are not in the same places the difference is infinite; else they
    are left out. `scale` is given for a tensor of rounding noise alone, such as the gradient
    of a key's bias under a softmax, whose own size means nothing.
    """
    if want.numel() == 0 or (want.dtype == got.dtype and torch.equal(want, got)):
        return 0.0
    wide = torch.complex128 if want.is_complex() or got.is_complex() else torch.float64
    one, other = want.to(wide), got.to(wide)
    if not math.isfinite(largest(one) + largest(other)):
        finite = torch.isfinite(one)
        if bool((finite & ~torch.isfinite(other)).any()):
            return float("inf")
        one, other = (t[finite & torch.isfinite(other)] for t in (one, other))
    gap, own = largest(one - other), max(largest(one), largest(other))
    return 0.0 if gap == 0.0 else gap / max(own, scale, torch.finfo(torch.float64).tiny)


def largest(tensor: Tensor) -> float:
    """The largest magnitude, 0 if there is none; NaN or infinite where one value is."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def same_bits(want: Tensor, got: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, any NaN like any other."""
    if not torch.equal(want, got):
        want, got = want.nan_to_num(), got.nan_to_num()
    signs = not want.is_floating_point() or torch.equal(want.signbit(), got.signbit())
    return signs and torch.equal(want, got)


def scales(found: Mapping[str, float]) -> dict[str, float]:
    """For each value, of the `sizes` found, the smallest that counts: a small part of its kind's
    largest.

    The kinds are outputs, gradients, and state after the call.
    """
    most: dict[str, float] = {}
    for name, size in found.items():
        most[kind(name)] = max(most.get(kind(name), 0.0), size)
    return {name: SMALL[kind(name) == "gradient"] * most[kind(name)] for name in found}


def sizes(observation: Observation) -> dict[str, float]:
    """The largest finite magnitude of each value."""
    found = {}
    for name, tensor in observation.values.items():
        inexact = tensor.is_floating_point() or tensor.is_complex()
        found[name] = largest(tensor) if inexact else 0.0
        if not math.isfinite(found[name]):
            found[name] = largest(tensor[torch.isfinite(tensor)])
    return found


def kind(name: str) -> str:
    """What sort of value the one of this name is: output, gradient, input or state."""
    return "gradient" if name.startswith("the gradient") else name.split(" ")[0]


def epsilon(tensor: Tensor) -> float:
    """The unit in the last place at one, of `tensor`'s dtype."""
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return torch.finfo(tensor.dtype).eps if inexact else 0.0
