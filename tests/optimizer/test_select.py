"""Selection: what differs, loses or needs too much memory is dropped, with its number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import looplift
import pytest
import torch
from looplift.optimizer import apply, contract, select
from looplift.optimizer.builder import Builder
from looplift.optimizer.capture import capture
from looplift.optimizer.facts import Facts, aten, is_op, shape, source_line
from looplift.optimizer.measure import Comparison, Timing
from looplift.optimizer.render.html import as_html
from looplift.optimizer.render.terminal import as_text, headline
from looplift.optimizer.report import ModeReport, Report, RewriteRow, SignatureReport
from looplift.optimizer.rewrite import Rewrite, Skip
from looplift.optimizer.signature import Watched
from looplift.passes import ORDER
from torch import Tensor, nn
from torch.fx import Node


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.tanh(h + self.enter(x[:, t]))
            outputs.append(h)
        return torch.stack(outputs, 1).flip(1).exp()  # which no step has


@dataclass(frozen=True)
class Change:
    """Replaces `exp` by something else."""

    make: Callable[[Builder, Node], Node]
    name: ClassVar[str] = "change"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for node in facts.operations:
            if is_op(node, aten.exp.default) and "rewritten_by" not in node.meta:

                def build(builder: Builder, node: Node = node) -> list[Node]:
                    return [self.make(builder, node)]

                yield Rewrite(self.name, "exp → other", source_line(node), node, (node,), build)


def wrong(build: Builder, node: Node) -> Node:
    return build.call(aten.exp2.default, node.args[0])


def same(build: Builder, node: Node) -> Node:
    return build.call(aten.exp.default, node.args[0])


def other_shape(build: Builder, node: Node) -> Node:
    return build.call(aten.select.int, node.args[0], 0, 0)


def raises(build: Builder, node: Node) -> Node:
    build.call(aten.neg.default, build.call(aten.exp.default, node.args[0]))
    raise RuntimeError("not today")


@dataclass(frozen=True)
class Fails:
    """Raises where it looks."""

    name: ClassVar[str] = "fails"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        raise LookupError("not today")


def test_a_pass_that_raises_leaves_the_others_alone() -> None:
    told = optimized(Fails(), measure=False)
    assert told["rewrites"]
    assert [d["reason"] for d in told["declined"] if d["pass_name"] == "fails"] == [
        "failed to propose (LookupError: not today)"]


def optimized(*passes: Any, **options: Any) -> dict[str, Any]:
    fast = looplift.apply_passes(Loop(), (torch.randn(2, 5, 3),), passes=(*ORDER, *passes),
                                 mode="inference", **options)
    return fast.report.to_dict()


def test_a_wrong_pass_is_dropped_and_the_others_are_kept() -> None:
    told = optimized(Change(wrong), measure=False)
    assert {r["pass_name"] for r in told["rewrites"]} == {
        "reroll-loops", "batch-timesteps", "lower-scans",
    }
    reasons = [d["reason"] for d in told["declined"] if d["pass_name"] == "change"]
    assert len(reasons) == 1
    assert "differs in output 0 (given inputs, inference" in reasons[0]


def wrong_for_nan(build: Builder, node: Node) -> Node:
    return build.call(aten.nan_to_num.default, same(build, node))


@dataclass(frozen=True)
class WhereLong(Change):
    """Replaces nothing in short programs."""

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        return (r for r in super().propose(facts)
                if isinstance(r, Rewrite) and max(shape(r.at)) > 32)


@pytest.mark.parametrize("change", [Change, WhereLong])
def test_what_is_wrong_in_a_long_loop_is_dropped(change: type[Change]) -> None:
    """Most cases are compared at a short length, if the same rewrites apply there."""
    short = mock.Mock(wraps=looplift.verify)
    with mock.patch.object(select, "verify", short):
        fast = looplift.apply_passes(Loop(), (torch.randn(2, 2000, 3),), measure=False,
                                     mode="inference", passes=(*ORDER, change(wrong_for_nan)))
    told = fast.report.to_dict()
    reasons = [d["reason"] for d in told["declined"] if d["pass_name"] == "change"]
    assert len(reasons) == 1
    assert "differs in output 0 (NaN in the inputs, inference" in reasons[0]
    assert {"reroll-loops", "batch-timesteps"} <= {r["pass_name"] for r in told["rewrites"]}
    assert "one program" in str(fast.report.signatures[0].lengths)
    given = [call.kwargs["short"] is not None for call in short.call_args_list]
    assert given == [change is Change, *[True] * (len(given) - 1)]


@pytest.mark.parametrize(("make", "reason"), [
    (other_shape, "ContractError: change replaced torch.float32[2, 5, 3] by torch.float32[5, 3]"),
    (raises, "could not be built (RuntimeError: not today)"),
])
def test_a_pass_that_breaks_is_declined(
    make: Callable[[Builder, Node], Node], reason: str
) -> None:
    told = optimized(Change(make), measure=False)
    assert any(reason in d["reason"] for d in told["declined"])
    assert told["rewrites"]


@pytest.mark.parametrize("make", [other_shape, raises])
def test_what_fails_leaves_the_graph_as_it_was(make: Callable[[Builder, Node], Node]) -> None:
    captured = capture(Loop(), (torch.randn(2, 5, 3),))
    graph_module = captured.graph_module
    before = list(graph_module.graph.nodes)
    [rewrite] = Change(make).propose(Facts(graph_module))
    assert isinstance(rewrite, Rewrite)
    with pytest.raises((RuntimeError, contract.ContractError)):
        apply._carry_out(graph_module, rewrite, captured.fake_mode)
    assert list(graph_module.graph.nodes) == before


def timed(ratios: Mapping[str, float]) -> Callable[..., Comparison]:
    """In place of the measurement: candidates whose name holds a key are that much faster."""

    def interleaved(candidates: Mapping[str, Any], *, mode: str = "", **_: Any) -> Comparison:
        timings = []
        for name in candidates:
            ratio = next((r for key, r in ratios.items() if key in name), 1.0)
            timings.append(Timing(name, 1 / ratio, ratio, ratio, ratio, ratio))
        return Comparison(mode, tuple(timings), 0.01, 5, 1)

    return interleaved


def test_a_rewrite_that_loses_is_dropped_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "interleaved", timed({"looplift": 2.0, "change": 1.5}))
    told = optimized(Change(same))
    assert "change" not in {r["pass_name"] for r in told["rewrites"]}
    reasons = [d["reason"] for d in told["declined"] if d["pass_name"] == "change"]
    assert reasons == ["loses: the model is 1.50x faster without it"]


def test_the_greatest_loser_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loses beside another rewrite may win without it."""

    def interleaved(candidates: Mapping[str, Any], **given: Any) -> Comparison:
        beside = any("batch" in name for name in candidates)
        ratios = {"looplift": 2.0, "batch": 1.5, "change": 1.2 if beside else 0.8}
        return timed(ratios)(candidates, **given)

    monkeypatch.setattr(select, "interleaved", interleaved)
    told = optimized(Change(same))
    assert "change" in {r["pass_name"] for r in told["rewrites"]}
    assert [d["pass_name"] for d in told["declined"] if "loses" in d["reason"]] \
        == ["batch-timesteps"]


