"""The module that `apply_passes` returns: the model, optimized for each way it is called."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .capture import Capture, CaptureError, State, capture, model_state
from .report import (
    ModeReport,
    Report,
    SignatureReport,
    described_inputs,
    mode_report,
    option_data,
)
from .rewritten import Rewritten, share
from .select import Options, Selection, select

MOST_SIGNATURES = 8


class OptimizedModule(nn.Module):
    """A model with its rewrites: same parameters, same `state_dict` keys, same signature.

    `original` is the model; `report` tells what was rewritten, kept out, and why.
    `graph_module` and `code` are the rewritten graph and its Python source, of the signature
    optimized last. A call of another signature (shapes, dtypes, strides, devices, train or
    eval state, grad mode, autocast) is optimized on first sight; after eight, the original
    runs.
    """

    def __init__(
        self, original: nn.Module, options: Options,
        progress: Callable[[str], None] = lambda message: None,
    ) -> None:
        super().__init__()
        share(self, original)
        own = vars(self)
        own.update(
            original=original, options=options, progress=progress,
            report=Report(type(original).__name__, option_data(options)),
            specialized={}, members=tuple(original.modules()), state=model_state(original),
            rewritten=None, warned=False,
        )

    original: nn.Module
    options: Options
    progress: Callable[[str], None]
    report: Report
    specialized: dict[Hashable, Callable[..., Any]]
    members: tuple[nn.Module, ...]
    state: tuple[State, ...]
    rewritten: Rewritten | None
    warned: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = self._signature(leaves, spec)
        run = self.specialized.get(key)
        if run is None:
            if len(self.specialized) >= MOST_SIGNATURES:
                self._warn_once()
                return self.original(*args, **kwargs)
            mode = "training" if torch.is_grad_enabled() else "inference"
            self.optimize(args, kwargs, (mode,))
            run = self.specialized[key]
        return run(*args, **kwargs)

    def optimize(self, args: Sequence[Any], kwargs: dict[str, Any], modes: Sequence[str]) -> None:
        """Capture, rewrite, verify and measure for these inputs, in each of `modes`."""
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        start = time.perf_counter()
        captured, failure = self._capture(args, kwargs)
        seconds = time.perf_counter() - start
        done: list[ModeReport] = []
        for mode in modes:
            with torch.set_grad_enabled(mode == "training"):
                key = self._signature(leaves, spec)
            if captured is None:
                self.specialized[key] = self.original
                continue
            with torch.enable_grad():
                selection = select(
                    self.original, captured, args, kwargs, self.options, mode, self.progress
                )
            self.specialized[key] = selection.module
            if selection.rewritten is not None:
                vars(self)["rewritten"] = selection.rewritten
            done.append(mode_report(selection))
        self.report.signatures.append(SignatureReport(
            described_inputs(leaves), self.original.training, seconds, failure, tuple(done)
        ))

    def _capture(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Capture | None, str | None]:
        self.progress("capturing")
        try:
            with torch.enable_grad():
                return capture(self.original, args, kwargs), None
        except CaptureError as error:
            return None, str(error)

    def _signature(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Hashable:
        inputs = tuple(
            (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor)
            else (type(leaf), _hashable(leaf))
            for leaf in leaves
        )
        state = tuple((t.shape, t.dtype, t.device) for t in (s.get() for s in self.state))
        modes = tuple(m.training for m in self.members)
        autocast = tuple(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in ("cpu", "cuda")
        )
        return (spec, inputs, state, modes, torch.is_grad_enabled(), autocast)

    def _warn_once(self) -> None:
        if not self.warned:
            vars(self)["warned"] = True
            warnings.warn(
                f"{type(self.original).__name__} was called with more than {MOST_SIGNATURES} "
                "signatures; further ones run the original model", stacklevel=4,
            )

    @property
    def graph_module(self) -> GraphModule | None:
        """The rewritten graph optimized last; None where the original runs."""
        return None if self.rewritten is None else self.rewritten.graph_module

    @property
    def code(self) -> str:
        """The Python source of `graph_module`: exactly what runs. Empty where the original runs."""
        return "" if self.rewritten is None else str(self.rewritten.code)

    def train(self, mode: bool = True) -> OptimizedModule:
        """Set the train or eval state, of the original too."""
        self.original.train(mode)
        vars(self)["training"] = mode
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["original"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        """A copy of the model, to be optimized anew where it is called."""
        import copy

        return OptimizedModule(copy.deepcopy(self.original, memo), self.options, self.progress)

    def __reduce__(self) -> Any:
        return (OptimizedModule, (self.original, self.options))


def _hashable(leaf: Any) -> Hashable:
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return leaf  # type: ignore[no-any-return]


__all__ = ["OptimizedModule", "Selection"]
