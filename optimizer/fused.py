"""`looplift::fused_scan`: a scan of small steps as one kernel, forward and backward.

The operator takes the step as Python source, so a graph or a file that calls it holds all that
it needs. Kernels are built by Inductor's builder and cached on disk by their content; where
there is no compiler, the step runs in a plain loop.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .backward import backward_of
from .kernel_loops import contiguous
from .loop import plain_loop
from .packing import Lie, kernel_for, plan, step_sizes
from .step import step_function
from .walk import backward, keep, result_sizes

log = logging.getLogger(__name__)
SMALL = 1 << 18  # elements; with fewer, threads cost more than they save (much on a busy machine)
DTYPES = {torch.float32: "run_float", torch.float64: "run_double"}
KINDS = {("cpu", dtype) for dtype in DTYPES}  # of all tensors of a call


@lru_cache(maxsize=256)
def _library(source: str) -> Any:
    """The built kernel, or None with a note in the log where there is none."""
    from torch._inductor.codecache import CppCodeCache

    try:
        return CppCodeCache.load(source)
    except Exception as error:  # no compiler, or one that fails
        log.warning("no fused loops here, plain ones run: %s", str(error).partition("\n")[0])
        return None


def is_built(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor]
) -> bool:
    """Whether there is a kernel for such arguments; builds it.

    Raises `Unsupported` with a reason where there can be none, or none for its backward.
    """
    given = (*carries, *slices, *invariants)
    counts = held, read, _ = len(carries), len(slices), len(invariants)
    sizes = step_sizes(carries, slices, invariants)
    strides = [t.stride()[held <= k < held + read :] for k, t in enumerate(given)]
    chosen = kernel_for(step, tuple(map(Lie, sizes, strides)), counts)
    back = backward_of(step, sizes, counts, (True,) * len(sizes))
    inner = held + len(back.sums), len(back.slices), len(back.invariants)
    kernel_for(back.step, tuple(Lie(size, contiguous(size)) for size in back.sizes), inner)
    return _library(chosen.source) is not None


@torch.library.custom_op("looplift::fused_scan", mutates_args=())
def fused_scan(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool,
) -> list[Tensor]:
    """The final carries, then each output of all steps, stacked along its axis of `axes`.

    `step(*carries, *slice, *invariants)` returns the next carries, then this step's outputs.
    `slices` hold one step along axis 0 each. In `reverse` the last step is the first. All
    tensors have one dtype.
    """
    made = _run(step, carries, slices, invariants, axes, reverse)
    return [t.contiguous() for t in made]


def _run(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool, spent: frozenset[int] = frozenset(),
) -> list[Tensor]:
    """`fused_scan`, results in any layout; outputs may be written over slices that are `spent`."""
    given = (*carries, *slices, *invariants)
    first, counts = carries[0], (len(carries), len(slices), len(invariants))
    kind = first.device.type, first.dtype
    found = None
    if kind in KINDS and all((t.device.type, t.dtype) == kind for t in given):
        shapes = tuple((t.shape, t.stride()) for t in given)
        found = plan(step, shapes, counts, first.element_size(), tuple(axes), reverse, spent)
    library = found and _library(found.source)
    if found is None or library is None:
        return _plain(step, carries, slices, invariants, axes, reverse)
    numbers, made, _alive = found.packed(given)
    threads = torch.get_num_threads() if found.work >= SMALL else 1
    getattr(library, DTYPES[first.dtype])(
        numbers, found.sizes, ctypes.c_int64(found.steps), ctypes.c_int64(threads))
    return made


def _plain(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool,
) -> list[Tensor]:
    body: Any = step_function(step)
    turned = [s.flip(0) for s in slices] if reverse else slices
    results = plain_loop(body, carries, turned, invariants)
    held = len(carries)
    finals = [r.clone() for r in results[:held]]
    return finals + [(r.flip(0) if reverse else r).movedim(0, axis)
                     for r, axis in zip(results[held:], axes, strict=True)]


@fused_scan.register_fake
def _(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool,
) -> list[Tensor]:
    results, held = result_sizes(step, step_sizes(carries, slices, invariants)), len(carries)
    steps, like = slices[0].shape[0], carries[0]
    stacked = [(*shape[:axis], steps, *shape[axis:])
               for shape, axis in zip(results[held:], axes, strict=True)]
    return [like.new_empty(shape) for shape in (*results[:held], *stacked)]


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    # gradients of gradients, and traces, go through the operator
    given = [t for t in (*ctx.saved_tensors, *grads) if t is not None]
    if torch.is_grad_enabled() or any(type(t) not in (Tensor, torch.nn.Parameter) for t in given):
        return backward(lambda *args: fused_scan(*args[:-1]), True, ctx, grads)
    return backward(_run, False, ctx, grads)


fused_scan.register_autograd(_backward, setup_context=keep)
