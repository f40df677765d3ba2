"""A model and its inputs → one functional ATen graph in program order.

One tracing step serves both doors, an `nn.Module` and Dynamo's graph: `make_fx` before
dispatch (so that `linear` stays `linear` and grad regions are seen), over PyTorch's own
functionalisation (so that nothing in the graph mutates anything). See docs/decisions/0001.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .builder import storage
from .cases import copied, flat, flat_outputs
from .constants import ConstantAnswers
from .contract import Seen, visible
from .fakes import FakeTensors
from .normal_form import UnsupportedRegion, normalize
from .refused import (
    CaptureError,
    refuse_constants,
    refuse_layouts,
    refuse_modules,
    user_frames,
)
from .state import (
    EFFECT,
    PLAIN,
    Assigned,
    Attributes,
    Effect,
    State,
    assignments,
    fresh_state,
    model_state,
    note_assigned,
    python_generators,
    swapped,
)
from .tracing import refuse_hook, tracing
from .untracked import Functional

DISTRIBUTIONS = str(Path(torch.distributions.__file__).parent)


@dataclass(frozen=True)
class Capture:
    """A model's forward as a pure function of its state and its flat inputs.

    The graph's placeholders are the `state` in order, then the flat tensor inputs
    (`tensor_inputs` are their places among all flat inputs). Its outputs are the flat
    outputs, what is `assigned` to attributes of the model, then a new value for each of
    `written`. `same_as` maps an output to the placeholder whose very tensor the model returns
    after writing to it; `constants` holds the outputs that are no tensors. `seen` is how the
    outputs lie in memory.
    """

    graph_module: GraphModule
    state: tuple[State, ...]
    tensor_inputs: tuple[int, ...]
    output_spec: pytree.TreeSpec
    outputs: int  # with what is assigned
    assigned: tuple[Assigned, ...]
    written: tuple[int, ...]
    same_as: dict[int, int]
    constants: dict[int, Any]
    seen: tuple[Seen, ...]
    fake_mode: FakeTensorMode
    size: int  # operations that were traced
    asks_for_gradients: bool = False  # whether forward read a `requires_grad`
    lost: CaptureError | None = None  # a gradient that only the model has
    asked: tuple[Tensor, ...] = ()  # what the model holds, and forward asked the values of
    rolled: bool = False  # whether the loops in the graph are folded already
    begun: dict[Any, Any] = field(default_factory=dict, compare=False)  # the pipeline's own


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    fake_mode: FakeTensorMode | None = None,
) -> Capture:
    """Trace `model(*args, **kwargs)` on fake copies; the model is left as it was.

    `fake_mode` is given when the inputs are fake already, as inside a torch.compile backend.
    Raises `CaptureError` where forward depends on data, assigns attributes, or does
    something that the tracer or a pass could not keep.
    """
    refuse_modules(model)
    if fake_mode is None:
        tensors = [*(s.get() for s in model_state(model)), *pytree.tree_leaves((args, kwargs))]
        if any(isinstance(t, Tensor) and t.is_meta for t in tensors):
            raise CaptureError("tensors on the meta device have no values to verify with")
        _run_once(model, args, dict(kwargs or {}))
    mode = fake_mode or FakeTensors()
    state = model_state(model)
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
    places = tuple(i for i, leaf in enumerate(flat) if isinstance(leaf, (Tensor, torch.SymInt)))
    trace = _Trace(model, flat, spec, places, state)
    fakes = _fakes(mode, [*(s.get() for s in state), *trace.inputs])
    drawn = python_generators()
    with tracing():
        try:
            with mode, enable_python_dispatcher():
                graph_module = make_fx(
                    trace.functional, pre_dispatch=True, record_stack_traces=True
                )(*fakes)
        except CaptureError:
            raise
        except Effect as error:
            raise CaptureError(str(error)) from error
        except Exception as error:
            raise _explained(error) from error
    held = [getattr(graph_module, str(n.target))
            for n in graph_module.graph.find_nodes(op="get_attr")]
    if not all(isinstance(h, (Tensor, nn.Module)) for h in held):
        raise CaptureError("forward hands an object to an operation, such as a torch.Generator, "
                           "which has no place in a graph")
    assert trace.output_spec is not None
    if python_generators() != drawn:
        raise CaptureError("forward draws random numbers from Python or NumPy, which would be "
                           "constants of a graph; draw them with torch")
    _refuse_writes(trace)
    seen, lost = tuple(visible(graph_module)), _lost(trace, graph_module)
    try:
        normalize(graph_module, [s.name for s in state], mode)
    except UnsupportedRegion as error:
        raise CaptureError(str(error)) from error
    refuse_layouts(graph_module)
    refuse_constants(graph_module)
    return Capture(
        graph_module, state, places, trace.output_spec, trace.outputs, trace.assigned,
        trace.written, trace.same_as, trace.constants, seen, mode, len(graph_module.graph.nodes),
        trace.asks_for_gradients, lost, trace.asked,
    )


def _lost(trace: _Trace, graph_module: GraphModule) -> CaptureError | None:
    """The gradient that a graph has not, since it holds no writes that autograd does not see."""
    needs = [*(s.get().requires_grad for s in trace.state),
             *(isinstance(t, Tensor) and t.is_floating_point() for t in trace.inputs)]
    frames = trace.mode.first(graph_module.graph, needs)
    return None if frames is None else CaptureError(
        "forward writes to a tensor that has a gradient, under no_grad or through `.data` or "
        "`detach()`; it keeps that gradient in PyTorch, and would lose it in a graph",
        user_frames(frames))


class _Trace:
    """The flat, functional view of one call of a model that `make_fx` is run on."""

    def __init__(
        self, model: nn.Module, flat: list[Any], spec: pytree.TreeSpec, places: tuple[int, ...],
        state: tuple[State, ...],
    ) -> None:
        self.model, self.flat, self.spec, self.places, self.state = model, flat, spec, places, state
        self.inputs = [flat[i] for i in places]
        self.output_spec: pytree.TreeSpec | None = None
        self.outputs = 0
        self.assigned: tuple[Assigned, ...] = ()
        self.written: tuple[int, ...] = ()
        self.same_as: dict[int, int] = {}
        self.constants: dict[int, Any] = {}
        self.asks_for_gradients = False
        self.asked: tuple[Tensor, ...] = ()
        self.mode = Functional()

    def functional(self, *fakes: Tensor) -> list[Any]:
        above = torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        )
        with above, self.mode:
            wrapped = [_to_functional(t) for t in fakes]
            leaves = self._call(wrapped)
            after = [_from_functional(w) for w in wrapped]
            self.written = tuple(i for i, (a, f) in enumerate(zip(after, fakes, strict=True))
                                 if a is not f)
            self._note_returned(leaves, wrapped)
            return [*map(_from_functional, leaves), *(after[i] for i in self.written)]

    def _call(self, wrapped: list[Any]) -> list[Any]:
        held = len(self.state)
        tensors = {id(s.get()): w for s, w in zip(self.state, wrapped[:held], strict=True)}
        leaves = list(self.flat)
        for place, leaf in zip(self.places, wrapped[held:], strict=True):
            leaves[place] = leaf
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        given = pytree.tree_leaves((args, kwargs))
        known = [None if s.changes else s.get() for s in self.state]
        with swapped(self.model, tensors) as before:
            with ConstantAnswers(known) as answers:
                result = self.model(*args, **kwargs)
            changes = before.changes()
        self.asks_for_gradients = answers.asks_for_gradients
        self.asked = tuple(answers.asked.values())
        left = pytree.tree_leaves((args, kwargs))
        if len(left) != len(given) or any(a is not b for a, b in zip(left, given, strict=True)):
            raise CaptureError(f"forward changes a list or table among its arguments, {EFFECT}")
        outputs, self.output_spec = flat_outputs(result)
        for leaf in outputs:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                reason = f"forward returns a {type(leaf).__name__}, not a tensor"
                if is_dataclass(leaf):
                    reason += "; register it (torch.export.register_dataclass)"
                raise CaptureError(reason)
        assigned, more = assignments(changes, len(outputs))
        self.assigned = tuple(assigned)
        outputs += more
        self.outputs = len(outputs)
        self.constants = {i: x for i, x in enumerate(outputs) if not isinstance(x, Tensor)}
        if answers.unseen is not None:
            raise answers.unseen
        if any(array.tobytes() != was for array, was in answers.arrays):
            raise CaptureError("forward writes to an array of NumPy that shares memory with a "
                               "tensor, which a graph would not repeat")
        return [x if isinstance(x, Tensor) else None for x in outputs]

    def _note_returned(self, leaves: list[Any], wrapped: list[Any]) -> None:
        for position, leaf in enumerate(leaves):
            for source in self.written:
                if leaf is wrapped[source]:
                    self.same_as[position] = source
                elif isinstance(leaf, FunctionalTensor) and _aliases(leaf, wrapped[source]):
                    raise CaptureError("forward returns a view of a tensor that it writes to")


def _aliases(one: FunctionalTensor, other: FunctionalTensor) -> bool:
    return storage(one.elem) == storage(other.elem)


def run_on_copies(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], restore: bool = True
) -> None:
    """One call on copies of the inputs, the parameters and the buffers.

    Without `restore`, what lists, tables and objects of the model hold stays as it is left.
    """
    leaves, spec = flat(args, kwargs)
    positional, named = pytree.tree_unflatten(list(copied(leaves)), spec)
    with swapped(model, fresh_state(model), restore=restore) as before:
        model(*positional, **named)
        note_assigned(before.changes())


def _run_once(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Run the model for real, on copies, so that caches it fills hold no fake tensors.

    What forward stores in lists, tables and objects of the model stays there if it is a cache:
    a second call leaves it alone, and it holds nothing that parameters gave a gradient.
    """
    before = Attributes(model).contents
    try:
        with mock.patch.object(Tensor, "register_hook", refuse_hook):
            run_on_copies(model, args, kwargs, restore=False)
        if before.changed():
            filled = Attributes(model).contents
            grads = any(t.requires_grad for t in before.new_tensors())
            run_on_copies(model, args, kwargs, restore=False)
            if grads or filled.changed():
                before.put_back()
    except Exception as error:
        before.put_back()
        raise error if isinstance(error, CaptureError) else _explained(error) from error