@dataclass(frozen=True)
class Back:
    """Replaces `exp2` by `exp`."""

    name: ClassVar[str] = "back"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        for node in facts.operations:
            if is_op(node, aten.exp2.default):
                yield Rewrite(self.name, "exp2 → exp", source_line(node), node, (node,),
                              lambda b, node=node: [same(b, node)])  # type: ignore[misc]


def test_what_is_only_right_together_is_kept_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "interleaved", timed({"looplift": 2.0, "back": 1.5}))
    told = optimized(Change(wrong), Back())
    assert {"change", "back"} <= {r["pass_name"] for r in told["rewrites"]}
    assert not [d for d in told["declined"] if "differs" in d["reason"]]


def test_what_each_call_looks_at_counts_as_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    counted: dict[str, int] = {}

    def interleaved(candidates: Mapping[str, Any], **given: Any) -> Comparison:
        for name, run in candidates.items():
            looked.clear()
            run()
            counted.update({name: len(looked)} if "naive" in candidates else {})
        return timed({"looplift": 2.0})(candidates, **given)

    def version(watched: Watched) -> int:
        looked.append(1)
        return 0

    monkeypatch.setattr(select, "interleaved", interleaved)
    monkeypatch.setattr(Watched, "version", version)
    optimized()
    assert counted == {"naive": 0, "looplift": 1}


