"""The examples run, and show what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import looplift

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_gru_loop() -> None:
    fast = load("gru_loop").main(measure=False)
    assert "fused_scan" in fast.code
    assert fast.code.count("linear(") == 2  # of all inputs, and in the step


def test_check_my_rewrite() -> None:
    assert isinstance(load("check_my_rewrite").main(), looplift.Differs)


def test_own_pass() -> None:
    fast = load("own_pass").main()
    assert [r["pass_name"] for r in fast.report.to_dict()["rewrites"]] == ["double-negation"] * 2


def test_all_are_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {file.stem for file in EXAMPLES.glob("*.py")} <= tested
