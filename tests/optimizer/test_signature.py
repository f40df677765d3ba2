"""Whatever a model's forward may depend on makes another signature, however it changes."""

from __future__ import annotations

import collections
import enum
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import looplift
import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook


class Kind(enum.Enum):
    ADDED, LEFT_OUT = range(2)


@dataclass
class Settings:
    gain: float = 1.5
    nested: dict[str, list[float]] = field(default_factory=lambda: {"gains": [1.0, 2.0]})


class Scaling:
    """Scales by a number of its own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.factor


class Configured(nn.Module):
    """Depends on a number, a list, a table, a submodule, an optional bias, on ties, and on
    settings of all kinds."""

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
        self.settings: Any = Settings()
        self.space = types.SimpleNamespace(gain=1.5, weights=numpy.ones(3))
        self.kind = Kind.ADDED
        self.activation: Any = functional.relu
        self.method: Any = Scaling(2.0).scaled
        self.partial: Any = functools.partial(torch.mul, 2.0)
        self.features = {"shift"}
        self.weights = numpy.ones(3)
        self.gains: Any = collections.deque([1.0, 2.0])
        self.wide = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = sum((self.inner(x) ** p for p in self.powers), self.options["shift"] * x)
        y = self.bare(y) * self.scale + self.offset + self.table
        y = y + x * self.settings.gain * self.space.gain * sum(self.settings.nested["gains"])
        y = y + self.activation(x) + self.method(x) + self.partial(x) + sum(self.gains)
        y = y + torch.tensor(self.weights * self.space.weights, dtype=x.dtype)
        y = y + x if self.kind is Kind.ADDED else y
        y = y + 1 if "shift" in self.features else y
        y = y if self.bare.weight.requires_grad else y * 2
        y = y.to(torch.promote_types(self.wide, x.dtype))
        tied = self.twin.weight is self.inner.weight
        return y + self.twin(x) if tied else y


def unregister(model: Configured) -> None:
    offset = model.offset
    del model.offset
    model.offset = nn.Parameter(offset * 3)


def double(model: Configured) -> None:
    model.double()
    model.table = model.table.double()


HOOKS: list[Any] = []
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
    "a field of settings": lambda m: setattr(m.settings, "gain", 2.5),
    "settings": lambda m: setattr(m, "settings", Settings(3.5)),
    "a number deep in settings": lambda m: m.settings.nested["gains"].__setitem__(1, 5.0),
    "a field of a namespace": lambda m: setattr(m.space, "gain", 2.5),
    "a choice": lambda m: setattr(m, "kind", Kind.LEFT_OUT),
    "a function": lambda m: setattr(m, "activation", torch.tanh),
    "a method": lambda m: setattr(m, "method", Scaling(3.0).scaled),
    "a partial function": lambda m: setattr(m, "partial", functools.partial(torch.mul, 3.0)),
    "what a set holds": lambda m: m.features.symmetric_difference_update({"shift", "other"}),
    "an array's numbers": lambda m: m.weights.__setitem__(0, 4.0),
    "an array's numbers in a namespace": lambda m: m.space.weights.__setitem__(0, 4.0),
    "an array in a namespace": lambda m: setattr(m.space, "weights", numpy.full(3, 2.0)),
    "an array": lambda m: setattr(m, "weights", numpy.full(3, 2.0)),
    "an entry of a deque": lambda m: m.gains.__setitem__(0, 4.0),
    "a dtype": lambda m: setattr(m, "wide", torch.float64),
    "what is trained": lambda m: m.bare.weight.requires_grad_(False),
    "a hook for all modules": lambda m: HOOKS.append(
        register_module_forward_hook(lambda mod, args, out: out * 2 if mod is m.inner else None)),
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


@pytest.fixture(autouse=True)
def no_hooks_for_all_modules() -> Iterator[None]:
    yield
    while HOOKS:
        HOOKS.pop().remove()


def test_nothing_changed_is_one_signature() -> None:
    model, x = Configured(), torch.randn(2, 3)
    fast = looplift.apply_passes(model, (x,), mode="inference", measure=False)
    with torch.no_grad():
        fast(x)
        model.scale, model.table = 2, torch.zeros(3)  # equal, or of the same shape
        fast(x)
    assert len(fast.report.signatures) == 1
