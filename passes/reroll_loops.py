"""An unrolled loop → `scan`.

Before:
    h1 = f(h0, x[:, 0]); h2 = f(h1, x[:, 1]); …; y = stack([h1, h2, …], 1)
After:
    h, hs = scan(f, h0, x.movedim(1, 0)); y = hs.movedim(0, 1)
Wins:
    Nothing by itself: it makes the loop visible to the passes that batch, solve and fuse it.
Sound if:
    1. the operations are the same in every trip, and every argument has the same class in
       every trip: constant, invariant, of this trip, of a fixed number of trips back, or read
       from an outer value at a known place;
    2. what is carried keeps its shape, dtype and device;
    3. no autocast region begins or ends inside.
Skips:
    loops whose steps compute no more than it would cost to stack what they read;
    each argument that breaks one of these, at the user's line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, cast

from torch import Tag, Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..optimizer.absorb import Absorption, absorption
from ..optimizer.assemble import build_scan
from ..optimizer.builder import Builder, duplicate, output_node, placeholders
from ..optimizer.collect import Collection, before_each_step, collection
from ..optimizer.facts import (
    READS,
    WASTED,
    WRITES,
    Facts,
    Line,
    aten,
    body_of,
    bytes_of,
    flat_arguments,
    is_op,
    is_random,
    is_scan,
    is_tensor,
    is_view,
    shape,
    source_line,
    spelled,
    trips,
)
from ..optimizer.fold import Loop, fold
from ..optimizer.interleave import last_write
from ..optimizer.repeats import Repeat, repeats
from ..optimizer.rewrite import Rewrite, Skip
from ..optimizer.schedules import filled, scheduled
from ..optimizer.stretch import NEVER, Misfit, Stretch, Varying

MOST_CUTS = 4
LONGEST_RHYTHM = 64  # trips after which a loop's steps may be alike again
BYTES_PER_CALL = 1 << 14  # copied in about the time that calling one operation takes
JOINED = 0.25  # of what is computed: so much may be copied at every call
# what costs as much as to stack what it reads
MOVING = (aten.index_select.default, aten.gather.default, aten.index.Tensor, aten.flip.default,
          aten.roll.default, aten.clone.default, aten.constant_pad_nd.default, aten.pad.default)
MOST_LINES = 4  # that are told of one by one for the same reason
LOOKS_REPEATED = 6  # operations of one kind at one line: more than an expression has
BETWEEN = "what lies between them is not the same in every step"


@dataclass(frozen=True)
class RerollLoops:
    """Fold tandem repeats of operations into `scan`; see the module's docstring."""

    least_trips: int = 3
    name: ClassVar[str] = "reroll-loops"

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        operations = facts.operations
        taken: list[range] = []
        folded: set[Node] = set()
        needed: set[Node] = set()
        told: set[Line | None] = set()
        for repeat in repeats(tokens(operations), self.least_trips):
            span = range(repeat.start, repeat.stop)
            if any(span.start < t.stop and t.start < span.stop for t in taken):
                continue
            runs = best_cuts(operations, repeat)
            run = runs[0]
            if not any(worth_folding(n) for n in run[: repeat.period]) or is_made(run):
                continue
            found = self._loops(runs, repeat.period)
            if isinstance(found, Misfit):
                if worth_telling(run, repeat.period):
                    reason = f"a loop of {repeat.trips} trips: {found.reason}"
                    told.update(source_line(n) for n in run)
                    where = source_line(found.node) or first_line(run, repeat.period)
                    yield Skip(self.name, reason, where)
                continue
            for loop in found:
                inside = loop.stretch.operations
                inputs = {source for node in inside for source in node.all_input_nodes}
                if inputs & folded or needed.intersection(inside):
                    continue  # one loop of this round reads another: next round, when it is folded
                taken.append(span)
                folded.update(inside)
                needed |= inputs
                yield self._rewrite(loop, first_line(inside, loop.stretch.period))
        if taken:
            return  # what else there is may read what these loops replace
        collected = [*self._states(facts)] or [*self._collections(facts)]
        yield from collected
        if not collected:
            writes = list(self._writes(facts))
            yield from writes
            if not writes and not facts.is_body:
                yield from self._leftovers(facts, told)
                yield from self._in_regions(facts)

    def _leftovers(self, facts: Facts, told: set[Line | None]) -> Iterator[Skip]:
        """Lines that ran several times and are no loop with steps that are all alike: why not."""
        ran: dict[tuple[Line, Any], list[Node]] = {}
        for node in facts.operations:
            line = source_line(node)
            if line is not None and worth_folding(node) and "rewritten_by" not in node.meta:
                ran.setdefault((line, node.target), []).append(node)
        reasons: dict[Line, list[str]] = {}
        for (line, _), nodes in ran.items():
            if len(nodes) >= LOOKS_REPEATED and line not in told and not is_scan(nodes[0]):
                kind = spelled(nodes[0].target)
                reasons.setdefault(line, []).append(
                    f"{len(nodes)} times {kind}: {difference(nodes)}")
        lines: dict[str, list[Line]] = {}
        for line, found in reasons.items():  # the telling ones first
            reason = min(found, key=lambda reason: BETWEEN in reason)
            alike = lines.setdefault(reason.partition(": ")[2], [])
            alike.append(line)
            if len(alike) <= MOST_LINES:
                yield Skip(self.name, reason, line)
        for why, alike in lines.items():
            if rest := alike[MOST_LINES:]:
                yield Skip(self.name, f"and {len(rest)} more lines: {why}", rest[0])

    def _in_regions(self, facts: Facts) -> Iterator[Skip]:
        """Lines that ran several times in autocast regions, which are left as they are."""
        outside = set(facts.operations)
        ran = Counter((source_line(n), n.target) for n in facts.nodes
                      if n.op == "call_function" and n not in outside and worth_folding(n))
        for line in dict.fromkeys(line for (line, _), count in ran.items()
                                  if count >= LOOKS_REPEATED):
            yield Skip(self.name, "it runs in an autocast region, which is left as it is", line)

    def _writes(self, facts: Facts) -> Iterator[Rewrite]:
        """Windows that loops wrote into a buffer, alternately perhaps → one concatenation."""
        for node in facts.operations:
            found = last_write(node)
            if found is not None:
                summary = f"{sum(w.count for w in found.windows)} windows → one concatenation"
                yield Rewrite(self.name, summary, source_line(node), node, (node,),
                              lambda b, found=found: [found.build(b)])  # type: ignore[misc]

    def _loops(self, runs: Sequence[Sequence[Node]], period: int) -> list[Loop] | Misfit:
        """The loop that a run is, or the loops one after another, as in both directions of a
        recurrent network: where the run is found to break, another may begin."""
        found = self._fold(runs, period)
        if isinstance(found, Loop):
            reason = loses(found)
            return Misfit(reason, runs[0][0]) if reason else [found]
        place = found.trip * period
        parts = [runs[0][:place], runs[0][place:]] if place else []
        loops: list[Loop] = []
        for part in parts:
            if len(part) >= self.least_trips * period:
                more = self._loops([part], period)
                loops += more if isinstance(more, list) else []
        return loops or found

    def _fold(self, runs: Sequence[Sequence[Node]], period: int) -> Loop | Misfit:
        """The loop that a run is, cut one way or another."""
        first: Misfit | None = None
        for part, long in cuts(runs, period):
            if len(part) < self.least_trips * long:
                continue
            try:
                return fold(part, long)
            except Misfit as misfit:
                first = first or misfit
        assert first is not None
        return first

    def _rewrite(self, loop: Loop, line: Line | None) -> Rewrite:
        operations = loop.stretch.operations
        replaces = tuple(
            loop.stretch.column(place)[trip]
            for place, used in loop.outside.items()
            for trip in (used[-1:] if place in loop.writes else used)
        )

        def build(builder: Builder) -> Sequence[Node]:
            replaced = build_scan(loop, builder)
            return [replaced[node] for node in replaces]

        per_trip = len([n for n in operations[: loop.stretch.period] if not is_view(n)])
        summary = f"{loop.trips} × {per_trip} operations → one scan"
        return Rewrite(self.name, summary, line, operations[-1].next, replaces, build,
                       supersedes=tuple(n for n in operations
                                        if is_random(n) or n.meta.get(WASTED)))

    def _states(self, facts: Facts) -> Iterator[Rewrite]:
        """A state's first value, then those after all steps but the last → the state before each
        step: its last update is what nobody reads."""
        for node in facts.operations:
            found = before_each_step(node) if is_op(node, aten.stack.default) else None
            if found is None:
                continue
            result, carry, turned = found
            scan, axis = cast(Node, result.args[0]), cast(int, (*node.args, 0)[1])
            others = tuple(r for r in scan.users if r is not result)

            def build(
                b: Builder, scan: Node = scan, place: int = cast(int, result.args[1]),
                carry: int = carry, others: tuple[Node, ...] = others,
                axis: int = axis % len(shape(node)), turned: bool = turned,
            ) -> list[Node]:
                body = duplicate(body_of(scan))
                results = list(cast(tuple[Node, ...], output_node(body).args[0]))
                results[place] = placeholders(body)[carry]
                output_node(body).args = (tuple(results),)
                made = b.scan(body, *cast(Any, scan.args[1:]))
                states = b.call(aten.flip.default, made[place], [0]) if turned else made[place]
                return [*(made[cast(int, r.args[1])] for r in others), b.move(states, 0, axis)]

            yield Rewrite(self.name, f"{trips(scan)} results → one permute", source_line(scan),
                          scan, (*others, node), build, supersedes=(scan,))
            return  # another may read the same scan

    def _collections(self, facts: Facts) -> Iterator[Rewrite]:
        """The results of a scan, stacked or concatenated one by one → the scan's own stack."""
        longer: set[Node] = set()  # scans: others that join one find it longer next time
        for node in facts.operations:
            found = collection(node) if is_op(node, aten.stack.default, aten.cat.default) else None
            rest = found and absorption(node, found, facts)
            if found and rest is None:
                yield self._collected(node, found)
            elif rest and rest.scan not in longer:
                longer.add(rest.scan)
                yield self._absorbed(rest)

    def _absorbed(self, rest: Absorption) -> Rewrite:
        """The last, incomplete trip → one more step of the scan."""
        return Rewrite(self.name, f"the rest joins {trips(rest.scan)} trips",
                       source_line(rest.scan), rest.scan, rest.replaces, rest.build)

    def _collected(self, node: Node, found: Collection) -> Rewrite:
        summary = f"{found.entries} results → one {'reshape' if found.joins else 'permute'}"
        return Rewrite(
            self.name, summary, source_line(node), node, (node,), lambda b: [found.build(b)]
        )


