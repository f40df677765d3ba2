"""One program for every length: what is found, what it serves, and what prevents it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any
from unittest import mock

import pytest
import torch
from looplift import Equal, OptimizedModule, apply_passes
from looplift.models import alternating_patches, dilated_attention, eigenstate
from looplift.optimizer import emit, every_length, lengths
from looplift.optimizer.capture import capture
from looplift.optimizer.formula import Formula, Function, Samples, Symbolic, SymbolicFloat, at
from looplift.optimizer.lengths import found_lengths
from looplift.optimizer.select import Selection
from looplift.optimizer.verify import verify_once
from looplift.passes import ORDER
from looplift.passes.batch_timesteps import BatchTimesteps
from looplift.passes.fuse_recurrences import FuseRecurrences
from torch import Tensor, nn
from torch.export import Dim
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

Run = Callable[..., Any]
WIDTH = 3


class Model(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.places = nn.Parameter(torch.randn(600, WIDTH))
        self.run = run
        self.double()  # in which long sums have no rounding to speak of

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return self.run(self, x, *others)


def long(*sizes: int) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(2, size, WIDTH, dtype=torch.float64) for size in sizes or (400,))


def optimized(model: nn.Module, *inputs: Any, **options: Any) -> OptimizedModule:
    return apply_passes(model, inputs, measure=False, **options)


def told(fast: OptimizedModule) -> str:
    return str(fast.report.signatures[0].lengths)


def same(fast: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    """Values, strides and gradients are the model's, with gradients and without."""
    results = []
    for run in (model, fast):
        given = [i.clone().requires_grad_() for i in inputs]
        outputs = torch.utils._pytree.tree_leaves(run(*given))
        wanted = [*given, *(p for p in model.parameters() if p.requires_grad)]
        grads = torch.autograd.grad([o.sin().sum() for o in outputs], wanted, allow_unused=True)
        with torch.no_grad():
            plain = torch.utils._pytree.tree_leaves(run(*inputs))
        results.append((outputs, grads, plain, [o.stride() for o in plain]))
    assert_close(results[1], results[0], rtol=1e-8, atol=1e-8)


def serves(fast: OptimizedModule, model: nn.Module, *calls: tuple[Tensor, ...]) -> None:
    """The calls run one program, without a trace of any of them."""
    with mock.patch("looplift.optimizer.family.capture", side_effect=AssertionError("traced")), \
            mock.patch("looplift.optimizer.module.capture", side_effect=AssertionError("traced")):
        for inputs in calls:
            same(fast, model, *inputs)
    assert len(fast.report.signatures) == 1


# Formulas


def formula(samples: Samples, numbers: list[int]) -> Formula:
    found = samples.formula(numbers)
    assert isinstance(found, Formula)
    return found


@pytest.mark.parametrize(("numbers", "at_100"), [
    ([9, 10, 12], 99), ([20, 22, 26], 200), ([5, 5, 5], 5), ([-10, -11, -13], -100),
])
def test_numbers_of_three_lengths_give_a_line(numbers: list[int], at_100: int) -> None:
    found = Samples(["T"], [(10,), (11,), (13,)]).formula(numbers)
    assert found == at_100 if isinstance(found, int) else at(found, (100,)) == at_100


def test_numbers_on_no_line_have_no_formula_until_a_fourth_shows_a_square() -> None:
    assert Samples(["T"], [(10,), (11,), (13,)]).formula([45, 55, 78]) is None
    square = formula(Samples(["T"], [(10,), (11,), (13,), (14,)]), [45, 55, 78, 91])
    assert square.at((100,)) == 4950
    assert eval(str(square), {"T": 100}) == 4950
    assert Samples(["T"], [(10,), (11,), (13,), (14,)]).formula([45, 55, 78, 92]) is None


@pytest.mark.parametrize(("numbers", "at_12"), [
    ([5, 5, 6], 6), ([5, 6, 7], 6), ([3, 3, 4], 4), ([4, 4, 5], 4)])
