"""The functions and operators that the emitted source uses call the very overloads of the graph."""

from __future__ import annotations

import operator
import subprocess
import sys
from typing import Any

import pytest
import torch
from looplift import apply_passes
from looplift.optimizer import emit
from looplift.optimizer.emit import FUNCTIONAL, INFIX, LARGE, METHODS, TORCH_FUNCTIONS, compiled
from looplift.optimizer.measure import call, peak_memory
from looplift.passes import ORDER
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils import _pytree as pytree

X, Y = torch.rand(3, 3) + 0.5, torch.rand(3, 3) + 0.5
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "full": ([3, 4], 0.5), "zeros": ([3, 4],), "ones": ([3, 4],),
    "reshape": (X, [9]), "permute": (X, [1, 0]), "expand": (X, [2, 3, 3]), "unsqueeze": (X, 0),
    "select": (X, 0, 1), "unfold": (X, 0, 2, 1), "new_zeros": (X, [2]), "squeeze": (X, 0),
    "linear": (X, Y), "scaled_dot_product_attention": (X[None], Y[None], X[None]),
    "softmax": (X, -1), "log_softmax": (X, -1), "logsumexp": (X, [-1]), "amax": (X, [0]),
    "amin": (X, [0]), "stack": ([X, Y],), "cat": ([X, Y],), "where": (X > 1, X, Y),
    "cumsum": (X, 0), "bmm": (X[None], Y[None]), "addmm": (X, X, Y), "mm": (X, Y),
    "einsum": ("ij,jk->ik", [X, Y]), "layer_norm": (X, [3]), "flip": (X, [0]),
    "slice_scatter": (X, Y[:1], 0, 0, 1), "select_scatter": (X, Y[0], 0, 1),
    "index_select": (X, 0, torch.tensor([1])), "embedding": (X, torch.tensor([1])),
    "full_like": (X, 2.0), "rsub": (X, 1), "baddbmm": (X[None], X[None], Y[None]),
    "clamp": (X, 0, 1), "contiguous": (X.t(),), "addcmul": (X, X, Y),
    "split_with_sizes": (X, [1, 2]),
}
OVERLOADS: dict[Any, tuple[Any, ...]] = {
    torch.ops.aten.sum.dim_IntList: (X, [0]), torch.ops.aten.mean.dim: (X, [0]),
    torch.ops.aten.pow.Tensor_Scalar: (X, 2),
}


def arguments(target: Any) -> tuple[Any, ...]:
    if target in OVERLOADS:
        return OVERLOADS[target]
    if target._opname in ARGUMENTS:
        return ARGUMENTS[target._opname]
    if target._overloadname == "Scalar":
        return (X, 2)
    binary = target._overloadname == "Tensor" or target._opname in ("matmul", "maximum", "minimum")
    return (X, Y) if binary else (X,)


@pytest.mark.parametrize(
    "target", sorted({*INFIX, *METHODS, *FUNCTIONAL, *TORCH_FUNCTIONS}, key=str), ids=str
)
def test_calls_the_same_overload(target: Any) -> None:
    leaves, spec = pytree.tree_flatten(arguments(target))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def call(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return [target(*pytree.tree_unflatten(filled, spec))]

    inputs = [leaves[i] for i in places]
    graph_module = make_fx(call, pre_dispatch=True)(*inputs)
    assert called(graph_module) == [target]
    for node in graph_module.graph.nodes:
        node.meta.setdefault("val", None)
    run, source = compiled(graph_module)
    again = make_fx(run, pre_dispatch=True)(*inputs)
    assert called(again) == [target], source


def called(graph_module: torch.fx.GraphModule) -> list[Any]:
    """The operators that are called; a tuple's items are no call."""
    targets = [n.target for n in graph_module.graph.nodes if n.op == "call_function"]
    return [t for t in targets if t is not operator.getitem]


def test_a_split_into_one_piece() -> None:
    run, source = compiled(make_fx(lambda x: torch.split(x, [3], 0)[0] + 1)(X))
    assert "split([3])" in source or "split([3], 0)" in source
    assert torch.equal(run(X), X + 1)


def test_names_do_not_collide() -> None:
    from torch.fx import symbolic_trace

    def forward(sum: torch.Tensor, torch_: torch.Tensor) -> Any:
        return [sum + torch_, sum - torch_]

    graph_module = symbolic_trace(forward)
    run, source = compiled(graph_module)
    assert [r.tolist() for r in run(X, Y)] == [(X + Y).tolist(), (X - Y).tolist()], source


class Chain(nn.Module):
    """Many small values, each soon used no more, then a recurrence over large steps."""

    def forward(self, x: Tensor) -> Tensor:
        x = ((((x * 2 + 1).exp() - 3).tanh() * 0.5 + 2).log() - 0.7).sigmoid()
        x = ((((x * 3 + 1).sin() - 3).cos() * 0.7 + 2).sqrt() - 0.7).relu()
        h, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t])
            outputs.append(h)
        return torch.stack(outputs, 1)


