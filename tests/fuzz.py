"""`make fuzz`: random loops as runnable source, optimized and compared with themselves.

Properties, of every program: `apply_passes` neither raises nor hangs; what it returns gives the
same values and gradients, without its own verifier being asked; each reason that it gives is
one of docs/refusals.md. Of every fourth: so does the program for all lengths, where there is
one, at lengths that were not traced. Of one whose steps depend on none before: no loop is left.

    python tests/fuzz.py [--minutes M] [--seed S]

A failing program is shrunk by hypothesis and written to build/fuzz. Once it is understood, its
loop joins the tests.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import logging
import multiprocessing
import re
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import looplift
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from looplift.optimizer.facts import all_graphs, has_body
from looplift.tests.programs import Program, programs
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

ROOT = Path(__file__).parent
REFUSALS = ROOT.parent / "docs" / "refusals.md"
SECONDS = 120  # after which one program counts as hanging
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}


class Hangs(Exception):
    """A program took longer than `SECONDS`."""


def check(program: Program) -> None:
    """Hold all properties of one program; raises AssertionError."""
    model = program.model()
    inputs = program.inputs(0)
    before = run(model, inputs)
    fast = looplift.apply_passes(model, inputs, verify=False, measure=False)
    told = fast.report.to_dict()
    failures = [c["failure"] for c in told["captures"] if c["failure"]]
    assert not failures, failures
    for number in (0, 1):
        inputs = program.inputs(number)
        want = run(model, inputs) if number else before
        assert layouts(model, inputs) == layouts(fast, inputs)
        agree(model, fast, inputs, want, TOLERANCE[program.dtype])
    unknown = [d["reason"] for d in told["declined"] if not documented(d["reason"])]
    assert not unknown, unknown
    if program.varies:
        check_lengths(program)
    if program.batches:
        assert fast.graph_module is not None, told["declined"]
        left = [n for g in all_graphs(fast.graph_module) for n in g.graph.nodes if has_body(n)]
        iterations = program.source.count("for k in")  # that each depend on the one before
        iterations *= 1 + program.source.count("t % 2")
        assert len(left) <= iterations, f"a loop is left: {left}, {told['declined']}"
        assert any(r["pass_name"] == "reroll-loops" for r in told["rewrites"]), told["declined"]


def check_lengths(program: Program) -> None:
    """The program for all lengths from its first on, where there is one, is the model at each."""
    model, inputs = program.model(), program.inputs(0)
    fast = looplift.apply_passes(model, inputs, verify=False, measure=False, mode="training",
                                 dynamic_shapes={"x": {1: Dim("T", max=60)}, "first": None})
    [known] = fast.report.signatures
    assert known.failure is None, known.failure
    told = str(known.lengths)
    if match := re.match(r"one program for T from (\d+)(?: in steps of (\d+))?", told):
        first, step = (int(n or 1) for n in match.groups())
        for k in (0, 2, 5, 6):
            at = program.at_length(first + k * step)
            if first + k * step <= 60:
                inputs = at.inputs(k)
                agree(model, fast, inputs, run(model, inputs), TOLERANCE[program.dtype])
        assert len(fast.report.signatures) == 1
    else:
        why = told.removeprefix("known at this length alone: ")
        assert documented(why), why


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    """Outputs, then gradients of inputs and parameters."""
    torch.manual_seed(0)
    given = [i.clone().requires_grad_() for i in inputs]
    outputs = pytree.tree_leaves(model(*given))
    wanted = [*given, *model.parameters()]
    total = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape)).sum()
                for o in outputs)
    assert isinstance(total, Tensor)
    gradients: tuple[Any, ...] = (None,) * len(wanted)
    if total.requires_grad:
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*(o.detach() for o in outputs), *gradients]


def layouts(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    """What a caller sees of the outputs besides values."""
    with torch.no_grad():
        outputs, spec = pytree.tree_flatten(model(*inputs))
    return [spec, *((o.dtype, o.shape, [st for n, st in zip(o.shape, o.stride(), strict=True)
                                        if n > 1]) for o in outputs)]


def agree(
    model: nn.Module, fast: nn.Module, inputs: tuple[Tensor, ...], want: list[Any],
    tolerance: float,
) -> None:
    """The same results, up to what rounding of inputs and parameters does to the model's own."""
    got = run(fast, inputs)
    try:
        same(want, got, tolerance)
    except AssertionError:
        nudged = copy.deepcopy(model)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in nudged.parameters():
                parameter.copy_(nudge(parameter))
        moved = run(nudged, tuple(map(nudge, inputs)))
        pairs = [(m, w) for m, w in zip(moved, want, strict=True) if w is not None]
        wobble = max(float((m - w).abs().max() / (1 + w.abs().max())) for m, w in pairs)
        same(want, got, max(tolerance, 16 * wobble))


def nudge(tensor: Tensor) -> Tensor:
    """Each number one rounding step away, up or down."""
    side = torch.randint(0, 2, tensor.shape).to(tensor) * 2 - 1
    return tensor.detach() * (1 + side * torch.finfo(tensor.dtype).eps)


def same(want: list[Any], got: list[Any], tolerance: float) -> None:
    for one, other in zip(want, got, strict=True):
        assert (one is None) == (other is None), "a gradient is there for one only"
        if one is not None:
            torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


def documented(reason: str) -> bool:
    """Whether `reason` is one of docs/refusals.md, in which `…` stands for anything."""
    return any(re.search(pattern, reason) for pattern in PATTERNS)


PATTERNS = [
    ".*".join(map(re.escape, match.split("…")))
    for match in re.findall(r"^\| `([^`]+)` \|", REFUSALS.read_text(), re.M)
]


def timed(program: Program) -> None:
    def stop(*_: Any) -> None:
        raise Hangs(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        check(program)
    finally:
        signal.alarm(0)


def worker(start: int, step: int, until: float, results: Any) -> None:
    """Try batches of programs, each with a seed of its own, until the time is over."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number in itertools.count(start, step):
        if time.time() > until:
            break
        count, failure = batch(number, until)
        results.put((count, number, failure))
    results.put(None)


def batch(number: int, until: float, examples: int = 100) -> tuple[int, str | None]:
    """How many programs of seed `number` were tried, and the smallest that failed, and how."""
    count = 0
    last: list[Program] = []

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None,
              suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink])
    @given(programs())
    def attempt(program: Program) -> None:
        nonlocal count
        count += 1
        last[:] = [program]
        timed(program)

    try:
        attempt()
    except Exception:
        text = traceback.format_exc(limit=-2)
        return count, f"{last[0]!r}\n{text}"
    return count, None


def save(text: str) -> Path:
    """Keep a failing program, with how it failed."""
    folder = ROOT.parent / "build" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.sha1(text.encode()).hexdigest()[:10]}.txt"
    file.write_text(text)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results, until = context.Queue(), time.time() + 60 * given.minutes
    workers = [
        context.Process(target=worker, args=(given.seed + k, given.processes, until, results))
        for k in range(given.processes)
    ]
    for one in workers:
        one.start()
    tried, failures, running = 0, 0, len(workers)
    while running:
        result = results.get()
        if result is None:
            running -= 1
            continue
        count, number, failure = result
        tried += count
        print(f"seed {number}: {tried} programs, {failures} failures", file=sys.stderr, flush=True)
        if failure is not None:
            failures += 1
            print(f"{save(failure)}:\n{failure}\n", flush=True)
    print(f"{tried} programs, {failures} failures; first seed {given.seed}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
