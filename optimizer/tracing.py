"""PyTorch while a model is traced: what the tracing thread, and no other, does in other ways."""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import PythonKeyTracer

from .constants import as_lists
from .facts import TORCH
from .functions import Function, NoOperator, called
from .refused import CALLER, OWN, REENTRANT, CaptureError, user_frames
from .turns import TRACING

FUNCTION: Any = vars(torch.autograd.Function)["apply"].__func__
DATA_OF: Any = vars(torch._C._autograd)["_get_data_attr"]
CONTEXTS, ENTER = torch.utils._contextlib.__file__, torch.inference_mode.__enter__
RECORDED = torch.is_grad_enabled
SCRIPTED: Any = torch._C.ScriptFunction
CALL = SCRIPTED.__call__
_mode: ContextVar[bool | None] = ContextVar("_mode", default=None)  # what a trace is told it is
_tracer: list[int] = []  # the thread that traces a model


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """The turn to trace a model, with PyTorch's functions as a trace needs them."""
    with TRACING, contextlib.ExitStack() as patches:
        for where, name, other in (
            (torch.autograd.Function, "apply",
             classmethod(_in_this_thread(_by_operator, FUNCTION))),
            (Tensor, "register_hook", _in_this_thread(refuse_hook, Tensor.register_hook)),
            (torch._C._autograd, "_get_data_attr",  # what Dynamo makes of `.data`
             _in_this_thread(Tensor.detach, DATA_OF)),
            (torch.inference_mode, "__enter__", _in_this_thread(_refuse_inference_mode, ENTER)),
            (torch, "is_grad_enabled", _in_this_thread(_is_recorded, RECORDED)),
            (SCRIPTED, "__call__", _in_this_thread(_by_source, CALL)),
            (FunctionalTensor, "tolist", as_lists),
            (PythonKeyTracer, "_filter_traceback_frames", lambda self, frames: frames),
            (torch.fx.proxy, "CapturedTraceback", _UserStack),
        ):
            patches.enter_context(mock.patch.object(where, name, other))
        _tracer.append(threading.get_ident())
        try:
            yield
        finally:
            _tracer.pop()


def is_traced() -> bool:
    """Whether this thread traces a model."""
    return threading.get_ident() in _tracer


class AsksForMode(CaptureError):
    """Forward asks whether gradients are recorded, and this trace is for both modes."""


@contextlib.contextmanager
def traced_for(training: bool) -> Iterator[None]:
    """Traces within are of one mode: a forward that asks for it is told."""
    before = _mode.set(training)
    try:
        yield
    finally:
        _mode.reset(before)


def _is_recorded() -> bool:
    """All traces record gradients, as what PyTorch's own files and ours ask is answered."""
    frame, mode = sys._getframe(2), _mode.get()
    if not RECORDED() or frame.f_code.co_filename.startswith((TORCH, OWN)):
        return RECORDED()
    if mode is None:
        raise AsksForMode("forward asks whether gradients are recorded (`torch.is_grad_enabled`), "
                          "of which a graph for both modes holds one answer",
                          user_frames(traceback.extract_stack(frame)))
    return mode


def _in_this_thread(while_tracing: Callable[..., Any], else_: Callable[..., Any]) -> Any:
    """What takes a function's place for the thread that traces; others run as before."""
    me = threading.get_ident()

    def run(*args: Any, **kwargs: Any) -> Any:
        return (while_tracing if threading.get_ident() == me else else_)(*args, **kwargs)

    return run


def _refuse_inference_mode(mode: Any) -> Any:
    """The tracer itself enters it too, from PyTorch's own files."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == CONTEXTS:  # a decorator
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename.startswith(TORCH):
        return ENTER(mode)
    raise CaptureError("forward enters `torch.inference_mode`, which a graph would not hold; use "
                       "`torch.no_grad`", user_frames(traceback.extract_stack(frame)))


def refuse_hook(tensor: Tensor, hook: Any) -> Any:
    raise CaptureError("forward registers a hook on a tensor, which a graph can't keep",
                       user_frames(traceback.extract_stack()))


def _by_operator(kind: Function, *args: Any, **kwargs: Any) -> Any:
    try:
        return called(kind, *args, **kwargs)
    except NoOperator as reason:
        if kind.__module__ == torch.utils.checkpoint.__name__:
            frames = user_frames(traceback.extract_stack())
            raise CaptureError(REENTRANT, frames) from reason
        raise CaptureError(f"forward uses the custom autograd function {kind.__name__}, whose "
                           f"backward a graph would lose: {reason}") from reason


def _by_source(function: Any, *args: Any, **kwargs: Any) -> Any:
    """TorchScript's executor differentiates on its own, which a trace doesn't see."""
    source: Any = getattr(function, "_torchdynamo_inline", None)
    if torch.jit._state._jit_caching_layer.get(source) != function.qualified_name:
        raise CaptureError("forward calls a function that torch.jit.trace made, of other inputs; "
                           "call its Python source", user_frames(traceback.extract_stack()))
    return source(*args, **kwargs)


class _UserStack:
    """In place of torch's recorder of stacks: the model's own frames alone, which are few."""

    extract = staticmethod(lambda: _UserStack)

    @staticmethod
    def summary() -> traceback.StackSummary:
        found: list[traceback.FrameSummary] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != CALLER:
            code = frame.f_code
            if not code.co_filename.startswith((TORCH, OWN, "<")):
                found.append(traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name,
                                                    lookup_line=False))
            frame = frame.f_back
        return traceback.StackSummary.from_list(reversed(found))