def test_parts_of_a_length(numbers: list[int], at_12: int) -> None:
    found = formula(Samples(["T"], [(10,), (11,), (13,)]), numbers)
    assert found.at((12,)) == at_12
    assert eval(str(found), {"T": 12}) == at_12


def test_places_in_a_ring() -> None:
    found = formula(Samples(["T"], [(10,), (11,), (13,), (14,)]), [0, 1, 3, 4])
    assert found.at((100,)) == 90
    found = formula(Samples(["T"], [(10,), (11,), (13,), (19,)]), [6, 0, 2, 1])
    assert [found.at((n,)) for n in (5, 12, 20, 101)] == [(n + 3) % 7 for n in (5, 12, 20, 101)]
    assert str(found) == "(T + 3) % 7"


def test_a_formula_says_where_it_gives_no_integer() -> None:
    half = formula(Samples(["T"], [(10,), (12,), (16,)]), [5, 6, 8])
    assert half.at((100,)) == 50
    with pytest.raises(ValueError, match="no integer"):
        half.at((101,))


@pytest.mark.parametrize(("numbers", "source"), [
    ([0.5, 0.5, 0.5], "0.5"), ([1 / 20, 1 / 26, 1 / 42], "1 / (2*T)"),
    ([10**-0.5, 13**-0.5, 21**-0.5], "(T) ** -0.5"), ([99**0.5, 168**0.5, 440**0.5], "None"),
    ([1.0, 1.3, 2.1], "0.0 + 0.1 * (T)"), ([0.9**9, 0.9**12, 0.9**20], "1.1111111111111112"),
    ([1 / 10, 1 / 13, 1 / 21 + 1e-9], "None"), ([0.0, 1.0, inf], "None"), ([3.0, 1.0, 2.0], "None"),
])
def test_numbers_that_are_no_integers(numbers: list[float], source: str) -> None:
    found = Samples(["T"], [(10,), (13,), (21,)]).function(numbers)
    assert str(found).startswith(source)
    if isinstance(found, Function):
        assert [found.at((n,)) for n in (10, 13, 21)] == pytest.approx(numbers, rel=1e-12)
        assert f"{SymbolicFloat(0.3, found)}" == str(found)


def test_two_lengths_have_products() -> None:
    samples = Samples(["T", "S"], [(10, 17), (11, 17), (10, 18), (11, 18), (13, 20)])
    assert formula(samples, [170, 187, 180, 198, 260]).at((5, 7)) == 35
    assert str(samples.formula([27, 28, 28, 29, 33])) == "S + T"


def test_a_symbolic_number_counts_as_itself_and_reads_as_its_formula() -> None:
    number = Symbolic(19, formula(Samples(["T"], [(10,), (11,), (13,)]), [19, 21, 25]))
    assert number + 1 == 20
    assert f"{number}" == repr(number) == "2*T - 1"


# What serves every length


def recurrent(m: Any, x: Tensor) -> Any:
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(x[:, t]) + m.b(h))
        outputs.append(h)
    return {"all": torch.stack(outputs, 1), "last": h}


def backwards_in_place(m: Any, x: Tensor) -> Tensor:
    out, h = torch.zeros_like(x), x[:, -1]
    for t in reversed(range(x.shape[1])):
        h = torch.sigmoid(m.a(x[:, t]) + h)
        out[:, t] = h
    return out


def with_positions(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, t]) * (t + 1) + t / x.shape[1] for t in range(x.shape[1])], 1)


def scheduled(m: Any, x: Tensor) -> Tensor:
    """Linear and geometric schedules, from both ends."""
    steps, h = x.shape[1], torch.zeros_like(x[:, 0])
    for t in range(steps):
        h = 0.5 * h + m.a(x[:, t]) * 0.99**t + x[:, t] * (0.3 + 0.07 * t)
        h = h + m.b(x[:, t]) * 0.9 ** (steps - 1 - t)
        h = h * (0.5 + 0.5 * (steps - t) / steps)
    return h


def neighbours(m: Any, x: Tensor) -> Tensor:
    last = x.shape[1] - 1
    return torch.stack([m.a(x[:, t]) - x[:, max(t - 2, 0)] + m.b(x[:, min(t + 1, last)])
                        for t in range(x.shape[1])], 1)


