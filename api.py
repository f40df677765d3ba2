"""`apply_passes`, with the passes of this package as its default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .optimizer.measure import compare
from .optimizer.module import OptimizedModule
from .optimizer.rewrite import Pass
from .optimizer.select import Options
from .optimizer.verify import verify
from .passes import ORDER

MODES = ("inference", "training", "both")


def apply_passes(
    model: nn.Module,
    args: Sequence[Any] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    passes: Sequence[Pass] = ORDER,
    mode: str = "both",
    allow_approximate: bool = False,
    allow_random_reorder: bool = False,
    verify: bool = True,
    measure: bool = True,
    tolerance: float | None = None,
    memory_budget: float = 1.25,
    seed: int = 0,
    dynamic_shapes: Any = None,
    progress: Callable[[str], None] = lambda message: None,
) -> OptimizedModule:
    """The same model, faster: rewritten, verified, measured, and without what does not pay.

    With `args` (and `kwargs`) it is optimized at once for inputs like these; without, at the
    first call of each signature, as torch.compile does. The model itself is left as it was,
    and the result runs on its very parameters.

    passes: what to run, in order; leave one out to keep it out.
    mode: "inference" (calls under no_grad), "training" (calls with gradients) or "both".
    allow_approximate: also rewrites that change results, such as tanh GELU; their error is
        measured and reported.
    allow_random_reorder: let random operations be reordered or merged.
    verify, measure: switch these off and the report says so.
    tolerance: the relative difference allowed between float64 results, 1e-9 if None.
    memory_budget: the result's peak memory over the model's, at most (16 MiB count as little
        memory for any model); in inference, what would pass it is batched in slabs of steps.
    dynamic_shapes: the input axes that may have any size, as torch.export takes them:
        `{"x": {1: Dim("T", min=2)}}`. One program is made for all sizes where there is one;
        for the lengths of long loops that is tried anyway.
    seed: of the inputs that verification draws and of the order of measurements.

    Raises TypeError for a model that is no module or is optimized or compiled already, and
    ValueError for an unknown mode or for `dynamic_shapes` that don't fit. If the model cannot be
    captured, the result runs the original, and its report names the line and the reason.
    """
    if isinstance(model, OptimizedModule):
        raise TypeError("the model is a looplift module already; optimize its `.original`")
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_passes takes an nn.Module, not a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("the model is a ScriptModule; optimize its Python source")
    if hasattr(model, "_orig_mod"):
        raise TypeError("the model is compiled already; optimize first: torch.compile("
                        "looplift.apply_passes(model)), or torch.compile(backend='looplift')")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    options = Options(
        tuple(passes), mode, allow_approximate, allow_random_reorder, verify, measure, tolerance,
        memory_budget, seed, dynamic_shapes,
    )
    optimized = OptimizedModule(model, options, progress)
    if args is not None:
        modes = MODES[:2] if mode == "both" else (mode,)
        optimized.optimize(tuple(args), dict(kwargs or {}), modes)
    return optimized


__all__ = ["apply_passes", "compare", "verify"]