def tokens(operations: Sequence[Node]) -> list[int]:
    """One integer for each operation; equal where two could be the same step of a loop."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(token(node), len(numbers)) for node in operations]


def token(node: Node) -> Any:
    """The operation, the structure and constants of its arguments, its results' shapes."""
    placed = is_op(node, *READS, *WRITES) or bool(scheduled(node))
    leaves, form = flat_arguments(node)
    number = filled(node)
    abstract = tuple(int if k == number else _leaf(leaf, placed) for k, leaf in enumerate(leaves))
    results, _ = pytree.tree_flatten(node.meta.get("val"))
    shapes = tuple(f"{r.dtype}{tuple(r.shape)}" if isinstance(r, Tensor) else "" for r in results)
    return (node.target, repr(form), abstract, shapes)


def _leaf(leaf: Any, placed: bool) -> Any:
    if isinstance(leaf, Node):
        return Node
    if placed and isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
        return int
    return (type(leaf).__name__, str(leaf))


def best_cuts(operations: Sequence[Node], repeat: Repeat) -> list[Sequence[Node]]:
    """The repeat's whole trips, cut first where the fewest values cross from trip to trip.

    A cut that leaves one trip fewer is taken only if all others part a tuple from its items.
    """
    spare = repeat.length - repeat.trips * repeat.period
    whole = repeat.trips * repeat.period
    stretch = Stretch(operations[repeat.start : repeat.start + whole], repeat.period)
    crossings = stretch.crossings()

    def cost(place: int) -> tuple[bool, bool, int, int]:
        return crossings[place] >= NEVER, place > spare, crossings[place], place

    runs = []
    for cut in sorted(range(repeat.period), key=cost)[:MOST_CUTS]:
        length = whole if cut <= spare else whole - repeat.period
        runs.append(operations[repeat.start + cut : repeat.start + cut + length])
    return runs


