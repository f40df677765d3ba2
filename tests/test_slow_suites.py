"""A small slice of the suites that have make targets of their own: fuzz, opinfo, corpus."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from looplift.optimizer import batching
from looplift.optimizer.facts import aten
from looplift.tests import fuzz, opinfo
from looplift.tests.corpus import run as corpus
from looplift.tests.corpus.models import ENTRIES
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
    assert fuzz.documented("a loop of 3 trips: some trips share parameters, others have their own")
    assert not fuzz.documented("it was too warm")


def test_a_wrong_batching_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself can fail: a rule that batches `roll` along the lanes is found wrong."""
    monkeypatch.setitem(batching.RULES, aten.roll.default, batching._vmapped)
    assert opinfo.examined((0, 40, ["roll"])).wrong


@pytest.mark.parametrize("name", [e.name for e in ENTRIES if e.package is None])
def test_loops_as_people_write_them(name: str) -> None:
    row = corpus.examined(name, 7)
    assert not row.failure
    assert row.folded == row.expected
    assert all("differs" not in reason for reason in row.declined)
    assert all(verdict.startswith(("exact", "same function")) for verdict in row.verdicts.values())


def test_a_corpus_row_that_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = corpus.run("no such model", 7, seconds=1, minutes=1, loops=1)
    assert lost.crashed
    assert "StopIteration" in lost.failure
    assert corpus.cells(lost)[4] == lost.failure