def euler_steps(m: Any, x: Tensor) -> Tensor:
    """An ordinary differential equation in steps of 1 / (T - 1), scaled by a root."""
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        h = h + (1.0 / (x.shape[1] + 1)) * torch.tanh(m.a(h)) + x[:, t] * x.shape[1] ** -0.5
        outputs.append(h / x.shape[1] ** -0.5 - float(x.shape[1]) + h / x.shape[1])
    return torch.stack(outputs, 1)


def windows(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, 2 * t : 2 * t + 4]).sum(1)
                        for t in range((x.shape[1] - 4) // 2 + 1)], 1)


def all_pairs(m: Any, x: Tensor) -> Tensor:
    outputs = [torch.tanh(m.a(x[:, t])) for t in range(x.shape[1])]
    states = torch.stack(outputs, 1)
    return (states @ states.mT).reshape(x.shape[0], -1)


def with_own_positions(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, t] + m.places[t]) for t in range(x.shape[1])], 1)


def echoes(m: Any, x: Tensor) -> Tensor:
    """A ring of eight, which steps read and write in turns."""
    held, outputs = torch.stack([torch.zeros_like(x[:, 0])] * 8, 1), []
    for t in range(x.shape[1]):
        outputs.append(torch.tanh(x[:, t] + 0.9 * held[:, t % 8]))
        held = held.clone()
        held[:, t % 8] = outputs[-1]
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(("run", "others", "first"), [
    (recurrent, (1, 2, 7, 64, 501), "T from 1,"),
    (backwards_in_place, (2, 7, 64, 501), "T from"),
    (with_positions, (1, 2, 3, 64, 501), "T from 1,"),
    (scheduled, (1, 2, 64, 501), "T from 1,"),
    (neighbours, (3, 4, 5, 64, 501), "T from 3,"),
    (euler_steps, (2, 3, 64, 501), "T from 2,"),
    (windows, (12, 64, 502), "in steps of 2"),
    (all_pairs, (1, 2, 64, 101), "T from 1,"),
    (with_own_positions, (1, 2, 64, 501), "T from 1,"),
    (echoes, (13, 64, 502), "T from"),
])
def test_one_program_serves_all_lengths(run: Run, others: tuple[int, ...], first: str) -> None:
    model = Model(run)
    with mock.patch.object(lengths, "MANY", 300):
        fast = optimized(model, *long())
    assert first in told(fast)
    serves(fast, model, *(long(n) for n in others), long())
    assert fast.code.count("\n") < 60


@pytest.mark.parametrize("run", [recurrent, scheduled, with_positions])
def test_the_graph_that_is_shown_runs_at_the_length_of_the_last_new_one(run: Run) -> None:
    model = Model(run)
    with mock.patch.object(lengths, "MANY", 300):
        fast = optimized(model, *long())
    for (x,) in (long(), long(7), long(64)):
        assert_close(tree_leaves(fast(x)), tree_leaves(model(x)))
        graph = fast.graph_module
        assert graph is not None
        assert graph is fast.graph_module
        held = {name.replace(".", "_"): tensor for name, tensor in model.named_parameters()}
        given = [held.get(head.name, x) for head in graph.graph.find_nodes(op="placeholder")]
        assert_close(list(graph(*given)), tree_leaves(model(x)))


@pytest.mark.parametrize(("module", "length", "others"), [
    (eigenstate, 96, (1, 2, 11, 131)),
    (alternating_patches, 480, (60, 240, 600)),
    (dilated_attention, 144, (360, 144 * 5)),
])
def test_the_models_of_the_stories(module: Any, length: int, others: tuple[int, ...]) -> None:
    def inputs(length: int) -> tuple[Tensor, ...]:
        return tuple(i.double() for i in module.example_inputs("tiny", length))

    model = module.model("tiny").double()
    fast = optimized(model, *inputs(length), dynamic_shapes=({1: Dim("T")},))
    assert told(fast).startswith("one program for T from")
    serves(fast, model, *map(inputs, others))


