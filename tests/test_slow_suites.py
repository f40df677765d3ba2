"""A small slice of the suites that have make targets of their own: fuzz, opinfo, corpus."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from looplift.optimizer import fused
from looplift.tests import fuzz, opinfo, steps
from looplift.tests.programs import Program, programs
from torch import Tensor, nn


@settings(max_examples=60, derandomize=True, deadline=None,
          suppress_health_check=list(HealthCheck))
@given(programs())
def test_random_programs(program: Program) -> None:
    fuzz.check(program)


@pytest.mark.parametrize("name", [
    "add", "matmul", "softmax", "sort", "roll", "where", "cumprod", "nn.functional.conv2d",
    "nn.functional.layer_norm", "nn.functional.embedding", "index_add", "linalg.inv",
    "as_strided_scatter",
])
def test_operators(name: str) -> None:
    tally = opinfo.examined((0, 4, [name]))
    assert tally.counts
    assert not tally.wrong


@pytest.mark.parametrize("seed", [1, 13, 1013, 20005, 20021])
def test_random_steps(seed: int) -> None:
    assert steps.compare(seed) == "ok"


def test_a_kernel_that_is_wrong_is_noticed() -> None:
    right = fused._run

    def wrong(*given: Any) -> list[Tensor]:
        return [r * (1 + 1e-6) for r in right(*given)]

    with mock.patch.object(fused, "_run", wrong), pytest.raises(AssertionError, match="not close"):
        steps.compare(1)


def test_undocumented_reasons_are_noticed() -> None:
    assert fuzz.documented("a loop of 3 trips: some trips share parameters, others have their own")
    assert not fuzz.documented("it was too warm")


class Scaled(nn.Module):
    """`x`, with the rounding of numbers as large as `offset`, and scaled."""

    def __init__(self, offset: float, scale: float) -> None:
        super().__init__()
        self.add, self.take = (nn.Parameter(torch.full((12,), offset, dtype=torch.float64))
                               for _ in range(2))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.add - self.take) * self.scale


def test_random_programs_differ_by_no_more_than_rounding_explains() -> None:
    inputs = (torch.randn(4, 12, dtype=torch.float64),)
    exact, rounded, wrong = Scaled(0, 1), Scaled(1e9, 1), Scaled(1e9, 1 + 1e-5)
    want = fuzz.run(rounded, inputs)
    with pytest.raises(AssertionError):
        fuzz.same(want, fuzz.run(exact, inputs), 1e-8)
    fuzz.agree(rounded, exact, inputs, want, 1e-8)
    with pytest.raises(AssertionError):
        fuzz.agree(rounded, wrong, inputs, want, 1e-8)
    with pytest.raises(AssertionError):
        fuzz.agree(exact, Scaled(0, 1 + 1e-7), inputs, fuzz.run(exact, inputs), 1e-8)
