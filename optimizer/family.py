"""A model's program for all lengths of its inputs, from traces at a few short ones.

A loop's program at a few short lengths says what it is at every length; a trace of the loop at
its full length costs milliseconds per operation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from .capture import Capture, capture
from .contract import Seen
from .formula import Formula, Lengths, Samples, Text, agree, at
from .general import General, NoFormula, NotOneProgram, general
from .lengths import Free, layout, operations, resized
from .pipeline import Allowed, Applied, Outcome, begun
from .refused import CaptureError
from .rewrite import Pass, Skip

# lengths to begin at, one after the other: fewer trips might not be told from none, and a loop that
# reads what it computed 12 steps before does what it does at all lengths only from 24 on
SHORTEST = (10, 40, 160)
FEW = 2000  # operations of a trace that is soon made
# what traced lengths may be apart
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 36, 48, 64, 72, 96, 128, 256, 512)
TRIES = 3  # programs are compared with this many of the steps


@dataclass(frozen=True)
class Family:
    """One program for all lengths that are `first` and a multiple of `steps` more."""

    frees: tuple[Free, ...]
    first: Lengths
    steps: Lengths
    traced: tuple[Lengths, ...]
    sample: Capture
    rolled: General
    seen: tuple[tuple[Any, ...], ...]
    constants: dict[int, Any]
    size: Formula | int  # operations of the whole trace
    applied: tuple[tuple[Applied, Text | None], ...]
    skips: tuple[tuple[Skip, Text | None], ...]
    allowed: Allowed
    passes: tuple[Pass, ...]

    def holds(self, lengths: Lengths) -> bool:
        """Whether the program is known at `lengths`."""
        return all(
            n >= max(first, free.least) and n <= (free.most or n) and (n - first) % step == 0
            for n, first, step, free in zip(lengths, self.first, self.steps, self.frees,
                                            strict=True)
        )

    def lengths(self, leaves: Sequence[Any]) -> Lengths | None:
        """The lengths of `leaves`, if the program is known at these."""
        found = tuple(n for free in self.frees if (n := free.of(leaves)) is not None)
        return found if len(found) == len(self.frees) and self.holds(found) else None

    def takes(self, leaves: Sequence[Any]) -> bool:
        """Whether `leaves` may be inputs of this program, by the sizes of their free axes."""
        places = [place for free in self.frees for place in free.places]
        return all(
            i < len(leaves) and isinstance(leaves[i], Tensor) and leaves[i].dim() > axis
            and layout(leaves[i]) is not None for i, axis, _ in places
        ) and self.lengths(leaves) is not None

    def capture(self, leaves: Sequence[Any]) -> Capture:
        """What a trace of the model on `leaves` would give, its loops folded."""
        lengths = self.lengths(leaves)
        assert lengths is not None
        base = self.sample
        graph_module = self.rolled.at(lengths, self.fakes(leaves), base.fake_mode)
        outcome = Outcome(
            graph_module,
            [replace(a, summary=t.at(lengths)) if t else a for a, t in self.applied],
            [replace(s, reason=t.at(lengths)) if t else s for s, t in self.skips],
        )
        first = (self.passes, self.allowed, frozenset[Any]())
        return replace(
            base, graph_module=graph_module, begun={first: outcome}, rolled=True,
            size=at(self.size, lengths), seen=tuple(_seen_at(s, lengths) for s in self.seen),
            constants={k: at(c, lengths) for k, c in self.constants.items()},
        )

    def fakes(self, leaves: Sequence[Any]) -> list[FakeTensor]:
        """What the placeholders stand for where `leaves` are the inputs."""
        base = self.sample
        tensors = [*(s.get() for s in base.state), *(leaves[i] for i in base.tensor_inputs)]
        return [base.fake_mode.from_tensor(t, static_shapes=True) for t in tensors]

    def resized(self, leaves: Sequence[Any], lengths: Lengths) -> list[Any]:
        return resized(leaves, self.frees, lengths)

    def __str__(self) -> str:
        told = [
            f"{free.name} from {first}" + (f" in steps of {step}" if step > 1 else "")
            for free, first, step in zip(self.frees, self.first, self.steps, strict=True)
        ]
        at_lengths = ", ".join("×".join(map(str, lengths)) for lengths in self.traced)
        return f"one program for {' and '.join(told)}, traced at {at_lengths}"


def _seen_at(seen: tuple[Any, ...], lengths: Lengths) -> Seen:
    shape, strides, offset, owner, same = seen
    return Seen(
        tuple(at(n, lengths) for n in shape),
        None if strides is None else tuple(at(n, lengths) for n in strides),
        at(offset, lengths), owner, same,
    )


def family(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], frees: Sequence[Free],
    passes: Sequence[Pass], allowed: Allowed, shorter: bool = True, shortest: int = SHORTEST[0],
) -> Family:
    """The program for lengths like the inputs', or `NotOneProgram` with the reason.

    `passes` are those that fold loops. Lengths that are traced, none below `shortest`, leave the
    same remainder as the inputs' own, by a step that is found from how many operations the model
    runs. If only `shorter` ones are of use, a trace at the inputs' own length is no dearer than at
    others.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if any(layout(leaves[place]) is None for free in frees for place, _, _ in free.places):
        raise NotOneProgram("an input has gaps or overlaps in memory")
    reason = NotOneProgram("the number of operations follows no simple rule in the length")
    choices = zip(*(_short_lengths(model, leaves, spec, frees, k, shorter, shortest)
                    for k in range(len(frees))), strict=False)
    for choice in itertools.islice(choices, TRIES):
        try:
            return _traced(model, leaves, spec, frees, choice, tuple(passes), allowed)
        except NotOneProgram as error:
            reason = error
        except CaptureError as error:
            raise NotOneProgram(str(error)) from error
    raise reason


