"""PyTorch's fake tensors, and the operation whose fakes take less than the operation does."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._meta_registrations import _create_grouped_mm_output_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .facts import aten


class FakeTensors(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors beside the real ones of a model.

    PyTorch's own fake of `_grouped_mm`, which mixtures of experts call, takes bfloat16 alone,
    as on CUDA; on the CPU float32 and float16 run too. What it may be given was checked by then:
    a model runs before it is captured.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is aten._grouped_mm.default:
            with self:
                return _grouped_mm(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _grouped_mm(
    one: Tensor, other: Tensor, offs: Tensor | None = None, bias: Tensor | None = None,
    out_dtype: Any = None,
) -> Any:
    make: Any = _create_grouped_mm_output_tensor
    return make(one, other, offs, out_dtype)
