"""`torch.compile(model, backend="looplift")`: the passes on Dynamo's graph, then Inductor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule

from .optimizer.capture import CaptureError, capture
from .optimizer.pipeline import run_passes
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
    """Dynamo's graph after the passes, with Dynamo's calling convention."""
    try:
        if any(isinstance(n.target, HigherOrderOperator) for n in graph_module.graph.nodes):
            log.debug("looplift leaves a graph with higher-order operators")
            return graph_module
        graph_module.code  # noqa: B018 - Dynamo's lazy modules write to themselves at first use
        captured = capture(graph_module, example_inputs, fake_mode=_fake_mode(example_inputs))
        if captured.written or captured.state or has_symbolic_sizes(captured.graph_module):
            log.debug("looplift leaves a graph that writes to its inputs, holds tensors, or has "
                      "symbolic sizes, which its rewrites cannot be checked for")
            return graph_module
        return run_passes(captured, ORDER).graph_module
    except CaptureError as error:
        log.warning("looplift could not capture a graph: %s", error)
    except Exception:
        log.exception("looplift failed on a graph; it is compiled as it was")
    return graph_module


def has_symbolic_sizes(graph_module: GraphModule) -> bool:
    """Whether some size is no number yet, as Dynamo makes them once a size has changed."""
    return any(
        isinstance(held, torch.SymInt)
        or (isinstance(held, torch.Tensor) and held._has_symbolic_sizes_strides)
        for held in (n.meta.get("val") for n in graph_module.graph.nodes)
    )


def _fake_mode(example_inputs: Sequence[Any]) -> Any:
    return torch._guards.detect_fake_mode(list(example_inputs))
