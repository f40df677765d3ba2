"""`torch.compile(model, backend="looplift")`: the passes on Dynamo's graph, then Inductor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._guards import CompileContext, TracingContext, detect_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv, guarding_hint_or_throw

from .optimizer.capture import capture
from .optimizer.pipeline import run_passes
from .optimizer.refused import CaptureError
from .passes import ORDER

log = logging.getLogger(__name__)


def looplift(
    graph_module: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """A Dynamo backend. `options["inner_backend"]` names the compiler that runs afterwards.

    `mode` and the other options go to that compiler ("inductor" if none is named). If a graph
    cannot be captured, or a pass raises, the original graph is compiled and an error logged.
    """
    given = dict(options or {})
    inner_name = given.pop("inner_backend", "inductor")
    rewritten = _rewritten(graph_module, example_inputs)
    if inner_name == "inductor":
        wrapper: Any = torch._TorchCompileInductorWrapper
        inner = wrapper(mode, given or None, None)
        return cast(Callable[..., Any], inner(rewritten, list(example_inputs)))
    inner = torch._dynamo.lookup_backend(inner_name)
    extra = {key: held for key, held in (("mode", mode), ("options", given)) if held}
    result = inner(rewritten, list(example_inputs), **extra)
    # a bound method would make PyTorch's minifier skip its check
    same = getattr(result, "__self__", None) is rewritten
    return cast(Callable[..., Any], rewritten if same else result)


def _rewritten(graph_module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Dynamo's graph after the passes, with Dynamo's calling convention.

    Sizes that are no numbers yet (Dynamo makes them so once a size has changed) are taken at
    their present values, with a guard for each if some rewrite applies: the rewrites are for
    one length.
    """
    try:
        if any(isinstance(n.target, HigherOrderOperator) for n in graph_module.graph.nodes):
            log.debug("looplift leaves a graph with higher-order operators")
            return graph_module
        graph_module.code  # noqa: B018 - Dynamo's lazy modules write to themselves at first use
        symbolic = any(map(_is_symbolic, example_inputs))
        if symbolic and not _may_specialize():
            log.debug("looplift leaves a graph whose sizes are to stay symbolic")
            return graph_module
        inputs, mode = list(example_inputs), detect_fake_mode(list(example_inputs))
        if symbolic:
            mode = FakeTensorMode(shape_env=ShapeEnv())
            inputs = [_at_present(held, mode) for held in inputs]
        captured = capture(graph_module, inputs, fake_mode=mode)
        if captured.written or captured.state or captured.asked \
                or has_symbolic_sizes(captured.graph_module):
            log.debug("looplift leaves a graph that writes to its inputs, holds tensors, or has "
                      "sizes that depend on data, which its rewrites cannot be checked for")
            return graph_module
        if captured.lost is not None and torch.is_grad_enabled():
            log.debug("looplift leaves a graph: %s", captured.lost)
            return graph_module
        if symbolic and captured.constants:
            log.debug("looplift leaves a graph that returns a symbolic size")
            return graph_module
        outcome = run_passes(captured, ORDER, training=torch.is_grad_enabled())
        if symbolic and not outcome.applied:
            return graph_module
        if symbolic:
            _guard(example_inputs)
        return _with_numbers(outcome.graph_module, example_inputs)
    except CaptureError as error:
        log.warning("looplift could not capture a graph: %s", error)
    except Exception:
        log.exception("looplift failed on a graph; it is compiled as it was")
    return graph_module


def has_symbolic_sizes(graph_module: GraphModule) -> bool:
    """Whether some size in the graph is no number."""
    return any(_is_symbolic(n.meta.get("val")) for n in graph_module.graph.nodes)


def _is_symbolic(held: Any) -> bool:
    return isinstance(held, torch.SymInt) or (
        isinstance(held, torch.Tensor) and held._has_symbolic_sizes_strides
    )


def _may_specialize() -> bool:
    """Whether sizes may become numbers: the user did not mark one as dynamic, and few were tried.

    Dynamo compiles a function at most `recompile_limit` times and then runs it uncompiled. Half
    of these may go to single sizes; after them one graph with symbolic sizes serves all.
    """
    compiled = CompileContext.current_compile_id()
    tries = compiled.frame_compile_id if compiled is not None else None
    context = TracingContext.try_get()
    if tries is None or context is None or context.fake_mode is None:
        return False
    shapes = context.fake_mode.shape_env
    fixed = [
        constraint
        for tracked in (shapes.tracked_fakes or [] if shapes is not None else [])
        for constraint in getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        if constraint is not None and not constraint.warn_only
    ]
    return not fixed and tries < torch._dynamo.config.recompile_limit // 2


def _at_present(held: Any, mode: FakeTensorMode) -> Any:
    """A fake input of the size that this one has now; no guard is made."""
    if isinstance(held, torch.SymInt):
        return int(guarding_hint_or_throw(held))
    if not isinstance(held, torch.Tensor):
        return held
    size, stride = ([int(guarding_hint_or_throw(s)) for s in sizes]
                    for sizes in (held.size(), held.stride()))
    with mode:
        return torch.empty_strided(size, stride, dtype=held.dtype, device=held.device,
                                   requires_grad=held.requires_grad)


def _guard(example_inputs: Sequence[Any]) -> None:
    """Make every size a number; Dynamo compiles anew for other sizes."""
    for held in example_inputs:
        sizes = (*held.size(), *held.stride()) if isinstance(held, torch.Tensor) else (held,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                int(size)


def _with_numbers(graph_module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """The graph with a placeholder, which it does not read, for every input that is no tensor."""
    graph, previous = graph_module.graph, None
    placeholders = iter(graph.find_nodes(op="placeholder"))
    for number, held in enumerate(example_inputs):
        if isinstance(held, torch.Tensor):
            previous = next(placeholders)
        else:
            with graph.inserting_after(previous) if previous else graph.inserting_before():
                previous = graph.placeholder(f"size_{number}")
    graph_module.recompile()
    return graph_module
