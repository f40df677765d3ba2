"""Whatever a model's forward may depend on makes another signature, however it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import looplift
import pytest
import torch
from torch import Tensor, nn


class Configured(nn.Module):
    """Depends on a number, a list, a table, a submodule, an optional bias, and on ties."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = 2
        self.powers = [1, 2]
        self.options = {"shift": 1.0}
        self.inner = nn.Linear(3, 3)
        self.twin = nn.Linear(3, 3)
        self.twin.weight = self.inner.weight
        self.bare = nn.Linear(3, 3, bias=False)
        self.register_buffer("offset", torch.ones(3))
        self.table = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = sum((self.inner(x) ** p for p in self.powers), self.options["shift"] * x)
        y = self.bare(y) * self.scale + self.offset + self.table
        tied = self.twin.weight is self.inner.weight
        return y + self.twin(x) if tied else y


def unregister(model: Configured) -> None:
    offset = model.offset
    del model.offset
    model.offset = nn.Parameter(offset * 3)


def double(model: Configured) -> None:
    model.double()
    model.table = model.table.double()


CHANGES: dict[str, Callable[[Configured], object]] = {
    "a number": lambda m: setattr(m, "scale", 3),
    "a number's type": lambda m: setattr(m, "scale", 2.0),
    "an entry of a list": lambda m: m.powers.__setitem__(0, 3),
    "the length of a list": lambda m: m.powers.append(3),
    "an entry of a table": lambda m: m.options.__setitem__("shift", 2.0),
    "a bias that was none": lambda m: setattr(m.bare, "bias", nn.Parameter(torch.ones(3))),
    "a submodule": lambda m: setattr(m, "inner", nn.Linear(3, 3)),
    "a bias": lambda m: setattr(m.inner, "bias", None),
    "a tie": lambda m: setattr(m.twin, "weight", nn.Parameter(m.twin.weight.clone())),
    "a tensor's values": lambda m: m.inner.weight.data.mul_(2),
    "a tensor's memory": lambda m: setattr(m.inner.weight, "data", torch.rand(3, 3)),
    "a tensor's strides": lambda m: setattr(m.inner.weight, "data", m.inner.weight.data.t()),
    "a tensor's shape": lambda m: setattr(m.offset, "data", m.offset.data[:1]),
    "a plain tensor": lambda m: setattr(m, "table", torch.zeros(3)),
    "a buffer": lambda m: setattr(m, "offset", torch.zeros(3)),
    "where a tensor hangs": unregister,
    "the dtype": double,
    "a hook": lambda m: m.inner.register_forward_hook(lambda mod, args, out: out * 2),
}


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_changes_is_noticed(change: str) -> None:
    model, x = Configured(), torch.randn(2, 3)
    fast = looplift.apply_passes(model, (x,), mode="inference", measure=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        CHANGES[change](model)
        x = x.to(model.inner.weight.dtype)
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))


def test_nothing_changed_is_one_signature() -> None:
    model, x = Configured(), torch.randn(2, 3)
    fast = looplift.apply_passes(model, (x,), mode="inference", measure=False)
    with torch.no_grad():
        fast(x)
        model.scale, model.table = 2, torch.zeros(3)  # equal, or of the same shape
        fast(x)
    assert len(fast.report.signatures) == 1
