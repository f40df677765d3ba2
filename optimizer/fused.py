"""`looplift::fused_scan`: a scan of small steps as one kernel, forward and backward.

The operator takes the step as Python source, so a graph or a file that calls it holds all that
it needs. Kernels are C++, built by Inductor's builder and cached on disk by their content, or
Triton on a GPU; where there is none, all steps of an affine recurrence run at once, and others in
a plain loop.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import triton_run
from .affine_step import at_once
from .backward import backward_of
from .compiled import compiled
from .kernel_loops import contiguous
from .loop import plain_loop
from .packing import Lie, Plan, kernel_for, plan, step_sizes
from .pointwise import Unsupported
from .step import Counts, Sizes, checks, step_function
from .triton_kernel import triton_kernel
from .walk import backward, keep, result_sizes

SMALL = 1 << 18  # elements; with fewer, threads cost more than they save (much on a busy machine)
PLAIN = (Tensor, torch.nn.Parameter)  # no subclasses, which may have a say
DTYPES = {torch.float32: "run_float", torch.float64: "run_double"}
HALVES = (torch.bfloat16, torch.float16)  # computed in float32, rounded once
PROBE = "int looplift_probe() { return 0; }"  # C++ that tells whether there is a compiler
GPUS = ("cuda",)  # devices with Triton kernels
KINDS = {(device, dtype) for device in ("cpu", *GPUS) for dtype in DTYPES}  # of a call's tensors


def build_kernel(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    write_only: bool = False,
) -> None:
    """Builds the kernel for such arguments; or only writes it, where there is who would build it.

    Raises `Unsupported` with a reason where there is none, or none for its backward.
    """
    given, device = (*carries, *slices, *invariants), carries[0].device
    dtype = torch.float32 if carries[0].dtype in HALVES else carries[0].dtype
    if (device.type, dtype) not in KINDS:
        raise Unsupported(f"its values are on the device {device.type!r}")
    counts = held, read, _ = len(carries), len(slices), len(invariants)
    sizes = step_sizes(carries, slices, invariants)
    if device.type in GPUS:
        both = (step, sizes, counts), _differentiated(step, sizes, counts)
        builder, is_built = "Triton", triton_run.is_there() and all(
            triton_kernel(*one) if write_only else triton_run.is_built(*one, dtype, device)
            for one in both)
    else:
        strides = [t.stride()[held <= k < held + read :] for k, t in enumerate(given)]
        chosen = kernel_for(step, tuple(map(Lie, sizes, strides)), counts)
        back, inner, backward_counts = _differentiated(step, sizes, counts)
        kernel_for(back, tuple(Lie(size, contiguous(size)) for size in inner), backward_counts)
        source = PROBE if write_only else chosen.source
        builder, is_built = "C++ compiler", compiled(source) is not None
    if not is_built:
        raise Unsupported(f"there is no {builder} that builds the kernel")


def _differentiated(
    step: str, sizes: tuple[Sizes, ...], counts: Counts
) -> tuple[str, tuple[Sizes, ...], Counts]:
    """The step of a walk back that gives all gradients, the sizes of its arguments, how many."""
    back = backward_of(step, sizes, counts, (True,) * len(sizes))
    held = counts[0] + len(back.sums)
    return back.step, back.sizes, (held, len(back.slices), len(back.invariants))


def fused_scan(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool = False,
) -> list[Tensor]:
    """The final carries, then each output of all steps, stacked along its axis of `axes`.

    `step` is the source of a function `step`: `step(*carries, *slice, *invariants)` returns the
    next carries, then this step's outputs. `slices` hold one step along axis 0 each. In
    `reverse` the last step is the first. All tensors have one real floating dtype. Raises
    `ValueError` where slices differ in how many steps they hold.

    >>> step = "def step(total, x):\\n    total = total + x\\n    return [total, total]"
    >>> fused_scan(step, [torch.zeros(2)], [torch.ones(3, 2)], [], [0])[1]
    tensor([[1., 1.],
            [2., 2.],
            [3., 3.]])
    """
    given = (*carries, *slices, *invariants)
    if not torch.compiler.is_compiling() and _transformed():
        return plain(step, carries, slices, invariants, axes, reverse)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() \
            or any(type(t) not in PLAIN or t.is_meta for t in given):
        made: list[Tensor] = scan_operator(step, carries, slices, invariants, axes, reverse)
        return made
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        counts = len(carries), len(slices), len(invariants)
        apply: Any = _Direct.apply
        return list(apply((step, counts, axes, reverse), *given))
    return _operate(step, carries, slices, invariants, axes, reverse)


def _transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, has a say: the plain
    loop has rules for all of them."""
    return torch._C._functorch.peek_interpreter_stack() is not None \
        or forward_ad._current_level >= 0


