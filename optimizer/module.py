"""The module that `apply_passes` returns: the model, optimized for each way it is called."""

from __future__ import annotations

import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .capture import Capture, capture
from .cases import copied
from .contract import ContractError
from .every_length import ComparedLengths, Make, optimize_family
from .family import SHORTEST, Family, family
from .formula import NoInteger
from .general import NotOneProgram
from .lengths import Free, found_lengths, given_lengths
from .pipeline import Allowed
from .program import program
from .refused import CaptureError, is_opaque, refuse_modules
from .report import (
    ModeReport,
    Report,
    SignatureReport,
    described_inputs,
    mode_report,
    option_data,
)
from .rewritten import Rewritten, share
from .select import Example, Options, Selection, select
from .signature import OpaqueArgument, Watched, call_signature, flatten
from .state import graphs_cut_off, unseen
from .tracing import AsksForMode, is_traced, traced_for
from .turns import Turns

MOST_SIGNATURES = 8
MOST_STATES = 32  # of the model, at calls of one kind, in which its program is the same
OFTEN, SELDOM = 8, 64  # where the original ran so often, each so manieth call looks for changes
log = logging.getLogger(__name__)


@dataclass
class _Calls:
    """Calls of one kind: how many in a row ran the original, and how often it was refused."""

    calls: int = 0
    refusals: int = 0
    known: int = 0  # how often they were captured only to find a known program

    def rests(self) -> bool:
        """Whether it is not looked, at this call, for what else could run."""
        return self.refusals > 1 or (self.calls > OFTEN and self.calls % SELDOM > 0)