def every_other(m: Any, x: Tensor) -> Tensor:
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(h) + x[:, t])
        outputs.append(h)
    return torch.stack(outputs, 1)[:, ::2]


@pytest.mark.parametrize("size", [40, 600])
def test_every_other_step(size: int) -> None:
    model = Model(every_other)
    fast = optimized(model, *long(size), dynamic_shapes=({1: Dim("T", min=1)},))
    assert told(fast).startswith("one program for T from 1, ")
    serves(fast, model, *(long(n) for n in (1, 2, 7, 12, 41, 100)))


def two_loops(m: Any, x: Tensor, y: Tensor) -> Any:
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(x[:, t]) + h)
    for t in range(y.shape[1]):
        h = torch.tanh(m.b(y[:, t]) + h)
        outputs.append(h)
    return torch.stack(outputs, 1), x @ y.mT


def test_two_lengths_of_their_own() -> None:
    model = Model(two_loops)
    with mock.patch.object(lengths, "MANY", 300), mock.patch.object(every_length, "SLOW", 100.0):
        fast = optimized(model, *long(150, 120))
    assert told(fast).startswith("one program for T from 1 and S from 1, ")
    serves(fast, model, long(11, 80), long(90, 21), long(40, 40), long(2, 1))


def test_short_batches_and_lengths_are_served_where_both_may_vary() -> None:
    model = Model(recurrent)
    [x] = long(30)
    with mock.patch.object(every_length, "SLOW", 100.0):
        fast = optimized(model, x, dynamic_shapes=({0: Dim("B", min=1), 1: Dim("T", min=2)},))
    assert told(fast).startswith("one program for B from 1 and T from 2, ")
    serves(fast, model, *((x[:b, :t].contiguous(),) for b, t in ((1, 2), (2, 7), (2, 3))))


def test_a_step_is_the_same_whatever_the_batch() -> None:
    """The source of a model deletes what is large and dead, at some sizes; that of a kernel's
    step does not."""
    two_of_64 = 2 * 64 * 3 * 4
    with mock.patch.object(emit, "LARGE", two_of_64 + 1), \
            mock.patch.object(every_length, "QUICK", 0.0):  # chosen at 64 × 64
        model, (x,) = Model(recurrent), long(30)
        fast = apply_passes(model, (x,), mode="inference", measure=False, passes=(
            *(p for p in ORDER if p.name != "batch-timesteps"),),
            dynamic_shapes=({0: Dim("B", min=1), 1: Dim("T", min=2)},))
    assert "fused_scan" in fast.code
    assert told(fast).startswith("one program for B from 1 and T from 2, ")
    assert "anew" not in told(fast)


def test_the_source_is_the_same_however_long_the_loop() -> None:
    model = Model(recurrent)
    with mock.patch.object(lengths, "MANY", 200):
        sources = {optimized(model, *long(n), mode="inference").code for n in (300, 1200)}
    assert len(sources) == 1


def test_other_strides_and_dtypes_are_other_programs() -> None:
    model = Model(recurrent)
    with mock.patch.object(lengths, "MANY", 300):
        fast = optimized(model, *long())
        [x] = long(64)
        same(fast, model, x)
        assert len(fast.report.signatures) == 1
        same(fast, model, x[:, ::2])
        assert len(fast.report.signatures) > 1


# What is known at one length alone


def triangular(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, : t + 1].mean(1)) for t in range(x.shape[1])], 1)


def irregular(m: Any, x: Tensor) -> Tensor:
    outputs, t = [], 0
    while t < x.shape[1]:
        outputs.append(m.a(x[:, t]))
        t += 1 + (t % 5 == 2)
    return torch.stack(outputs, 1)


def erratic(m: Any, x: Tensor) -> Any:
    for _ in range(x.shape[1] ** 2 % 101 + 100):
        x = torch.tanh(m.a(x))
    return x + sum(m.b(x[:, t : t + 1]) for t in range(x.shape[1]))


def only_at_its_length(m: Any, x: Tensor) -> Any:
    return torch.stack([m.a(x[:, t]) for t in range(x.shape[1])], 1) + m.places[:400]