def _short_lengths(
    model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec, frees: Sequence[Free],
    number: int, shorter: bool, shortest: int,
) -> Iterator[Lengths]:
    """Short lengths of one free length at which the model runs, evenly more with the length.

    If they are not the very shortest, their traces must be soon made: in half the time that one of
    the full length takes, or, if that is not all there is to gain, of few operations.
    """
    free = frees[number]
    length = free.of(leaves)
    if length is None:
        raise NotOneProgram(f"inputs have different sizes where they share the length {free.name}")
    taken = {n for leaf in leaves if isinstance(leaf, Tensor) for n in leaf.shape}
    taken |= {n for p in model.parameters() for n in p.shape}
    for step in STEPS:
        first = max(shortest, 4 * step, free.least) + 7 * step * number  # no two are the same
        first += (length - first) % step
        while any(first + k * step in taken - {length} for k in (0, 1, 3)):
            first += step  # or the size of another axis could be mistaken for the length's
        if first + 4 * step > (length if shorter else free.most or first + 4 * step):
            return
        counts = [operations(model, resized(leaves, [free], (first + k * step,)), spec)
                  for k in range(4)]
        known = [count for count in counts if count]
        if len(known) == 4 and len({b - a for a, b in itertools.pairwise(known)}) == 1:
            whole = known[0] + (length - first) // step * (known[1] - known[0])
            soon = whole // 2 if shorter else max(whole // 2, FEW)
            if shortest == SHORTEST[0] or known[0] + known[1] + known[3] <= soon:
                yield first, first + step, first + 3 * step, step


def _traced(
    model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec, frees: Sequence[Free],
    choice: Sequence[Lengths], passes: tuple[Pass, ...], allowed: Allowed,
) -> Family:
    """The family of the programs at a few lengths: of one alone, then of several together."""
    if len(frees) == 1:
        [(a, b, c, _)] = choice
        todo: list[Lengths] = [(a,), (b,), (c,)]
        more: list[Lengths] = [(c + b - a,)]
    else:
        firsts = tuple(short[0] for short in choice)
        todo = [firsts]
        for k, (_, b, _, _) in enumerate(choice):
            todo.append((*firsts[:k], b, *firsts[k + 1 :]))
        todo += [tuple(short[1] for short in choice), tuple(short[2] for short in choice)]
        more = [(*firsts[:k], short[2], *firsts[k + 1 :]) for k, short in enumerate(choice)]
    traced: list[tuple[Lengths, Capture, Outcome]] = []

    def trace(lengths: Lengths) -> None:
        args, kwargs = pytree.tree_unflatten(resized(leaves, frees, lengths), spec)
        captured = capture(model, args, kwargs)
        traced.append((lengths, captured, begun(captured, passes, frozenset(), allowed)))

    for lengths in todo:
        trace(lengths)
    steps = tuple(short[3] for short in choice)
    try:
        return _unified(frees, traced, steps, passes, allowed)
    except NoFormula:
        for lengths in more:  # enough to tell squares
            trace(lengths)
        return _unified(frees, traced, steps, passes, allowed)


def _unified(
    frees: Sequence[Free], traced: Sequence[tuple[Lengths, Capture, Outcome]], steps: Lengths,
    passes: tuple[Pass, ...], allowed: Allowed,
) -> Family:
    lengths, captures, outcomes = zip(*traced, strict=True)
    samples = Samples([free.name for free in frees], lengths)
    sample = captures[0]
    if not agree([(c.state, c.tensor_inputs, c.output_spec, c.outputs, c.assigned, c.written,
                   c.same_as, len(c.seen), sorted(c.constants)) for c in captures]):
        raise NotOneProgram("its inputs or outputs are others at other lengths")

    def number(values: Sequence[Any], what: str) -> Any:
        if agree(values):
            return values[0]
        formula = samples.formula(values) if all(type(v) is int for v in values) else None
        if formula is None:
            raise NoFormula(f"{what} ({', '.join(map(str, values))}) follow no simple rule")
        return formula

    def numbers(rows: Sequence[Sequence[Any] | None], what: str) -> Any:
        if not agree([row if row is None else len(row) for row in rows]):
            raise NotOneProgram(f"{what} are others at other lengths")
        return None if rows[0] is None else tuple(
            number(column, what) for column in zip(*(row or () for row in rows), strict=True))

    seen = []
    for each in zip(*(c.seen for c in captures), strict=True):
        if not agree([(s.owner, s.same) for s in each]):
            raise NotOneProgram("its outputs share memory otherwise at other lengths")
        seen.append((numbers([s.shape for s in each], "the sizes of an output"),
                     numbers([s.strides for s in each], "the strides of an output"),
                     number([s.offset for s in each], "the offsets of an output"), each[0].owner,
                     each[0].same))
    return Family(
        tuple(frees), lengths[0], steps, lengths, sample,
        general(samples, [o.graph_module for o in outcomes]), tuple(seen),
        {k: number([c.constants[k] for c in captures], "outputs that are no tensors")
         for k in sample.constants},
        number([c.size for c in captures], "the numbers of operations"),
        _texts(samples, [o.applied for o in outcomes], lambda a: a.summary),
        _texts(samples, [o.skips for o in outcomes], lambda s: s.reason), allowed, passes,
    )


def _texts(samples: Samples, rows: Sequence[Sequence[Any]], text: Callable[[Any], str]) -> Any:
    """The records of the first row, each with its text at every length, where there is one rule."""
    alike = agree([len(row) for row in rows])
    columns = zip(*rows, strict=True) if alike else ([record] for record in rows[0])
    return tuple((column[0], samples.text([text(r) for r in column]) if alike else None)
                 for column in columns)
