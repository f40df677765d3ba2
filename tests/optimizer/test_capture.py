"""Capture and `apply_passes` on what breaks other FX tools: effects, regions, hooks, odd inputs."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import looplift
import numpy as np
import pytest
import torch
from looplift import Equal, OptimizedModule, apply_passes, verify
from looplift.optimizer.capture import capture
from looplift.optimizer.contract import Seen
from looplift.optimizer.refused import CaptureError
from looplift.optimizer.rewritten import Rewritten
from looplift.optimizer.tracing import CALL, SCRIPTED
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Any]
State = dict[str, Any]


def known_bug(reason: str, *raises: type[Exception]) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, reason=reason, raises=raises or AssertionError)


class Program(nn.Module):
    """A function as a module; it is given the module, which holds the state, then the inputs."""

    def __init__(self, run: Run, state: State | None = None) -> None:
        super().__init__()
        self.run = run
        for name, held in (state or {}).items():
            if isinstance(held, Tensor) and not isinstance(held, nn.Parameter):
                self.register_buffer(name, held)
            else:
                setattr(self, name, held)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Recurrent(nn.Module):
    """A loop that is always rewritten: (B, T, 3) to (B, T, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.decay = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x.new_zeros(x.shape[0], 5), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(x[:, t]) + h * self.decay)
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


class Scaled(Recurrent):
    """The loop times a plain Python number."""

    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class Dropping(Recurrent):
    """The loop, then dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.5, self.training)


class Normalized(Recurrent):
    """The loop, then batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.norm(super().forward(x).flatten(0, 1))
        return normalized


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


X = random(2, 6, 3)
ROWS = random(4, 3)


def optimized(model: nn.Module, *inputs: Any, **options: Any) -> OptimizedModule:
    return apply_passes(model, inputs, measure=False, **options)


def rewritten(model: nn.Module, *inputs: Any, **options: Any) -> OptimizedModule:
    """`optimized`, and it did something."""
    fast = optimized(model, *inputs, **options)
    assert fast.graph_module is not None
    return fast


def failure(fast: OptimizedModule) -> str:
    return str(fast.report.signatures[0].failure)


def close(one: nn.Module, other: nn.Module, *inputs: Any) -> None:
    assert_close(one(*inputs), other(*inputs), rtol=1e-5, atol=1e-6)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# What a captured graph repeats


def weight() -> State:
    return {"weight": nn.Parameter(random(3, 3))}


def statistics() -> State:
    return {"norm": nn.BatchNorm1d(3)}


def counter() -> State:
    return {"count": torch.zeros(()), "memory": torch.zeros(3)}


def tied() -> State:
    table, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = table.weight
    return {"table": table, "head": head}


def in_place(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1).clamp_(min=0)
    y[:2] += x[:2]
    y[:, 0].mul_(3)
    return y


