"""The module that `apply_passes` returns: the model, optimized for each way it is called."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .capture import CaptureError, State, capture, model_state
from .cases import copied
from .report import (
    ModeReport,
    Report,
    SignatureReport,
    described_inputs,
    mode_report,
    option_data,
)
from .rewritten import Rewritten, share
from .select import Cache, Options, Selection, select

MOST_SIGNATURES = 8
log = logging.getLogger(__name__)


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
        vars(self)["original"] = original  # what the attributes of a module are read from
        super().__init__()
        share(self, original)
        own = vars(self)
        own.pop("training", None)
        own.update(
            original=original, options=options, progress=progress,
            report=Report(type(original).__name__, option_data(options)),
            specialized={}, rewritten=None, warned=False, members=(), generation=0,
        )
        self._look_at_model()

    original: nn.Module
    options: Options
    progress: Callable[[str], None]
    report: Report
    specialized: dict[Hashable, Callable[..., Any]]
    members: tuple[nn.Module, ...]
    state: tuple[State, ...]
    settings: tuple[Callable[[], Hashable], ...]
    ties: tuple[tuple[dict[str, Any], str, dict[str, Any], str], ...]
    generation: int
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
            run = self.specialized[self._signature(leaves, spec)]
        return run.run_flat(leaves) if isinstance(run, Rewritten) else run(*args, **kwargs)

    def optimize(self, args: Sequence[Any], kwargs: dict[str, Any], modes: Sequence[str]) -> None:
        """Capture, rewrite, verify and measure for these inputs, in each of `modes`.

        Where that fails, for whatever reason, the original runs and the report says why. The
        random state is left as it was.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        done: list[ModeReport] = []
        failure, start = None, time.perf_counter()
        self._look_at_model()
        for mode in modes:
            with torch.set_grad_enabled(mode == "training"):
                self.specialized[self._signature(leaves, spec)] = self.original
        try:
            with torch.inference_mode(False), torch.random.fork_rng(), torch.enable_grad():
                args, kwargs = pytree.tree_unflatten(list(copied(tuple(leaves))), spec)
                self.progress("capturing")
                captured = capture(self.original, args, kwargs)
                seconds = time.perf_counter() - start
                cache: Cache = {}
                for mode in modes:
                    selection = select(self.original, captured, args, kwargs, self.options, mode,
                                       self.progress, cache)
                    with torch.set_grad_enabled(mode == "training"):
                        self.specialized[self._signature(leaves, spec)] = selection.module
                    if selection.rewritten is not None:
                        vars(self)["rewritten"] = selection.rewritten
                    done.append(mode_report(selection))
        except CaptureError as error:
            failure = str(error)
        except Exception as error:
            log.exception("looplift failed on %s; the original runs", type(self.original).__name__)
            failure = f"internal error, {type(error).__name__}: {error}"
        if failure is not None:
            seconds = time.perf_counter() - start
        self.report.signatures.append(SignatureReport(
            described_inputs(leaves), self.original.training, seconds, failure, tuple(done)
        ))

    def _look_at_model(self) -> None:
        """Note the model's modules, tensors and settings, which make part of every signature."""
        members = tuple(self.original.modules())
        if members != self.members:
            vars(self).update(members=members, generation=self.generation + 1)
        vars(self).update(
            state=model_state(self.original), ties=_ties(self.original),
            settings=tuple(_settings(m) for m in members),
        )

    def _signature(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Hashable:
        try:
            return self._key(leaves, spec)
        except (AttributeError, KeyError):  # a tensor or setting is gone
            self._look_at_model()
            return self._key(leaves, spec)

    def _key(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Hashable:
        inputs = tuple(
            (leaf.shape, _strides(leaf), leaf.dtype, leaf.device) if isinstance(leaf, Tensor)
            else (type(leaf), _hashable(leaf))
            for leaf in leaves
        )
        state = tuple((t.shape, t.dtype, t.device) for t in (s.get() for s in self.state))
        settings = tuple(read() for read in self.settings)
        tied = tuple(one[key] is other[name] for one, key, other, name in self.ties)
        storages = [leaf.untyped_storage()._cdata for leaf in leaves
                    if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
        shared = tuple(map(storages.index, storages)) if len(storages) > 1 else ()
        autocast = tuple(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in ("cpu", "cuda")
        )
        return (spec, inputs, shared, self.generation, state, tied, settings,
                torch.is_grad_enabled(), autocast)

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

    @property
    def training(self) -> bool:
        """The original's train or eval state."""
        return self.original.training

    @training.setter
    def training(self, mode: bool) -> None:
        """nn.Module's own constructor sets this; the original keeps its state."""

    def train(self, mode: bool = True) -> OptimizedModule:
        """Set the train or eval state, of the original too."""
        self.original.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.load_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, held: Any) -> None:
        """Set on the model: what forward reads is the original's."""
        if "settings" not in vars(self):  # while it is made
            vars(self)[name] = held
        else:
            setattr(self.original, name, held)

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


def _strides(tensor: Tensor) -> Hashable:
    return tensor.stride() if tensor.layout is torch.strided else tensor.layout


def _ties(model: nn.Module) -> tuple[tuple[dict[str, Any], str, dict[str, Any], str], ...]:
    """The places that hold one parameter, in pairs: whether they still do is to be seen."""
    first: dict[int, tuple[dict[str, Any], str]] = {}
    pairs = []
    for module in model.modules():
        held: dict[str, Any] = module._parameters
        for name, parameter in held.items():
            if parameter is not None and id(parameter) in first:
                pairs.append((*first[id(parameter)], held, name))
            elif parameter is not None:
                first[id(parameter)] = (held, name)
    return tuple(pairs)


def _settings(module: nn.Module) -> Callable[[], Hashable]:
    """Reads what forward may depend on besides tensors: numbers, texts, and which hooks exist."""
    held = vars(module)
    names = [n for n, x in held.items() if isinstance(x, (bool, int, float, str, type(None)))]
    lists = [n for n, x in held.items() if isinstance(x, (list, tuple)) and not n.startswith("_")]

    def read() -> Hashable:
        return (
            *(held[n] for n in names), *(tuple(map(_hashable, held[n])) for n in lists), len(held),
            len(held["_forward_hooks"]), len(held["_forward_pre_hooks"]),
            *map(id, held["_modules"].values()),
        )

    return read


def _hashable(leaf: Any) -> Hashable:
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return leaf  # type: ignore[no-any-return]


__all__ = ["OptimizedModule", "Selection"]