class OptimizedModule(nn.Module):
    """A model with its rewrites: same parameters, same `state_dict` keys, same signature.

    `original` is the model; `report` tells what was rewritten, kept out, and why.
    `graph_module` and `code` are the rewritten graph and its Python source, of the signature
    optimized last. A call of another signature (shapes, dtypes, strides, devices, train or
    eval state, grad mode, autocast) is optimized on first sight; after eight, the original
    runs. Where the original runs, settings that have changed are seen at every 64th call.
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
            specialized={}, any_length={}, families=[], programs=defaultdict(dict), rewritten=None,
            warned=False,
            seen=defaultdict(_Calls),
            asks_for_gradients=False, watched=Watched(original), opaque=is_opaque(original),
            turns=Turns.of(original),
        )

    original: nn.Module
    options: Options
    progress: Callable[[str], None]
    report: Report
    specialized: dict[Hashable, Callable[..., Any]]
    any_length: dict[Hashable, Make]  # by the signature at a family's first length
    families: list[Family]
    # by inputs and program: what runs it, or makes what runs it
    programs: defaultdict[Hashable, dict[Hashable, Any]]
    watched: Watched
    turns: Turns  # of the threads that call it
    seen: defaultdict[Hashable, _Calls]  # by a call's signature without what the model holds
    rewritten: Rewritten | None
    shown: Callable[[], GraphModule]  # gives the graph of `rewritten`
    warned: bool
    asks_for_gradients: bool  # whether forward reads a tensor's `requires_grad`
    opaque: bool  # whether a part of the model can't be looked at, or not yet

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._apart(args, kwargs)(*args, **kwargs)
        if is_traced() or torch._C._is_tracing():
            return self.original(*args, **kwargs)  # as a part of what is traced
        if self.opaque:
            result = self.original(*args, **kwargs)
            vars(self)["opaque"] = is_opaque(self.original)
            return result
        leaves, structure = flatten(args, kwargs)
        try:
            called = call_signature(leaves, structure)
        except OpaqueArgument as error:
            if all(s.failure != str(error) for s in self.report.signatures):
                self.optimize(args, kwargs, ("inference",))  # which reports it
            return self.original(*args, **kwargs)
        here = self.seen[called, self.original.training]
        here.calls += 1
        with self.turns.shared:
            run = self.original if here.rests() else \
                self.specialized.get(self._seen_as(called, leaves))
            if run is not None:
                return self._ran(run, args, kwargs, leaves, here)
        with self.turns.alone:
            run = self._chosen(args, kwargs, leaves, structure, called, here)
        with self.turns.shared:
            return self._ran(run, args, kwargs, leaves, here)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """What runs a call under torch.compile, which is not to trace how it is chosen."""
        leaves, structure = flatten(args, kwargs)
        try:
            called = call_signature(leaves, structure)
        except OpaqueArgument:
            return self.original
        if self.opaque:
            return self.original
        with self.turns.alone:
            here = self.seen[called, self.original.training]
            run = self._chosen(args, kwargs, leaves, structure, called, here)
        return self.original if isinstance(run, Rewritten) and run.overlaps(leaves) else run

    def _ran(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
        leaves: list[Any], here: _Calls,
    ) -> Any:
        if run is not self.original:
            here.calls = 0
        if not isinstance(run, Rewritten):
            return run(*args, **kwargs)
        return self.original(*args, **kwargs) if run.overlaps(leaves) else run.run_flat(leaves)

    def _chosen(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any],
        structure: Hashable, called: Hashable, here: _Calls,
    ) -> Callable[..., Any]:
        """What runs a call that was not seen before, or by another thread; optimized now."""
        key = self._seen_as(called, leaves)
        run = self.specialized.get(key)
        if run is None:
            run = self._at_other_length(key, leaves, structure)
        if run is not None:
            return run
        if torch._C._functorch.peek_interpreter_stack() is not None \
                or detect_fake_mode(leaves) is not None:
            return self.original  # what is transformed, or has no values, can't be looked at
        if len(self.report.signatures) >= MOST_SIGNATURES or here.known >= MOST_STATES:
            self._warn_once()
            return self.original
        mode = "training" if torch.is_grad_enabled() else "inference"
        before = len(self.report.signatures)
        here.refusals += not self.optimize(args, kwargs, (mode,))
        here.known += len(self.report.signatures) == before
        return self.specialized.get(self._signature(leaves, structure), self.original)

    def optimize(self, args: Sequence[Any], kwargs: dict[str, Any], modes: Sequence[str]) -> bool:
        """Capture, rewrite, verify and measure for these inputs, in each of `modes`.

        Where that fails, for whatever reason, the original runs, the report says why, and False
        is returned. Where the program was seen before, as after a call that left something in
        an attribute, what was chosen then is taken. The random state is left as it was.
        """
        _, structure = flatten(tuple(args), kwargs)
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        done: list[ModeReport] = []
        failure, told, start = None, None, time.perf_counter()
        named = self.options.dynamic_shapes
        frees = [] if named is None else given_lengths(self.original, args, kwargs, named)
        try:
            vars(self)["opaque"] &= is_opaque(self.original)
            if self.opaque:
                refuse_modules(self.original)
            for mode in modes:
                self._keep(leaves, structure, mode, self.original)
            refuse_modules(self.original)
            with self.turns.alone, unseen(), torch.enable_grad(), \
                    graphs_cut_off(self.original):
                own = list(copied(tuple(leaves)))
                try:
                    told = self._optimize_modes(own, spec, structure, modes, frees, done)
                except AsksForMode:  # its program is another in each
                    for mode in modes:
                        with traced_for(mode == "training"):
                            told = self._optimize_modes(
                                own, spec, structure, (mode,), frees, done) or told
        except (CaptureError, ContractError, OpaqueArgument) as error:
            failure = str(error)
        except Exception as error:
            log.exception("looplift failed on %s; the original runs", type(self.original).__name__)
            first = str(error).partition("\n")[0]  # a graph may follow
            failure = f"internal error, {type(error).__name__}: {first}"
        if failure is None and not done:
            return True  # its program was known
        seconds = time.perf_counter() - start - sum(mode.seconds for mode in done)
        self.report.signatures.append(SignatureReport(
            described_inputs(leaves), self.original.training, seconds, failure, tuple(done), told
        ))
        return failure is None

    def _optimize_modes(
        self, leaves: list[Any], spec: pytree.TreeSpec, structure: Hashable, modes: Sequence[str],
        frees: Sequence[Free], done: list[ModeReport],
    ) -> str | None:
        """Short traces, or one of the full length; what is known of all lengths."""
        told = self._optimize_lengths(leaves, spec, structure, modes, frees, done)
        if not self._covered(leaves, structure, modes):
            self._optimize_length(leaves, spec, structure, modes, done)
        return told

    def _optimize_length(
        self, leaves: list[Any], spec: pytree.TreeSpec, structure: Hashable, modes: Sequence[str],
        done: list[ModeReport],
    ) -> None:
        """A trace of these inputs at their full length, for calls of this signature."""
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        self.progress("capturing")
        captured = self._note(capture(self.original, args, kwargs))
        seen = program(captured)
        for mode in modes:
            with torch.set_grad_enabled(mode == "training"):
                known = self.programs[self._inputs(leaves, structure)]
            if seen in known:
                self._keep(leaves, structure, mode, known[seen])
                continue
            selection = select(self.original, Example(captured, args, kwargs), self.options, mode,
                               self.progress, lambda: self._signature(leaves, structure))
            self._keep(leaves, structure, mode, selection.module)
            known[seen] = selection.module
            done.append(mode_report(selection))

    def _optimize_lengths(
        self, leaves: list[Any], spec: pytree.TreeSpec, structure: Hashable, modes: Sequence[str],
        frees: Sequence[Free], done: list[ModeReport],
    ) -> str | None:
        """Short traces, for calls of all lengths; what is known of these, if they may vary."""
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        named = bool(frees)
        frees = frees or found_lengths(self.original, args, kwargs)
        if not frees or not self.options.passes:
            return None
        self._find_known(leaves, spec, structure, modes)
        if self._covered(leaves, structure, modes):
            return None
        self.progress("capturing at short lengths")
        allowed = Allowed(self.options.allow_approximate, self.options.allow_random_reorder)
        before = partial(self._signature, leaves, structure)
        why: list[str] = []
        for shortest in SHORTEST if len(frees) == 1 else SHORTEST[:1]:
            try:
                found = family(self.original, args, kwargs, frees, self.options.passes[:1], allowed,
                               shorter=not named, shortest=shortest)
                found, made, chosen = optimize_family(self.original, found, leaves, spec,
                                                      self.options, modes, self.progress, before)
                self._note(found.sample)
                break
            except (NotOneProgram, NoInteger) as error:
                why.append(str(error))
        else:
            return f"known at this length alone: {why[0]}"
        short = found.resized(leaves, found.traced[0])  # where strides tell
        seen = program(found.sample)
        for mode, choice in made.items():
            with torch.set_grad_enabled(mode == "training"):
                self.any_length[self._signature(short, structure, leaves)] = choice.make
                self.programs[self._inputs(short, structure, leaves)][seen] = choice.make
            done.append(mode_report(choice.selection))
        self.families.append(found)
        return f"{found}, {chosen}"

    def _find_known(
        self, leaves: list[Any], spec: pytree.TreeSpec, structure: Hashable, modes: Sequence[str]
    ) -> None:
        """Take over what was chosen for all lengths of a program that is the same now."""
        for found in self.families:
            if found.takes(leaves):
                short, known = found.resized(leaves, found.traced[0]), {}
                for mode in modes:
                    with torch.set_grad_enabled(mode == "training"):
                        known[mode] = self.programs.get(
                            self._inputs(short, structure, leaves), {})
                if not any(known.values()):
                    continue
                seen = program(capture(self.original, *pytree.tree_unflatten(short, spec)))
                for mode, programs in known.items():
                    if isinstance(make := programs.get(seen), ComparedLengths):
                        with torch.set_grad_enabled(mode == "training"):
                            self.any_length[self._signature(short, structure, leaves)] = \
                                make.anew()

    def _covered(self, leaves: list[Any], structure: Hashable, modes: Sequence[str]) -> bool:
        """Whether a program for all lengths runs these inputs, in each of `modes`."""
        runs = []
        for mode in modes:
            with torch.set_grad_enabled(mode == "training"):
                key = self._signature(leaves, structure)
                runs.append(self._at_other_length(key, leaves, structure))
        return None not in runs

    def _at_other_length(
        self, key: Hashable, leaves: list[Any], structure: Hashable
    ) -> Callable[..., Any] | None:
        """What runs inputs of another length, if their program is known; then kept by `key`."""
        for found in self.families:
            if found.takes(leaves):
                short = found.resized(leaves, found.traced[0])  # where strides tell
                make = self.any_length.get(self._signature(short, structure, leaves))
                if make is not None:
                    with unseen(), traced_for(torch.is_grad_enabled()), torch.enable_grad():
                        self.specialized[key] = self._shown(make(leaves), leaves)
                    return self.specialized[key]
        return None

    def _keep(
        self, leaves: Sequence[Any], structure: Hashable, mode: str, module: nn.Module
    ) -> None:
        with torch.set_grad_enabled(mode == "training"):
            self.specialized[self._signature(leaves, structure)] = self._shown(module, leaves)

    def _shown(self, module: nn.Module, leaves: Sequence[Any]) -> nn.Module:
        """`module`; its source and graph are what is shown from now on, if it has any."""
        if isinstance(module, Rewritten):
            vars(self).update(rewritten=module, shown=module.graph_for(leaves))
        return module

    def _signature(
        self, leaves: Sequence[Any], structure: Hashable, given: Sequence[Any] | None = None
    ) -> Hashable:
        """`given`: the inputs whose `requires_grad` counts, if forward asks for it."""
        return self._seen_as(call_signature(leaves, structure), given or leaves)

    def _seen_as(self, called: Hashable, leaves: Sequence[Any]) -> Hashable:
        return called, self.watched.version(), self._wanted(leaves)

    def _inputs(
        self, leaves: Sequence[Any], structure: Hashable, given: Sequence[Any] | None = None
    ) -> Hashable:
        """A signature without what the model holds."""
        return call_signature(leaves, structure), self.training, self._wanted(given or leaves)

    def _wanted(self, leaves: Sequence[Any]) -> Hashable:
        return self.asks_for_gradients and tuple([
            leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor)])

    def _note(self, captured: Capture) -> Capture:
        vars(self)["asks_for_gradients"] |= captured.asks_for_gradients
        if captured.asked:
            self.watched.ask(captured.asked)
        return captured

    def _warn_once(self) -> None:
        if not self.warned:
            vars(self)["warned"] = True
            warnings.warn(
                f"{type(self.original).__name__} was called with more than {MOST_SIGNATURES} "
                f"signatures, or in {MOST_STATES} states; further ones run the original model",
                stacklevel=4,
            )

    @property
    def graph_module(self) -> GraphModule | None:
        """The rewritten graph optimized last, for inputs of those lengths; None where the original
        runs."""
        return None if self.rewritten is None else self.shown()

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
        if "watched" not in vars(self):  # while it is made
            vars(self)[name] = held
        else:
            setattr(self.original, name, held)

    def __delattr__(self, name: str) -> None:
        delattr(self.original, name)

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


__all__ = ["OptimizedModule", "Selection"]