def by_number_of_steps(m: Any, x: Tensor) -> Tensor:
    """Another weight for long inputs: equal at all the lengths that are short."""
    weight = m.a if x.shape[1] < 300 else m.b
    return torch.stack([weight(x[:, t]) for t in range(x.shape[1])], 1)


def in_a_long_ring(m: Any, x: Tensor) -> Tensor:
    """In short inputs, no place of the ring is used twice."""
    held = x.new_zeros(x.shape[0], 99, x.shape[2])
    for t in range(x.shape[1]):
        held = held.clone()
        held[:, t % 99] = torch.tanh(x[:, t] + 0.9 * held[:, t % 99])
    return held[:, t % 99]


@pytest.mark.parametrize(("run", "reason"), [
    (in_a_long_ring, "what short ones tell is no program (select"),
    (triangular, "it does other operations at other lengths"),
    (irregular, "a table of numbers at test_lengths.py"),
    (erratic, "the number of operations follows no simple rule in the length"),
    (by_number_of_steps, "at length 400: differs in output 0"),
])
def test_what_prevents_it_is_told(run: Run, reason: str) -> None:
    model = Model(run)
    fast = optimized(model, *long(), dynamic_shapes=({1: Dim("T")},))
    assert told(fast).startswith("known at this length alone")
    assert reason in told(fast)
    same(fast, model, *long())
    assert reason in str(fast.report)


def seasons(model: Model, x: Tensor, period: int) -> Tensor:
    """Exponential smoothing: each season's factor is that of the one before, a bit changed."""
    level, factors, made = x[:, 0], [model.places[k].exp() for k in range(period)], []
    for t in range(x.shape[1]):
        made.append(level * factors[t])
        level = 0.3 * x[:, t] / factors[t] + 0.7 * level
        factors.append(torch.sigmoid(x[:, t]) + 0.7 * factors[t])
    return torch.stack(made, 1)


def test_a_loop_that_reads_what_it_computed_many_steps_before_is_one_program() -> None:
    model, [x] = Model(partial(seasons, period=12)), long()
    fast = optimized(model, x)
    assert told(fast).startswith("one program for T from 13, traced at 40, 41, 43")
    for length in (400, 13, 24, 25, 157):
        same(fast, model, *long(length))
    assert len(fast.report.signatures) == 1


def test_traces_that_take_as_long_as_that_of_the_whole_length_are_not_made() -> None:
    model, [x] = Model(partial(seasons, period=30)), long()
    with mock.patch("looplift.optimizer.family.capture", wraps=capture) as traced:
        fast = optimized(model, x, mode="inference")
    assert told(fast).startswith("known at this length alone")
    assert max(call.args[1][0].shape[1] for call in traced.call_args_list) < 160
    same(fast, model, x)


def test_a_length_that_cannot_vary_is_not_looked_for() -> None:
    model = Model(only_at_its_length)
    with mock.patch.object(lengths, "MANY", 300):
        assert found_lengths(model, long(), {}) == []


def test_short_loops_are_traced_whole() -> None:
    assert found_lengths(Model(recurrent), long(50), {}) == []
    assert [free.name for free in found_lengths(Model(recurrent), long(), {})] == ["T"]


class AsWideAsLong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 8)
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(x[:, t]) + h)
        return h


def test_a_width_that_happens_to_be_the_length_keeps_no_loop_from_being_found() -> None:
    with mock.patch.object(lengths, "MANY", 200):
        (free,) = found_lengths(AsWideAsLong(), (torch.randn(2, 96, 96),), {})
    assert [(place, axis) for place, axis, _ in free.places] == [(0, 1)]


