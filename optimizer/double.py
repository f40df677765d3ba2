"""Running a program in float64, also where it names a narrower dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .facts import LIFTED, aten

WIDER = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
         torch.complex64: torch.complex128}


def doubled(tensor: Tensor) -> Tensor:
    """`tensor` in float64 (complex128) if it is of a narrower such dtype."""
    return tensor.to(WIDER[tensor.dtype]) if tensor.dtype in WIDER else tensor


PLAIN = (int, float, bool, complex, str, type(None), torch.device, torch.layout,
         torch.memory_format)
PROMOTING = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.rsub.Scalar,
             aten.pow.Tensor_Scalar)  # of a mask or integers and a number: the default dtype

DRAWING = {aten.rand, aten.randn, aten.rand_like, aten.randn_like, aten.normal_functional,
           aten.normal_, aten.uniform_, aten.exponential_, aten.cauchy_, aten.log_normal_,
           aten.geometric_, aten.exponential, aten.cauchy, aten.log_normal, aten.geometric,
           aten.normal, aten.uniform, aten.bernoulli, aten.poisson}


class _Doubling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in float64 also where a program names a narrower dtype.

    A tensor made of numbers is rounded to `narrow`, the program's own dtype, which it has in
    a graph captured in that dtype.
    """

    def __init__(self, narrow: torch.dtype | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.narrow = narrow

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in DRAWING:
            return self._drawn(func, args, kwargs)
        if not kwargs and not any(map(_may_be_narrow, args)) and func not in LIFTED:
            result = func(*args)  # most operations of a loop: no tree is walked for them
            if isinstance(result, Tensor) and result.dtype in WIDER and func in PROMOTING:
                return func(*(a.double() if isinstance(a, Tensor) else a for a in args))
            return doubled(result) if isinstance(result, Tensor) and not func.is_view else result
        kwargs = dict(kwargs)
        if kwargs.get("dtype") in WIDER:
            kwargs["dtype"] = WIDER[kwargs["dtype"]]
        wide = pytree.tree_map_only(torch.dtype, lambda d: WIDER.get(d, d), args)
        if func in LIFTED:
            lifted = func(*args, **kwargs)
            round_off = lifted.is_floating_point() and self.narrow is not None
            return doubled(lifted.to(self.narrow) if round_off else lifted)
        in_place = func._schema.is_mutable or func.is_view
        if not in_place:
            wide, kwargs = pytree.tree_map_only(Tensor, doubled, (wide, kwargs))
        result = func(*wide, **kwargs)
        return doubled(result) if isinstance(result, Tensor) and not in_place else result


    def _drawn(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Random numbers, drawn in the program's own dtype: in another they are others. (Who brings
        a generator is not the program.)"""
        if self.narrow in WIDER and kwargs.get("generator") is None:
            wide = WIDER[self.narrow]
            if kwargs.get("dtype") is wide:
                kwargs = {**kwargs, "dtype": self.narrow}
            made = func(*(a.to(self.narrow) if isinstance(a, Tensor) and a.dtype is wide else a
                          for a in args), **kwargs)
        else:
            made = func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0] if made is args[0] else args[0].copy_(made)
        return doubled(made)


def _may_be_narrow(arg: Any) -> bool:
    """Whether an argument is, or may hold, what is to be widened."""
    if isinstance(arg, Tensor):
        return arg.dtype in WIDER
    if isinstance(arg, (list, tuple)):
        return any(map(_may_be_narrow, arg))
    return not isinstance(arg, PLAIN)


class Width(Enum):
    """In which dtype a program is compared; from the quickest."""

    TENSORS = "float64, but for what a program makes in a narrower dtype that it names"
    DOUBLE = "float64"
    OWN = "the caller's dtype"


@contextlib.contextmanager
def computing(width: Width, narrow: torch.dtype | None) -> Iterator[None]:
    """Within it what is computed from tensors of a width is computed in it, without autocast.

    `narrow` is the dtype that the program is meant for, if it is one.
    """
    if width is Width.OWN:
        yield
        return
    within = _Doubling(narrow) if width is Width.DOUBLE else contextlib.nullcontext()
    with within, torch.autocast("cpu", enabled=False):
        yield