def _operate(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool,
) -> list[Tensor]:
    told = checks(step)
    if told is not None:
        made = _run(step, carries, slices, invariants, axes, reverse)
    if told is None or any(made[k].isnan().any() for k in told):  # the loop raises what it does
        made = plain(step, carries, slices, invariants, axes, reverse)
    return [t.contiguous() for t in made]


scan_operator = torch.library.custom_op("looplift::fused_scan", _operate, mutates_args=())


def _run(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool, spent: frozenset[int] = frozenset(),
) -> list[Tensor]:
    """`fused_scan`, results in any layout; outputs may be written over slices that are `spent`."""
    given, counts = (*carries, *slices, *invariants), (len(carries), len(slices), len(invariants))
    device, dtype = carries[0].device.type, carries[0].dtype
    if (device, dtype) in KINDS and device not in GPUS:
        lies = tuple([(t.shape, t.stride(), t.dtype, t.device, t.is_neg()) for t in given])
        found = _planned(step, lies, counts, tuple(axes), reverse, spent)
        library = found and compiled(found.source)
        if found is not None and library is not None:
            numbers, made, _alive = found.packed(given)
            threads = torch.get_num_threads() if found.work >= SMALL else 1
            getattr(library, DTYPES[dtype])(
                numbers, found.sizes, ctypes.c_int64(found.steps), ctypes.c_int64(threads))
            return made
    return _otherwise(step, carries, slices, invariants, axes, reverse, spent)


@lru_cache(maxsize=512)
def _planned(
    step: str, lies: tuple[Any, ...], counts: Counts, axes: tuple[int, ...], reverse: bool,
    spent: frozenset[int],
) -> Plan | None:
    """The plan for a call of a kernel on the CPU, None where none can be called; `lies`: sizes,
    strides, dtype and device of each argument, and whether it is negated where it is read."""
    held, read, _ = counts
    kinds = {(dtype, device, negated) for *_, dtype, device, negated in lies}
    if len(kinds) > 1 or lies[0][-1] or len({size[0] for size, *_ in lies[held : held + read]}) > 1:
        return None
    shapes = tuple((tuple(size), strides) for size, strides, *_ in lies)
    return plan(step, shapes, counts, lies[0][2].itemsize, axes, reverse, spent)


def _otherwise(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool, spent: frozenset[int],
) -> list[Tensor]:
    """`_run` on arguments as they are not for a kernel on the CPU."""
    given, first = (*carries, *slices, *invariants), carries[0]
    if any(t.shape[0] != slices[0].shape[0] for t in slices):
        raise ValueError(f"slices hold {[t.shape[0] for t in slices]} steps, not equally many")
    if any(t.is_neg() for t in given):  # a kernel sees memory
        carries, slices, invariants = ([t.resolve_neg() for t in ts]
                                       for ts in (carries, slices, invariants))
        return _run(step, carries, slices, invariants, axes, reverse)
    if any((t.device, t.dtype) != (first.device, first.dtype) for t in given
           if not (_is_number(t) and first.dtype in HALVES)):
        return plain(step, carries, slices, invariants, axes, reverse)
    if first.dtype in HALVES:
        carries, slices, invariants = ([t.float() for t in ts]
                                       for ts in (carries, slices, invariants))
        made = _run(step, carries, slices, invariants, axes, reverse, spent)
        return [t.to(first.dtype) for t in made]
    counts = len(carries), len(slices), len(invariants)
    on_gpu = first.device.type in GPUS and (first.device.type, first.dtype) in KINDS
    return (on_gpu and triton_run.run(step, given, counts, axes, reverse)) \
        or _at_once(step, carries, slices, invariants, axes, reverse) \
        or plain(step, carries, slices, invariants, axes, reverse)


