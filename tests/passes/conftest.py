"""What the tests of all passes share: run, print, compare with a golden file, hold the contract."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import looplift
import pytest
import torch
from looplift.optimizer.capture import capture
from looplift.optimizer.emit import emit
from looplift.optimizer.pipeline import Outcome, run_passes
from looplift.optimizer.rewrite import Pass
from looplift.passes import ORDER
from torch import nn

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


@pytest.fixture
def run() -> Callable[..., Outcome]:
    """Capture a model and run passes on it (all of them, without an argument)."""

    def run_on(
        model: nn.Module, inputs: Sequence[Any], passes: Sequence[Pass] = ORDER, **options: Any
    ) -> Outcome:
        return run_passes(capture(model, inputs), passes, **options)

    return run_on


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Outcome], None]:
    """Compare a rewritten graph's source with the golden file of that name."""

    def compare(name: str, outcome: Outcome) -> None:
        source = emit(outcome.graph_module)
        text = re.sub(r"\n +# [^\n]*", "", source)  # source lines move when tests are edited
        file = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden", default=False):
            file.write_text(text)
        expected = file.read_text()
        diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "now")
        assert text == expected, "\n".join(diff)

    return compare


@pytest.fixture
def equal() -> Callable[..., looplift.OptimizedModule]:
    """Optimize, and hold that no pass proposed anything wrong, in either mode."""

    def check(model: nn.Module, inputs: Sequence[Any], **options: Any) -> looplift.OptimizedModule:
        fast = looplift.apply_passes(model, inputs, measure=False, **options)
        told = fast.report.to_dict()
        assert not [c["failure"] for c in told["captures"] if c["failure"]]
        wrong = [d["reason"] for d in told["declined"]
                 if any(sign in d["reason"] for sign in
                        ("differs", "could not be built", "failed to propose"))]
        assert not wrong, wrong
        return fast

    return check


@pytest.fixture
def keeps_contract() -> Callable[..., None]:
    """Outputs have the original's strides and dtype, and writing to them leaves inputs alone."""

    def check(model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        fast = looplift.apply_passes(model, inputs, measure=False, mode="inference")
        assert fast.report.to_dict()["rewrites"], "nothing was rewritten"
        with torch.no_grad():
            want, got = model(*inputs), fast(*inputs)
            assert (got.dtype, got.stride(), got.shape) == (want.dtype, want.stride(), want.shape)
            before = [i.clone() for i in inputs]
            got.zero_()
            assert all(torch.equal(b, i) for b, i in zip(before, inputs, strict=True))
            torch.testing.assert_close(fast(*inputs), want)

    return check
