"""What was chosen at one length, as one module for every length of the family."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from .formula import Lengths, Samples
from .general import NotOneProgram, general
from .lengths import Family
from .measure import call
from .rewritten import Rewritten
from .select import LITTLE, Cache, Options, Selection, again, select
from .verdict import Differs, Equal
from .verify import verify_once

QUICK = 0.02  # seconds: choices are measured at the longest length at which a step takes no more
SLOW = 5.0  # seconds: gradients whose check may take longer are checked at shorter lengths
LEAST, MOST = 64, 4  # or at this length; at no more than so many times the shortest


@dataclass(frozen=True)
class Chosen:
    """What was chosen in one mode, and the module that runs it at every length of a family."""

    selection: Selection
    module: nn.Module  # the original where nothing paid
    least: int  # the shortest length it is right at


def optimize_family(
    model: nn.Module, found: Family, leaves: Sequence[Any], spec: pytree.TreeSpec,
    options: Options, modes: Sequence[str], progress: Callable[[str], None],
) -> tuple[Family, dict[str, Chosen], str]:
    """Choose rewrites at lengths at which the model runs quickly; carry them to every length.

    The third result says at which. The family that is returned begins at the shortest length that
    they are right at. Raises `NotOneProgram` where the result differs from the model at a longer
    one.
    """
    wanted = tuple(n for free in found.frees if (n := free.of(leaves)) is not None)
    chosen_at = measuring_lengths(model, found, leaves, spec, wanted)
    short = found.resized(leaves, chosen_at)
    args, kwargs = pytree.tree_unflatten(short, spec)
    captured = found.capture(short)
    cache: Cache = {}
    # what is little memory at these lengths may be much at those that are wanted
    little = LITTLE * min(1.0, prod(c / w for c, w in zip(chosen_at, wanted, strict=True)))
    made = {}
    for mode in modes:
        selection = select(model, captured, args, kwargs, options, mode, progress, cache, little)
        folding = options.passes[0].name
        if wrong := [d for d in selection.declined
                     if d.pass_name == folding and d.reason.startswith("differs")]:
            raise NotOneProgram(f"at length {_named(chosen_at)}: {wrong[0].reason}")
        module, least = selection.module, 1
        if selection.rewritten is not None:
            progress(f"verifying at other lengths ({mode})")
            module = at_every_length(model, found, leaves, spec, selection, options, chosen_at,
                                     wanted)
            least = _shortest(model, module, found, leaves, spec, selection, options)
        made[mode] = Chosen(selection, module, least)
    if len(found.first) == 1:
        found = replace(found, first=(max(choice.least for choice in made.values()),))
    return found, made, f"chosen at {_named(chosen_at)}"


def measuring_lengths(
    model: nn.Module, found: Family, leaves: Sequence[Any], spec: pytree.TreeSpec,
    wanted: Lengths,
) -> Lengths:
    """The lengths to choose at: `wanted`, or shorter ones that run quickly, in the same steps."""
    short = tuple(first + -(-max(LEAST - first, 4 * step) // step) * step
                  for first, step in zip(found.first, found.steps, strict=True))
    args, kwargs = pytree.tree_unflatten(found.resized(leaves, short), spec)
    run = call(model, args, kwargs, training=True)
    run()
    start = time.perf_counter()
    run()
    more = min(max(1.0, QUICK / (time.perf_counter() - start)), MOST) ** (1 / len(short))
    chosen = tuple(
        first + int((length * more - first) // step) * step
        for length, first, step in zip(short, found.first, found.steps, strict=True)
    )
    near = all(w <= 2 * c for w, c in zip(wanted, chosen, strict=True))
    return wanted if near and found.holds(wanted) else chosen


def at_every_length(
    model: nn.Module, found: Family, leaves: Sequence[Any], spec: pytree.TreeSpec,
    selection: Selection, options: Options, chosen_at: Lengths, wanted: Lengths,
) -> Rewritten:
    """The selection's rewrites at `chosen_at`, as one module whose source holds for all lengths.

    It is verified against `model` at lengths that were not traced, and at `wanted`. Raises
    `NotOneProgram` where it differs, or where the rewrites are others at other lengths.
    """
    steps = found.steps
    firsts = [tuple(n + k * step for n, step in zip(chosen_at, steps, strict=True))
              for k in (0, 1, 3, 4)]
    if len(steps) > 1:
        firsts[3:] = [tuple(n + (k == other) * 2 * step for k, (n, step) in enumerate(
            zip(chosen_at, steps, strict=True))) for other in range(len(steps))]
    captures = [found.capture(found.resized(leaves, lengths)) for lengths in firsts]
    graphs = [again(c, options, selection).graph_module for c in captures]
    if any(captures[0].constants[k] != c.constants[k] for c in captures for k in c.constants):
        raise NotOneProgram("an output is a number that varies with the length")
    held = len(found.sample.state)
    where = {free.name: next((held + found.sample.tensor_inputs.index(place), axis)
                             for place, axis, size in free.places if size is None)
             for free in found.frees}
    unified = general(Samples(list(where), firsts), graphs)
    made = Rewritten(model, captures[0], unified.symbolic(where))
    if options.verify:
        untraced = tuple(first + 2 * step for first, step in zip(found.first, steps, strict=True))
        beyond = tuple(n + 5 * step for n, step in zip(chosen_at, steps, strict=True))
        _verified(model, made, found, leaves, spec, selection, options,
                  [untraced, beyond,
                   *_up_to(wanted, beyond, found, selection.mode == "training")])
    return made


def _verified(
    model: nn.Module, made: Rewritten, found: Family, leaves: Sequence[Any],
    spec: pytree.TreeSpec, selection: Selection, options: Options, todo: Sequence[Lengths],
) -> None:
    """Compare at each of the lengths: gradients, and float64, as far as they are quick enough."""
    mode, double, seconds, before = selection.mode, True, 0.0, todo[0]
    unproven = []
    for lengths in todo:
        growth = prod(n / m for n, m in zip(lengths, before, strict=True))
        # a model's own backward may take the square of the length
        if mode == "training" and seconds * growth**2 > SLOW:
            mode = "inference"
            unproven.append(f"gradients at lengths beyond {_named(before)}")
        if mode == "inference" and double and seconds * growth > SLOW:
            double = False
            unproven.append(f"equality in float64 at lengths beyond {_named(before)}")
        start = time.perf_counter()
        differs = _differs(model, made, found.resized(leaves, lengths), spec, selection, options,
                           mode, double)
        if differs is not None:
            raise NotOneProgram(f"at length {_named(lengths)}: {differs}")
        seconds, before = time.perf_counter() - start, lengths
    if isinstance(selection.verdict, Equal):
        selection.verdict = replace(selection.verdict,
                                    unproven=(*selection.verdict.unproven, *unproven))


def _shortest(
    model: nn.Module, made: nn.Module, found: Family, leaves: Sequence[Any],
    spec: pytree.TreeSpec, selection: Selection, options: Options,
) -> int:
    """The shortest length down to which the module is right at each, although none was traced."""
    [least, *others], [step, *_] = found.first, found.steps
    end = time.perf_counter() + SLOW
    while (not others and options.verify and time.perf_counter() < end
           and least - step >= max(1, found.frees[0].least)):
        shorter = found.resized(leaves, (least - step,))
        if _differs(model, made, shorter, spec, selection, options, selection.mode) is not None:
            break
        least -= step
    return least


def _differs(
    model: nn.Module, made: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec,
    selection: Selection, options: Options, mode: str, double: bool = True,
) -> Differs | None:
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    approximate = any(k.applied.approximate for k in selection.kept)
    return verify_once(model, made, args, kwargs, mode=mode, tolerance=options.tolerance,
                       approximate=approximate, double=double)


def _up_to(
    wanted: Lengths, begin: Lengths, found: Family, training: bool
) -> Iterator[Lengths]:
    """`wanted`; in training lengths on the way to it, each about four times the one before."""
    while training and max(w / n for w, n in zip(wanted, begin, strict=True)) > 4:
        begin = tuple(
            min(w, first + (4 * n - first) // step * step)
            for w, n, first, step in zip(wanted, begin, found.first, found.steps, strict=True)
        )
        yield begin
    if wanted != begin and found.holds(wanted):
        yield wanted


def _named(lengths: Lengths) -> str:
    return "×".join(map(str, lengths))
