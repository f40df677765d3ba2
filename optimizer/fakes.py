"""PyTorch's fake tensors, but for operations whose fakes are not as the operation is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._meta_registrations import _create_grouped_mm_output_tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode

from .facts import aten

BATCH_NORMS = {
    aten.native_batch_norm.default, aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit_no_training.default,
}


class FakeTensors(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors beside the real ones of a model.

    PyTorch's own fake of `_grouped_mm`, which mixtures of experts call, takes bfloat16 alone,
    as on CUDA; on the CPU float32 and float16 run too. What it may be given was checked by then:
    a model runs before it is captured. Its fakes of batch norms lie as their input does.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is aten._grouped_mm.default:
            with self:
                return _grouped_mm(*args, **(kwargs or {}))
        made: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if func in BATCH_NORMS and made[0].fake_device.type == "cpu":
            with self:  # of the input's memory format, whatever its strides
                like = suggest_memory_format(args[0])
                return torch.empty_like(made[0], memory_format=like), *made[1:]
        return made


def _grouped_mm(
    one: Tensor, other: Tensor, offs: Tensor | None = None, bias: Tensor | None = None,
    out_dtype: Any = None,
) -> Any:
    make: Any = _create_grouped_mm_output_tensor
    return make(one, other, offs, out_dtype)
