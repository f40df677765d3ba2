"""Read-only questions about a graph: shapes, constants, source lines, what an operation is."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from .loop import plain_loop

aten = torch.ops.aten
SCAN = torch.ops.higher_order.scan
# what these see depends on how their tensor lies in memory
PHYSICAL = (aten.as_strided.default, aten.as_strided_scatter.default, aten.as_strided_copy.default)
READS = (aten.select.int, aten.slice.Tensor)
AUTOCAST = ("cpu", "cuda")  # devices whose autocast a call's signature tells
LIFTED = (aten.lift_fresh.default, aten.lift_fresh_copy.default)  # numbers of forward's own
WRITES = (aten.select_scatter.default, aten.slice_scatter.default)
SUPERSEDED = "superseded"  # marks a random or wasted operation that others run instead
WASTED = "wasted"  # marks what the model computes and does not use
LARGEST_CONSTANT = 1 << 22  # elements of an index table that is evaluated while optimizing


@dataclass(frozen=True, order=True)
class Line:
    """A line of the user's source."""

    file: str
    number: int
    text: str = ""

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.number}"

    def as_frame(self) -> str:
        """The line as a stack trace of one frame, the form in which nodes hold it."""
        return f'File "{self.file}", line {self.number}, in forward\n    {self.text}'


FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<number>\d+), in [^\n]*(?:\n\s+(?P<text>[^\n]+))?'
)
TORCH = str(Path(torch.__file__).parent)
OPERATIONS = ("/einops/", "/einx/", "/opt_einsum/")  # packages of operations, not of models


def source_line(node: Node) -> Line | None:
    """The innermost line of the model's own source that ran `node`, if it has a trace."""
    for frame in reversed(list(FRAME.finditer(node.meta.get("stack_trace") or ""))):
        if not frame["file"].startswith((TORCH, "<")) and not any(
            package in frame["file"] for package in OPERATIONS
        ):
            return Line(frame["file"], int(frame["number"]), (frame["text"] or "").strip())
    return None


def value(node: Node) -> Tensor:
    """The fake tensor that stands for `node`'s result."""
    return cast(Tensor, node.meta["val"])


def apart(nodes: Sequence[Node]) -> list[Tensor]:
    """A fake tensor of its own for each node: `make_fx` knows its arguments by identity, and
    carries that start as one tensor share one."""
    return [value(node).detach() for node in nodes]


def is_tensor(node: object) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def shape(node: Node) -> tuple[int, ...]:
    return tuple(value(node).shape)


def is_inexact(node: Node) -> bool:
    """Whether `node` holds floating or complex numbers."""
    return value(node).is_floating_point() or value(node).is_complex()


def bytes_of(node: Node) -> int:
    """The size of `node`'s elements, each counted once for every place that shows it."""
    return value(node).numel() * value(node).element_size()


