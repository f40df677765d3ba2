"""`looplift::fused_scan`: a scan of pointwise steps as one kernel, forward and backward.

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
from torch.fx.experimental.proxy_tensor import make_fx

from .emit import emit
from .loop import plain_loop
from .pointwise import Unsupported, cpp, step_function, traced

log = logging.getLogger(__name__)
SMALL = 1 << 18  # elements; with fewer, threads cost more than they save (much on a busy machine)
DTYPES = {torch.float32: "run_float", torch.float64: "run_double"}
KINDS = [{("cpu", dtype)} for dtype in DTYPES]


@lru_cache(maxsize=256)
def _library(source: str, carries: int, slices: int, invariants: int) -> Any:
    """The built kernel, or None with a note in the log where there is none."""
    from torch._inductor.codecache import CppCodeCache

    try:
        return CppCodeCache.load(cpp(source, carries, slices, invariants))
    except Unsupported:
        raise
    except Exception as error:  # no compiler, or one that fails
        log.warning("no fused loops here, plain ones run: %s", str(error).partition("\n")[0])
        return None


def is_built(step: str, carries: int, slices: int, invariants: int, outputs: int) -> bool:
    """Whether there is a kernel for the step; builds it.

    Raises `Unsupported` with a reason where there can be none, or none for its backward.
    """
    counts = carries, slices, invariants
    kept = _with_history(step, carries, counts)
    back = _differentiated(step, counts, outputs)
    cpp(kept, *counts)
    cpp(back, carries + invariants, carries + slices + outputs, invariants)
    return _library(step, *counts) is not None


@torch.library.custom_op("looplift::fused_scan", mutates_args=())
def fused_scan(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    outputs: int, reverse: bool,
) -> list[Tensor]:
    """The final carries, then each of the `outputs` of all steps, stacked on axis 0.

    `step(*carries, *slice, *invariants)` returns the next carries, then this step's outputs; it
    is pointwise. Carries have the size of the lanes; `slices`, one step along axis 0 each, and
    `invariants` broadcast to it. In `reverse` the last step is the first. All tensors have one
    dtype.
    """
    return _run(step, carries, slices, invariants, outputs, reverse)


def _run(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    outputs: int, reverse: bool, into: Sequence[Tensor] = (),
) -> list[Tensor]:
    """`fused_scan`; its first outputs may be written into slices that no one else reads, since
    a step reads its slices before it writes its outputs."""
    sizes, steps = carries[0].shape, slices[0].shape[0]
    library = None
    if {(t.device.type, t.dtype) for t in (*carries, *slices, *invariants)} in KINDS:
        library = _library(step, len(carries), len(slices), len(invariants))
    if library is None:
        return _plain(step, carries, slices, invariants, reverse)
    made = [torch.empty(sizes, dtype=carries[0].dtype) for _ in carries]
    made += [*into, *(carries[0].new_empty((steps, *sizes)) for _ in range(outputs - len(into)))]
    held, read = len(carries), len(slices)
    lanes = [t.expand(sizes) for t in carries]
    lanes += [t.reshape(_padded(t, len(sizes))).expand(steps, *sizes) for t in slices]
    lanes += [t.expand(sizes) for t in invariants]
    lanes += made
    moving = {*range(held, held + read), *range(len(lanes) - outputs, len(lanes))}
    shape, rows, kept = _coalesced(sizes, lanes, moving)
    packed: list[int] = []
    for number, (tensor, strides) in enumerate(zip(kept, rows, strict=True)):
        stride = tensor.stride(0) if number in moving else 0
        first = tensor.data_ptr()
        if reverse and number in moving:
            first += (steps - 1) * stride * tensor.element_size()
            stride = -stride
        packed += [first, stride, *strides]
    threads = torch.get_num_threads() if steps * carries[0].numel() >= SMALL else 1
    if carries[0].numel():
        getattr(library, DTYPES[carries[0].dtype])(
            (ctypes.c_int64 * len(packed))(*packed), (ctypes.c_int64 * 3)(*shape),
            ctypes.c_int64(steps), ctypes.c_int64(threads),
        )
    return made


def _coalesced(
    sizes: Sequence[int], tensors: list[Tensor], moving: set[int]
) -> tuple[list[int], list[list[int]], list[Tensor]]:
    """At most three axes of lanes, the strides of each tensor along them, and the tensors.

    The fastest axis has stride 1, or 0 where a tensor is broadcast; tensors that lie otherwise
    are copied.
    """
    while True:
        shape: list[int] = []
        rows: list[list[int]] = [[] for _ in tensors]
        for axis, size in enumerate(sizes):
            if size == 1:
                continue
            strides = [t.stride(axis + (k in moving)) for k, t in enumerate(tensors)]
            if shape and all(row[-1] == s * size for row, s in zip(rows, strides, strict=True)):
                shape[-1] *= size
                for row, s in zip(rows, strides, strict=True):
                    row[-1] = s
            else:
                shape.append(size)
                for row, s in zip(rows, strides, strict=True):
                    row.append(s)
        scattered = [bool(row) and row[-1] not in (0, 1) for row in rows]
        if len(shape) <= 3 and not any(scattered):
            spare = 3 - len(shape)
            return [1] * spare + shape, [[0] * spare + row for row in rows], tensors
        if len(shape) > 3:
            scattered = [True] * len(tensors)
        tensors = [t.contiguous() if copy else t
                   for t, copy in zip(tensors, scattered, strict=True)]


def _plain(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    reverse: bool,
) -> list[Tensor]:
    body: Any = step_function(step)
    turned = [s.flip(0) for s in slices] if reverse else slices
    results = plain_loop(body, carries, turned, invariants)
    held = len(carries)
    finals = [r.clone() for r in results[:held]]
    return finals + [r.flip(0) if reverse else r for r in results[held:]]


@fused_scan.register_fake
def _(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    outputs: int, reverse: bool,
) -> list[Tensor]:
    sizes = carries[0].shape
    made = [carries[0].new_empty(sizes) for _ in carries]
    return made + [carries[0].new_empty((slices[0].shape[0], *sizes)) for _ in range(outputs)]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.step, carries, slices, invariants, ctx.outputs, ctx.reverse = inputs
    ctx.counts = len(carries), len(slices), len(invariants)
    ctx.save_for_backward(*carries, *slices, *invariants)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    held, read, fixed = ctx.counts
    saved = ctx.saved_tensors
    carries, slices, invariants = saved[:held], saved[held : held + read], saved[held + read :]
    given = [torch.zeros_like(carries[0]) if g is None else g for g in grads[:held]]
    steps = slices[0].shape[0]
    given += [carries[0].new_zeros((steps, *carries[0].shape)) if g is None else g
              for g in grads[held:]]
    history = fused_scan(_with_history(ctx.step, held, ctx.counts), list(carries), list(slices),
                         list(invariants), held, ctx.reverse)[held:]
    back = (
        _differentiated(ctx.step, ctx.counts, ctx.outputs),
        [*given[:held], *(torch.zeros_like(carries[0]) for _ in invariants)],
        [*history, *slices, *given[held:]], list(invariants), read, not ctx.reverse,
    )
    # gradients of gradients, and traces, go through the operator
    plain = not torch.is_grad_enabled() and all(type(t) is Tensor for t in (*history, *given))
    found = _run(*back, into=history[:read]) if plain else fused_scan(*back)
    to_carries, rest = found[:held], found[held:]
    to_invariants, to_slices = rest[:fixed], rest[fixed:]
    return (
        None, list(to_carries),
        [g.sum_to_size(_padded(s, g.dim() - 1)).reshape(s.shape)
         for g, s in zip(to_slices, slices, strict=True)],
        [g.sum_to_size(i.shape) for g, i in zip(to_invariants, invariants, strict=True)],
        None, None,
    )


def _padded(slices: Tensor, axes: int) -> list[int]:
    """The sizes of slices with ones for those of the lanes' axes that they lack."""
    return [slices.shape[0], *[1] * (axes + 1 - slices.dim()), *slices.shape[1:]]


