"""Interleaved, calibrated timings and peak memory of several callables.

`torch.utils.benchmark` does the timing. Candidates take turns within one run, so that what
the machine does meanwhile falls on all alike, and the first candidate is timed twice: how
far it is from itself is the noise, and nothing inside the noise is called a gain.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.benchmark import Timer

from .cases import copied, flat
from .state import Attributes, state_kept

AGAIN = "naive again"
BUSY = 0.05  # noise above which a machine has other things to do


@dataclass(frozen=True)
class Timing:
    """One candidate: seconds per call, and its time as a share of the first candidate's.

    `ratio` is first / this (above 1: faster), the median over the rounds; `low` and `high`
    bound the middle half of the rounds, and `best` is the ratio of the fastest rounds.
    `memory` is peak bytes allocated by one call.
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    best: float
    memory: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Candidates timed in one interleaved run; `noise` is the first one's against itself."""

    mode: str
    timings: tuple[Timing, ...]
    noise: float
    rounds: int
    threads: int

    def __getitem__(self, name: str) -> Timing:
        return next(t for t in self.timings if t.name == name)

    def gain(self, name: str) -> float:
        """How many times faster than the first one `name` is, to decide by.

        On a machine that is busy otherwise (more than 5% noise) rounds are slowed at random,
        and the fastest ones say more than the median.
        """
        return self[name].ratio if self.noise <= BUSY else self[name].best

    def measured_in(self, name: str) -> str:
        """Where the gain is not the median, which a table shows: " in the fastest rounds …"."""
        if self.noise <= BUSY:
            return ""
        return f" in the fastest rounds of a busy machine (median {self[name].ratio:.2f}x)"


class _Timer(Timer):
    """torch's timer, warmed up once and not before every measurement: calls may take seconds."""

    def warm_up(self) -> float:
        """Seconds of a second call."""
        return min(self.seconds_per_call(1), self.seconds_per_call(1))

    def seconds_per_call(self, calls: int) -> float:
        return float(self._timeit(number=calls)) / calls


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, mode: str = "", rounds: int = 7,
    seconds: float = 3.0, seed: int = 0, edge: float | None = None,
) -> Comparison:
    """Time the candidates in turns for about `seconds` in all, and compare with the first.

    Where it is asked on which side of `edge` ratios lie, a quarter of the time is enough for those
    of which it tells beyond the noise.
    """
    runs = {**candidates, AGAIN: next(iter(candidates.values()))}
    threads = torch.get_num_threads()
    timers = {n: _Timer("run()", globals={"run": run}, num_threads=threads)
              for n, run in runs.items()}
    once = {n: timer.warm_up() for n, timer in timers.items()}
    rounds = max(3, min(rounds, int(2 * seconds / sum(once.values()))))
    share = seconds / (rounds * len(runs))

    def timed(names: Iterable[str], share: float) -> Comparison:
        calls = {n: max(1, min(10_000, int(share / max(once[n], 1e-7)))) for n in names}
        return _in_turns({n: timers[n] for n in calls}, calls, rounds, mode, seed)

    if edge is None:
        return timed(timers, share)
    first = timed(timers, share / 4)
    unsure = 1 + first.noise
    left = [t.name for t in first.timings[1:] if t.low / unsure <= edge <= t.high * unsure]
    if not left:
        return first
    second = timed([first.timings[0].name, *left, AGAIN], share)
    longer = {t.name: t for t in second.timings}
    return replace(second, timings=tuple(longer.get(t.name, t) for t in first.timings))


def _in_turns(
    timers: Mapping[str, _Timer], calls: Mapping[str, int], rounds: int, mode: str, seed: int
) -> Comparison:
    order, shuffle = list(timers), random.Random(seed)
    times: dict[str, list[float]] = {n: [] for n in timers}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(timers[name].seconds_per_call(calls[name]))
    again = times.pop(AGAIN)
    base = next(iter(times.values()))
    own = [abs(a / b - 1) for a, b in zip(base, again, strict=True)]
    timings = tuple(_timing(n, base, each) for n, each in times.items())
    return Comparison(mode, timings, statistics.median(own), rounds, torch.get_num_threads())


