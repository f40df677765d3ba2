"""The step of a fused scan: Python source, and its graph of core operations."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import _lru_cache_wrapper, lru_cache, partial, wraps
from operator import and_
from textwrap import dedent
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .builder import put_number
from .composed import RULES, Early
from .facts import aten
from .lookups import SPELLED
from .pointwise import constant, tracing_a_step
from .systems import TELLING, telling
from .turns import TRACING

VMAP = [getattr(torch._C.DispatchKey, name) for name in (
    "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode", "FuncTorchBatched",
    "FuncTorchVmapMode")]
CHECKED = "checked"  # outputs called so are NaN where an operation of the step raises
R = TypeVar("R")
Step = Callable[..., list[Tensor]]
Sizes = tuple[int, ...]
Counts = tuple[int, int, int]  # of carries, slices and invariants
RENAMED: dict[Any, Any] = {
    aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default,
    aten.squeeze_.dim: aten.squeeze.dim,  # of a product that has no other reader
}


def moving(counts: Counts, count: int) -> list[int]:
    """Which of a step's arguments, then results, `count` in all, are others at each step."""
    held, read, fixed = counts
    return [*range(held, held + read), *range(2 * held + read + fixed, count)]


def placed(source: str, first: str, dtype: torch.dtype) -> str:
    """A step that makes its constants where its `first` argument is, and of its dtype."""
    source = source.replace(str(dtype), f"{first}.dtype")
    return re.sub(r"torch\.device\([^()]*\)", f"{first}.device", source)


class _Aside(threading.local):
    inside = False  # a call of `aside`, which holds the turn to trace


_aside = _Aside()


def aside(function: Callable[[], Any]) -> Any:
    """A function's result, in a thread of its own: the modes and keys that dispatch operators
    for the caller, who may be tracing or differentiating, do not count there."""
    turn = contextlib.nullcontext() if _aside.inside else TRACING
    with turn, ThreadPoolExecutor(1, initializer=partial(setattr, _aside, "inside", True)) as pool:
        return pool.submit(function).result()


def remembered(function: Callable[..., R]) -> _lru_cache_wrapper[R]:
    """A function of a step's source and sizes, computed once, `aside`: the modes of whoever asks
    first, which may copy what is a view or have no values, would count for all who ask later."""

    @lru_cache(maxsize=512)
    @wraps(function)
    def found(*args: Any, **kwargs: Any) -> R:
        return cast(R, aside(partial(function, *args, **kwargs)))

    return found


@lru_cache(maxsize=256)
def checks(source: str) -> tuple[int, ...] | None:
    """Which results tell where an operation of the step may raise; None if none tells.

    >>> checks("def step(h, x):\\n    return [h * x, h]")
    ()
    """
    names = source[source.rindex("[") + 1 : source.rindex("]")].split(", ")
    found = tuple(k for k, name in enumerate(names) if name.startswith(CHECKED))
    raises = any(name in source for name in (*map(str, TELLING), *SPELLED))
    return found if found or not raises else None


@lru_cache(maxsize=256)
def step_function(source: str) -> Step:
    """The function that `source` defines."""
    scope: dict[str, Any] = {"torch": torch, "inf": float("inf"), "nan": float("nan")}
    exec(dedent(source), scope)
    return scope["step"]  # type: ignore[no-any-return]


@remembered
def traced(source: str, sizes: tuple[Sizes, ...]) -> GraphModule:
    """The step in core operations, on arguments of these sizes."""
    token = telling.set(bool(checks(source)))
    try:
        made = functional_graph(step_function(source), sizes)
    finally:
        telling.reset(token)
    _tabulate(made)
    return made


def _tabulate(graph_module: GraphModule) -> None:
    """What no argument reaches and is no one number, as tables; without those whose numbers
    would be others in float64."""
    graph, known = graph_module.graph, dict[Node, tuple[Tensor, Tensor]]()
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = (getattr(graph_module, str(node.target)),) * 2
        elif _is_constant(node, known):
            known[node] = _evaluated(node, known, False), _evaluated(node, known, True)
    for node, (single, double) in known.items():
        if node.op != "call_function" or all(user in known for user in node.users) \
                or not torch.equal(single.double(), double.double()):
            continue
        if single.numel() == 1 and constant(node) is None:
            put_number(node, single.item(), single)
        elif single.numel() > 1 and bool((single != single.reshape(-1)[0]).any()):
            name = f"table_of_{node.name}"
            graph_module.register_buffer(name, single, persistent=False)
            with graph.inserting_before(node):
                table = graph.get_attr(name)
            table.meta["val"] = single
            node.replace_all_uses_with(table)
    graph.eliminate_dead_code()