fused_scan.register_autograd(_backward, setup_context=_keep)


@lru_cache(maxsize=256)
def _with_history(step: str, held: int, counts: tuple[int, int, int]) -> str:
    """The step that returns, after the next carries, the carries as it found them."""
    names = [f"x{k}" for k in range(sum(counts))]
    indented = step.replace("\n", "\n    ")
    return (f"def step({', '.join(names)}):\n    {indented.strip()}\n"
            f"    return [*step({', '.join(names)})[:{held}], {', '.join(names[:held])}]\n")


@lru_cache(maxsize=256)
def _differentiated(step: str, counts: tuple[int, int, int], outputs: int) -> str:
    """The step of the backward, from the last step to the first.

    Carries: gradients of the carries, sums of those of the invariants. Slices: the carries as
    each step found them, its slices, gradients of its outputs. Outputs: gradients of the slices.
    """
    held, read, fixed = counts
    function: Any = traced(step, sum(counts))

    def backward(*given: Tensor) -> list[Tensor]:
        grads, sums = given[:held], given[held : held + fixed]
        rest = given[held + fixed :]
        xs, to_outputs = rest[: held + read], rest[held + read : held + read + outputs]
        inputs = [x.detach().requires_grad_() for x in (*xs, *rest[held + read + outputs :])]
        with torch.enable_grad():
            results = function(*inputs)
        wanted = [(r, g) for r, g in zip(results, (*grads, *to_outputs), strict=True)
                  if r.requires_grad]
        found = torch.autograd.grad([r for r, _ in wanted], inputs, [g for _, g in wanted],
                                    allow_unused=True) if wanted else [None] * len(inputs)
        full = [torch.zeros_like(x) if g is None else g
                for x, g in zip(inputs, found, strict=True)]
        to_invariants = [s + g for s, g in zip(sums, full[held + read :], strict=True)]
        return [*full[:held], *to_invariants, *full[held : held + read]]

    lanes = [torch.full((8,), 0.5) for _ in range(2 * held + 2 * fixed + read + outputs)]
    with torch.enable_grad():
        graph_module = make_fx(backward)(*lanes)
    # formulas of gradients write in place; what is printed does not
    return _as_step(make_fx(torch.func.functionalize(graph_module))(*lanes))


def _as_step(graph_module: Any) -> str:
    graph_module.graph.eliminate_dead_code()
    return emit(graph_module, "step")