def into_slices(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[1:3] = x[:2] @ m.weight
    y.t()[0].copy_(x[:, 1])
    y.view(-1)[::2].add_(1)
    return y


def by_index(m: Any, x: Tensor, index: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[index] = x[:2]
    y.index_put_((index,), x[2:], accumulate=True)
    y.index_add_(0, index, x[:2])
    return y


def input_written(m: Any, x: Tensor) -> Tensor:
    x[:, 0] += 1
    return x * 2


def buffers_written(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    m.memory[1:] = x.detach().sum(0)[1:]
    result: Tensor = x * m.count + m.memory
    return result


def many_draws(m: Any, x: Tensor) -> Tensor:
    first, second = functional.dropout(x, 0.5), torch.rand_like(x)
    functional.dropout(x, 0.1)  # its result is unused, its draws are not
    third = torch.empty(3).uniform_()
    return first + second * torch.randn(3) + torch.bernoulli(second) + third


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = (x @ m.weight).mean()
    result: Tensor = x @ m.weight - shift
    return result


def regions_in_regions(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        fixed = x @ m.weight
        with torch.enable_grad():
            free = (x * m.weight[0]).sum()
        mixed = fixed + free
    result: Tensor = mixed * x + free
    return result


@torch.no_grad()
def decorated(x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix


def in_autocast(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        narrow = x @ m.weight
        with torch.autocast("cpu", enabled=False):
            wide = narrow.float() @ m.weight
    return narrow, wide


def nested(m: Any, pair: Any, other: Any, *, factor: float) -> Any:
    x = pair[0] * pair[1]["more"] + other[1]
    return {"x": (x * factor, [None, x + 1]), "factor": factor, "name": "n", "flag": True}


TRAPS: dict[str, tuple[Run, Callable[[], State], tuple[Any, ...]]] = {
    "operations in place": (in_place, dict, (ROWS,)),
    "copies into slices": (into_slices, weight, (ROWS,)),
    "index_put": (by_index, dict, (ROWS, torch.tensor([1, 3]))),
    "an input written to": (input_written, dict, (ROWS,)),
    "an input written to and returned": (lambda m, x: x.add_(1), dict, (ROWS,)),
    "buffers written to": (buffers_written, counter, (ROWS,)),
    "batch norm": (lambda m, x: m.norm(x), statistics, (ROWS,)),
    "batch norm called twice": (lambda m, x: m.norm(m.norm(x)), statistics, (ROWS,)),
    "dropout": (lambda m, x: functional.dropout(x, 0.5, m.training), dict, (ROWS,)),
    "many draws": (many_draws, dict, (ROWS,)),
    "no_grad": (without_gradient, weight, (ROWS,)),
    "enable_grad in no_grad": (regions_in_regions, weight, (ROWS,)),
    "no_grad as a decorator": (lambda m, x: decorated(x, m.weight) + x @ m.weight, weight, (ROWS,)),
    "autocast": (in_autocast, weight, (ROWS,)),
    "a checkpoint": (lambda m, x: checkpoint(lambda y: y @ m.weight, x, use_reentrant=False),
                     weight, (ROWS,)),
    "weight norm": (lambda m, x: m.layer(x), lambda: {
        "layer": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))}, (ROWS,)),
    "tied parameters": (lambda m, i: m.head(m.table(i)), tied, (torch.tensor([1, 2]),)),
    "the input itself": (lambda m, x: x, dict, (ROWS,)),
    "views of the input": (lambda m, x: (x.view(-1), x.t(), x[0]), dict, (ROWS,)),
    "one result twice": (lambda m, x: (y := x * 2, y), dict, (ROWS,)),
    "a result and a view of it": (lambda m, x: (y := x * 2, y.t()), dict, (ROWS,)),
    "a parameter": (lambda m, x: (x @ m.weight, m.weight, m.weight.t()), weight, (ROWS,)),
    "buffers only": (lambda m, x: x * m.memory, counter, (ROWS,)),
    "no state": (lambda m, x: x.softmax(-1), dict, (ROWS,)),
    "None": (lambda m, x, mask=None: x * 2 if mask is None else x * mask, dict, (ROWS, None)),
    "integers": (lambda m, x: x * 2 + x // 3, dict, (torch.arange(6),)),
    "complex numbers": (lambda m, x: x * x.conj() + x.real, dict,
                        (random(4, dtype=torch.complex64),)),
    "conjugate views": (lambda m, x: (x * 2).conj(), dict,
                        (random(4, dtype=torch.complex64).conj(),)),
    "booleans": (lambda m, x: ~x & x.roll(1), dict, (torch.tensor([True, False, True]),)),
    "no elements": (lambda m, x: x @ m.weight, weight, (torch.zeros(0, 3),)),
    "a number": (lambda m, x: x * 2, dict, (torch.tensor(3.0),)),
    "gaps between elements": (lambda m, x: (x @ m.weight).t(), weight, (random(3, 8)[:, ::2].t(),)),
    "an expanded input": (lambda m, x: x * 2, dict, (random(3, 1).expand(3, 4),)),
    "half precision": (lambda m, x: x.softmax(-1), dict, (ROWS.bfloat16(),)),
    "torch's attention": (lambda m, x: m.layer(x, x, x)[0], lambda: {
        "layer": nn.MultiheadAttention(4, 2, dropout=0.1)}, (random(5, 2, 4),)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("trap", TRAPS)
def test_captured_graphs_repeat_everything(trap: str, training: bool) -> None:
    run, state, inputs = TRAPS[trap]
    program = Program(run, state()).train(training)
    captured = capture(program, inputs)
    verdict = verify(program, Rewritten(program, captured, captured.graph_module), inputs)
    assert isinstance(verdict, Equal), str(verdict)


def test_keywords_nested_inputs_and_outputs_of_any_kind() -> None:
    program, factor = Program(nested), 2.5
    inputs = (ROWS, {"more": ROWS + 1}), [None, 3]
    captured = capture(program, inputs, {"factor": factor})
    graph = Rewritten(program, captured, captured.graph_module)
    assert verify(program, graph, inputs, {"factor": factor})
    result = graph(*inputs, factor=factor)
    assert list(result) == ["x", "factor", "name", "flag"]
    assert (result["factor"], result["name"], result["flag"]) == (2.5, "n", True)
    assert result["x"][1][0] is None


def test_capture_leaves_model_and_inputs_alone() -> None:
    program = Program(buffers_written, {**counter(), **weight()})
    inputs = (ROWS.clone(),)
    before = [(id(t), t._version) for t in (*program.state_dict(keep_vars=True).values(), *inputs)]
    capture(program, inputs)
    after = [(id(t), t._version) for t in (*program.state_dict(keep_vars=True).values(), *inputs)]
    assert after == before


# Random numbers and statistics over several calls


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dropout_draws_the_same_numbers(training: bool) -> None:
    model = Dropping().train(training)
    fast = rewritten(model, X)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected, state = model(X), torch.get_rng_state()
        torch.manual_seed(seed)
        assert_close(fast(X), expected)
        assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_counts_as_many_calls() -> None:
    model = Normalized()
    naive = copy.deepcopy(model)
    fast = rewritten(model, X)
    for k in range(3):
        close(fast, naive, X * (k + 1))
    assert_close(dict(model.named_buffers()), dict(naive.named_buffers()))
    assert model.norm.num_batches_tracked == 3
    fast.eval()
    close(fast, naive.eval(), X)
    assert model.norm.num_batches_tracked == 3


# What is asked of tensors that no input reaches has one answer


def increasing(m: Any, x: Tensor) -> Any:
    times = torch.arange(x.shape[1]).to(x) / 4
    assert (times[1:] > times[:-1]).all()
    return x * times.max().item() + times.tolist()[1] + int(times[2] * 8)


def default_mask(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones_like(x, dtype=torch.bool)
    if mask.all():
        x = x + 1
    mask[0] = False
    return x * 1000 if mask.all() else x * 3


def chosen_places(m: Any, x: Tensor) -> Any:
    table = torch.linspace(0, 1, x.shape[1], dtype=torch.float64)
    places = torch.nonzero(table > 0.3)[:, 0]
    places.sub_(1)
    kinds, counts = torch.unique(torch.tensor([1, 2, 2, 3]), return_counts=True)
    return x[:, places] + (kinds * counts).sum() + table[table > 0.5].sum()


@pytest.mark.parametrize("run", [increasing, default_mask, chosen_places])
def test_values_that_no_input_reaches_are_known(run: Run) -> None:
    program = Program(run, {})
    captured = capture(program, (ROWS,))
    for x in (ROWS, -ROWS):
        assert_close(captured.graph_module(x), [program(x)], rtol=0, atol=0)


def begins_with_a_leaf(m: Any, x: Tensor) -> Tensor:
    """As neuron models of norse do; nobody sees that leaf's gradient."""
    h, g = torch.zeros(x.shape[1]), x[0].detach().clone()
    h.requires_grad = True
    g.requires_grad_()
    for row in x:
        h = torch.tanh(h * m.weight[0] + row + g)
    return h


def filled_with_a_tensor(m: Any, x: Tensor) -> Tensor:
    """The number itself is not asked for, and has no gradient."""
    rate = m.weight.detach().mean()
    first = torch.full((2,), rate) + torch.full((2,), fill_value=rate > 0)
    return x * torch.full_like(x, rate * 2) + x.new_full((3,), x[0, 0].detach()) + first.sum()  # type: ignore[arg-type]


def chosen_by_bytes(m: Any, x: Tensor) -> Tensor:
    """As conditional random fields of pytorch-crf do."""
    mask = (x > 0).to(torch.uint8)
    made = torch.where(mask, x, 0) + x.where(mask, x * 2)
    return made + torch.where(condition=mask, input=x, other=made) + x.where(
        other=made, condition=mask)


@pytest.mark.filterwarnings("ignore:.*uint8.*:UserWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("run", [begins_with_a_leaf, filled_with_a_tensor, chosen_by_bytes])
def test_what_only_looks_as_if_a_graph_could_not_hold_it(
    run: Run, training: bool, caplog: pytest.LogCaptureFixture
) -> None:
    program = Program(run, weight())
    captured = capture(program, (ROWS,))
    results = []
    graph: Run = captured.graph_module
    for k in range(2):
        x = ROWS.clone().requires_grad_(training)
        with torch.set_grad_enabled(training):
            made = graph(program.weight, x)[0] if k else program(x)
        results.append((made, torch.autograd.grad(made.sum(), x) if training else ()))
    assert_close(results[1], results[0])
    assert results[1][0].requires_grad is training
    assert not caplog.records


def checked_by_a_distribution(m: Any, x: Tensor) -> Any:
    return torch.distributions.Normal(x, 1.0).mean


# What is refused: the report says where and why, and the original runs


def branches(m: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x * 3


def counts_calls(m: Any, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    result: Tensor = x * m.calls
    return result


def keeps_an_object(m: Any, x: Tensor) -> Tensor:
    m.calls = object()
    return x


def writes_a_parameter(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.weight.mul_(0.9)
    result: Tensor = x @ m.weight
    return result


def exchanges_data(m: Any, x: Tensor) -> Tensor:
    m.count.data = m.count.data + 1
    return torch.mul(x, m.count)


def hooks_a_tensor(m: Any, x: Tensor) -> Tensor:
    y: Tensor = x * m.weight.sum()
    if y.requires_grad:
        y.register_hook(lambda g: g)  # type: ignore[no-untyped-call]
    return y


def in_inference_mode(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 2


def view_of_written(m: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    return x[:, 1]


VALUE = "forward asks for the value of a tensor"
REFUSED: dict[str, tuple[Run, str, str]] = {
    "control flow": (branches, VALUE, "if x.sum() > 0:"),
    "item": (lambda m, x: x * x.max().item(), VALUE, "x.max().item()"),
    "tolist": (lambda m, x: x * x[0].tolist()[0], VALUE, "x[0].tolist()"),
    "int": (lambda m, x: x * int(x[0, 0]), VALUE, "int(x[0, 0])"),
    "a shape from data": (lambda m, x: x[x > 0], "output shape depends on the data", "x[x > 0]"),
    "numpy": (lambda m, x: x * torch.from_numpy(x.numpy()), VALUE, "x.numpy"),
    "a buffer's value": (lambda m, x: x if m.count > 0 else -x, VALUE, "m.count > 0"),
    "a random value": (lambda m, x: x if torch.rand(2).sum() > 3 else -x, VALUE, "torch.rand(2)"),
    "the value of memory not written to": (
        lambda m, x: x if x.new_empty(2).sum() > torch.inf else -x, VALUE, "x.new_empty(2)"),
    "a mask of an input": (
        lambda m, x: x[torch.ones_like(x) * x > 0], "output shape depends on the data", ""),
    "an attribute": (keeps_an_object, "forward assigns the attribute 'calls'", ""),
    "a parameter written to": (writes_a_parameter, "forward writes to the parameter 'weight'", ""),
    "a dataclass": (lambda m, x: Seen(), "not a tensor; register it", ""),
    "another kind of output": (lambda m, x: {1, 2}, "forward returns a set, not a tensor", ""),
    "a gradient that is asked for": (
        lambda m, x: x.requires_grad_() * 2, "forward changes what has a gradient",
        "x.requires_grad_() * 2"),
    "a checkpoint that returns": (
        lambda m, x: checkpoint(torch.sin, x, use_reentrant=True), "pass `use_reentrant=False`",
        "checkpoint(torch.sin, x"),
    "a distribution's checks": (
        checked_by_a_distribution, "set_default_validate_args(False)", "Normal(x, 1.0)"),
    "data that is exchanged": (exchanges_data, "forward assigns to the `.data` of a tensor", ""),
    "a part in inference mode": (
        in_inference_mode, "forward enters `torch.inference_mode`", "with torch.inference_mode():"),
    "inference mode": (
        torch.inference_mode()(lambda m, x: x * 2), "forward enters `torch.inference_mode`", ""),
    "a hook on a tensor": (
        hooks_a_tensor, "forward registers a hook on a tensor", "y.register_hook(lambda g: g)"),
    "a view of what is written to": (view_of_written, "a view of a tensor that it writes to", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_runs_as_it_is(name: str) -> None:
    run, reason, line = REFUSED[name]
    program, naive = (Program(run, {**counter(), **weight()}) for _ in range(2))
    before = {key: held for key, held in vars(program).items() if key != "training"}
    fast = optimized(program, ROWS.clone())
    assert {key: held for key, held in vars(program).items() if key != "training"} == before
    assert reason in failure(fast)
    if line:
        assert f"{__file__}:" in failure(fast)
        assert line in failure(fast)
    assert fast.graph_module is None
    assert fast.code == ""
    ours, theirs = fast(ROWS.clone()), naive(ROWS.clone())
    assert_close(dict(program.state_dict()), dict(naive.state_dict()), rtol=0, atol=0)
    assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    assert "not captured, the original runs: " in str(fast.report)


def test_a_model_is_restored_after_an_exception_in_forward() -> None:
    def fail(m: Any, x: Tensor) -> Tensor:
        m.count.add_(1)
        raise ValueError("mine")

    program = Program(fail, counter())
    buffer = program.get_buffer("count")
    fast = optimized(program, ROWS)
    assert "ValueError: mine" in failure(fast)
    assert 'raise ValueError("mine")' in failure(fast)
    assert program.count is buffer
    assert float(buffer) == 0
    with pytest.raises(ValueError, match=r"^mine$"):
        fast(ROWS)


def test_exceptions_of_later_calls_surface_as_they_are() -> None:
    fast = rewritten(Recurrent(), X)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        fast(random(2, 6, 4))
    with pytest.raises(TypeError, match="positional argument"):
        fast(X, X)
    close(fast, fast.original, X)


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch is built without torch.distributed")
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_distributed_wrapper_is_refused_with_what_to_do() -> None:
    fast = optimized(nn.parallel.DistributedDataParallel(Recurrent()), X)
    assert "wrapped in DistributedDataParallel; optimize the module inside (`.module`)" in failure(
        fast)
    close(fast, fast.original, X)


def test_a_wrapper_inside_the_model_is_refused_too() -> None:
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {})
    fast = optimized(nn.Sequential(wrapper(Recurrent())), X)
    assert "wrapped in FullyShardedDataParallel (0)" in failure(fast)


def test_hooks_are_refused_and_run() -> None:
    model, seen = Recurrent().eval(), []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.nn.utils.spectral_norm(model.head)
    fast = optimized(model, X)
    assert "(head) has forward hooks (test_hooks_are_refused_and_run.<locals>.<lambda>, " \
        "SpectralNorm), whose" in " ".join(failure(fast).split())
    assert not seen
    close(fast, model, X)
    assert len(seen) == 2 * X.shape[1]
    assert {type(output) for output in seen} == {Tensor}


def test_hooks_registered_later_run() -> None:
    model, seen = Recurrent(), []
    fast = rewritten(model, X, mode="inference")
    handle = model.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        fast(X)
        assert len(seen) == X.shape[1]
        handle.remove()
        fast(X)
    assert len(seen) == X.shape[1]


def test_backward_hooks_are_refused() -> None:
    model = Recurrent()
    model.head.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert "the module (head) has backward hooks" in failure(optimized(model, X))


def test_compiled_models_are_refused() -> None:
    with pytest.raises(TypeError, match="the model is compiled already; optimize first"):
        optimized(torch.compile(Recurrent()), X)  # type: ignore[arg-type]  # typed as a function


@pytest.mark.parametrize("whole", [True, False], ids=["in place", "a submodule"])
def test_models_compiled_otherwise_run_as_they_are(whole: bool) -> None:
    model = Recurrent()
    (model if whole else model.cell).compile(backend="eager")
    fast = optimized(model, X)
    assert fast.graph_module is None
    close(fast, model, X)


def test_what_apply_passes_does_not_take() -> None:
    with pytest.raises(TypeError, match=r"looplift module already; optimize its `\.original`"):
        optimized(optimized(Program(in_place), ROWS), ROWS)
    with pytest.raises(TypeError, match=r"takes an nn\.Module, not a function"):
        apply_passes(in_place, (ROWS,))  # type: ignore[arg-type]  # as a user might
    with pytest.raises(ValueError, match="mode must be one of inference, training, both"):
        optimized(Program(in_place), ROWS, mode="backwards")


# Signatures


def test_lengths_and_batches_of_any_size() -> None:
    model = Recurrent()
    fast = apply_passes(model, measure=False)
    with torch.no_grad():
        for shape in [(2, 1, 3), (2, 2, 3), (1, 5, 3), (0, 4, 3)]:
            assert_close(fast(random(*shape)), model(random(*shape)))
    assert [s.failure for s in fast.report.signatures] == [None] * 4


def test_no_steps_at_all() -> None:
    def preallocated(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t in range(x.shape[1]):
            out[:, t] = x[:, t] @ m.weight
        return out

    program = Program(preallocated, weight())
    for steps in (0, 1, 2, 5):
        close(optimized(program, random(2, steps, 3)), program, random(2, steps, 3))
    with pytest.raises(RuntimeError, match="stack expects a non-empty TensorList"):
        optimized(Recurrent(), random(2, 0, 3))(random(2, 0, 3))


def test_nothing_is_optimized_twice_and_lazy_is_like_eager() -> None:
    model = Recurrent()
    fast = apply_passes(model, measure=False)
    assert not fast.report.signatures
    close(fast, model, X)
    close(fast, model, X * 2)
    assert len(fast.report.signatures) == 1
    with torch.no_grad():
        close(fast, model, X)
    assert [m.mode for s in fast.report.signatures for m in s.modes] == ["training", "inference"]
    close(fast, model, X.transpose(0, 1).contiguous().transpose(0, 1))  # other strides
    assert len(fast.report.signatures) == 3


def test_after_eight_signatures_the_original_runs_with_one_warning() -> None:
    fast = apply_passes(Program(lambda m, x: x * 2), measure=False)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for length in range(1, 13):
            assert fast(torch.ones(length)).tolist() == [2.0] * length
    told = [str(w.message) for w in caught if "signatures" in str(w.message)]
    assert told == ["Program was called with more than 8 signatures, or in 32 states; further "
                    "ones run the original model"]
    assert len(fast.report.signatures) == 8


def test_autocast_around_a_call_is_a_signature_of_its_own() -> None:
    model = Recurrent()
    fast = rewritten(model, X)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(X).dtype == model(X).dtype == torch.bfloat16
        assert_close(fast(X), model(X))
    close(fast, model, X)


# The module around the graph


def test_parameters_are_the_very_same() -> None:
    model = Normalized()
    fast = rewritten(model, X)
    assert [*map(id, fast.parameters())] == [*map(id, model.parameters())]
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [*map(id, fast.buffers())] == [*map(id, model.buffers())]
    assert list(fast.state_dict()) == list(model.state_dict())
    assert fast.cell is model.cell
    assert fast.original is model


def test_a_loaded_state_dict_is_used() -> None:
    model, other = Recurrent(), Recurrent()
    fast = rewritten(model, X)
    fast.load_state_dict(other.state_dict())
    close(fast, other, X)
    close(model, other, X)


def test_an_optimizer_on_the_fast_model_trains_it() -> None:
    model = Recurrent()
    naive = copy.deepcopy(model)
    fast = rewritten(model, X)
    for trained in (fast, naive):
        optimizer = torch.optim.Adam(trained.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            trained(X).square().sum().backward()
            optimizer.step()
    assert_close(dict(model.named_parameters()), dict(naive.named_parameters()), rtol=1e-4,
                 atol=1e-5)
    close(fast, naive, X)


def test_gradients_reach_inputs() -> None:
    model = Recurrent()
    fast = rewritten(model, X)
    gradients: list[Tensor] = []
    for one in (fast, model):
        x = X.clone().requires_grad_()
        gradients += torch.autograd.grad(one(x).sum(), x)
    assert_close(*gradients)


def test_train_and_eval_switch_the_original_too() -> None:
    model = Dropping()
    fast = rewritten(model, X)
    assert fast.eval() is fast
    assert not any(m.training for m in (fast, model, model.cell))
    close(fast, model, X)
    fast.train()
    assert all(m.training for m in (fast, model, model.cell))
    assert [s.training for s in fast.report.signatures] == [True, False]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])
def test_copies_are_independent(duplicate: Callable[[nn.Module], OptimizedModule]) -> None:
    fast = rewritten(Recurrent(), X, mode="inference")
    twin = duplicate(fast)
    assert isinstance(twin, OptimizedModule)
    close(twin, fast.original, X)
    assert twin.options == fast.options
    with torch.no_grad():
        twin.decay.zero_()
    assert float(fast.decay.detach().abs().max()) > 0
    close(twin, twin.original, X)


def test_new_parameters_are_picked_up() -> None:
    model = Recurrent()
    fast = rewritten(model, X)
    model.decay = nn.Parameter(torch.zeros(5))
    model.cell.weight.data = torch.ones(5, 3)
    close(fast, model, X)
    fast.decay = nn.Parameter(torch.ones(5))
    assert fast.decay is model.decay
    close(fast, model, X)


@pytest.mark.parametrize("through", ["fast", "model"])
def test_conversions(through: str) -> None:
    model = Recurrent()
    fast = rewritten(model, X, mode="training")
    (fast if through == "fast" else model).double()
    close(fast, model, X.double())
    assert fast(X.double()).dtype == torch.float64
    assert len(fast.report.signatures) == 2
    fast.to(torch.float32).requires_grad_(False)
    assert not fast(X).requires_grad


def test_functional_calls_and_transforms() -> None:
    model = Recurrent()
    fast = rewritten(model, X)
    parameters = {name: p.detach() * 2 for name, p in model.named_parameters()}

    def loss(one: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda given: torch.func.functional_call(one, given, (X,)).square().sum()

    assert_close(torch.func.grad(loss(fast))(parameters), torch.func.grad(loss(model))(parameters))


def test_a_changed_attribute_is_picked_up() -> None:
    model = Scaled()
    model.factor = 2.0
    fast = rewritten(model, X)
    model.factor = 3.0
    close(fast, model, X)
    fast.training = False
    assert not model.training
    close(fast, model, X)


def test_other_attributes_and_methods_are_those_of_the_original() -> None:
    fast = rewritten(Scaled(), X, mode="inference")
    assert fast.factor == 2.0
    assert fast.extra_repr() == ""
    with pytest.raises(AttributeError, match="'Scaled' object has no attribute 'nothing'"):
        _ = fast.nothing


def test_apply_passes_leaves_the_random_state_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    optimized(Recurrent(), X, mode="inference")
    torch.manual_seed(7)
    Recurrent()
    expected = torch.get_rng_state()
    torch.manual_seed(7)
    optimized(Recurrent(), X, mode="inference")
    assert not torch.equal(before, expected)
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_first_lazy_call_draws_the_same_numbers() -> None:
    model = Dropping()
    fast = apply_passes(model, measure=False)
    torch.manual_seed(7)
    expected = model(X)
    torch.manual_seed(7)
    assert_close(fast(X), expected)


def test_first_call_in_inference_mode() -> None:
    model = Recurrent()
    fast = apply_passes(model, measure=False)
    with torch.inference_mode():
        close(fast, model, X)


@pytest.mark.parametrize("holder", [[], {}], ids=["list", "dict"])
def test_what_forward_stores_in_a_list_or_dict_is_stored(holder: Any) -> None:
    def store(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.loop(x)
        held.append(result) if isinstance(held, list) else held.update(y=result)
        return result

    held = copy.copy(holder)
    fast = optimized(Program(store, {"loop": Recurrent(), "held": held}), X, mode="inference")
    assert not held
    with torch.no_grad():
        fast(X)
    assert len(held) == 1


def test_an_attribute_set_on_the_fast_model_is_that_of_the_original() -> None:
    fast = rewritten(Scaled(), X, mode="inference")
    setattr(fast, "factor", 3.0)  # noqa: B010 - mypy takes it for a submodule
    assert fast.original.factor == 3.0
    delattr(fast, "factor")
    assert fast.original.factor == 2.0


def test_a_parametrization_registered_later() -> None:
    model = Recurrent()
    fast = rewritten(model, X)
    nn.utils.parametrizations.weight_norm(model.cell)
    close(fast, model, X)


def test_a_buffer_set_to_none_later() -> None:
    model = Program(lambda m, x: x if m.memory is None else x * m.memory, counter())
    fast = optimized(model, ROWS)
    setattr(model, "memory", None)  # noqa: B010 - mypy takes it for a submodule
    close(fast, model, ROWS)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_torchs_own_recurrent_layers_are_captured(kind: Callable[[int, int], nn.Module]) -> None:
    assert optimized(kind(3, 4), X, mode="inference").report.signatures[0].failure is None


def test_lazy_modules_are_optimized_after_their_first_call() -> None:
    model = nn.Sequential(nn.LazyLinear(3), Recurrent())
    fast = optimized(model, X)
    assert "has no parameters yet" in failure(fast)
    assert fast(X).shape == (2, 6, 2)
    fast(X)
    assert fast.graph_module is not None
    close(fast, model, X)


def test_modules_with_a_scripted_part_run_as_they_are() -> None:
    trace: Any = torch.jit.trace
    model = nn.Sequential(trace(nn.Linear(3, 3), X), Recurrent())
    fast = optimized(model, X)
    assert "is a ScriptModule" in failure(fast)
    close(fast, model, X)


def halved(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x * 0.5 + h)


class Calling(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x[:, 0] * 0, []
        for t in range(x.shape[1]):
            h = self.function(x[:, t], h)
            outputs.append(h)
        return torch.stack(outputs, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted_functions_are_traced_by_their_source() -> None:
    script: Any = torch.jit.script
    fast, x = optimized(Calling(script(halved)), X), X.clone().requires_grad_()
    assert "torch.tanh" in fast.code
    close(fast, Calling(halved), x)
    assert SCRIPTED.__call__ is CALL


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_functions_of_a_trace_are_told() -> None:
    trace: Any = torch.jit.trace
    model = Calling(trace(halved, (X[:, 0], X[:, 1])))
    fast = optimized(model, X)
    assert "forward calls a function that torch.jit.trace made" in failure(fast)
    close(fast, model, X)


class Experts(nn.Module):
    """A loop, then an expert for each third of its rows: (B, T, 8) to (B · T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.experts = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x[:, 0] * 0, []
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(x[:, t]) + h)
            outputs.append(h)
        rows = torch.stack(outputs, 1).reshape(-1, 8)
        ends = torch.tensor([rows.shape[0] // 3, rows.shape[0] // 2, rows.shape[0]]).int()
        return functional.grouped_mm(rows, self.experts, offs=ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_of_experts_in_float32_too(dtype: torch.dtype) -> None:
    fast = rewritten(Experts().to(dtype), torch.randn(2, 24, 8, dtype=dtype))
    for mode in fast.report.signatures[0].modes:
        assert isinstance(mode.verdict, Equal)
        assert "reroll-loops" in {rewrite.pass_name for rewrite in mode.rewrites}


def test_new_submodules_are_picked_up() -> None:
    model = Recurrent()
    fast = rewritten(model, X)
    torch.manual_seed(5)
    model.cell = nn.Linear(3, 5)
    assert distance(fast(X), model(X)) < 1e-5


def test_parameters_that_are_no_longer_tied_are_picked_up() -> None:
    def two_layers(m: Any, x: Tensor) -> Tensor:
        return torch.stack([m.second(m.first(x[:, t]).tanh()) for t in range(x.shape[1])], 1)

    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = Program(two_layers, {"first": first, "second": second})
    fast = rewritten(model, X)
    second.weight = nn.Parameter(torch.zeros(3, 3))
    assert distance(fast(X), model(X)) < 1e-5


def test_a_new_attribute_is_picked_up() -> None:
    model = Scaled()
    fast = rewritten(model, X)
    model.factor = 3.0  # of the class until now
    close(fast, model, X)


def test_the_second_call_of_a_model_that_adds_an_attribute() -> None:
    program, naive = Program(counts_calls), Program(counts_calls)
    fast = optimized(program, ROWS)
    for _ in range(2):
        close(fast, naive, ROWS)


def test_a_cache_outside_the_model_holds_no_tensor_of_the_tracer() -> None:
    @lru_cache
    def triangle(size: int) -> Tensor:
        return torch.ones(size, size).tril()

    model = Program(lambda m, x: triangle(len(x)) @ x)
    optimized(model, ROWS)
    model(ROWS)


def test_a_first_call_in_inference_mode_is_optimized() -> None:
    fast = apply_passes(Recurrent(), measure=False)
    with torch.inference_mode():
        fast(X)
    assert fast.graph_module is not None


class Asking(Recurrent):
    """A loop that does more in one mode, or for inputs that require a gradient."""

    def __init__(self, asks: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        more = self.asks(x)
        return super().forward(x) * (2 if more else 1)


@pytest.mark.parametrize("steps", [6, 400], ids=["one length", "every length"])
@pytest.mark.parametrize("verifies", [True, False])
def test_each_mode_has_its_own_program_where_forward_asks_for_it(
    steps: int, verifies: bool
) -> None:
    model = Asking(lambda x: torch.is_grad_enabled())
    fast = apply_passes(model, (torch.randn(2, steps, 3),), measure=False, verify=verifies)
    modes = fast.report.signatures[0].modes
    assert [m.mode for m in modes if m.rewrites] == ["inference", "training"]
    for length in (steps, steps + 3):
        x = torch.randn(2, length, 3)
        assert_close(fast(x), model(x))
        with torch.no_grad():
            assert_close(fast(x), model(x))


def test_a_capture_for_both_modes_refuses_to_tell_which() -> None:
    with pytest.raises(CaptureError, match="forward asks whether gradients are recorded"):
        capture(Asking(lambda x: torch.is_grad_enabled()), (X,))
    with torch.no_grad():
        capture(Asking(lambda x: torch.no_grad()(torch.is_grad_enabled)()), (X,))


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("steps", [6, 400], ids=["one length", "every length"])
def test_inputs_are_verified_as_they_are_where_forward_asks_for_their_gradients(
    steps: int, needed: bool
) -> None:
    model = Asking(lambda x: x.requires_grad)
    x = torch.randn(2, steps, 3, requires_grad=needed)
    fast = apply_passes(model, (x,), measure=False)
    assert [m.mode for m in fast.report.signatures[0].modes if m.rewrites] == [
        "inference", "training"]
    assert_close(fast(x), model(x))


def test_eval_of_the_original_is_that_of_the_fast_model() -> None:
    model = Recurrent()
    fast = rewritten(model, X, mode="inference")
    model.eval()
    assert not fast.training


class TripledGradient(torch.autograd.Function):
    """The identity, with three times its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 3


def test_functions_with_their_own_backward_are_kept_or_refused() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        result: Tensor = TripledGradient.apply(m.loop(x))  # type: ignore[no-untyped-call]
        return result

    model = Program(run, {"loop": Recurrent()})
    fast = optimized(model, X, mode="training", verify=False)
    one, other = (torch.autograd.grad(m(X).sum(), [*model.parameters()]) for m in (fast, model))
    assert max(map(distance, one, other)) < 1e-4


def test_gradients_enabled_inside_forward() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            result: Tensor = m.loop(x)
        return result

    fast = optimized(Program(run, {"loop": Recurrent()}), X, mode="inference", verify=False)
    with torch.no_grad():
        assert fast(X).requires_grad


def test_one_example_for_two_inputs() -> None:
    """As in `apply_passes(attention, (x, x, x))`."""
    model = Program(lambda m, x, y: m.loop(x) - 2 * m.loop(y), {"loop": Recurrent()})
    fast = optimized(model, X, X, mode="inference")
    with torch.no_grad():
        assert distance(fast(X, X + 1), model(X, X + 1)) < 1e-5


def test_extra_state_is_in_the_state_dict() -> None:
    class WithExtraState(Recurrent):
        def get_extra_state(self) -> int:
            return 3

    fast = rewritten(WithExtraState(), X, mode="inference")
    assert list(fast.state_dict()) == list(fast.original.state_dict())


def test_measuring_leaves_buffers_alone() -> None:
    norm = nn.BatchNorm1d(3)
    before = copy.deepcopy(norm.state_dict())
    looplift.compare(norm, nn.BatchNorm1d(3), (ROWS,), rounds=1, seconds=0.01, memory=False)
    assert_close(norm.state_dict(), before)


def test_measuring_leaves_inputs_alone() -> None:
    program, x = Program(lambda m, x: x.add_(1) * 2), torch.zeros(3)
    looplift.compare(program, program, (x,), mode="inference", rounds=1, seconds=0.01, memory=False)
    assert x.tolist() == [0.0] * 3


# Known bugs


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("kind", ["script", "trace"])
def test_script_modules_are_refused(kind: str) -> None:
    made: Any = torch.jit.script(nn.Linear(3, 3))
    if kind == "trace":
        made = torch.jit.trace(nn.Linear(3, 3), (ROWS,))  # type: ignore[no-untyped-call]
    with pytest.raises(TypeError, match="is a ScriptModule; optimize its Python source"):
        looplift.apply_passes(made, (ROWS,))


def test_one_tensor_for_two_inputs() -> None:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        result: Tensor = m.loop(y)
        return result

    model = Program(run, {"loop": Recurrent()})
    fast = rewritten(model, X.clone(), X.clone())
    one, other = X.clone(), X.clone()
    with torch.no_grad():
        assert distance(fast(one, one), model(other, other)) < 1e-5


def test_sizes_returned_are_sizes() -> None:
    program = Program(lambda m, x: (x * 2, x.shape))
    captured = capture(program, (ROWS,))
    assert type(Rewritten(program, captured, captured.graph_module)(ROWS)[1]) is torch.Size


@known_bug("the warning points into torch: three frames up is nn.Module's __call__")
def test_the_warning_points_at_the_call() -> None:
    fast = apply_passes(Program(lambda m, x: x * 2), measure=False)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for length in range(1, 11):
            fast(torch.ones(length))
    assert [w.filename for w in caught if "signatures" in str(w.message)] == [__file__]


def test_as_strided_is_refused_with_what_to_use_instead() -> None:
    fast = apply_passes(Program(lambda m, x: torch.as_strided(x, (2, 2), (1, 2)) + 1),
                        (random(3, 4),), measure=False)
    failure = fast.report.signatures[0].failure
    assert failure is not None
    assert "depends on how its tensor lies in memory; use unfold, select or slices" in failure


# What hangs on a model in lists, tables and objects


class Cell:
    """A plain object with a tensor or nothing."""

    def __init__(self) -> None:
        self.held: Any = None


class Nested(nn.Module):
    """Keeps its state, or a cache, somewhere below an attribute: (B, T, 3) to (B, 3)."""

    def __init__(self, where: str, cache: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.cache = cache
        self.cell, self._memory, self.lists = Cell(), {"v": None}, [[None]]
        self.slots: dict[str, tuple[Any, Any]] = {
            "object": (vars(self.cell), "held"), "table": (self._memory, "v"),
            "list in a list": (self.lists[0], 0),
        }
        self.where = where

    @property
    def held(self) -> Any:
        slot, key = self.slots[self.where]
        return slot[key]

    def forward(self, x: Tensor) -> Tensor:
        slot, key = self.slots[self.where]
        if slot[key] is None:
            slot[key] = x.new_ones(3) if self.cache else x.new_zeros(len(x), 3)
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = torch.tanh(self.linear(x[:, t]) + h + slot[key])
        if not self.cache:
            slot[key] = h
        return h


@pytest.mark.parametrize("where", ["object", "table", "list in a list"])
def test_state_below_an_attribute_is_refused_and_left_as_it_was(where: str) -> None:
    model, x = Nested(where, cache=False), torch.randn(2, 5, 3)
    naive = copy.deepcopy(model)
    fast = optimized(model, x)
    assert "forward changes what the attribute" in failure(fast)
    assert model.held is None
    for _ in range(3):
        assert torch.equal(fast(x), naive(x))
    assert isinstance(model.held, Tensor)


@pytest.mark.parametrize("where", ["object", "table", "list in a list"])
def test_a_cache_below_an_attribute_is_filled_once(where: str) -> None:
    model, x = Nested(where, cache=True), torch.randn(2, 5, 3)
    fast = optimized(model, x)
    assert fast.graph_module is not None
    assert isinstance(model.held, Tensor)
    assert_close(fast(x), copy.deepcopy(model)(x))


class Twice(nn.Module):
    """A parameter that is registered, and in a table as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.table = {"weight": self.weight}

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t] * self.table["weight"])
        return h


def test_a_parameter_in_a_table_is_the_models_own() -> None:
    model, x = Twice(), torch.randn(2, 5, 3)
    fast = optimized(model, x)
    assert fast.graph_module is not None
    fast(x).sum().backward()
    got = model.weight.grad
    model.weight.grad = None
    model(x).sum().backward()
    assert_close(got, model.weight.grad)
    assert model.table["weight"] is model.weight


STRAY = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(("run", "reason"), [
    (lambda m, x: x[:, :1] * STRAY.sum(), "requires a gradient"),
    (lambda m, x: x * torch.sqrt(torch.FloatTensor([0.5])), "use torch.tensor"),
])
def test_tensors_that_a_graph_cannot_hold(run: Run, reason: str) -> None:
    program = Program(run)
    fast = optimized(program, ROWS.clone())
    assert reason in failure(fast)
    assert torch.equal(fast(ROWS), program(ROWS))


def test_a_model_that_counts_as_false_is_optimized_once() -> None:
    model = nn.Sequential()  # of length 0
    fast = optimized(model, X)
    for _ in range(3):
        assert fast(X) is X
        with torch.no_grad():
            assert fast(X) is X
    assert len(fast.report.signatures) == 1


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("x", [
    torch.randn(6, 4, 5), torch.randn(6, 5, 4).transpose(1, 2), torch.randn(6, 4, 10)[..., ::2],
    torch.randn(6, 4, 5, 3), torch.randn(6, 4, 5, 3).to(memory_format=torch.channels_last),
    torch.randn(5, 4, 6, 3).transpose(0, 2), torch.randn(6, 4),
])
def test_a_batch_norm_lies_in_memory_as_it_does_when_it_runs(x: Tensor, train: bool) -> None:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    model = kinds[x.dim()](4).train(train)
    [seen, *_] = capture(model, (x,)).seen
    assert seen.strides == model(x).stride()


@pytest.mark.parametrize("held", [True, False])
def test_a_table_is_read_at_places_that_are_tensors(held: bool) -> None:
    """`table[t]` asks for the value of t, which is known, or need not be."""
    class Sampler(nn.Module):
        table: Tensor
        wide: Tensor
        times: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.rand(100))
            self.register_buffer("wide", torch.rand(3, 100))
            self.register_buffer("times", torch.arange(95, -1, -8))

        def forward(self, x: Tensor) -> Tensor:
            for t in self.times if held else torch.arange(95, -1, -8):
                x = torch.sin(x) * self.table[t].sqrt() + self.wide[:, t - 9]
            return x

    model, x = Sampler(), torch.randn(2, 3)
    fast = looplift.apply_passes(model, (x,), measure=False)
    assert not [c for c in fast.report.to_dict()["captures"] if c["failure"]]
    assert fast.report.to_dict()["rewrites"]
    torch.testing.assert_close(fast(x), model(x))
    model.times -= 1  # the last one is -1, from the end
    torch.testing.assert_close(fast(x), model(x))
    model.times += 50
    for run in (fast, model) if held else ():
        with pytest.raises(IndexError, match="out of bounds"):
            run(x)


class Arrays(nn.Module):
    """One that goes through NumPy, with numbers of its own or with what it is given."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(6.0) if self.own else x.detach()
        return x + float(np.sqrt(numbers.numpy()).sum()) + float(np.asarray(numbers)[1])


def test_arrays_of_known_numbers() -> None:
    x = torch.rand(5)
    fast = looplift.apply_passes(Arrays(own=True), (x,), measure=False)
    assert not [c for c in fast.report.to_dict()["captures"] if c["failure"]]
    assert_close(fast(x), fast.original(x))
    with pytest.raises(CaptureError, match="asks for the value of a tensor"):
        capture(Arrays(own=False), (x,))


class Counted(nn.Module):
    """As many steps as a tensor that it holds says, from a place that another tells."""

    steps: Tensor
    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(6))
        self.places = torch.tensor([2, 0])
        self.settings = SimpleNamespace(
            scale=torch.tensor(2), table=torch.rand(3), times=torch.arange(5), size=torch.tensor(4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(self.steps)):
            x = torch.tanh(x * int(self.settings.scale) + self.settings.table[self.places[0]])
        for t in self.settings.times:
            x = x + 1 if t - 3 >= 0 else x * 2
        x = x + torch.full((2, self.settings.size), torch.as_tensor(0.5))  # type: ignore[call-overload]
        return x if self.places[1] > 0 else x[:, : self.places[0]]


@pytest.mark.parametrize("change", [
    lambda m: m.steps.add_(3), lambda m: m.settings.scale.mul_(2), lambda m: m.places.add_(-1),
    lambda m: setattr(m, "places", torch.tensor([1, 5])),
    lambda m: setattr(m.settings, "scale", torch.tensor(3)),
    lambda m: m.load_state_dict({"steps": torch.tensor(4)}),
    lambda m: m.load_state_dict({"steps": torch.tensor(4)}, assign=True),
    lambda m: m.settings.table.mul_(2), lambda m: m.settings.times.add_(1),
])
def test_values_that_forward_asks_for_are_looked_at_in_every_call(
    change: Callable[[Any], Any]
) -> None:
    model, x = Counted(), torch.randn(2, 4)
    fast = looplift.apply_passes(model, (x,), measure=False, mode="inference")
    assert not [c for c in fast.report.to_dict()["captures"] if c["failure"]]
    assert "scan" in fast.code
    with torch.no_grad():
        assert_close(fast(x), model(x))
        change(model)
        assert_close(fast(x), model(x))
    assert len(fast.report.signatures) in (1, 2)


@pytest.mark.parametrize("read", [
    lambda m, x: x * int(m.steps.cpu()), lambda m, x: x * int(m.settings.times.numpy()[0]),
    lambda m, x: x + torch.zeros(size=(2, m.settings.size)), lambda m, x: x * int(m.settings.own),
    lambda m, x: x.sum(dim=m.settings.axis), lambda m, x: x[:, : m.settings.short],
    lambda m, x: x * len(f"{m.settings.axis:3}{m.steps * 10}"),
])
def test_values_are_seen_however_forward_asks(read: Callable[[Any, Tensor], Tensor]) -> None:
    class Reads(Counted):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(6):
                x = torch.tanh(x)
            return read(self, x)

    model, x = Reads(), torch.randn(2, 4)
    held = vars(model.settings)
    held |= {"axis": torch.tensor(1), "short": torch.tensor(3, dtype=torch.int16),
             "own": nn.Parameter(torch.tensor(2.0))}
    fast = looplift.apply_passes(model, (x,), measure=False, mode="inference")
    with torch.no_grad():
        assert_close(fast(x), model(x))
        model.steps.add_(1)
        for name, change in (("times", 4), ("axis", -1), ("short", -1), ("own", 2)):
            held[name].data.add_(change)
        assert_close(fast(x), model(x))


def writes_to_a_tensor(m: Any, x: Tensor) -> Any:
    m.settings.scale += 1
    return x * m.settings.scale


def writes_to_a_view(m: Any, x: Tensor) -> Any:
    m.settings.times[0] = 3
    return x * m.settings.times[0]


def writes_to_an_array(m: Any, x: Tensor) -> Tensor:
    times = m.settings.times.numpy()
    times += 1
    return x * int(times[0])


@pytest.mark.parametrize(("write", "reason"), [
    (writes_to_a_tensor, "writes to a tensor that an object on the model holds"),
    (writes_to_a_view, "writes to a tensor that an object on the model holds"),
    (writes_to_an_array, "writes to an array of NumPy"),
])
def test_what_an_object_holds_is_not_written_to(
    write: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    class Writes(Counted):
        def forward(self, x: Tensor) -> Tensor:
            return write(self, x)

    with pytest.raises(CaptureError, match=reason):
        capture(Writes(), (torch.randn(2, 4),))


def test_a_counter_that_forward_asks_for_and_changes_is_refused() -> None:
    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * int(self.calls)

    with pytest.raises(CaptureError, match="asks for the value of 'calls', which it writes to"):
        capture(Counting(), (torch.randn(3),))