def cuts(
    runs: Sequence[Sequence[Node]], period: int
) -> Iterator[tuple[Sequence[Node], int]]:
    """What a run may be a loop as, with the operations of a trip: all of it, or without a first or
    last trip that looks alike but is not, or with several of its periods to a trip, as in
    `f if t % 2 else g`."""
    run = runs[0]
    yield from ((each, period) for each in runs)
    yield from ((run[period:], period), (run[:-period], period))
    for k in sorted({2, 3, 4, rhythm(run, period)} - {1}):
        yield run[: len(run) // (k * period) * k * period], k * period


def rhythm(run: Sequence[Node], period: int) -> int:
    """After how many trips the operations read what lies as far back again: of `h if t % 8 else
    g` after 8; 1 if that is not seen. The first third of the trips, which may read what was before
    them, does not count.
    """
    place = {node: k for k, node in enumerate(run)}
    back = [tuple(k - place[s] if s in place else None for s in node.all_input_nodes)
            for k, node in enumerate(run)]
    trips = [tuple(back[k : k + period]) for k in range(0, len(run), period)]
    later = trips[len(trips) // 3 :]
    most = min(len(trips) // 3, LONGEST_RHYTHM)
    return next((k for k in range(1, most + 1) if later[k:] == later[:-k]), 1)


def first_line(run: Sequence[Node], period: int) -> Line | None:
    """The first line of the user's file in a loop's body: in a trip in the middle, since what the
    first and the last read may be read before the loop too, and so may parts of what they view."""
    middle = len(run) // period // 2 * period
    trip = run[middle : middle + period]
    own = [n for n in trip if not is_view(n)] or trip
    return min((ln for n in own if (ln := source_line(n)) is not None), default=None)


def difference(nodes: Sequence[Node]) -> str:
    """In what operations of one line differ."""
    parameters = [{s for s in n.all_input_nodes if s.meta.get("state")} for n in nodes]
    if len({str([s.meta.get("val") for s in (n, *n.all_input_nodes)]) for n in nodes}) > 1:
        return "they work on different sizes"
    if any(own != parameters[0] for own in parameters):
        return "each uses parameters of its own"
    if len({token(n) for n in nodes}) > 1:
        return "a number given to them varies in a way that no scan can read"
    return BETWEEN


def loses(loop: Loop) -> str:
    """Why it would cost more to stack the separate values that the steps read than it saves.

    `a·x + b·y + c·z` is no loop over (a, x), (b, y), (c, z), and the query, key and value
    projections of one input are none over their weights.
    """
    varying = [s for sources in loop.sources for s in sources if isinstance(s, Varying)]
    stacked = {s.items for s in varying if isinstance(s.items[0], Node)}
    work = [n for n in loop.stretch.operations[: loop.stretch.period] if worth_folding(n)]
    cheap = all(is_op(n, *MOVING) or (
        isinstance(n.target, OpOverload) and Tag.pointwise in n.target.tags) for n in work)
    if cheap and len(work) <= len(stacked):
        return "its steps read values that would have to be stacked, at the cost of what they " \
            "compute"
    few = len(work) == 1 and loop.trips < LOOKS_REPEATED
    if few and ((cheap and any(map(is_uneven, varying))) or not (loop.reads or varying)):
        return "it repeats one operation a few times, which a loop would not make faster"
    copied = sum(bytes_of(n) for items in stacked for n in items if n.meta.get("state"))
    made = [n for n in loop.stretch.operations if worth_folding(n) and is_tensor(n)]
    computed = sum(map(bytes_of, made))
    saved = (loop.trips - 1) * len(work) * BYTES_PER_CALL
    one_input = len(work) == 1 and not loop.reads and all(
        n.meta.get("state") for items in stacked for n in items)
    if copied and (one_input or copied > max(computed * JOINED, saved)):
        return "its parameters would be copied into one at every call, which costs more than it " \
            "saves"
    return ""


def is_uneven(varying: Varying) -> bool:
    """Whether numbers differ from trip to trip by no one step, as where gates are read."""
    numbers = varying.items
    return all(isinstance(n, int) for n in numbers) \
        and len({b - a for a, b in pairwise(numbers)}) > 1


def worth_folding(node: Node) -> bool:
    """Whether an operation does more than view a value, or make one from nothing."""
    return bool(node.all_input_nodes) and not is_view(node)


def is_made(run: Sequence[Node]) -> bool:
    """Whether a rewrite wrote all of it down, and no loop is in it."""
    return all("rewritten_by" in n.meta for n in run) and not any(map(is_scan, run))


def worth_telling(run: Sequence[Node], period: int) -> bool:
    """Whether a repeat that is no loop looks like one to its author: some work in each trip."""
    return sum(is_tensor(n) and not is_view(n) for n in run[:period]) >= 2
