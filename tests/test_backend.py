"""`torch.compile(model, backend="looplift")`: equal to eager, and rewritten."""

import copy
import inspect
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from looplift import backend
from looplift.optimizer.refused import CaptureError
from looplift.passes import ORDER
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional
from torch.testing import assert_close

Backend = Callable[[GraphModule, Sequence[Any]], Any]
EAGER: dict[str, Any] = {"inner_backend": "eager"}
X = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    torch._dynamo.reset()


class Recurrent(nn.Module):
    """A loop that is always rewritten: (B, T, 3) to (B, T, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.decay = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Any:
        h, outputs = x.new_zeros(x.shape[0], 5), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(x[:, t]) + h * self.decay)
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


class GruCell(Recurrent):
    """A loop over torch's own cell."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRUCell(3, 5)

    def forward(self, x: Tensor) -> Any:
        h, outputs = x.new_zeros(x.shape[0], 5), []
        for t in range(x.shape[1]):
            h = self.gru(x[:, t], h)
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


class Gru(Recurrent):
    """torch's own layer, which Dynamo does not trace by default."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 5, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.gru(x)[0])


class Counting(Recurrent):
    """The loop, a buffer written to, batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.count = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.count.add_(1)
        y = self.norm(super().forward(x).flatten(0, 1)) * self.count
        return functional.dropout(y, 0.5, self.training)


class Breaking(Recurrent):
    """Two graphs, with a decision on data between them."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        factor = 2 if y.sum() > 0 else 3
        return super().forward(x + factor) + y.sum()


class Fixed(Recurrent):
    """The loop, with a region without gradients before it."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            shift = self.cell(x).mean()
        return super().forward(x) - shift


class Several(Recurrent):
    """The loop; outputs that are views of one another and of the input; a Python number."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"y": y, "views": (y.transpose(0, 1), x.view(-1))}, x.shape[1]


class Writing(Recurrent):
    """The loop over an input that it writes to."""

    def forward(self, x: Tensor) -> Any:
        x.add_(1)
        return super().forward(x)


class TripledGradient(torch.autograd.Function):
    """The identity, with three times its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 3


class OwnGradient(Recurrent):
    """The loop, then a function with its own backward."""

    def forward(self, x: Tensor) -> Any:
        return TripledGradient.apply(super().forward(x))  # type: ignore[no-untyped-call]


def rendered_early(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
    """The backend on a graph whose source is rendered already, as Dynamo's lazily is."""
    assert graph_module.code
    return backend.looplift(graph_module, example_inputs, options=EAGER)


def compiled(model: Any, door: str = "by name", **options: Any) -> Any:
    if door == "by name":
        return torch.compile(model, backend="looplift", options=EAGER, **options)
    return torch.compile(model, backend=rendered_early, **options)


DOORS = pytest.mark.parametrize("door", ["by name", "rendered early"])
MODELS = [Recurrent, GruCell, Gru, Counting, Breaking, Fixed, Several, Writing, OwnGradient]


def seen(model: nn.Module, run: Callable[[Tensor], Any], training: bool) -> list[Any]:
    """Outputs, gradients, the input and the buffers after three calls with other inputs each."""
    found: list[Any] = []
    for k in range(3):
        torch.manual_seed(k)
        leaf = (X * (k + 1)).requires_grad_(training)
        x = leaf.clone()
        with torch.set_grad_enabled(training):
            result = run(x)
        found += [result, x]
        if training:
            y = result if isinstance(result, Tensor) else result[0]["y"]
            found += torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()],
                                         allow_unused=True, materialize_grads=True)
    return [*found, dict(model.named_buffers())]


@DOORS
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_equal_to_eager(kind: type[Recurrent], training: bool, door: str) -> None:
    model = kind()
    naive = copy.deepcopy(model)
    fast = compiled(model, door)
    assert_close(seen(model, fast, training), seen(naive, naive, training), rtol=1e-5, atol=1e-5)


class Detaching(Recurrent):
    """A state, and views of it without its gradient."""

    def forward(self, x: Tensor) -> Any:
        h, outputs = x.new_zeros(x.shape[0], 5), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(x[:, t]) + h * self.decay)
            outputs.append(h)
        return h.detach(), torch.stack(outputs, 1), h, h[:, 1:3].detach()


@pytest.mark.parametrize("inner_backend", ["aot_eager", "inductor"])
def test_what_is_detached_stays_detached(inner_backend: str) -> None:
    model, x = Detaching(), torch.randn(2, 20, 3)
    fast = torch.compile(model, backend="looplift", options={"inner_backend": inner_backend})
    made = []
    for run in (model, fast):
        found = run(x)
        model.zero_grad()
        sum(o.sin().sum() for o in found if o.requires_grad).backward()
        made.append((found, [p.grad.clone() for p in model.parameters() if p.grad is not None],
                     [o.requires_grad for o in found]))
    assert_close(made[1], made[0], rtol=1e-4, atol=1e-5)


