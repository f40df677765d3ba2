"""`looplift::fused_scan`: a scan of small steps as one kernel, forward and backward.

The operator takes the step as Python source, so a graph or a file that calls it holds all that
it needs. Kernels are built by Inductor's builder and cached on disk by their content; where
there is no compiler, the step runs in a plain loop.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .backward import Term, backward_of
from .kernel import contiguous
from .loop import plain_loop
from .packing import Counts, kernel_for, packed, step_sizes, step_strides
from .pointwise import Unsupported
from .step import Sizes, step_function, traced

log = logging.getLogger(__name__)
SMALL = 1 << 18  # elements; with fewer, threads cost more than they save (much on a busy machine)
DTYPES = {torch.float32: "run_float", torch.float64: "run_double"}
KINDS = [{("cpu", dtype)} for dtype in DTYPES]


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
    counts = len(carries), len(slices), len(invariants)
    sizes = step_sizes(carries, slices, invariants)
    chosen = kernel_for(step, sizes, counts, step_strides(carries, slices, invariants))
    back = backward_of(step, sizes, counts, (True,) * len(sizes))
    inner = counts[0] + len(back.sums), len(back.slices), len(back.invariants)
    kernel_for(back.step, back.sizes, inner, tuple(map(contiguous, back.sizes)))
    return _library(chosen.source) is not None


@torch.library.custom_op("looplift::fused_scan", mutates_args=())
def fused_scan(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    outputs: int, reverse: bool,
) -> list[Tensor]:
    """The final carries, then each of the `outputs` of all steps, stacked on axis 0.

    `step(*carries, *slice, *invariants)` returns the next carries, then this step's outputs.
    `slices` hold one step along axis 0 each. In `reverse` the last step is the first. All
    tensors have one dtype.
    """
    return _run(step, carries, slices, invariants, reverse)


def _run(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    reverse: bool, spent: frozenset[int] = frozenset(),
) -> list[Tensor]:
    """`fused_scan`; outputs may be written over the slices that are `spent`."""
    given = (*carries, *slices, *invariants)
    counts = held, read, _ = len(carries), len(slices), len(invariants)
    chosen = library = None
    if {(t.device.type, t.dtype) for t in given} in KINDS and all(t.numel() for t in given):
        with suppress(Unsupported):  # tensors may lie otherwise than those it was built for
            chosen = kernel_for(step, step_sizes(carries, slices, invariants), counts,
                                step_strides(carries, slices, invariants), spent)
            library = _library(chosen.source)
    if chosen is None or library is None:
        return _plain(step, carries, slices, invariants, reverse)
    steps = slices[0].shape[0]
    moving = {*range(held, held + read), *range(len(given) + held, len(chosen.layouts))}
    numbers, sizes, made, alive = packed(chosen, given, moving, steps, reverse)
    work = max(*(t.numel() for t in alive), steps * max(t.numel() for t in carries))
    threads = torch.get_num_threads() if work >= SMALL else 1
    getattr(library, DTYPES[carries[0].dtype])(
        (ctypes.c_int64 * len(numbers))(*numbers), (ctypes.c_int64 * len(sizes))(*sizes),
        ctypes.c_int64(steps), ctypes.c_int64(threads),
    )
    return [t.contiguous() for t in made]


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
    given = (*carries, *slices, *invariants)
    results = _results(step, step_sizes(carries, slices, invariants))
    steps = slices[0].shape[0]
    made = [given[0].new_empty(shape) for shape in results[: len(carries)]]
    return made + [given[0].new_empty((steps, *shape)) for shape in results[len(carries) :]]


@lru_cache(maxsize=256)
def _results(step: str, sizes: tuple[Sizes, ...]) -> list[Sizes]:
    """The sizes of what a step returns."""
    found: Any = traced(step, sizes).graph.output_node().args[0]
    return [tuple(n.meta["val"].shape) for n in found]


@lru_cache(maxsize=256)
def _shown(step: str, sizes: tuple[Sizes, ...], held: int) -> dict[int, tuple[int, bool]]:
    """The carries that a step returns: by number the output, and if it is the carry after it."""
    graph = traced(step, sizes).graph
    results: Any = graph.output_node().args[0]
    heads = [n for n in graph.nodes if n.op == "placeholder"][:held]
    return {k: (j, after) for k in range(held) for j, node in enumerate(results[held:])
            for after in (False, True) if node is (results[k] if after else heads[k])}


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.step, carries, slices, invariants, _, ctx.reverse = inputs
    ctx.counts = len(carries), len(slices), len(invariants)
    ctx.shown = _shown(ctx.step, step_sizes(carries, slices, invariants), len(carries))
    shown = [output[len(carries) + number] for number, _ in ctx.shown.values()]
    ctx.save_for_backward(*carries, *slices, *invariants, *shown)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    (held, read, fixed), saved = ctx.counts, ctx.saved_tensors
    carries, slices = saved[:held], saved[held : held + read]
    invariants = saved[held + read : held + read + fixed]
    shown = dict(zip(ctx.shown, saved[held + read + fixed :], strict=True))
    sizes = step_sizes(carries, slices, invariants)
    results, steps = _results(ctx.step, sizes), slices[0].shape[0]
    given = [carries[0].new_zeros([steps] * (k >= held) + list(size)) if g is None else g
             for k, (g, size) in enumerate(zip(grads, results, strict=True))]
    wanted = tuple(t.requires_grad for t in (*carries, *slices, *invariants))
    back = backward_of(ctx.step, sizes, ctx.counts, wanted)
    known = {**{f"slice_{k}": t for k, t in enumerate(slices)},
             **{f"grad_{k}": t for k, t in enumerate(given[held:])},
             **{f"invariant_{k}": t.expand(steps, *t.shape) for k, t in enumerate(invariants)}}
    own: set[str] = set()  # what no one else reads
    for k in back.histories:
        if k in shown:
            own |= {f"history_{k}"} if ctx.shown[k][1] else set()
            known[f"history_{k}"] = _history(carries[k], shown[k], ctx.shown[k][1], ctx.reverse)
    again = _recomputed(ctx, back.histories, carries, slices, invariants, known)
    known |= again
    own |= again.keys()
    if back.before is not None:
        per_step = [known[name] for name in back.before_slices]
        axes = (*[0] * len(per_step), *[None] * fixed)
        made = torch.vmap(back.before, in_dims=axes)(*per_step, *invariants)
        known |= {f"before_{k}": t for k, t in enumerate(made)}
        own |= {f"before_{k}" for k in range(len(made))}
    starts = [*given[:held], *(carries[0].new_zeros(size) for size in back.sums)]
    walked = (back.step, starts, [known[name] for name in back.slices],
              [invariants[k] for k in back.invariants])
    # gradients of gradients, and traces, go through the operator
    if torch.is_grad_enabled() or any(type(t) is not Tensor for t in (*starts, *walked[2])):
        found = fused_scan(*walked, len(back.outputs), not ctx.reverse)
    else:
        factors = {f.name for terms in back.to_invariants.values() for t in terms
                   for f in t.factors}
        found = _run(*walked, not ctx.reverse, frozenset(
            k for k, name in enumerate(back.slices) if name in own and name not in factors))
    known |= dict(zip(back.outputs, found[len(starts) :], strict=True))
    known |= {name: known[whole].narrow(axis + 1, start, size)
              for name, (whole, axis, start, size) in back.pieces.items()}
    return (
        None, list(found[:held]), [known.get(f"to_slice_{k}") for k in range(read)],
        [_total(back.to_invariants[k], found[held : len(starts)], known)
         if k in back.to_invariants else None for k in range(fixed)],
        None, None,
    )


def _history(first: Tensor, shown: Tensor, after: bool, reverse: bool) -> Tensor:
    """A carry as each step found it, of what the steps returned of it."""
    if not after:
        return shown
    start = first.unsqueeze(0)
    return torch.cat([shown[1:], start] if reverse else [start, shown[:-1]])


def _recomputed(
    ctx: Any, wanted: Sequence[int], carries: Sequence[Tensor], slices: Sequence[Tensor],
    invariants: Sequence[Tensor], known: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The carries that no output shows, computed again; those that are known are slices."""
    held = ctx.counts[0]
    if all(f"history_{k}" in known for k in wanted):
        return {}
    there = tuple(k for k in range(held) if f"history_{k}" in known)
    rest = [k for k in range(held) if k not in there]
    step = _with_history(ctx.step, ctx.counts, there)
    found = fused_scan(step, [carries[k] for k in rest],
                       [*(known[f"history_{k}"] for k in there), *slices], list(invariants),
                       len(rest), ctx.reverse)
    return {f"history_{k}": t for k, t in zip(rest, found[len(rest) :], strict=True)}


