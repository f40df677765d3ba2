"""What bounds the integers of a loop: never less than what its steps compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looplift.optimizer import integers
from looplift.optimizer.builder import output_node, placeholders
from looplift.optimizer.integers import fit
from looplift.optimizer.pointwise import Unsupported
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
MOST, STEPS = 60, 40
PARTS = (
    "n", "k", "n", "k", "3", "-2", "1", "mask", "(x * 3).round().long().clamp(-4, 5)",
    "({0} + {1})", "({0} - {1})", "({0} * {1})", "(-{0})", "{0}.abs()", "{0}.clamp(min=-3)",
    "{0}.clamp(-9, 7)", "{0}.clamp(max=8)", "torch.maximum({0}, {1})", "torch.minimum({0}, {1})",
    "torch.where(mask, {0}, {1})", "torch.where(mask, 4, {0})", "({0} % 7)", "({0} // 3)",
    "{0}.masked_fill(mask, 6)", "(x > 0).sum()", "{0}.view(1).sum()", "x.argmax()",
)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    text = draw(st.sampled_from(PARTS[: 9 if depth == 0 else None]))
    if "{" not in text:
        return f"torch.tensor({text})" if text.strip("-").isdigit() else \
            "mask.long()" if text == "mask" else text
    return text.format(*(draw(expressions(depth - 1)) for _ in range(2)))


def body_of(step: Step) -> GraphModule:
    return make_fx(step, tracing_mode="fake")(
        torch.tensor(0), torch.tensor(0), torch.zeros(()))


def fits(step: Step, start: int) -> bool:
    body, outside = body_of(step), Graph()
    heads, results = placeholders(body), output_node(body).args[0]
    assert isinstance(results, tuple)
    given: dict[Node, Node | None] = dict.fromkeys(heads)
    for head in heads[:2]:
        given[head] = made = outside.call_function(torch.ops.aten.full.default, ([], start))
        made.meta["val"] = torch.tensor(start)
    states = dict(zip(heads[:2], results, strict=True))
    return fit(body.graph.nodes, given, states, STEPS, torch.float32)


@settings(deadline=None)
@given(one=expressions(), two=expressions(), start=st.integers(-5, 5), seed=st.integers(0, 9))
def test_no_integer_is_larger_than_it_may_be(one: str, two: str, start: int, seed: int) -> None:
    scope: dict[str, Step] = {}
    exec(f"import torch\ndef step(n, k, x):\n    mask = x > 0.3\n    return {one}, {two}", scope)
    step = scope["step"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "STEPS", 1)
        patch.setattr(integers, "EXACT", {torch.float32: MOST})
        if not fits(step, start):
            return
    generator = torch.Generator().manual_seed(seed)
    body = body_of(step)
    largest = 0

    class Watched(torch.fx.Interpreter):
        def run_node(self, n: Node) -> object:
            nonlocal largest
            made = super().run_node(n)
            if isinstance(made, Tensor) and made.dtype is torch.int64:
                largest = max(largest, int(made.abs().max()))
            return made

    n = k = torch.tensor(start)
    for _ in range(STEPS):
        n, k = Watched(body).run(n, k, torch.randn((), generator=generator))
    assert largest <= MOST, body.code


@pytest.mark.parametrize(("step", "start", "expected"), [
    (lambda n, k, x: (n + 1, k.clamp(-3, 3)), 0, True), (lambda n, k, x: (n + k, k), 1, False),
    (lambda n, k, x: (n * 2, k), 1, False), (lambda n, k, x: (n * 2, k), 0, True),
    (lambda n, k, x: (((n + k) == 1).long(), ((n + k) > 1).long()), 1, True),
  (lambda n, k, x: (n + 2, k), 0, False),
    (lambda n, k, x: ((n + 50) % 7, k), 0, True), (lambda n, k, x: ((n + 70) % 7, k), 0, False),
    (lambda n, k, x: (n, (x * 9).long() + 1), 0, False), (lambda n, k, x: (n, n), 61, False),
    (lambda n, k, x: (n, torch.where(x > 0, k, 3)), 60, True),
    (lambda n, k, x: (n.clamp(0, 40) - k.clamp(-30, 0), k), 0, False),
    (lambda n, k, x: (n.clamp(0, 40) + k.clamp(-30, 0), k), 0, True),
    (lambda n, k, x: ((x.expand(70) > 0).sum(), k), 0, False),
    (lambda n, k, x: ((x.expand(50) > 0).sum(), k), 0, True),
])
def test_which_fit(
    step: Step, start: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integers, "STEPS", 1)
    monkeypatch.setattr(integers, "EXACT", {torch.float32: MOST})
    assert fits(step, start) is expected


@pytest.mark.parametrize(("run", "expected"), [
    (lambda x: x.long(), True), (lambda x: x.double().long(), False),
    (lambda x: x.half().long(), True), (lambda x: x.long().int(), False),
    (lambda x: x.long().clamp(-9, 9).int(), True), (lambda x: x.long() - 1, False),
])
def test_numbers_rounded_before_the_loop(
    run: Callable[[Tensor], Tensor], expected: bool
) -> None:
    """float32 holds what is rounded of float32 and narrower numbers, however large."""
    outer = make_fx(run, tracing_mode="fake")(torch.zeros(()))
    (result,) = output_node(outer).all_input_nodes
    body = body_of(lambda n, k, x: (n, torch.minimum(k, n)))
    heads = placeholders(body)
    given: dict[Node, Node | None] = {heads[0]: result, heads[1]: result, heads[2]: None}
    assert fit(body.graph.nodes, given, {}, STEPS, torch.float32) is expected


def test_a_program_for_all_lengths_may_have_many_steps() -> None:
    assert fits(lambda n, k, x: (n + 255, k), 0)
    assert not fits(lambda n, k, x: (n + 257, k), 0)


def test_an_operation_that_kernels_have_no_rule_for() -> None:
    with pytest.raises(Unsupported, match="has no rule for"):
        fits(lambda n, k, x: (n ^ 1, k), 0)