@DOORS
def test_dynamic_batches_and_changing_lengths(door: str) -> None:
    model = Recurrent()
    fast = compiled(model, door, dynamic=True)
    for batch, steps in [(2, 6), (3, 6), (5, 6), (5, 4), (1, 4)]:
        x = torch.randn(batch, steps, 3)
        assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


@DOORS
def test_sizes_as_inputs(door: str) -> None:
    fast = compiled(fold, door, dynamic=True)
    for rows in (2, 3, 4, 6):
        assert_close(fast(torch.ones(12), rows), fold(torch.ones(12), rows))


@DOORS
def test_autocast(door: str) -> None:
    model = Recurrent()
    fast = compiled(model, door)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(X).dtype == torch.bfloat16
        assert_close(fast(X), model(X), rtol=0.02, atol=0.02)
    assert fast(X).dtype == torch.float32


# What happens in between


names = itertools.count()


@dataclass
class Inner:
    """An inner backend, registered under `name`, that notes what it is given."""

    result: Callable[[GraphModule], Any] = lambda graph_module: graph_module.forward
    name: str = field(default_factory=lambda: f"watching_{next(names)}")
    graphs: list[GraphModule] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        def watch(graph_module: GraphModule, inputs: Any, **options: Any) -> Any:
            self.graphs.append(graph_module)
            self.options.append(options)
            return self.result(graph_module)

        torch._dynamo.register_backend(watch, name=self.name)

    def linears(self) -> int:
        """Calls of linear in all graphs, however they are written."""
        nodes = [n for g in self.graphs for n in g.graph.nodes if n.op == "call_function"]
        return sum("linear" in str(n.target) for n in nodes)


@pytest.fixture
def inner() -> Inner:
    return Inner()


def test_listed() -> None:
    assert "looplift" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("looplift") is backend.looplift


def test_graphs_are_rewritten_once_their_source_is_rendered(inner: Inner) -> None:
    def through(graph_module: GraphModule, inputs: Sequence[Any]) -> Any:
        assert graph_module.code
        return backend.looplift(graph_module, inputs, options={"inner_backend": inner.name})

    model = Recurrent()
    assert_close(torch.compile(model, backend=through)(X), model(X), rtol=1e-5, atol=1e-6)
    assert inner.linears() == 2  # one for all cells, one for all heads


def test_what_the_inner_backend_returns_is_returned() -> None:
    inner = Inner(lambda graph_module: graph_module)
    graph_module = torch.fx.symbolic_trace(nn.Linear(3, 2))
    result = backend.looplift(graph_module, [X[0]], options={"inner_backend": inner.name})
    assert isinstance(result, GraphModule)
    assert result is inner.graphs[0]


def test_mode_and_other_options_go_to_the_inner_backend(inner: Inner) -> None:
    graph_module = torch.fx.symbolic_trace(nn.Linear(3, 2))
    options = {"inner_backend": inner.name, "max_autotune": True}
    backend.looplift(graph_module, [X[0]], mode="reduce-overhead", options=options)
    backend.looplift(graph_module, [X[0]], options={"inner_backend": inner.name})
    assert inner.options == [{"mode": "reduce-overhead", "options": {"max_autotune": True}}, {}]


def test_an_unknown_inner_backend() -> None:
    with pytest.raises(Exception, match="nowhere"):
        torch.compile(Recurrent(), backend="looplift", options={"inner_backend": "nowhere"})(X)


class Raising:
    """A pass with a bug."""

    name = "raise-always"

    def propose(self, facts: Any) -> Any:
        raise RuntimeError("a bug in a pass")


def test_a_pass_that_raises_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "ORDER", (*ORDER, Raising()))
    model = Recurrent()
    with caplog.at_level(logging.ERROR, logger="looplift"):
        assert_close(compiled(model, "rendered early")(X), model(X))
    assert all("the others go on" in record.message for record in caplog.records)
    assert "a bug in a pass" in str(caplog.records[0].exc_info)


def test_a_failure_leaves_the_graph_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("a bug in the pipeline")

    monkeypatch.setattr(backend, "run_passes", fails)
    model = Recurrent()
    with caplog.at_level(logging.ERROR, logger="looplift.backend"):
        assert_close(compiled(model, "rendered early")(X), model(X), rtol=0, atol=0)
    (record,) = caplog.records
    assert "compiled as it was" in record.message
    assert "a bug in the pipeline" in str(record.exc_info)


def test_a_graph_that_cannot_be_captured_is_compiled_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise CaptureError("not this one")

    monkeypatch.setattr(backend, "capture", refuse)
    model = Recurrent()
    with caplog.at_level(logging.WARNING, logger="looplift.backend"):
        assert_close(compiled(model)(X), model(X), rtol=0, atol=0)
    assert [r.message for r in caplog.records] == ["looplift could not capture a graph: "
                                                   "not this one"]


COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), "")
compiler = pytest.mark.skipif(not COMPILER, reason="Inductor needs a C++ compiler")


@compiler
def test_inductor_is_the_default() -> None:
    model = Recurrent()
    fast = torch.compile(model, backend="looplift")
    with torch.no_grad():
        assert_close(fast(X[:, :3]), model(X[:, :3]), rtol=1e-4, atol=1e-5)


def test_graphs_are_rewritten(inner: Inner) -> None:
    torch.compile(Recurrent(), backend="looplift", options={"inner_backend": inner.name})(X)
    assert inner.linears() == 2


def test_nothing_is_logged_for_a_plain_loop(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="looplift.backend"):
        compiled(Recurrent())(X)
    assert caplog.records == []


def fold(x: Tensor, rows: int) -> Tensor:
    return x.reshape(rows, -1) * rows + torch.arange(rows)[:, None]


def through(inner: Inner, given: list[str] | None = None) -> Backend:
    """The backend; it notes the graphs that it is given."""
    def run(graph_module: GraphModule, inputs: Sequence[Any]) -> Any:
        if given is not None:
            given.append(str(graph_module.graph))
        return backend.looplift(graph_module, inputs, options={"inner_backend": inner.name})

    return run


def marked(x: Tensor) -> Tensor:
    torch._dynamo.mark_dynamic(x, 0)
    return x


@pytest.mark.parametrize(
    ("run", "inputs"), [(fold, (torch.ones(12), 3)), (Recurrent(), (marked(X.clone()),))],
    ids=["nothing to rewrite", "a size that the user marked"],
)
def test_sizes_stay_symbolic(
    run: Callable[..., Tensor], inputs: tuple[Any, ...], inner: Inner,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given: list[str] = []
    with caplog.at_level(logging.WARNING, logger="looplift.backend"):
        result = torch.compile(run, backend=through(inner, given), dynamic=True)(*inputs)
    assert_close(result, run(*inputs), rtol=0, atol=0)
    assert [str(g.graph) for g in inner.graphs] == given
    assert len(given) == 1
    assert caplog.records == []


def test_a_loop_is_rewritten_for_the_sizes_of_the_call_then_they_stay_symbolic(
    inner: Inner
) -> None:
    model, given = Recurrent(), list[str]()
    fast = torch.compile(model, backend=through(inner, given))
    for batch in (2, 3, 4, 5, 6, 7, 9):
        x = torch.randn(batch, 6, 3)
        assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
        assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    rewritten = [str(g.graph) not in given for g in inner.graphs]
    assert rewritten == [True] * 4 + [False]  # half of Dynamo's recompile_limit of 8


def test_several_sizes_may_change_at_once(
    inner: Inner, caplog: pytest.LogCaptureFixture
) -> None:
    def run(rewards: Tensor, going_on: Tensor) -> Tensor:
        values, value = torch.empty_like(rewards), torch.zeros(())
        for t in reversed(range(rewards.shape[1])):
            value = values[:, t] = rewards[:, t] + value * going_on[:, t]
        return values

    given: list[str] = []
    fast = torch.compile(run, backend=through(inner, given))
    for sizes in ((2, 24, 1), (3, 20, 1), (4, 30, 1)):
        inputs = torch.randn(sizes), torch.rand(sizes)
        assert_close(fast(*inputs), run(*inputs))
    assert [str(g.graph) not in given for g in inner.graphs] == [True] * 3
    assert not [r for r in caplog.records if r.name.startswith("looplift")]


def test_numbers_among_the_inputs_keep_their_places(inner: Inner) -> None:
    def run(n: int, x: Tensor, m: int) -> Tensor:
        model = functional.linear
        h = x.new_zeros(x.shape[0], 3)
        for t in range(x.shape[1]):
            h = torch.tanh(model(x[:, t], torch.eye(3)) * n + h * m)
        return h

    for n, m in [(2, 3), (4, 3), (4, 5)]:
        fast = torch.compile(run, backend=through(inner), dynamic=True)
        assert_close(fast(n, X, m), run(n, X, m))


def test_a_graph_module_is_returned() -> None:
    graph_module = torch.fx.symbolic_trace(nn.Linear(3, 2))
    result = backend.looplift(graph_module, [X[0]], options=EAGER)
    assert not inspect.ismethod(result)


@compiler
@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"},
                                   {"options": {"max_autotune": False}}], ids=["mode", "options"])
def test_inductor_takes_mode_and_options(given: dict[str, Any]) -> None:
    double = torch.compile(lambda x: x * 2, backend="looplift", **given)
    assert_close(double(X), X * 2)
