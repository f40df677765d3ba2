"""What forward asks of tensors that no input reaches, answered while it is traced.

`assert (t[1:] > t[:-1]).all()` on a table, `if mask.all()` on a default mask and `n.item()` of a
counter have the same answer at every call with inputs of these sizes; `range(self.steps)` has it
as long as what the model holds is the same, which each call compares.
"""

from __future__ import annotations

import contextlib
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, get_proxy_mode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .facts import LARGEST_CONSTANT, LIFTED, aten, is_pure, root
from .refused import CaptureError, user_frames
from .untracked import node_of

UNANSWERABLE = (
    DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode
)
REQUIRES_GRAD: Any = vars(torch._C.TensorBase)["requires_grad"]
DATA: Any = vars(torch._C.TensorBase)["data"]
UNSEEN = {  # by the tracer, which would go on as if nothing had been asked
    Tensor.requires_grad_: "changes what has a gradient (`requires_grad_`)",
    REQUIRES_GRAD.__set__: "changes what has a gradient (`requires_grad`)",
    DATA.__set__: "assigns to the `.data` of a tensor",
}
FILLING = {torch.full: 1, torch.full_like: 1, Tensor.new_full: 2}  # where the number is
ARRAYS = (Tensor.numpy, Tensor.__array__)
ASKING = (*ARRAYS, Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__float__, Tensor.__bool__,
          Tensor.__index__, Tensor.__complex__, Tensor.__contains__, Tensor.equal, torch.equal,
          Tensor.allclose, torch.allclose, Tensor.is_nonzero, torch.is_nonzero,
          Tensor.__format__, Tensor.__repr__)
