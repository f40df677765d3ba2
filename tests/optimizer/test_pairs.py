"""Complex numbers as pairs: PyTorch's values for all kinds of numbers, finite or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from looplift.optimizer.pairs import in_pairs, parted
from looplift.optimizer.pointwise import Unsupported
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

KINDS = torch.tensor([0.0, 1.5, -2.0, 0.3, float("inf"), -float("inf"), float("nan")])
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
FUNCTIONS: dict[str, Function] = {  # of two complex tensors and a real one
    "a * b": lambda a, b, x: a * b,
    "a * x": lambda a, b, x: a * x,
    "a * 0.1": lambda a, b, x: a * 0.1,
    "x * 1j": lambda a, b, x: x * 1j,
    "a + b": lambda a, b, x: a + b,
    "a + x": lambda a, b, x: a + x,
    "x - a": lambda a, b, x: x - a,
    "a + b / 2": lambda a, b, x: torch.add(a, b, alpha=0.5),
    "1 - a": lambda a, b, x: 1 - a,
    "a / x": lambda a, b, x: a / (x + 1),
    "a / 4": lambda a, b, x: a / 4,
    "-a": lambda a, b, x: -a,
    "exp": lambda a, b, x: torch.exp(a),
    "exp of an imaginary number": lambda a, b, x: torch.exp(x * 0.5j),
    "conjugate": lambda a, b, x: a.conj() * b,
    "where": lambda a, b, x: torch.where(x > 0, a, b),
    "where with a real one": lambda a, b, x: torch.where(x > 0, a, x),
    "polar": lambda a, b, x: torch.polar(x, x),
    "complex": lambda a, b, x: torch.complex(x, -x) * b,
    "real part": lambda a, b, x: a.real * x - a.imag,
    "as real": lambda a, b, x: torch.view_as_real(a).sum(-1),
    "as complex": lambda a, b, x: torch.view_as_complex(torch.stack([x, x + 1], -1)) * a,
    "to complex": lambda a, b, x: x.to(a.dtype) * a,
    "filled": lambda a, b, x: a + torch.full_like(a, 2 + 1j) + torch.ones_like(b),
    "views": lambda a, b, x: (a.reshape(7, -1).unsqueeze(0).transpose(1, 2)[:, 1:, 0].squeeze(0)),
    "sum": lambda a, b, x: a.reshape(7, -1).sum(0),
}


def traced(function: Function, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    one = torch.complex(*torch.cartesian_prod(KINDS, KINDS).unbind(-1)).to(dtype)
    real = KINDS.to(one.real.dtype).repeat(7 * 49)
    given = [one.repeat_interleave(49), one.repeat(49), real]
    graph_module = make_fx(lambda *args: (function(*args),), tracing_mode="fake")(*given)
    return graph_module, given


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_pairs_are_the_complex_numbers(name: str, dtype: torch.dtype) -> None:
    graph_module, given = traced(FUNCTIONS[name], dtype)
    want = FUNCTIONS[name](*given)
    found = in_pairs(graph_module)(*(part for t in given for part in parted(t)))
    assert_close(list(found), list(parted(want)), equal_nan=True)


def test_a_product_of_matrices() -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, dtype=torch.complex128), torch.randn(3, 2, dtype=torch.complex128),
             torch.randn(3, 3, dtype=torch.float64)]
    graph_module = make_fx(lambda a, b, x: (a @ x.to(a.dtype) @ b,), tracing_mode="fake")(*given)
    found = in_pairs(graph_module)(*(part for t in given for part in parted(t)))
    assert_close(list(found), list(parted(given[0] @ given[2].to(given[0].dtype) @ given[1])))


@pytest.mark.parametrize(("function", "reason"), [
    (lambda a, b, x: a / b, "divides by complex numbers"),
    (lambda a, b, x: a.sqrt(), "computes sqrt of complex numbers"),
    (lambda a, b, x: torch.ops.aten._to_copy(a, dtype=torch.float32), "drops an imaginary part"),
    (lambda a, b, x: torch.view_as_real(a).select(0, 1), "along another axis"),
])
def test_other_operations_have_a_reason(function: Function, reason: str) -> None:
    graph_module, _ = traced(function, torch.complex64)
    with pytest.raises(Unsupported, match=reason):
        in_pairs(graph_module)


def test_a_body_of_real_numbers_stays() -> None:
    graph_module, _ = traced(lambda a, b, x: x + 1, torch.complex64)
    for node in list(graph_module.graph.nodes)[:2]:
        graph_module.graph.erase_node(node)
    assert in_pairs(graph_module) is graph_module
