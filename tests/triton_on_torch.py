"""What the part of Triton that generated kernels use means, in PyTorch on the CPU.

It is as strict as Triton where a kernel could be wrong: blocks have sizes that are powers of two,
what is stored has its pointers' shape, and nothing but what a mask allows is read or written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from looplift.optimizer import fused, triton_run
from torch import Tensor


@dataclass(frozen=True)
class Pointers:
    """Addresses: places in a memory."""

    memory: Tensor
    places: Tensor

    def __add__(self, offset: Any) -> Pointers:
        return Pointers(self.memory, self.places + offset)


def pointers(tensor: Tensor) -> Pointers:
    """Where a tensor begins in its memory."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return Pointers(whole, torch.tensor(tensor.storage_offset()))


def arange(start: int, stop: int) -> Tensor:
    assert start == 0
    assert stop & (stop - 1) == 0
    return torch.arange(stop, dtype=torch.int32)


def load(at: Pointers, mask: Tensor, other: float) -> Tensor:
    mask = mask.expand_as(at.places)
    read = at.memory.new_full(at.places.shape, other)
    read[mask] = at.memory[at.places[mask]]
    return read


def store(at: Pointers, value: Tensor, mask: Tensor) -> None:
    assert at.places.shape == value.shape
    assert value.dtype == at.memory.dtype
    mask = mask.expand_as(at.places)
    at.memory[at.places[mask]] = value[mask]


def reduce(value: Tensor, axis: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    first, *rest = value.unbind(axis)
    for other in rest:
        first = combine(first, other)
    return first


def reshape(value: Tensor, shape: Sequence[int]) -> Tensor:
    assert all(n & (n - 1) == 0 for n in shape)
    return value.reshape(*shape)


def extreme(of: Callable[..., Tensor], x: Tensor, y: Any, propagate_nan: bool = False) -> Tensor:
    assert propagate_nan or not x.is_floating_point()
    return of(x, torch.as_tensor(y, dtype=x.dtype))


running = {"program": 0}
LANGUAGE: dict[str, Any] = {
    "arange": arange, "load": load, "store": store, "reduce": reduce, "reshape": reshape,
    "constexpr": int, "dtype": torch.dtype, "float32": torch.float32, "float64": torch.float64,
    "int32": torch.int32, "int64": torch.int64, "abs": torch.abs, "where": torch.where,
    "permute": torch.permute, "broadcast_to": torch.broadcast_to,
    "maximum": partial(extreme, torch.maximum), "minimum": partial(extreme, torch.minimum),
    "PropagateNan": SimpleNamespace(ALL=True),
    "program_id": lambda axis: torch.tensor(running["program"]),
    "sum": lambda x, axis: x.sum(axis),
    "zeros": lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    "full": lambda shape, number, dtype: torch.full(shape, number, dtype=dtype),
    "gather": lambda x, index, axis: torch.gather(x, axis, index.long()),
}


class Kernel:
    """A function that `triton.jit` decorates: called by itself, or for a grid of programs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int) -> None:
            given = [pointers(a) if isinstance(a, Tensor) else a for a in args]
            for running["program"] in range(*grid):
                self.function(*given)

        return launch


def module(source: str) -> SimpleNamespace:
    """What a module that imports Triton defines."""
    language, extra = ModuleType("triton.language"), ModuleType("triton.language.extra")
    vars(language).update(LANGUAGE, extra=extra)
    vars(extra)["libdevice"] = SimpleNamespace(**{**vars(torch), "rint": torch.round})
    triton = ModuleType("triton")
    vars(triton).update(jit=Kernel, language=language)
    found = {"triton": triton, "triton.language": language, "triton.language.extra": extra}
    scope: dict[str, Any] = {}
    with mock.patch.dict(sys.modules, found):
        exec(source, scope)
    return SimpleNamespace(**scope)


@contextmanager
def in_place_of_kernels() -> Iterator[mock.Mock]:
    """Runs fused scans on the CPU as on a GPU, here; yields what is called at each launch."""
    with mock.patch.object(fused, "GPUS", ("cpu",)), \
            mock.patch.object(triton_run, "is_there", return_value=True), \
            mock.patch.object(triton_run, "_module", module), \
            mock.patch.object(triton_run, "failed", set()), \
            mock.patch.object(triton_run.log, "warning", side_effect=AssertionError), \
            mock.patch.object(triton_run, "_launched", wraps=triton_run._launched) as launched:
        yield launched