@lru_cache(maxsize=256)
def _with_history(step: str, counts: Counts, there: tuple[int, ...]) -> str:
    """The step that returns the carries as it found them; those `there` are slices."""
    held, read, fixed = counts
    rest = [f"carry_{k}" for k in range(held) if k not in there]
    others = [*(f"slice_{k}" for k in range(read)), *(f"invariant_{k}" for k in range(fixed))]
    names = [*rest, *(f"carry_{k}" for k in there), *others]
    all_names = [*(f"carry_{k}" for k in range(held)), *others]
    indented = step.strip().replace("\n", "\n    ")
    nexts = ", ".join(f"results[{k}]" for k in range(held) if k not in there)
    return (f"def step({', '.join(names)}):\n    {indented}\n"
            f"    results = step({', '.join(all_names)})\n"
            f"    return [{nexts}, {', '.join(rest)}]\n")


def _total(terms: Sequence[Term], sums: Sequence[Tensor], known: dict[str, Tensor]) -> Tensor:
    """An invariant's gradient."""
    totals = []
    for term in terms:
        factors = [_viewed(known[f.name], f.views) for f in term.factors]
        if len(factors) == 1:
            total = factors[0].sum(0)
        elif factors:
            left, right = factors[0].movedim(0, -2), factors[1].movedim(0, -3)
            total = left.flatten(-2) @ right.flatten(-3, -2)  # the sum over steps is in it
        else:
            total = sums[term.carry]
        for node in term.chain:
            function: Any = node.target
            total = function(total, *node.args[1:], **node.kwargs)
        totals.append(total)
    return sum(totals[1:], totals[0])


def _viewed(tensor: Tensor, views: Sequence[Any]) -> Tensor:
    for node in views:
        tensor = torch.vmap(lambda x, node=node: node.target(x, *node.args[1:]))(tensor)
    return tensor


fused_scan.register_autograd(_backward, setup_context=_keep)