def _timing(name: str, base: Sequence[float], own: Sequence[float]) -> Timing:
    ratios = sorted(b / o for b, o in zip(base, own, strict=True))
    quarter = len(ratios) // 4
    return Timing(name, statistics.median(own), statistics.median(ratios), ratios[quarter],
                  ratios[-1 - quarter], min(base) / min(own))


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that one call holds at a time, on top of what was there before."""
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    cpu = torch.profiler.ProfilerActivity.CPU
    with _quiet(), _large_blocks_apart(), \
            torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, where the C library is glibc.

    By default large blocks go back to the system at once, and asking for them again costs a
    page fault each: on a virtual machine that drowned a model's arithmetic by up to 40x. For
    processes that do nothing but measure; a caller's own process is left as it is.
    """
    global _mapped
    _mapped = KEPT
    _allocator(M_MMAP_THRESHOLD, KEPT)
    _allocator(M_TRIM_THRESHOLD, KEPT)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
KEPT = 1 << 30
_mapped = 1 << 25  # bytes from which on a block is mapped alone; glibc comes to this by itself


@contextlib.contextmanager
def _large_blocks_apart() -> Iterator[None]:
    """With large blocks mapped alone: the profiler keeps small ones for each operation, which on
    the heap would lie in the hole that each freed block leaves. A backward of 4,096 steps with
    4 MB each, freed at once, held 16 GB so."""
    _allocator(M_MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:
        _allocator(M_MMAP_THRESHOLD, _mapped)


def _allocator(setting: int, size: int) -> None:
    """Tell the allocator, where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(setting, size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that the profiler's C++ side writes to stderr when it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def call(model: Callable[..., Any], args: Any, kwargs: Any, training: bool) -> Callable[[], Any]:
    """One inference, or one training step (a loss, its backward, gradients dropped), of `model`."""
    leaves, spec = flat(args, kwargs)
    own = copied(leaves)
    args, kwargs = pytree.tree_unflatten(list(own), spec)
    if not training:

        def inference() -> None:
            with torch.no_grad():
                model(*args, **kwargs)

        return _repeatable(model, inference)
    held = list(model.parameters()) if isinstance(model, nn.Module) else []
    wanted = [t for t in (*held, *own) if isinstance(t, Tensor) and t.requires_grad]

    def training_step() -> None:
        outputs = [o for o in pytree.tree_leaves(model(*args, **kwargs))
                   if isinstance(o, Tensor) and o.requires_grad]
        loss = sum((o.abs() if o.is_complex() else o).float().mean() for o in outputs)
        if isinstance(loss, Tensor):
            torch.autograd.grad(loss, wanted, allow_unused=True)

    return _repeatable(model, training_step)


def _repeatable(model: Any, run: Callable[[], None]) -> Callable[[], None]:
    """`run`, the attributes of `model` as they were before after each call."""
    if not isinstance(model, nn.Module):
        return run
    before, changes = Attributes(model), None

    def again() -> None:
        nonlocal changes
        run()
        changes = before.changes() if changes is None else changes
        before.put_back(changes)

    return again


def device_of(model: nn.Module, leaves: Sequence[Any]) -> torch.device:
    tensors = [t for t in (*model.parameters(), *leaves) if isinstance(t, Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


def compare(
    a: nn.Module, b: nn.Module, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *,
    mode: str = "both", rounds: int = 7, seconds: float = 3.0, memory: bool = True,
) -> tuple[Comparison, ...]:
    """Time and weigh module `b` against module `a` on the same inputs.

    One `Comparison` for each of "inference" and "training", or for the one asked for; its
    timings are named "a" and "b", and `b`'s ratio is how many times faster it is.
    """
    return compare_all({"a": a, "b": b}, args, kwargs, mode=mode, rounds=rounds, seconds=seconds,
                       memory=memory)


def compare_all(
    models: Mapping[str, nn.Module], args: Sequence[Any], kwargs: dict[str, Any] | None = None, *,
    mode: str = "both", rounds: int = 7, seconds: float = 3.0, memory: bool = True,
) -> tuple[Comparison, ...]:
    """`compare` for any number of modules; ratios are to the first."""
    found = []
    for one in ("inference", "training") if mode == "both" else (mode,):
        runs = {n: call(m, args, kwargs or {}, one == "training") for n, m in models.items()}
        with contextlib.ExitStack() as stack:
            for model in models.values():
                stack.enter_context(state_kept(model))
            timed = interleaved(runs, mode=one, rounds=rounds, seconds=seconds)
            if memory:
                device = device_of(next(iter(models.values())), flat(args, kwargs)[0])
                weighed = tuple(
                    replace(t, memory=peak_memory(runs[t.name], device)) for t in timed.timings
                )
                timed = replace(timed, timings=weighed)
        found.append(timed)
    return tuple(found)
