"""A small slice of the suites that have make targets of their own: fuzz, opinfo."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from looplift.optimizer import batching
from looplift.optimizer.facts import aten
from looplift.tests import fuzz, opinfo
from looplift.tests.programs import Program, programs


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


def test_undocumented_reasons_are_noticed() -> None:
    assert fuzz.documented("a loop of 3 trips: each trip uses parameters of its own")
    assert not fuzz.documented("it was too warm")


def test_a_wrong_batching_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself can fail: a rule that batches `roll` along the lanes is found wrong."""
    monkeypatch.setitem(batching.RULES, aten.roll.default, batching._vmapped)
    assert opinfo.examined((0, 40, ["roll"])).wrong