def is_op(node: object, *targets: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_scan(node: object) -> bool:
    return is_op(node, SCAN)


def has_body(node: object) -> bool:
    """Whether `node` is a scan, or the loop that a scan was lowered to."""
    return is_op(node, SCAN, plain_loop)


def only_last(loop: Node) -> Sequence[int]:
    """The results of a lowered scan that are no stacks, but the last step's value alone."""
    return cast(Sequence[int], loop.args[4]) if len(loop.args) > 4 else ()


def spelled(target: Any) -> str:
    """An operation's name as users know it: `batch_norm` of `_native_batch_norm_legit_no_stats`."""
    name = str(getattr(target, "_opname", None) or getattr(target, "__name__", target))
    return re.sub(r"^_?(native_|linalg_)|_(legit|ex$|forward$|functional|no_stats|no_training)",
                  "", name).lstrip("_").removesuffix("__")


def is_random(node: Node) -> bool:
    """Whether running `node` reads or advances a random number generator."""
    if has_body(node):
        return any(map(is_random, body_of(node).graph.nodes))
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is aten.dropout.default:
        return bool(node.args[1]) and bool(node.args[2])
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(argument(node, "dropout_p") != 0.0)
    return torch.Tag.nondeterministic_seeded in node.target.tags


def is_region_marker(node: Node) -> bool:
    """Whether `node` enters or leaves a region (autocast) across which nothing may move."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in (
        "_enter_autocast",
        "_exit_autocast",
    )


def outside_regions(nodes: Iterable[Node]) -> Iterator[Node]:
    """The nodes that are in no autocast region, without the region's markers."""
    depth = 0
    for node in nodes:
        if is_region_marker(node):
            depth += 1 if "enter" in str(node.target.__name__) else -1  # type: ignore[union-attr]
        elif depth == 0:
            yield node


def is_pure(node: Node) -> bool:
    """Whether `node` may be removed when unused: no mutation, no random state, no region."""
    if node.op in ("placeholder", "output"):
        return False
    if node.meta.get(SUPERSEDED):
        return True
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    if has_body(node):
        return not is_random(node)
    if is_random(node) or is_region_marker(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return not node.is_impure()


def is_kernel(node: object) -> bool:
    """Whether `node` is a fused scan; by name, since its operator may not be registered."""
    target = node.target if isinstance(node, Node) else None
    return isinstance(target, torch._ops.OpOverload) \
        and target._schema.name == "looplift::fused_scan"


def is_view(node: Node) -> bool:
    """Whether `node` only looks at its first argument's storage in another way."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target in (aten.reshape.default, aten.contiguous.default) or any(
        r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns
    )


def flat_arguments(node: Node) -> tuple[list[Any], Any]:
    """The leaves of a node's arguments, and what holds them, for `with_leaves`.

    As `torch.utils._pytree` does for any structure, 20 times faster.
    """
    leaves: list[Any] = []
    return leaves, map_aggregate((node.args, node.kwargs), leaves.append)


def with_leaves(form: Any, leaves: Iterable[Any]) -> Any:
    """Arguments and keyword arguments, as `form` holds them."""
    rest = iter(leaves)
    return map_aggregate(form, lambda _: next(rest))


def argument(node: Node, name: str) -> Any:
    """The value of the argument called `name` in the schema of `node`'s operator."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, declared in enumerate(node.target._schema.arguments):
        if declared.name == name:
            if position < len(node.args) and not declared.kwarg_only:
                return node.args[position]
            return node.kwargs.get(name, declared.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def body_of(node: Node) -> GraphModule:
    """The GraphModule that a scan runs at each step."""
    attribute = cast(Node, node.args[0])
    owner = attribute.graph.owning_module
    assert owner is not None
    return cast(GraphModule, owner.get_submodule(str(attribute.target)))


def trips(node: Node) -> int:
    """The number of steps of a scan: the length of its per-step slices."""
    return int(value(cast(list[Node], node.args[2])[0]).shape[0])


def stacked_as(result: Node) -> tuple[Node, int]:
    """The node that a loop's stacked result is, and the axis to stack it along.

    If the result is only ever permuted to put its steps elsewhere, it is stacked there.
    """
    loop = cast(Node, result.args[0])
    if cast(int, result.args[1]) < len(cast(list[Node], loop.args[1])):
        return result, 0
    users = list(result.users)
    if len(users) == 1 and is_op(users[0], aten.permute.default):
        order = list(cast(list[int], users[0].args[1]))
        axis = order.index(0)
        if [d for d in order if d] == sorted(d for d in order if d):
            return users[0], axis
    return result, 0


def root(node: Node) -> Node:
    """What a view, perhaps of another, is a view of."""
    while is_view(node):
        node = cast(Node, node.args[0])
    return node


def behind(ends: Iterable[Node], cut: Set[Node] = frozenset()) -> set[Node]:
    """`ends` and what they are computed from, up to what is `cut`."""
    found: set[Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [] if node in cut else node.all_input_nodes
    return found


def all_graphs(graph_module: GraphModule) -> Iterator[GraphModule]:
    """`graph_module`, then the bodies of its scans, outermost first."""
    yield graph_module
    for node in graph_module.graph.nodes:
        if has_body(node):
            yield from all_graphs(body_of(node))


class Facts:
    """What a pass may ask of one graph: whether it is to be differentiated (`training`), and
    whether a pass builds kernels of loops (`fuses`)."""

    def __init__(
        self, graph_module: GraphModule, training: bool = False, fuses: bool = False
    ) -> None:
        self.graph_module, self.training, self.fuses = graph_module, training, fuses
        self.constants: dict[Node, Tensor | None] = {}

    @cached_property
    def nodes(self) -> list[Node]:
        return list(self.graph_module.graph.nodes)

    @cached_property
    def order(self) -> dict[Node, int]:
        return {node: position for position, node in enumerate(self.nodes)}

    @cached_property
    def is_body(self) -> bool:
        """Whether this is the body of a scan, not the model's own graph."""
        heads = [n.name for n in self.nodes if n.op == "placeholder"]
        return any(h.startswith(("carry_", "slice_", "invariant_")) for h in heads)

    @cached_property
    def operations(self) -> list[Node]:
        """The nodes that compute something, in program order, outside autocast regions."""
        return [n for n in outside_regions(self.nodes) if n.op == "call_function"]

    @cached_property
    def movable(self) -> set[Node]:
        """The nodes that may be computed elsewhere, if they are pure."""
        return {n for n in self.nodes if n.op == "get_attr"}.union(self.operations)

    def constant(self, node: object) -> Tensor | None:
        """The integer or boolean tensor that `node` always is, or None when it depends on data.

        Evaluates tables such as `arange(0, n, 2) + offset`; values of inputs, parameters and
        buffers are never taken for constants, since they may change between calls.
        """
        if not is_tensor(node):
            return None
        assert isinstance(node, Node)
        if node not in self.constants:
            self.constants[node] = None
            self.constants[node] = self._evaluate(node)
        return self.constants[node]

    def _evaluate(self, node: Node) -> Tensor | None:
        if value(node).is_floating_point() or value(node).is_complex():
            return None
        if value(node).numel() > LARGEST_CONSTANT:
            return None
        if node.op == "get_attr":
            found = self.graph_module
            for name in str(node.target).split("."):
                found = getattr(found, name)
            return cast(Tensor, found)
        if node.op != "call_function" or not is_pure(node):
            return None
        if not isinstance(node.target, torch._ops.OpOverload) or "empty" in node.target.__name__:
            return None
        known: dict[Node, Tensor] = {}
        for source in node.all_input_nodes:
            table = self.constant(source)
            if table is None:
                return None
            known[source] = table
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        kwargs = dict(kwargs)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        return cast(Tensor, node.target(*args, **kwargs))
