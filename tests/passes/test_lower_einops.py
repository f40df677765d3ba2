"""einsum becomes matmul, multiply or sum, in the cheapest order."""

from __future__ import annotations

from typing import Any

import looplift
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looplift.models import hyper_connections
from looplift.optimizer.facts import aten, is_op
from looplift.passes.lower_einops import LowerEinops
from torch import Tensor, nn

EQUATIONS = (
    "ij,jk->ik", "ij,jk", "bij,bjk->bik", "...a,b->...ba", "a,...ab->...b", "ab,...ac->...bc",
    "ij->ji", "ij->j", "ij->", "ij,ij->", "ij,kl->ijkl", "ab,bc,cd->ad", "bhid,bhjd->bhij",
    "...i,...i->...", "i,i->", "bsd,std->btd", "fsgt,bnfsd->bngtd", "abc,cd,abe->de",
    "aib,bj,j->ai", "...ij,...jk->...ik", "i...,i...->...", "ij,j->i", "ab,cb->ac", "n,nm,m->",
    "bij,jk->bik", "ijb,jk->ikb", "ij,kj->ki", "abcd,cd->ba",
)


class Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *operands: Tensor) -> Tensor:
        return torch.einsum(self.equation, *operands)


def operands(equation: str, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = []
    for term in equation.split("->")[0].split(","):
        shape: list[int] = []
        rest = term
        while rest:
            letter, rest = ("...", rest[3:]) if rest.startswith("...") else (rest[0], rest[1:])
            shape += [2, 3] if letter == "..." else [sizes[letter]]
        shapes.append(shape)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


PRIMES = dict(
    zip("abcdefghijklmnst", (2, 3, 5, 7, 2, 3, 5, 7, 3, 5, 2, 7, 2, 3, 5, 2), strict=True)
)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_fires(equation: str, run: Any) -> None:
    outcome = run(Einsum(equation), operands(equation, PRIMES), [LowerEinops()])
    assert len(outcome.applied) == 1
    assert not any(is_op(n, aten.einsum.default) for n in outcome.graph_module.graph.nodes)


@pytest.mark.parametrize("equation", ["ab,...ac->...bc", "ab,bc,cd->ad", "...a,b->...ba"])
def test_golden(equation: str, run: Any, golden: Any) -> None:
    outcome = run(Einsum(equation), operands(equation, PRIMES), [LowerEinops()])
    golden(f"lower_einops_{EQUATIONS.index(equation)}", outcome)


def test_skips(run: Any) -> None:
    outcome = run(Einsum("ii->i"), (torch.randn(3, 3),), [LowerEinops()])
    assert [s.reason for s in outcome.skips] == ["'ii->i' takes a diagonal"]


@pytest.mark.parametrize("equation", EQUATIONS)
@settings(max_examples=3, deadline=None)
@given(drawn=st.lists(st.sampled_from([1, 2, 3]), min_size=16, max_size=16))
def test_same_values_and_gradients(equation: str, drawn: list[int]) -> None:
    sizes = dict(zip("abcdefghijklmnst", drawn, strict=True))
    fast = looplift.apply_passes(Einsum(equation), operands(equation, sizes), measure=False)
    reasons = [d["reason"] for d in fast.report.to_dict()["declined"]]
    assert not [r for r in reasons if "differs" in r or "could not" in r], reasons


def test_keeps_the_contract(keeps_contract: Any) -> None:
    for equation in ("bij,bjk->bik", "ab,...ac->...bc", "ij,j->i"):
        keeps_contract(Einsum(equation), operands(equation, PRIMES))


def test_the_cheapest_order(run: Any) -> None:
    """(100, 2)·(2, 100)·(100, 2): from the right 800 multiplications, from the left 40,000."""
    shapes = (torch.randn(100, 2), torch.randn(2, 100), torch.randn(100, 2))
    outcome = run(Einsum("ab,bc,cd->ad"), shapes, [LowerEinops()])
    largest = max(n.meta["val"].numel() for n in outcome.graph_module.graph.nodes
                  if n.op == "call_function")
    assert largest == 200


def test_hyper_connections_are_left_without_einsum(run: Any, golden: Any) -> None:
    outcome = run(hyper_connections.model("tiny"), hyper_connections.example_inputs("tiny"))
    assert not any(is_op(n, aten.einsum.default) for n in outcome.graph_module.graph.nodes)
    golden("hyper_connections", outcome)


@pytest.mark.parametrize(("equation", "shapes"), [
    ("bhid,bhjd->bhij", [(1, 2, 5, 4), (3, 2, 6, 4)]), ("cb,bcad->", [(3, 4), (4, 1, 2, 4)]),
    ("ab,bc,cd->ad", [(2, 1), (3, 4), (1, 5)]), ("ij,j->i", [(2, 3), (1,)]),
    ("ij,ij->ij", [(2, 1), (1, 3)]), ("...i,...i->...", [(1, 4, 3), (2, 1, 3)]),
])
def test_axes_of_one_repeat(equation: str, shapes: list[tuple[int, ...]], equal: Any) -> None:
    inputs = tuple(torch.randn(s, requires_grad=True) for s in shapes)
    fast = equal(Einsum(equation), inputs)
    torch.testing.assert_close(fast(*inputs), torch.einsum(equation, *inputs))
