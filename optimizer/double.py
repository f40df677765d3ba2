"""Running a program in float64, also where it names a narrower dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WIDER = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
         torch.complex64: torch.complex128}


def doubled(tensor: Tensor) -> Tensor:
    """`tensor` in float64 (complex128) if it is of a narrower such dtype."""
    return tensor.to(WIDER[tensor.dtype]) if tensor.dtype in WIDER else tensor


class _Doubling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in float64 also where a program names a narrower dtype."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in WIDER:
            kwargs["dtype"] = WIDER[kwargs["dtype"]]
        wide = pytree.tree_map_only(torch.dtype, lambda d: WIDER.get(d, d), args)
        result = func(*wide, **kwargs)
        narrow = isinstance(result, Tensor) and result.dtype in WIDER
        if narrow and not func._schema.is_mutable and not any(map(_is_narrow, args)):
            return doubled(result)
        return result


def _is_narrow(leaf: Any) -> bool:
    return any(isinstance(t, Tensor) and t.dtype in WIDER for t in pytree.tree_leaves(leaf))


@contextlib.contextmanager
def in_double(double: bool) -> Iterator[None]:
    """Within it (if `double`) what is computed is computed in float64, without autocast."""
    if not double:
        yield
        return
    with _Doubling(), torch.autocast("cpu", enabled=False):  # type: ignore[no-untyped-call]
        yield
