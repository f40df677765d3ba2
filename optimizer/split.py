"""Reads that together cover a tensor → one `split`, whose backward is one `cat`.

The backward of each `slice` fills a tensor of the whole size and adds it to the others; the
normal form writes `chunk` and `split` as slices, so that loops look alike. This turns what is
left of them back.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import cast

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .builder import Builder, output_node
from .facts import all_graphs, aten, is_op, is_view, outside_regions, shape


def join_reads(graph_module: GraphModule, mode: FakeTensorMode) -> None:
    """Write slices that tile an axis as a split, in `graph_module` and its bodies."""
    for graph in all_graphs(graph_module):
        pieces: dict[tuple[Node, int], list[Node]] = defaultdict(list)
        for node in outside_regions(graph.graph.nodes):
            if is_op(node, aten.slice.Tensor):
                pieces[cast(tuple[Node, int], node.args[:2])].append(node)
        end = output_node(graph)
        for (_, axis), slices in pieces.items():
            source = cast(Node, slices[0].args[0])  # may have become a piece itself
            ordered = sorted(slices, key=lambda s: cast(int, s.args[2]))
            if not _tiles(ordered, shape(source)[axis]) or any(_returned(s, end) for s in slices):
                continue
            build = Builder(graph, slices[0], mode, dict(slices[0].meta))
            sizes = [shape(s)[axis] for s in ordered]
            split = build.call(aten.split_with_sizes.default, source, sizes, axis)
            made = [build.call(operator.getitem, split, place) for place in range(len(ordered))]
            for piece, item in zip(ordered, made, strict=True):
                piece.replace_all_uses_with(item)
                graph.graph.erase_node(piece)
        graph.recompile()


def _tiles(slices: list[Node], size: int) -> bool:
    """Whether `slices`, in order of their starts, cover `size` elements once each."""
    if len(slices) < 2 or any(s.args[4] != 1 for s in slices):
        return False
    bounds = [cast(tuple[int, int], s.args[2:4]) for s in slices]
    starts, stops = [start for start, _ in bounds], [stop for _, stop in bounds]
    return starts == [0, *stops[:-1]] and stops[-1] == size


def _returned(node: Node, end: Node) -> bool:
    """Whether a caller may get a view of `node`, which could not be written to in place if it
    were one of several views."""
    return any(user is end or (is_view(user) and _returned(user, end)) for user in node.users)