def _fakes(mode: FakeTensorMode, leaves: Sequence[Any]) -> list[Any]:
    """A fake for each tensor; one that is given twice gets two, which may alias."""
    fakes: list[Any] = []
    seen: set[int] = set()
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not isinstance(leaf, torch._subclasses.FakeTensor):
            distinct = leaf.detach() if id(leaf) in seen else leaf
            seen.add(id(leaf))
            fakes.append(mode.from_tensor(distinct, static_shapes=True))
        else:
            fakes.append(leaf)
    return fakes


def _refuse_writes(trace: _Trace) -> None:
    """Writes that a graph could not repeat faithfully."""
    held = len(trace.state)
    for place in (place for place in trace.written if place < held):
        if trace.state[place].get().requires_grad:
            raise CaptureError(f"forward writes to the parameter {trace.state[place].name!r}")
        if any(t is trace.state[place].get() for t in trace.asked):
            raise CaptureError(f"forward asks for the value of {trace.state[place].name!r}, which "
                               "it writes to")
    tensors = [*(s.get() for s in trace.state), *trace.inputs]
    storages = [storage(t) if isinstance(t, Tensor) and t.layout is torch.strided else None
                for t in tensors]
    for place in trace.written:
        if storages.count(storages[place]) > 1:
            raise CaptureError("forward writes to a tensor that shares memory with another input, "
                               "buffer or parameter")