def in_sixteen_parts(m: Any, x: Tensor) -> Tensor:
    """As many operations at each length from 16 on."""
    total = torch.zeros_like(x[:, 0])
    for part in torch.split(x, -(-x.shape[1] // 16), 1):
        for _ in range(20):
            total = torch.tanh(m.a(total)) + part.sum(1)
    return total


def test_a_loop_that_grows_at_short_lengths_alone_is_traced_whole() -> None:
    with mock.patch.object(lengths, "MANY", 300):
        assert found_lengths(Model(in_sixteen_parts), long(2048), {}) == []
        assert len(found_lengths(Model(recurrent), long(2048), {})) == 1


def doubled_from_ninety(m: Any, x: Tensor) -> Tensor:
    return smoothed(m, x) * (2 if x.shape[1] > 90 else 1)


def test_what_is_another_program_is_seen_before_anything_is_chosen() -> None:
    seen: list[str] = []
    model = Model(doubled_from_ninety)
    fast = apply_passes(model, long(100), measure=False, dynamic_shapes=({1: Dim("T")},),
                        progress=seen.append, mode="inference")
    assert "at length 100: differs" in told(fast)
    assert next(s for s in seen if "verifying" in s or s == "capturing") == "capturing"
    same(fast, model, *long(100))


def test_where_nothing_pays_at_short_lengths_a_short_trace_of_the_longer_one_is_tried() -> None:
    def nothing(model: nn.Module, *given: Any, **named: Any) -> Selection:
        return Selection("inference", model, None)

    with mock.patch.object(every_length, "select", nothing), \
            mock.patch.object(every_length, "QUICK", 0.0):
        for size, says in ((200, "known at this length alone: nothing paid at length 64"),
                           (900, "one program")):
            fast = optimized(Model(smoothed), *long(size), mode="inference",
                             dynamic_shapes=({1: Dim("T")},))
            assert says in told(fast)


def iterations(m: Any, x: Tensor) -> Tensor:
    for _ in range(40):
        x = torch.tanh(m.a(x) + x)
    return x


def test_lengths_of_hyper_parameters_stay() -> None:
    with mock.patch.object(lengths, "MANY", 50):
        assert found_lengths(Model(iterations), long(), {}) == []


# Lengths that the caller names


@pytest.mark.parametrize("shapes", [
    {"x": {1: Dim("steps", min=2)}}, {"x": (None, Dim("steps", min=2), None)},
    ({1: Dim("steps", min=2)},),
{"x": {-2: Dim("steps", min=2)}},
])
def test_dynamic_shapes_in_torch_exports_convention(shapes: Any) -> None:
    class Named(Model):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return recurrent(self, x)

    model = Named(recurrent)
    fast = optimized(model, *long(6), dynamic_shapes=shapes)
    assert told(fast).startswith("one program for steps from 2,")
    for mode in fast.report.signatures[0].modes:
        assert isinstance(mode.verdict, Equal)
        assert mode.verdict.unproven[0].startswith("shapes that differ from (2, ")
        assert mode.verdict.unproven[0].endswith(", 3) in more than steps")
    serves(fast, model, *(long(n) for n in (2, 3, 6, 64)))


class Pair(nn.Module):
    def forward(self, x: Tensor, y: dict[str, Tensor]) -> Tensor:
        steps = [torch.tanh(x[:, t]) * y["y"][:, 2 * t] for t in range(x.shape[1])]
        return torch.stack(steps, 1)


@pytest.mark.parametrize("dims", [
    (Dim("T"), 2 * Dim("T")), (Dim.AUTO, Dim.DYNAMIC),
])
def test_lengths_that_follow_others(dims: tuple[Any, Any]) -> None:
    x, y = torch.randn(2, 8, 3), {"y": torch.randn(2, 16, 3)}
    fast = optimized(Pair(), x, y, dynamic_shapes={"x": {1: dims[0]}, "y": {"y": {1: dims[1]}}})
    if dims[0] is Dim.AUTO:  # two lengths of their own: the model can't run at any two
        assert told(fast).startswith("known at this length alone")
    else:
        assert told(fast).startswith("one program for T from 1,")
        longer = torch.randn(2, 50, 3), {"y": torch.randn(2, 100, 3)}
        assert_close(fast(*longer), Pair()(*longer))
        assert len(fast.report.signatures) == 1


@pytest.mark.parametrize(("shapes", "message"), [
    ({"z": {1: Dim("T")}}, "dynamic_shapes names z, but forward is given x, y"),
    ({"x": {3: Dim("T")}}, "dynamic_shapes names axis 3 of x, which has 3"),
    ({"x": {1: 2 * Dim("T")}}, "no input has the length T itself"),
    ({"y": {1: Dim("T"), 2: None}}, "dynamic_shapes of y does not look like what is given"),
])
def test_dynamic_shapes_that_do_not_fit(shapes: Any, message: str) -> None:
    x, y = torch.randn(2, 8, 3), {"y": torch.randn(2, 16, 3)}
    with pytest.raises(ValueError, match=message):
        optimized(Pair(), x, y, dynamic_shapes=shapes)


# What is rewritten anew at each length


def smoothed(m: Any, x: Tensor) -> Tensor:
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = 0.9 * h + m.a(x[:, t])
        outputs.append(m.b(torch.tanh(h)))
    return torch.stack(outputs, 1)


def in_slabs(run: Run) -> tuple[Model, OptimizedModule]:
    slabs = [replace(p, slab=16) if isinstance(p, BatchTimesteps) else p for p in ORDER
             if not isinstance(p, FuseRecurrences)]
    model = Model(run)
    with mock.patch.object(lengths, "MANY", 300):
        fast = optimized(model, *long(), passes=slabs)
    assert "rewritten anew at each length" in told(fast)
    return model, fast


def test_batches_in_slabs_are_made_anew_at_each_length() -> None:
    model, fast = in_slabs(smoothed)
    assert "25" in fast.code
    serves(fast, model, *(long(n) for n in (11, 64, 501)))
    assert "31" in fast.code  # the slabs of the length that came last


def cut_short(m: Any, x: Tensor) -> Tensor:
    return smoothed(m, x) * (1 if x.shape[1] < 450 else 2)


def test_a_length_at_which_it_is_another_program_runs_the_original() -> None:
    model, fast = in_slabs(cut_short)
    serves(fast, model, long(449), long(450))


@pytest.mark.parametrize("at", [20, 33])
def test_lengths_of_as_many_slabs_as_where_it_was_chosen_are_not_all(at: int) -> None:
    """The five lengths that are compared have one or two slabs, as what is chosen for them says;
    shorter and longer ones have others."""
    with mock.patch.object(every_length, "measuring_lengths", return_value=((at,), 1.0)):
        model, fast = in_slabs(smoothed)
    serves(fast, model, long(12), long(70))


def test_a_length_at_which_it_cannot_be_made_runs_the_original() -> None:
    model, fast = in_slabs(smoothed)
    with mock.patch("looplift.optimizer.every_length.again", side_effect=KeyError("lost")):
        serves(fast, model, long(501))


def test_many_lengths_run_the_original_with_a_warning() -> None:
    model, fast = in_slabs(smoothed)
    with mock.patch("looplift.optimizer.every_length.MOST_LENGTHS", 4):
        serves(fast, model, long(64))
        with pytest.warns(UserWarning, match="more than 4 lengths"):
            serves(fast, model, long(65), long(66), long(67))


def added_to_a_buffer(m: Any, x: Tensor) -> Tensor:
    out = torch.ones(2, 64, WIDTH, dtype=x.dtype)
    for t in range(x.shape[1]):
        out[:, t] += m.a(x[:, t]) * (t + 1)
    return out


@pytest.mark.parametrize(("most", "says"), [(60, "one program"), (14, "too few lengths")])
def test_no_length_beyond_the_longest_that_is_allowed(most: int, says: str) -> None:
    model = Model(added_to_a_buffer)
    fast = optimized(model, *long(12), dynamic_shapes=({1: Dim("T", max=most)},))
    assert fast.report.signatures[0].failure is None
    assert says in told(fast)


def doubled_where_long(m: Any, x: Tensor) -> Tensor:
    if x.shape[1] > 700:
        raise ValueError("too long")
    total = scaled_sum(m, x)
    return total * 2 if x.shape[1] > 500 else total


def scaled_sum(m: Any, x: Tensor) -> Tensor:
    total = x[:, 0]
    for t in range(x.shape[1]):
        total = torch.tanh(m.a(total)) + x[:, t]
    return total


def test_longer_inputs_than_were_compared_are_compared_once() -> None:
    model = Model(doubled_where_long)
    fast = optimized(model, *long())
    assert told(fast).startswith("one program")
    for length in (333, 450, 501, 600, 450):
        same(fast, model, *long(length))
    with pytest.raises(ValueError, match="too long"):
        fast(*long(701))
    assert len(fast.report.signatures) == 1


def scaled_at_some_lengths(m: Any, x: Tensor) -> Tensor:
    total = scaled_sum(m, x)
    length = x.shape[1]
    return total * 2 if (length % 7 == 0 and length > 20) or 100 <= length < 200 else total


def test_lengths_that_a_model_treats_otherwise_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_length, "QUICK", 0.0)  # chosen at 64, however fast the machine is
    model = Model(scaled_at_some_lengths)
    fast = optimized(model, *long())
    assert told(fast).startswith("one program")
    for length in (21, 22, 49, 63, 99, 100, 150, 199, 200, 399, 402, 406, 49):
        same(fast, model, *long(length))
    assert len(fast.report.signatures) == 1


def otherwise_at_five(m: Any, x: Tensor) -> Tensor:
    return scaled_sum(m, x) * (2 if x.shape[1] == 5 else 1)


def test_a_short_length_that_a_model_treats_otherwise_is_seen() -> None:
    model = Model(otherwise_at_five)
    fast = optimized(model, *long())
    assert "from 1," in told(fast)
    for length in (1, 4, 5, 6, 5):
        same(fast, model, *long(length))
    assert len(fast.report.signatures) == 1


def test_each_length_is_compared_once() -> None:
    model = Model(scaled_sum)
    fast = optimized(model, *long())
    with torch.no_grad(), mock.patch.object(
        every_length, "verify_once", wraps=verify_once) as compared:
        for length in (900, 900, 800, 700, 950):
            assert_close(fast(*long(length)), model(*long(length)))
    assert compared.call_count == 4


def in_place(m: Any, x: Tensor) -> Tensor:
    """It has no gradient: autograd needs what the next step overwrites."""
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h.copy_(torch.tanh(m.a(h) * h + x[:, t]))
    return h


@pytest.mark.parametrize("mode", ["inference", "both"])
def test_a_model_for_inference_alone(mode: str) -> None:
    model = Model(in_place)
    fast = optimized(model, *long(), mode=mode)
    assert told(fast).startswith("one program")
    assert ("the original itself raises in training" in str(fast.report)) == (mode == "both")
    with torch.no_grad():
        assert_close(fast(*long(70)), model(*long(70)))


def every_third(m: Any, x: Tensor) -> Tensor:
    h, outputs = x[:, 0], []
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(h) + m.b(x[:, t]))
        h = h * 0.5 if t % 3 == 2 else h
        outputs.append(h)
    return torch.stack(outputs, 1)


def test_shorter_lengths_than_were_traced_are_tried() -> None:
    """At some of them the steps of the one program do not fit together."""
    model = Model(every_third)
    fast = optimized(model, *long(180), mode="inference")
    for length in (1, 2, 3, 5, 6, 7, 30, 181):
        with torch.no_grad():
            assert_close(fast(*long(length)), model(*long(length)))


def written_where_it_lies(m: Any, x: Tensor) -> Tensor:
    result, h = torch.zeros_like(x), x.new_zeros(x.shape[0], x.shape[2])
    for t in range(x.shape[1]):
        h = torch.tanh(m.a(h) + x[:, t])
        result[:, t] = h
    return result


def test_inputs_that_lie_otherwise_in_memory_have_a_program_of_their_own() -> None:
    """At length 1, from which on one program holds, strides do not tell them apart."""
    model = Model(written_where_it_lies)
    fast = optimized(model, *long())
    assert told(fast).startswith("one program for T from 1")
    for length in (400, 40):
        same(fast, model, long(length)[0].transpose(0, 1).contiguous().transpose(0, 1))