def _is_number(tensor: Tensor) -> bool:
    """Whether it is one number, which operations on half precision take as it is."""
    return not tensor.dim() and tensor.dtype is torch.float32


def pays(steps: int, carries: Sequence[Tensor]) -> bool:
    """Whether O(log steps) passes over all states beat a loop over the steps.

    Measured for h = a·h + b on two cores: 0.3–1.3x as fast as the loop at 64 and 256 steps,
    3–5x at 1,024 steps, with few lanes; 1.3x and less where a state has 16 KiB. On a GPU every
    operation of a loop costs a launch.
    """
    if not carries or (carries[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return False  # a captured graph can't look at whether numbers are finite
    if carries[0].device.type != "cpu":
        return steps >= 16
    return steps >= 128 and sum(t.numel() * t.element_size() for t in carries) <= 1 << 14


def _at_once(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool,
) -> list[Tensor] | None:
    held, sizes = len(carries), step_sizes(carries, slices, invariants)
    counts = held, len(slices), len(invariants)
    if not pays(slices[0].shape[0], carries):
        return None
    found = at_once(step, sizes, counts)
    if isinstance(found, Unsupported):
        return None
    made = found.run(carries, slices, invariants, reverse)
    return made and [*made[:held], *(t.movedim(0, axis) for t, axis in
                                     zip(made[held:], axes, strict=True))]


def _alone(tensor: Tensor) -> Tensor:
    """A tensor, of the same memory, that is no view: a caller may write to it."""
    if not tensor._is_view():
        return tensor
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return tensor.new_empty(0).set_(tensor.untyped_storage(), *place)


def plain(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool,
) -> list[Tensor]:
    """`fused_scan`, step by step."""
    turned = [s.flip(0) for s in slices] if reverse else slices
    results = plain_loop(step_function(step), carries, turned, invariants)
    held = len(carries)
    finals = [r.clone() for r in results[:held]]
    return finals + [(r.flip(0) if reverse else r).movedim(0, axis)
                     for r, axis in zip(results[held:], axes, strict=True)]


@scan_operator.register_fake
def _(
    step: str, carries: Sequence[Tensor], slices: Sequence[Tensor], invariants: Sequence[Tensor],
    axes: Sequence[int], reverse: bool,
) -> list[Tensor]:
    steps, held, like = slices[0].shape[0], len(carries), carries[0]
    results = result_sizes(step, step_sizes(carries, slices, invariants))
    stacked = [(*shape[:axis], steps, *shape[axis:])
               for shape, axis in zip(results[held:], axes, strict=True)]
    return [like.new_empty(shape) for shape in (*results[:held], *stacked)]


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    # gradients of gradients, and traces, go through the operator
    saved = ctx.saved_tensors  # once: a checkpoint computes them again each time
    given = [t for t in (*saved, *grads) if t is not None]
    if _transformed() or not all(map(torch._C._has_storage, given)):  # or gradients are batched
        return backward(lambda *args: plain(*args[:-1]), True, ctx, saved, grads)
    if torch.is_grad_enabled() or any(type(t) not in PLAIN for t in given):
        return backward(lambda *args: scan_operator(*args[:-1]), True, ctx, saved, grads)
    chunks = given[0].device.type == "cpu"  # elsewhere all steps run at once, the more the better
    return backward(_run, not chunks, ctx, saved, grads)


scan_operator.register_autograd(_backward, setup_context=keep)


class _Direct(torch.autograd.Function):
    """The operator's forward and backward where nobody else has to see it; a tenth of a
    millisecond less."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *given: Tensor) -> tuple[Tensor, ...]:
        step, (held, read, _), axes, reverse = call
        inputs = step, given[:held], given[held : held + read], given[held + read :], axes, reverse
        made = list(map(_alone, _operate(*inputs)))
        keep(ctx, inputs, made)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _, to_carries, to_slices, to_invariants, *_ = _backward(ctx, grads)
        return None, *to_carries, *to_slices, *to_invariants
