"""`torch.compile(model, backend="looplift")`: the passes on Dynamo's graph, then Inductor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
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
    inner = torch._dynamo.lookup_backend(inner_name)
    extra = {key: held for key, held in (("mode", mode), ("options", given)) if held}
    return inner(rewritten, list(example_inputs), **extra)


def _rewritten(graph_module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Dynamo's graph after the passes, with Dynamo's calling convention."""
    try:
        captured = capture(graph_module, example_inputs, fake_mode=_fake_mode(example_inputs))
        if captured.written or captured.state:
            log.debug("looplift leaves a graph that writes to its inputs or holds tensors")
            return graph_module
        return run_passes(captured, ORDER).graph_module
    except CaptureError as error:
        log.warning("looplift could not capture a graph: %s", error)
    except Exception:
        log.exception("looplift failed on a graph; it is compiled as it was")
    return graph_module


def _fake_mode(example_inputs: Sequence[Any]) -> Any:
    return torch._guards.detect_fake_mode(list(example_inputs))
