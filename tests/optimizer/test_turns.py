"""Threads that call one optimized model: each gets the model's results, whoever optimizes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import looplift
import pytest
import torch
from looplift.optimizer.step import aside
from looplift.optimizer.turns import Turns
from torch import Tensor, nn
from torch.testing import assert_close


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(h) + x[:, t])
        return h


def test_first_calls_from_several_threads() -> None:
    model = Loop()
    fast = looplift.apply_passes(model, measure=False)
    inputs = [torch.randn(batch, 20, 8, requires_grad=True) for batch in (1, 2, 3)]

    def trained(x: Tensor) -> tuple[Tensor, Any]:
        result = fast(x)
        return result, torch.autograd.grad(result.sum(), x)

    with ThreadPoolExecutor(len(inputs)) as pool:
        found = list(pool.map(trained, inputs))
    for x, (result, gradient) in zip(inputs, found, strict=True):
        want = model(x)
        assert_close(result, want)
        assert_close(gradient, torch.autograd.grad(want.sum(), x))
    assert [s.failure for s in fast.report.signatures] == [None] * len(inputs)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_a_call_waits_while_another_thread_optimizes() -> None:
    model, x = Loop(), torch.randn(2, 20, 8)
    fast = looplift.apply_passes(model, (x,), measure=False)
    with ThreadPoolExecutor(1) as pool:
        with fast.turns.alone:
            call = pool.submit(fast, x)
            with pytest.raises(TimeoutError):
                call.result(0.2)
        assert_close(call.result(60), model(x))


def test_turns_may_be_taken_again_by_who_has_one() -> None:
    turns = Turns()
    with turns.shared, turns.shared, turns.alone, turns.alone, turns.shared:
        assert turns.owner == threading.get_ident()
    assert vars(turns) == vars(turns) | {"owner": None, "depth": 0, "waiting": 0, "inside": {}}


def test_who_runs_alone_waits_for_calls_and_no_new_one_begins() -> None:
    turns, order = Turns(), []
    began = threading.Event()

    def alone() -> None:
        began.set()
        with turns.alone:
            order.append("alone")

    def shared() -> None:
        with turns.shared:
            order.append("shared")

    with turns.shared:
        first = threading.Thread(target=alone)
        first.start()
        began.wait()
        while not turns.waiting:
            pass
        second = threading.Thread(target=shared)
        second.start()
        second.join(0.2)
        order.append("first call")
    first.join()
    second.join()
    assert order == ["first call", "alone", "shared"]


def test_a_function_that_runs_aside_may_run_another_aside() -> None:
    pool = ThreadPoolExecutor(1)
    nested = pool.submit(lambda: aside(lambda: aside(threading.get_ident)))
    assert nested.result(60) != threading.get_ident()
    pool.shutdown()
