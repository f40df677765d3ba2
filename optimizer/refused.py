"""What a graph can not hold: reasons not to capture a model."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.lazy import LazyModuleMixin

from .facts import PHYSICAL, TORCH, Line, is_op, source_line

OWN = str(Path(__file__).parent)
CALLER = str(Path(__file__).with_name("capture.py"))  # which calls the model
REENTRANT = "forward uses torch.utils.checkpoint with `use_reentrant=True`, which a graph would " \
    "not hold, and whose gradients can't be compared; pass `use_reentrant=False`"


class CaptureError(Exception):
    """The model could not be captured; says why, and at which line of the user's file."""

    def __init__(self, reason: str, frames: Sequence[traceback.FrameSummary] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.frame = frames[-1] if frames else None

    @property
    def where(self) -> str:
        """The line, as reports name it."""
        return "?" if self.frame is None else str(
            Line(self.frame.filename, self.frame.lineno or 0))

    def __str__(self) -> str:
        if self.frame is None:
            return self.reason
        at = f'{self.frame.filename}:{self.frame.lineno}'
        return f"{self.reason}\n  at {at} in {self.frame.name}\n    {self.frame.line}"


def user_frames(frames: Sequence[traceback.FrameSummary]) -> traceback.StackSummary:
    """The frames of the model's own source: without torch's and without ours."""
    kept = [f for f in frames if not f.filename.startswith((TORCH, OWN, "<"))]
    inside = [i for i, f in enumerate(frames) if f.filename == CALLER]
    if inside:
        after = set(map(id, frames[inside[-1]:]))
        kept = [f for f in kept if id(f) in after]
    return traceback.StackSummary.from_list(kept)


def refuse_layouts(graph_module: GraphModule) -> None:
    """`as_strided` sees how a tensor lies in memory, which rewrites change."""
    for node in graph_module.graph.nodes:
        if is_op(node, *PHYSICAL):
            raise CaptureError(f"{node.target.__name__} at {source_line(node)} depends on how its "
                               "tensor lies in memory; use unfold, select or slices")


def refuse_constants(graph_module: GraphModule) -> None:
    """Tensors that are neither inputs nor the model's own must be constants."""
    for node in graph_module.graph.find_nodes(op="get_attr"):
        held = getattr(graph_module, str(node.target))
        if isinstance(held, torch._subclasses.FakeTensor):
            raise CaptureError(
                f"a tensor is made by torch.Tensor(…) or its like at {source_line(node)}, of which "
                "a trace does not see the numbers; use torch.tensor"
            )
        if isinstance(held, Tensor) and (held.requires_grad or isinstance(held, nn.Parameter)):
            raise CaptureError(
                f"forward uses a tensor that requires a gradient, or a parameter, at "
                f"{source_line(node)}, and that is none of the model's; register it (modules in a "
                "list: nn.ModuleList)"
            )


def refuse_modules(model: nn.Module) -> None:
    if has_global_hooks():
        raise CaptureError("hooks for all modules are registered, which a graph can't keep")
    for name, module in model.named_modules():
        where = f" ({name})" if name else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(f"the module{where} is a ScriptModule; optimize its Python source")
        if _is_lazy(module):
            raise CaptureError(f"the module{where} has no parameters yet; call the model first")
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise CaptureError(
                f"the model is wrapped in {type(module).__name__}{where}; optimize the module "
                "inside (`.module`) and wrap the result"
            )
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(f"the module{where} has backward hooks, which a graph can't keep")
        if hooks := [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
            names = ", ".join(dict.fromkeys(
                getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks))
            raise CaptureError(
                f"the module{where} has forward hooks ({names}), whose effects a graph would not "
                "repeat; remove them, or optimize the modules inside"
            )


def is_opaque(model: nn.Module) -> bool:
    """Whether a part of it can't be looked at: TorchScript, or one that waits for a first call."""
    return any(isinstance(m, torch.jit.ScriptModule) or _is_lazy(m) for m in model.modules())


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def has_global_hooks() -> bool:
    """Whether somebody has registered hooks that run in every module."""
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]