def _is_constant(node: Node, known: Mapping[Node, Any]) -> bool:
    return isinstance(node.target, OpOverload) and "empty" not in str(node.target) \
        and isinstance(node.meta.get("val"), Tensor) and not node.is_impure() \
        and torch.Tag.nondeterministic_seeded not in node.target.tags \
        and all(n in known for n in node.all_input_nodes)


def _evaluated(node: Node, known: Mapping[Node, Sequence[Tensor]], wide: bool) -> Tensor:
    """What a constant node computes, in float64 if `wide`."""
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n][wide])
    if wide:
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
    made: Tensor = cast(OpOverload, node.target)(*args, **kwargs)
    return made


def over_steps(function: Callable[..., Any], moves: Sequence[bool], args: Sequence[Tensor]) -> Any:
    """`torch.vmap` over axis 0 of the arguments that move, also within a call of an operator
    that came through a dispatch mode, which switches it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in VMAP:
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        return torch.vmap(function, in_dims=tuple(0 if m else None for m in moves))(*args)


def functional_graph(
    function: Callable[..., Any], sizes: Sequence[Sizes], kept: Sequence[OpOverload] = ()
) -> GraphModule:
    """A function of tensors of `sizes` in core operations and `kept` ones, none of which writes
    in place."""
    rules = {target: rule for target, rule in RULES.items() if target not in kept}
    with tracing_a_step(), Early():
        made = make_fx(torch.func.functionalize(function), decomposition_table=rules)(
            *halves(sizes))
    reshaped(made)
    if any(map(_writes, made.graph.nodes)):  # as what PyTorch composes of others does
        made = make_fx(torch.func.functionalize(made))(*halves(sizes))
        reshaped(made)
    _fill(made)
    return made


def _fill(graph_module: GraphModule) -> None:
    """Numbers for constant tensors of one: `torch.as_tensor(0.5)` in a surrogate gradient."""
    for node in graph_module.graph.find_nodes(op="get_attr"):
        held = getattr(graph_module, str(node.target))
        if isinstance(held, Tensor) and held.numel() == 1:
            put_number(node, held.item(), held)


def halves(sizes: Sequence[Sizes]) -> list[Tensor]:
    """Arguments to trace with."""
    return [torch.full(size, 0.5, dtype=torch.float32, device="cpu") for size in sizes]


def _writes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def reshaped(graph_module: GraphModule) -> None:
    """Let views be copies, whatever strides arguments have; without what nobody uses."""
    for node in graph_module.graph.nodes:
        node.target = RENAMED.get(node.target, node.target)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


@remembered
def flows(source: str, sizes: tuple[Sizes, ...]) -> list[tuple[bool, ...]]:
    """By argument, which results of a step have a gradient where that argument alone has."""
    step, found = step_function(source), []
    for place in range(len(sizes)):
        given = [x.requires_grad_(k == place) for k, x in enumerate(halves(sizes))]
        with torch.enable_grad(), Early():
            found.append(tuple(made.requires_grad for made in step(*given)))
    return found


def reaching(
    source: str, sizes: tuple[Sizes, ...], carries: int, read: Sequence[bool]
) -> list[bool]:
    """Which arguments have a gradient of the results of many steps that are `read`."""
    flow, read = flows(source, sizes), list(read)
    while True:
        found = [any(map(and_, one, read)) for one in flow]
        after = [a or b for a, b in zip(read, found[:carries], strict=False)]
        if after == read[:carries]:
            return found
        read[:carries] = after


@remembered
def differentiable(
    source: str, sizes: tuple[Sizes, ...], carries: int, wanted: tuple[bool, ...], steps: int
) -> tuple[bool, ...]:
    """Which results of so many steps have a gradient, where those `wanted` of the arguments do.

    A spike, `(v > 1).to(v)`, has none. After a step more than there are carries nothing changes.
    """
    flow = flows(source, sizes)

    def results(flags: Sequence[bool]) -> list[bool]:
        reached = [found for found, flag in zip(flow, flags, strict=True) if flag]
        return [any(column) for column in zip(*reached, strict=True)] or [False] * len(flow[0])

    states, rest, outputs = list(wanted[:carries]), wanted[carries:], []
    for _ in range(steps):
        made = results([*states, *rest])
        states = made[:carries]
        outputs.append(made[carries:])
    return (*states, *(any(of_steps) for of_steps in zip(*outputs, strict=True)))
