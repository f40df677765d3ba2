"""Runs Triton kernels of fused scans, where Triton is and a GPU for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .kernel_loops import contiguous
from .packing import Lie, stacked, step_sizes
from .pointwise import Unsupported
from .step import Counts, Sizes, moving
from .triton_kernel import TritonKernel, triton_kernel
from .walk import result_sizes

log = logging.getLogger(__name__)
failed: set[str] = set()  # sources that Triton could not compile


@lru_cache(maxsize=1)
def is_there() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@lru_cache(maxsize=512)
def is_built(
    step: str, sizes: tuple[Sizes, ...], counts: Counts, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a kernel runs a step on arguments of `sizes`; builds it, and runs one step.

    Raises `Unsupported` with a reason where there can be none.
    """
    triton_kernel(step, sizes, counts)
    held, read, _ = counts
    given = [torch.zeros((*[1] * (held <= k < held + read), *size), dtype=dtype, device=device)
             for k, size in enumerate(sizes)]
    axes = [0] * (len(result_sizes(step, sizes)) - held)
    return run(step, given, counts, axes, False) is not None


def run(
    step: str, given: Sequence[Tensor], counts: Counts, axes: Sequence[int], reverse: bool
) -> list[Tensor] | None:
    """`fused_scan` of carries, slices and invariants, so many as `counts` says; None where no
    kernel runs it."""
    held, read, _ = counts
    first, steps = given[0], given[held].shape[0]
    if not steps or not is_there():
        return None
    sizes = step_sizes(given[:held], given[held : held + read], given[held + read :])
    try:
        chosen = triton_kernel(step, sizes, counts)
    except Unsupported:
        return None
    if chosen.source in failed:
        return None
    results = [tuple(size) for size in result_sizes(step, sizes)]
    made = [Lie(size, contiguous(size)).empty(first) for size in results[:held]]
    made += [stacked((steps, *size), axis).empty(first)
             for size, axis in zip(results[held:], axes, strict=True)]
    moves = moving(counts, len(given) + len(results))
    arguments: list[Any] = []
    for k, (tensor, axes_of) in enumerate(zip((*given, *made), chosen.strided, strict=True)):
        if k in moves:
            stride = tensor.stride(0)
            tensor = tensor[-1 if reverse else 0]
            arguments += [tensor, -stride if reverse else stride]
        else:
            arguments.append(tensor)
        arguments += [tensor.stride(axis) for axis in axes_of]
    if not _launched(chosen, arguments, steps, first):
        return None
    return [*made[:held], *(t.movedim(0, axis) for t, axis in zip(made[held:], axes, strict=True))]


def _launched(chosen: TritonKernel, arguments: list[Any], steps: int, first: Tensor) -> bool:
    """Whether the kernel ran."""
    lanes = math.prod(chosen.parts)
    try:
        module = _module(chosen.source)
        dtype = getattr(module.tl, str(first.dtype).removeprefix("torch."))
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            module.kernel[(math.ceil(lanes / chosen.block),)](
                *arguments, *chosen.parts, lanes, steps, dtype, chosen.block,
                num_warps=chosen.warps)
    except Exception as error:  # it does not compile here: too many registers, another Triton
        log.warning("a loop runs step by step, its kernel can't be built: %s",
                    str(error).strip().partition("\n")[0])
        failed.add(chosen.source)
        return False
    return True


@lru_cache(maxsize=256)
def _module(source: str) -> Any:
    """What `source` defines; Triton wants it in a file."""
    from torch._inductor.codecache import PyCodeCache

    return PyCodeCache.load(source)
