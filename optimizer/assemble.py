"""A loop that was found → the scan that runs it, in the graph around it."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from .builder import Builder, fake_result
from .facts import WRITES, aten, is_op, is_tensor, shape, value, with_leaves
from .fold import Loop, Write, position
from .interleave import write_windows
from .normal_rules import FILLED_LIKE, filled_with
from .reads import lanes
from .schedules import filled, with_tensors
from .stretch import Carried, Constant, Invariant, Local, Source, Varying

# operations that draw by the size of their argument, and those that are given that size
LIKE = {aten.rand_like.default: aten.rand.default, aten.randn_like.default: aten.randn.default}
WRITTEN_OVER = {aten.bernoulli.p, aten.normal_functional.default, aten.uniform.default,
                aten.exponential.default, aten.cauchy.default, aten.log_normal.default,
                aten.geometric.default}
DRAWN = {*LIKE, *WRITTEN_OVER, aten.dropout.default}


def build_scan(loop: Loop, build: Builder) -> dict[Node, Node]:
    """Insert the scan of `loop`; maps each node used outside the loop to what replaces it."""
    return _Assembly(loop, build).run()


class _Assembly:
    """Builds the body and the arguments of a loop's scan."""

    def __init__(self, loop: Loop, build: Builder) -> None:
        self.loop, self.build = loop, build
        self.graph, self.holder = Graph(), torch.nn.Module()
        self.heads: dict[str, list[tuple[Any, Node]]] = {"carry": [], "slice": [], "invariant": []}
        self.carries: dict[tuple[int, tuple[Node, ...]], Node] = {}
        self.known: dict[Any, Node] = {}
        self.made: dict[int, Node] = {}

    def run(self) -> dict[Node, Node]:
        loop, stretch = self.loop, self.loop.stretch
        self._declare_carries()
        for place in self._needed():
            node = stretch.operations[stretch.period + place]
            self.made[place] = (
                self._lane(place) if place in loop.reads else self._operation(place, node)
            )
        outputs = [self._next(place, start) for place, start in self.carries]
        finals, steps = self._results()
        if not self.heads["slice"]:
            index = self.build.call(
                aten.arange.default, loop.trips, dtype=torch.int64, device=self._device()
            )
            self._head("slice", index, torch.empty((), dtype=torch.int64), index)
        ordered = [n for kind in self.heads.values() for _, n in kind]
        body = self._finish(ordered, outputs + [self._step_value(s) for s in steps])
        results = self.build.scan(body, *[[a for a, _ in kind] for kind in self.heads.values()])
        lanes_at = dict(zip(steps, results[len(self.carries):], strict=True))
        return self._replacements(finals, lanes_at, results)

    def _device(self) -> torch.device:
        return next(value(n).device for n in self.loop.stretch.operations if is_tensor(n))

    def _head(self, kind: str, outer: Node, like: torch.Tensor, key: Any) -> Node:
        """A placeholder of the body, bound to the node `outer` of the graph around it."""
        if key not in self.known:
            node = self.graph.placeholder(f"{kind}_{len(self.heads[kind])}")
            node.meta["val"] = like
            self.known[key] = node
            self.heads[kind].append((outer, node))
        return self.known[key]

    def _needed(self) -> list[int]:
        """The places whose results the body must compute, in order."""
        loop = self.loop
        wanted = [w.source.place for w in loop.writes.values()
                  if isinstance(w.source, (Local, Carried))]
        wanted += [p for p in loop.outside if p not in loop.writes]
        wanted += [s.place for p in range(loop.stretch.period)
                   if p not in loop.writes and p not in loop.sums
                   for s in loop.sources[p] if isinstance(s, Carried)]
        needed: set[int] = set()
        while wanted:
            place = wanted.pop()
            if place in needed:
                continue
            needed.add(place)
            if place not in loop.reads:
                wanted += [s.place for s in loop.sources[place] if isinstance(s, (Local, Carried))]
        return sorted(needed)

    def _declare_carries(self) -> None:
        for place in self._needed():
            if place in self.loop.reads:
                continue
            for source in self.loop.sources[place]:
                if isinstance(source, Carried):
                    for distance in range(1, len(source.start) + 1):
                        self._carry(source.place, source.start[-distance:])
        for write in self.loop.writes.values():
            if isinstance(write.source, Carried):
                for distance in range(1, len(write.source.start) + 1):
                    self._carry(write.source.place, write.source.start[-distance:])

    def _carry(self, place: int, start: tuple[Node, ...]) -> Node:
        """The value of operation `place`, `len(start)` steps back."""
        key = (place, start)
        if key not in self.carries:
            node = self.graph.placeholder(f"carry_{len(self.carries)}")
            node.meta["val"] = value(start[0])
            self.carries[key] = node
            self.heads["carry"].append((start[0], node))
        return self.carries[key]

    def _next(self, place: int, start: tuple[Node, ...]) -> Node:
        """What the next step sees of a carry: the result itself, or the carry one step nearer."""
        return self.made[place] if len(start) == 1 else self.carries[(place, start[1:])]

    def _lane(self, place: int) -> Node:
        links, base = self.loop.reads[place], self.loop.read_base[place]
        key = (base, tuple(links))
        if key in self.known:
            return self.known[key]
        stacked = lanes(self.build, base, links)
        return self._head("slice", stacked, value(self.loop.stretch.operations[place]), key)

    def _operation(self, place: int, node: Node) -> Node:
        number = filled(node)
        if number is not None:
            fill = self.loop.sources[place][number]
            if isinstance(fill, Varying):
                return self._filled(node, fill)
        if (placed := position(self.loop, place)) is not None:
            return self._placed(place, node, *placed)
        leaves = [self._argument(node, s) for s in self.loop.sources[place]]
        args, kwargs = with_leaves(self.loop.forms[place], leaves)
        if (made := self._by_size(node, args, kwargs)) is not None:
            return made
        if any(isinstance(s, Varying) and not isinstance(s.items[0], Node)
               for s in self.loop.sources[place]):
            made = with_tensors(node, args, kwargs, partial(self._put, node))
            dtype = value(node).dtype
            return made if value(made).dtype == dtype else self._put(
                node, aten.to.dtype, made, dtype)
        made = self.graph.call_function(cast(Any, node.target), args, kwargs)
        made.meta = dict(node.meta.items())
        return made

    def _placed(self, place: int, node: Node, axis: int, numbers: tuple[int, ...]) -> Node:
        """One element of an axis, read or written at a place of each step's own: `torch.where`
        with a mask of that place."""
        base, *others = (self._argument(node, s) for s in self.loop.sources[place][:2]
                         if not isinstance(s, Constant))
        sizes = shape(base)
        key = ("places", axis, sizes, numbers)
        if key not in self.known:
            call, device = self.build.call, value(node).device
            table = self.build.table(numbers, device, torch.int64)
            along = call(aten.arange.default, sizes[axis], dtype=torch.int64, device=device)
            mask = call(aten.eq.Tensor, along, call(aten.unsqueeze.default, table, 1))
            mask = self.build.reshape(mask, [len(numbers), -1, *[1] * (len(sizes) - axis - 1)])
            self._head("slice", mask, value(mask)[0], key)
        put = partial(self._put, node)
        if is_op(node, *WRITES):
            written = others[0] if is_op(node, aten.slice_scatter.default) \
                else put(aten.unsqueeze.default, others[0], axis)
            return put(aten.where.self, self.known[key], written, base)
        nothing = put(aten.full.default, [], 0, dtype=value(node).dtype, device=value(node).device)
        return put(aten.sum.dim_IntList, put(aten.where.self, self.known[key], base, nothing),
                   [axis], is_op(node, aten.slice.Tensor))

    def _put(self, node: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """An operation of the body, in place of `node`."""
        made = self.graph.call_function(target, args, kwargs)
        made.meta = dict(node.meta)
        made.meta["val"] = fake_result(made, self.build.mode)
        return made

    def _by_size(self, node: Node, args: Any, kwargs: Any) -> Node | None:
        """What is filled or random by the size of its argument alone, where only that counts: off
        the carries' cycle, random numbers can be drawn in a loop of their own, in the same order.
        """
        like, made = node.args[0] if node.args else None, value(node)
        if not isinstance(like, Node) or node.target not in (*DRAWN, *FILLED_LIKE) \
                or kwargs.get("memory_format") is not None \
                or not (made.is_contiguous() and value(like).is_contiguous()):
            return None
        put = partial(self._put, node)
        options = {"dtype": made.dtype, "device": made.device}
        if node.target in FILLED_LIKE:
            return put(aten.full.default, list(made.shape), filled_with(node.target, args),
                       **options)
        if made.device.type != "cpu":
            return None
        if node.target in LIKE:
            return put(LIKE[node.target], list(made.shape), **options)
        size = partial(put, aten.zeros.default, list(made.shape), **options)
        if node.target in WRITTEN_OVER:
            return put(node.target, size(), *args[1:], **kwargs)
        if not args[2] or args[1] in (0, 1):
            return None
        probability = 1 - args[1]
        noise = put(aten.bernoulli.p, size(), probability)
        return put(aten.mul.Tensor, args[0], put(aten.div.Tensor, noise, probability))

    def _filled(self, node: Node, numbers: Varying) -> Node:
        """A tensor filled with a number of each step's own."""
        kind = value(node).dtype  # what names no dtype is rounded, also in float64
        if not is_op(node, aten.full.default) or node.kwargs.get("dtype") is not None:
            kind = torch.float64 if kind.is_floating_point else torch.int64
        one = self._numbers(node, numbers.items, kind)
        one = self._put(node, aten.to.dtype, one, value(node).dtype)
        return self._put(node, aten.expand.default, one, list(shape(node)))

    def _argument(self, node: Node, source: Source) -> Any:
        match source:
            case Constant(held):
                return held
            case Local(place):
                return self.made[place]
            case Carried(place, start):
                return self._carry(place, start)
            case Invariant(outer) if not is_tensor(outer):
                return self._inner_body(outer)
            case Invariant(outer):
                return self._head("invariant", outer, value(outer), outer)
            case Varying(items):
                return self._table(node, items)

    def _inner_body(self, outer: Node) -> Node:
        """The body of a scan inside the loop, held by the loop's own body."""
        if outer not in self.known:
            held = self.build.graph_module.get_submodule(str(outer.target))
            self.holder.add_module(str(outer.target), held)
            self.known[outer] = self.graph.get_attr(str(outer.target))
        return self.known[outer]

    def _table(self, node: Node, items: tuple[Any, ...]) -> Node:
        """A schedule: one number, or one constant tensor, for each step."""
        if isinstance(items[0], Node):
            if items in self.known:
                return self.known[items]
            held = self.build.call(aten.stack.default, list(items))
            return self._head("slice", held, value(items[0]), items)
        # Python floats are doubles, and as 0-d tensors promote integers and other 0-d tensors only
        floating = any(isinstance(i, float) for i in items)
        number = self._numbers(node, items, torch.float64 if floating else torch.int64)
        given = [value(n) for n in node.all_input_nodes if is_tensor(n)]
        if floating and all(map(_is_integral, given)):
            own = torch.get_default_dtype()
        elif all(t.is_floating_point() and not t.dim() for t in given):
            own = torch.promote_types(given[0].dtype, torch.float32)  # as halves are computed
        else:
            return number
        return self._put(node, aten.to.dtype, number, own)

    def _numbers(self, node: Node, items: tuple[Any, ...], dtype: torch.dtype) -> Node:
        key = ("table", items, dtype)
        if key in self.known:
            return self.known[key]
        held = self.build.table(items, value(node).device, dtype)
        return self._head("slice", held, value(held)[0], key)

    def _step_value(self, source: Local | Carried) -> Node:
        if isinstance(source, Local):
            return self.made[source.place]
        return self._carry(source.place, source.start)

    def _results(self) -> tuple[dict[int, Node], list[Local | Carried]]:
        """Which results leave the loop as final carries, and what leaves it for every step."""
        finals: dict[int, Node] = {}
        steps: list[Local | Carried] = []
        for place, used in self.loop.outside.items():
            if place in self.loop.writes:
                continue
            nearest = [k for k in self.carries if k[0] == place and len(k[1]) == 1]
            if used == [self.loop.trips - 1] and nearest:
                finals[place] = self.carries[nearest[0]]
            else:
                steps.append(Local(place))
        for write in self.loop.writes.values():
            if isinstance(write.source, (Local, Carried)) and write.source not in steps:
                steps.append(write.source)
        return finals, steps

    def _finish(self, heads: list[Node], outputs: list[Node]) -> GraphModule:
        """The body, its placeholders in the order carries, slices, invariants."""
        ordered = Graph()
        moved: dict[Node, Node] = {}
        for node in [*heads, *(n for n in self.graph.nodes if n.op != "placeholder")]:
            moved[node] = ordered.node_copy(node, moved.__getitem__)
        ordered.output(tuple(moved[n] for n in outputs))
        return GraphModule(self.holder, ordered)

    def _replacements(
        self, finals: dict[int, Node], lanes_at: dict[Local | Carried, Node], results: list[Node]
    ) -> dict[Node, Node]:
        loop, build = self.loop, self.build
        replaced: dict[Node, Node] = {}
        carry_order = list(self.carries.values())
        for place, used in loop.outside.items():
            column = loop.stretch.column(place)
            if place in loop.writes:
                replaced[column[-1]] = self._written(loop.writes[place], lanes_at)
            elif place in finals:
                replaced[column[-1]] = results[carry_order.index(finals[place])]
            else:
                for trip in used:
                    replaced[column[trip]] = build.call(
                        aten.select.int, lanes_at[Local(place)], 0, trip
                    )
        return replaced

    def _written(self, write: Write, lanes_at: dict[Local | Carried, Node]) -> Node:
        """The buffer after all steps, from the per-step values stacked on axis 0."""
        build, axis = self.build, write.axis
        start = write.start if write.after is None else self._written(write.after, lanes_at)
        stacked = self._all_steps(write, lanes_at)
        if write.added is not None:
            return add_windows(build, start, stacked, write)
        begins = list(write.begins)
        if begins[1] < begins[0]:
            stacked, begins = build.call(aten.flip.default, stacked, [0]), begins[::-1]
        moved = build.move(stacked, 0, axis)
        gap, width = begins[1] - begins[0], write.width or 1
        end = begins[-1] + width
        if write.width is not None:
            if gap > width:
                return build.call(write_windows, start, moved, axis, begins[0], gap)
            sizes = shape(moved)
            moved = build.reshape(
                moved, [*sizes[:axis], len(begins) * width, *sizes[axis + 2 :]]
            )
            gap = 1
        if (begins[0], gap, end) == (0, 1, shape(start)[axis]):
            return build.call(aten.contiguous.default, moved)
        return build.call(
            aten.slice_scatter.default, start, moved, axis, begins[0], end, gap
        )

    def _all_steps(self, write: Write, lanes_at: dict[Local | Carried, Node]) -> Node:
        match write.source:
            case Local() | Carried():
                return lanes_at[write.source]
            case Invariant(outer):
                sizes = [self.loop.trips, *shape(outer)]
                return self.build.call(aten.expand.default, outer, sizes)
            case _:
                raise AssertionError("`_find_write` takes no other source")


def add_windows(build: Builder, start: Node, stacked: Node, write: Write) -> Node:
    """`start` with overlapping windows added to it, each value in the order of the steps.

    A window is cut into pieces as long as the windows are apart; the pieces of one number lie
    side by side, and are added at once.
    """
    assert write.added is not None
    axis, begins, sizes = write.axis, write.begins, write.added
    width, gap, size = sizes[axis], abs(begins[1] - begins[0]), shape(start)[axis]
    steps = shape(stacked)[0]
    ones = [1] * (len(sizes) - len(shape(stacked)) + 1)
    windows = build.reshape(stacked, [steps, *ones, *shape(stacked)[1:]])
    windows = build.call(aten.expand.default, windows, [steps, *sizes])
    backwards = begins[1] < begins[0]
    if backwards:
        windows = build.call(aten.flip.default, windows, [0])
    windows = build.move(windows, 0, axis)
    pieces = -(-width // gap)
    spare = pieces * gap - width
    if spare:
        behind = [0, 0] * (len(sizes) - axis - 1)
        windows = build.call(aten.constant_pad_nd.default, windows, [*behind, 0, spare])
    for number in range(pieces) if backwards else reversed(range(pieces)):
        piece = build.slice(windows, axis + 1, number * gap, (number + 1) * gap)
        piece = build.reshape(piece, [*sizes[:axis], steps * gap, *sizes[axis + 1 :]])
        begin = min(begins) + number * gap
        end = min(begin + steps * gap, size)
        piece = build.slice(piece, axis, 0, end - begin)
        now = build.call(aten.add.Tensor, build.slice(start, axis, begin, end), piece)
        start = build.call(aten.slice_scatter.default, start, now, axis, begin, end, 1)
    return start


def _is_integral(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())