WRITING = {"__setitem__", *(f"__i{name}__" for name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"))}
CHOOSING = {torch.where: 0, Tensor.where: 1}  # where the mask is, which may be of bytes
LIKE_FIRST = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
LIKE_SECOND = ("to", "type_as", "expand_as", "view_as", "reshape_as")


class Unknown(Exception):
    """A value depends on an input, on the model's state or on random numbers."""


class ConstantAnswers(TorchFunctionMode):
    """Under a trace: what fails for want of values is computed from those of constants, and of the
    integers and masks that the model holds, `state` among them; those are `asked`."""

    def __init__(self, state: Sequence[Tensor | None] = ()) -> None:
        super().__init__()
        self.state = state
        self.asked: dict[int, Tensor] = {}  # by their ids
        self.known: dict[Node, Any] = {}
        self.arrays: list[tuple[Any, bytes]] = []  # that were given, and what they held
        self.root: nn.Module | None = None  # holds the tensors that forward made of numbers
        self.asks_for_gradients = False
        self.unseen: CaptureError | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.asks_for_gradients |= getattr(func, "__self__", None) is REQUIRES_GRAD
        if self.unseen is None:
            self._refuse(func, args)
        if func == DATA.__get__:
            func = Tensor.detach  # the tracer takes `.data` for the tensor itself
        whole = func in ASKING or func in FILLING
        asked = pytree.tree_leaves((args, kwargs)) if whole else _numbers(args, kwargs)
        self._note(filter(_is_held, asked))
        if func in ARRAYS and _is_held(args[0]):
            return self._value(func, args, kwargs)  # a trace would give other memory
        if func in CHOOSING:
            args, kwargs = _by_masks(args, kwargs, CHOOSING[func])
        try:
            return func(*args, **kwargs)
        except (*UNANSWERABLE, TypeError, RuntimeError) as error:
            if not isinstance(error, UNANSWERABLE) and func not in (*FILLING, *ARRAYS):
                raise
            numbered = self._by_numbers(func, args, kwargs)
            args, kwargs = numbered or (args, kwargs)
            for answer in (*([_called] if numbered else []), self._told, self._otherwise):
                with contextlib.suppress(Unknown):
                    return answer(func, args, kwargs)
            raise error from None

    def _refuse(self, func: Any, args: Sequence[Any]) -> None:
        """Note what the graph would not hold; raise where PyTorch would say so in its own terms."""
        if func in UNSEEN:
            if func == DATA.__set__ or not _is_made(args[0]):
                self.unseen = CaptureError(f"forward {UNSEEN[func]}, which a graph would not hold",
                                           user_frames(traceback.extract_stack()))
        elif args and _writes(func) and _shows_held(args[0]):
            self.unseen = CaptureError(
                "forward writes to a tensor that an object on the model holds, or a global one, "
                "which a graph would not repeat; register it as a buffer",
                user_frames(traceback.extract_stack()))
            raise self.unseen

    def _by_numbers(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Both, with numbers for the integers whose values are known, as a size or an index; None
        without any."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        numbers = leaves if func in ASKING else list(map(self._number, leaves))
        same = all(map(operator.is_, leaves, numbers))
        return None if same else pytree.tree_unflatten(numbers, spec)

    def _number(self, leaf: Any) -> Any:
        if isinstance(leaf, slice):
            parts = leaf.start, leaf.stop, leaf.step
            numbers = list(map(self._number, parts))
            return leaf if all(map(operator.is_, parts, numbers)) else slice(*numbers)
        try:
            return self._value(Tensor.item, (leaf,), {}) if _is_integer(leaf) else leaf
        except Unknown:
            return leaf

    def _told(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result of what is known, as constants of the trace."""
        answer = self._value(func, args, kwargs)
        return pytree.tree_map_only(Tensor, aten.lift_fresh_copy.default, answer)

    def _otherwise(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What needs no value: a tensor filled with one, or `tensor[:, i]` by one."""
        made = _picked(*args) if func is Tensor.__getitem__ else _filled(func, args, kwargs)
        if made is None:
            raise Unknown
        return made

    def _note(self, tensors: Iterable[Tensor]) -> None:
        self.asked |= {id(t): t for t in tensors}

    def _value(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A function's result, if its arguments are known."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        nodes = self._nodes(func, leaves)
        with ThreadPoolExecutor(1) as apart:  # which has none of the trace's modes
            return apart.submit(self._answer, func, leaves, spec, nodes).result()

    def _nodes(self, func: Any, leaves: Sequence[Any]) -> dict[int, Node]:
        """The nodes that the traced tensors among `leaves` stand for, by their places."""
        mode = get_proxy_mode()
        if mode is None or not isinstance(mode.tracer, PythonKeyTracer):
            raise Unknown
        self.root = mode.tracer.root
        found = {}
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, (FunctionalTensor, FakeTensor)):
                if (node := node_of(leaf)) is None:
                    raise Unknown
                found[place] = node
            elif _is_held(leaf) and (func in ARRAYS or not leaf.requires_grad):
                self._note([leaf])
            elif isinstance(leaf, Tensor):
                raise Unknown
        return found

    @torch.no_grad()
    def _answer(
        self, func: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec,
        nodes: dict[int, Node],
    ) -> Any:
        for place, node in nodes.items():
            leaves[place] = self._evaluated(node)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        made = func(*args, **kwargs)
        if func in ARRAYS:  # of its own memory; who writes to it is refused
            made = made.copy()
            self.arrays.append((made, made.tobytes()))
        return made

    def _evaluated(self, node: Node) -> Any:
        """The value of `node`, from those of all that it is computed from."""
        todo = [node]
        while todo:
            one = todo[-1]
            sources = [] if one in self.known else _sources(one)
            if missing := [source for source in sources if source not in self.known]:
                todo += missing
                continue
            todo.pop()
            if one not in self.known:
                self.known[one] = self._computed(one)
        return self.known[node]

    def _computed(self, node: Node) -> Any:
        if node.op == "get_attr":
            held = getattr(self.root, str(node.target))
            if type(held) is Tensor and not held.requires_grad:
                if not any(user.target in LIFTED for user in node.users):  # forward made it
                    self._note([held])
                return held
        if node.op == "placeholder":
            place = node.graph.find_nodes(op="placeholder").index(node)
            held = self.state[place] if place < len(self.state) else None
            if held is None or held.is_floating_point() or held.is_complex() \
                    or held.numel() > LARGEST_CONSTANT:
                raise Unknown
            self._note([held])
            return held
        is_known = isinstance(node.target, torch._ops.OpOverload) and is_pure(node)
        if "empty" in str(node.target) or not (is_known or node.target is operator.getitem):
            raise Unknown
        known = _sources(node)
        values = {n: self.known[n] if n in known else _blank(n) for n in node.all_input_nodes}
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        seen = node.meta.get("val")
        if any(t.numel() > LARGEST_CONSTANT for t in _tensors(seen)):
            raise Unknown
        made = cast(Callable[..., Any], node.target)(*args, **kwargs)
        if [(t.shape, t.dtype) for t in _tensors(made)] != [
            (t.shape, t.dtype) for t in _tensors(seen)
        ]:
            raise Unknown
        return made


def _called(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    try:
        return func(*args, **kwargs)
    except (*UNANSWERABLE, AttributeError, TypeError, RuntimeError) as error:
        raise Unknown from error


def _is_integer(leaf: Any) -> bool:
    """Whether it is a tensor of one integer without axes."""
    return isinstance(leaf, Tensor) and not leaf.dim() and leaf.dtype in (torch.int64, torch.int32)


def _numbers(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors of one integer among arguments, in lists and slices too: sizes, places."""
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, (tuple, list)):
            yield from _numbers(arg, {})
        elif isinstance(arg, slice):
            yield from _numbers((arg.start, arg.stop, arg.step), {})
        elif isinstance(arg, Tensor) and arg.numel() == 1 and not arg.is_floating_point():
            yield arg


def _is_held(leaf: Any) -> bool:
    """Whether a tensor hangs on an object of the model, or is a global: a trace does not know it,
    and takes it for a constant."""
    return type(leaf) in (Tensor, nn.Parameter) and torch._C._has_storage(leaf) \
        and not torch._is_functional_tensor(leaf) and not leaf.is_meta


def _shows_held(tensor: Any) -> bool:
    """Whether a tensor is such a one, or a view of one."""
    if _is_held(tensor) or type(tensor) is not FakeTensor:
        return _is_held(tensor)
    node = node_of(tensor)
    return node is not None and root(node).op == "get_attr"


def _writes(func: Any) -> bool:
    """Whether it writes to its first argument: `add_`, `+=`, `x[i] = …`."""
    name = getattr(func, "__name__", "")
    return name in WRITING or (name.endswith("_") and not name.endswith("__"))


def _picked(tensor: Tensor, index: Any) -> Tensor | None:
    """`tensor[:, i]` by an integer without axes, as an index of one."""
    *before, i = index if isinstance(index, tuple) else (index,)
    if not _is_integer(i) or not all(isinstance(part, slice) for part in before):
        return None
    return tensor[(*before, i.reshape(1))].squeeze(len(before))


def _filled(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """A tensor filled with the value of one that has no axes, without asking for it."""
    place = FILLING.get(func, len(args))
    number = args[place] if place < len(args) else kwargs.get("fill_value")
    if func not in FILLING or not isinstance(number, Tensor) or number.dim():
        return None
    kind = number.dtype  # the result's comes from a number of its kind
    nothing: Any = 0.0 if kind.is_floating_point else 0j if kind.is_complex \
        else False if kind is torch.bool else 0
    if place < len(args):
        made = func(*args[:place], nothing, *args[place + 1 :], **kwargs)
    else:
        made = func(*args, **{**kwargs, "fill_value": nothing})
    return cast(Tensor, made).copy_(number.detach())


def _by_masks(
    args: Sequence[Any], kwargs: dict[str, Any], place: int
) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments of a choice, with a mask for bytes, of which a trace knows no result."""
    if place < len(args) and args[place].dtype is torch.uint8:
        return (*args[:place], args[place].bool(), *args[place + 1 :]), kwargs
    mask = kwargs.get("condition")
    if mask is not None and mask.dtype is torch.uint8:
        return args, {**kwargs, "condition": mask.bool()}
    return args, kwargs


def _is_made(tensor: Any) -> bool:
    """Whether forward itself made a tensor, and so a leaf of its own, which no caller sees."""
    if not isinstance(tensor, FunctionalTensor):
        return isinstance(tensor, FakeTensor)  # of a constant, which itself is none
    node = node_of(tensor)
    return node is not None and node.op == "call_function"


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _sources(node: Node) -> list[Node]:
    """The nodes of whose numbers `node` is made: of some only size, dtype and device matter."""
    name = getattr(node.target, "__name__", "").split(".")[0]
    if name in LIKE_FIRST:
        return []
    return [n for n in node.all_input_nodes if name not in LIKE_SECOND or n is node.args[0]]


def _blank(node: Node) -> Tensor:
    seen = node.meta["val"]
    return torch.empty(seen.shape, dtype=seen.dtype, device=seen.device)


def as_lists(tensor: Tensor) -> Any:
    """`tensor.tolist()` by way of `item`, for tensors of which a trace knows no value."""
    return [as_lists(part) for part in tensor] if tensor.dim() else tensor.item()