def test_memory_is_freed_as_early_as_in_the_model() -> None:
    model, x = Chain(), torch.randn(4, 16, 128)
    fast = apply_passes(model, (x,), measure=False, verify=False, mode="inference")
    assert fast.report.to_dict()["rewrites"]
    naive, ours = (peak_memory(call(m, (x,), {}, False), x.device) for m in (model, fast))
    assert ours <= naive + LARGE


class Ring(nn.Module):
    """A loop whose steps make large values out of large ones, twice in a row."""

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, 0]
        for _ in range(2):
            total = torch.zeros_like(y)
            for t in range(x.shape[1]):
                scores = torch.softmax(((x[:, t] @ y) * 0.1).exp() - 1, -1)
                total = total * 0.5 + scores @ y
            y = total.tanh()
        return y


def test_what_a_step_of_a_loop_made_is_freed_as_in_the_model() -> None:
    model, x = Ring(), torch.randn(1, 6, 160, 160)
    passes = [p for p in ORDER if p.name in ("reroll-loops", "lower-scans")]
    fast = apply_passes(model, (x,), passes=passes, measure=False, mode="inference")
    assert "for slice_0 in" in fast.code
    naive, ours = (peak_memory(call(m, (x,), {}, False), x.device) for m in (model, fast))
    assert ours <= naive + LARGE


def parts_beside(x: Tensor) -> Tensor:
    """Each step's results are a view of what it reads, and a value that is also its state."""
    total, parts = x[:, 0].flatten(1), []
    for t in range(x.shape[1]):
        part = x[:, t].flatten(1)
        total = torch.sin(total + part.sigmoid())
        parts.append(torch.cat([part, total], 1))
    return torch.stack(parts, 1) + total[:, None].repeat(1, 1, 2)


def parts_kept(x: Tensor) -> Tensor:
    kept, last = [], x[:, 0].flatten(1)
    for t in range(x.shape[1]):
        kept.append(x[:, t].flatten(1))
        last = torch.tanh(last) * kept[-1]
    return torch.stack(kept, 1) * last[:, None]


@pytest.mark.parametrize("run", [parts_beside, parts_kept])
@pytest.mark.parametrize("passes", [("reroll-loops", "lower-scans"), tuple(p.name for p in ORDER)])
def test_what_is_deleted_is_there_and_read_no_more(
    run: Any, passes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emit, "LARGE", 0)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = run(x)
            return result

    model, x = Model(), torch.randn(2, 10, 3, 4)
    fast = apply_passes(model, (x,), passes=[p for p in ORDER if p.name in passes], measure=False)
    told = fast.report.to_dict()
    assert told["rewrites"]
    assert not [d for d in told["declined"] if "differs" in d["reason"]]
    torch.testing.assert_close(fast(x), model(x))


class ReadTwice(nn.Module):
    """What the loop reads, and its states, are read again after it, by other steps."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.joint = nn.Parameter(torch.randn(1, 2, 3)), nn.Linear(8, 4)
        self.gate, self.schedule = nn.Parameter(torch.randn(4)), [0.1 * t for t in range(20)]

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.ones(len(x), 4, dtype=x.dtype), []
        for t in range(0, x.shape[1], 3):
            now = x[:, t]
            both = torch.cat([now[:, None], h[:, None]], 1)
            near = functional.conv1d(both, self.kernel[:, :2], padding=1)[:, 0]
            torch.cat([h, near], -1) @ self.joint.weight.t()  # which nobody reads
            h = torch.sigmoid(self.gate) * h + now
            outputs.append((torch.tanh(near.t().contiguous().t()) * self.schedule[t]).unsqueeze(1))
        return torch.cat(outputs, dim=1)


def test_what_a_loop_reads_is_not_deleted_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emit, "LARGE", 0)
    model, x = ReadTwice().double(), torch.randn(3, 10, 4).double()
    fast = apply_passes(model, (x,), measure=False)
    told = fast.report.to_dict()
    assert told["rewrites"]
    assert not [d for d in told["declined"] if "differs" in d["reason"]]
    torch.testing.assert_close(fast(x), model(x))


def test_emit_needs_no_kernels() -> None:
    """The machine writes source without the passes, and so without their operators."""
    program = """
import torch
from looplift.optimizer.capture import capture
from looplift.optimizer.emit import emit
print(emit(capture(torch.nn.Linear(2, 2), (torch.ones(1, 2),)).graph_module))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False)
    assert "torch.nn.functional.linear" in done.stdout, done.stderr