def _to_functional(leaf: Any) -> Any:
    return FunctionalTensor.to_functional(leaf) if isinstance(leaf, Tensor) else leaf


def _from_functional(leaf: Any) -> Any:
    if not isinstance(leaf, FunctionalTensor):
        return leaf
    torch._sync(leaf)  # type: ignore[attr-defined, no-untyped-call]
    return torch._from_functional_tensor(leaf.elem)


def _explained(error: Exception) -> CaptureError:
    """The tracer's exception in the user's terms, at the user's line."""
    frames = user_frames(traceback.extract_tb(error.__traceback__))
    known: tuple[tuple[str, str], ...] = (
        ("DataDependentOutputException",
         "forward asks for the value of a tensor (data-dependent control flow or `.item()`), "
         "which has no place in a graph; use torch.where, or keep the value a tensor"),
        ("GuardOnDataDependentSymNode",
         "forward branches on the value of a tensor (data-dependent control flow or `.item()`), "
         "which has no place in a graph; use torch.where, or keep the value a tensor"),
        ("DynamicOutputShapeException",
         "an operation's output shape depends on the data (as nonzero or a boolean mask does)"),
        ("UnsupportedFakeTensorException", "an operation has no rule for its output's shape"),
    )
    names = [kind.__name__ for kind in type(error).__mro__]
    within = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if "DataDependentOutputException" in names and any(
            file.startswith(DISTRIBUTIONS) for file in within):
        return CaptureError(
            "torch.distributions checks the values that it is given, which has no place in a "
            "graph; call `torch.distributions.Distribution.set_default_validate_args(False)`",
            frames)
    if ".numpy() is not supported" in str(error):
        names.append("DataDependentOutputException")
    for name, reason in known:
        if name in names:
            return CaptureError(reason, frames)
    if "FunctionalTensor" in str(error) or torch.autograd.__file__ in within:
        return CaptureError("forward differentiates or maps a function (`torch.func`, "
                            "`torch.autograd`), which a graph would not hold", frames)
    return CaptureError(f"{type(error).__name__}: {error}", frames)