def test_worth_is_the_time_without_over_the_time_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "interleaved", timed({"looplift": 2.0, "batch": 0.5}))
    worth = {r["pass_name"]: r["worth"] for r in optimized()["rewrites"]}
    assert worth["batch-timesteps"] == 2.0
    assert worth["lower-scans"] is None


def test_nothing_is_kept_that_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "interleaved", timed({}))
    model, x = Loop(), torch.randn(2, 5, 3)
    fast = looplift.apply_passes(model, (x,), mode="inference")
    told = fast.report.to_dict()
    assert told["rewrites"] == []
    assert any("no gain: 1.00x naive" in d["reason"] for d in told["declined"])
    assert fast.code == ""
    assert torch.equal(fast(x), model(x))


def test_what_needs_too_much_memory_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "interleaved", timed({"looplift": 2.0}))
    weights = {"Loop": 100_000_000, "Rewritten": 200_000_000}
    monkeypatch.setattr(select._Selecting, "_weigh",
                        lambda self, module: weights[type(module).__name__])
    told = optimized()
    assert told["rewrites"] == []
    assert any("needs 2.00x the naive peak memory (allowed: 1.25x)" in d["reason"]
               for d in told["declined"])
    kept = optimized(memory_budget=3.0)
    assert kept["rewrites"]


def test_a_busy_machine_is_judged_by_its_best_rounds() -> None:
    timing = Timing("looplift", 1.0, 0.7, 0.5, 2.0, 1.9)
    busy, quiet = (Comparison("inference", (timing,), noise, 5, 2) for noise in (0.3, 0.01))
    assert (busy.gain("looplift"), quiet.gain("looplift")) == (1.9, 0.7)
    assert headline(mode_report(busy)).plain.startswith(
        "1.90x as fast as naive in the fastest rounds of a busy machine (median 0.70x), ")
    assert headline(mode_report(quiet)).plain.startswith("0.70x as fast as naive, ")


def test_a_reason_that_several_rewrites_share_is_told_once() -> None:
    declined = tuple(select.Declined(name, "a.py:1", reason)
                     for name, reason in (("one", "no gain"), ("two", "no gain"), ("three", "no")))
    report = Report("Loop", {}, [SignatureReport((), False, 0.0, None, (ModeReport(
        "inference", (), declined, select.NOTHING, None, (1, 1), 0.0),))])
    for shown in (as_text(report), as_html(report)):
        assert (shown.count("no gain"), shown.count("as above")) == (1, 1)


def test_a_line_that_several_rewrites_share_is_shown_once() -> None:
    rows = tuple(RewriteRow(name, where, f"text of {where[0]}", "", 1, "", None)
                 for name, where in (("one", "a.py:1"), ("two", "b.py:2"), ("three", "a.py:1")))
    report = Report("Loop", {}, [SignatureReport((), False, 0.0, None, (ModeReport(
        "inference", rows, (), select.NOTHING, None, (1, 1), 0.0),))])
    for shown in (as_text(report), as_html(report)):
        assert (shown.count("text of a"), shown.count("text of b")) == (1, 1)
        assert shown.count("a.py:1") == 2


def mode_report(comparison: Comparison) -> ModeReport:
    kept = RewriteRow("one", "a.py:1", "", "", 1, "", None)
    return ModeReport("inference", (kept,), (), select.NOTHING, comparison, (1, 1), 0.0)


def test_what_is_not_kept_is_not_shown_as_what_runs() -> None:
    timing = Timing("looplift", 1.0, 0.7, 0.5, 2.0, 1.9)
    comparison = Comparison("inference", (timing,), 0.01, 5, 2)
    nothing = ModeReport("inference", (), (), select.NOTHING, comparison, (1, 1), 0.0)
    for mode, count in ((nothing, 1), (mode_report(comparison), 0)):
        report = Report("Loop", {}, [SignatureReport((), False, 0.0, None, (mode,))])
        for shown in (as_text(report), as_html(report)):
            assert shown.count("looplift, not kept") == count
