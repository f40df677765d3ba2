"""Which lengths of a model's inputs its loops run over, and inputs of other lengths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.dynamic_shapes import _DimHint
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .capture import run_on_copies
from .formula import Lengths

MANY = 1500  # operations of a loop: with fewer, a full trace takes no longer than short ones
SHORT = 24  # a size below this is no length that is worth shortening
NAMES = ("T", "S")  # of the lengths that are found


@dataclass(frozen=True)
class Free:
    """A length that may vary: where inputs have it, as (flat input, axis, size by length)."""

    name: str
    places: tuple[tuple[int, int, Callable[[int], int] | None], ...]
    least: int = 1
    most: int | None = None

    def of(self, leaves: Sequence[Any]) -> int | None:
        """The length that the inputs have, if they agree on one."""
        [length, *_] = [leaves[i].shape[axis] for i, axis, size in self.places if size is None]
        fits = all(leaves[i].shape[axis] == (length if size is None else size(length))
                   for i, axis, size in self.places)
        return length if fits else None


def given_lengths(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], dynamic_shapes: Any
) -> list[Free]:
    """The lengths that `dynamic_shapes` names, in torch.export's own convention.

    Axes marked `Dim.AUTO` or `Dim.DYNAMIC` that have one size are one length. Raises
    `ValueError` where it names an argument or an axis that is not there.
    """
    bound = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    if not isinstance(dynamic_shapes, dict):
        dynamic_shapes = dict(zip(bound, dynamic_shapes, strict=True))
    if unknown := sorted(dynamic_shapes.keys() - bound.keys()):
        raise ValueError(f"dynamic_shapes names {', '.join(unknown)}, but forward is given "
                         f"{', '.join(bound)}")
    number = {id(leaf): k for k, leaf in enumerate(pytree.tree_leaves((tuple(args), dict(kwargs))))}
    places: dict[str, list[tuple[int, int, Callable[[int], int] | None]]] = {}
    dims: dict[str, Any] = {}
    for name, shapes in dynamic_shapes.items():
        for tensor, axis, dim in _dynamic_axes(name, bound[name], shapes):
            root = getattr(dim, "root", dim)
            key = f"n{tensor.shape[axis]}" if isinstance(dim, _DimHint) else root.__name__
            size = dim.fn if root is not dim else None
            places.setdefault(key, []).append((number[id(tensor)], axis, size))
            dims[key] = root
    for key, named in places.items():
        if all(size is not None for _, _, size in named):
            raise ValueError(f"no input has the length {key} itself, only lengths derived from it")
    return [Free(key, tuple(named), max(1, _finite(dims[key].min) or 1), _finite(dims[key].max))
            for key, named in places.items()]


def _dynamic_axes(name: str, held: Any, shapes: Any) -> Iterator[tuple[Tensor, int, Any]]:
    """The axes of the tensors in `held` that `shapes` lets vary."""
    if shapes is None:
        return
    if isinstance(held, Tensor):
        axes = shapes.items() if isinstance(shapes, dict) else enumerate(shapes)
        for axis, dim in axes:
            if not -held.dim() <= axis < held.dim():
                raise ValueError(f"dynamic_shapes names axis {axis} of {name}, which has "
                                 f"{held.dim()}")
            fixed = dim is None or isinstance(dim, int) or dim is Dim.STATIC
            if not fixed:
                yield held, axis % held.dim(), dim
        return
    if not isinstance(held, (list, tuple, dict)) or len(shapes) != len(held):
        raise ValueError(f"dynamic_shapes of {name} does not look like what is given")
    keys = held.keys() if isinstance(held, dict) else range(len(held))
    for key in keys:
        yield from _dynamic_axes(f"{name}[{key!r}]", held[key], shapes[key])


def _finite(most: Any) -> int | None:
    return int(most) if isinstance(most, int) and most < 1 << 62 else None


def found_lengths(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Free]:
    """The lengths that long loops of the model run over, two at most; none for short loops.

    Input axes of one size are one length, or where the model does not run so, each by itself. A
    loop runs over it if the model runs fewer operations when it is shorter; how many at its full
    length is estimated.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    sizes: dict[int, list[tuple[int, int, None]]] = {}
    for place, leaf in enumerate(leaves):
        for axis, size in enumerate(leaf.shape if isinstance(leaf, Tensor) else ()):
            if size >= SHORT:
                sizes.setdefault(size, []).append((place, axis, None))
    found = []
    for size, places in sizes.items():
        for some in dict.fromkeys([tuple(places), *((place,) for place in places)]):
            free = Free("", some)
            many = _run_over(size, model, leaves, free, spec)
            if many is not None and many >= MANY:
                found.append((-many, free))
            if many is not None and (many >= MANY or len(some) == len(places)):
                break  # else another axis happens to have that size, such as a layer's width
    most = sorted(found, key=lambda each: each[0])[: len(NAMES)]
    frees = sorted((free for _, free in most), key=lambda free: free.places)
    return [replace(free, name=name) for name, free in zip(NAMES, frees, strict=False)]


def _run_over(
    size: int, model: nn.Module, leaves: Sequence[Any], free: Free, spec: pytree.TreeSpec
) -> int | None:
    """How many operations a length of `size` takes, as far as it matters whether they are many;
    None if the model runs at no other length."""
    most = None
    for half in _halves(size):
        many = _operations_at(size, half, model, leaves, free, spec)
        if many is None:
            continue
        if many >= MANY and half <= size // 64:  # as far as it grows
            longer = _operations_at(size, 4 * half, model, leaves, free, spec)
            many = many if longer is None else longer
        most = many
        if many >= MANY or half >= size // 16:
            break
    return most


def _operations_at(
    size: int, half: int, model: nn.Module, leaves: Sequence[Any], free: Free,
    spec: pytree.TreeSpec,
) -> int | None:
    """How many more operations a length of `size` takes than none, from `half` and its double."""
    fewer, more = (operations(model, resized(leaves, [free], (n,)), spec)
                   for n in (half, 2 * half))
    return None if fewer is None or more is None else (more - fewer) * size // half


def _halves(size: int) -> list[int]:
    """Lengths to compare with their doubles: a very short one, which tells most loops quickly, and
    a sixteenth to a quarter, of ever larger multiples."""
    parts = [size // part // of * of for part in (16, 8, 4) for of in (1, 16, 64, 256, 1024)]
    return sorted({n for n in (size // 256 if size >= 2048 else 0, *parts) if n})


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> int | None:
    """How many operations one call of the model runs; None if it raises."""
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    counted = _Counted()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad(), counted:
            run_on_copies(model, args, kwargs)
    except Exception:
        return None
    return counted.count


def resized(leaves: Sequence[Any], frees: Sequence[Free], lengths: Lengths) -> list[Any]:
    """Inputs of other lengths: those given, cut off or begun anew; in the same order in memory."""
    made = list(leaves)
    for free, length in zip(frees, lengths, strict=True):
        for place, axis, size in free.places:
            wanted = length if size is None else size(length)
            taken = torch.arange(wanted, device=leaves[place].device) % max(
                leaves[place].shape[axis], 1)
            made[place] = made[place].detach().index_select(axis, taken)
    for place in {place for free in frees for place, _, _ in free.places}:
        order = layout(leaves[place])
        if order is not None:
            back = sorted(range(len(order)), key=order.__getitem__)
            dense = made[place].permute(order).contiguous().permute(back)
            made[place] = dense.requires_grad_(leaves[place].requires_grad)
    return made


def layout(tensor: Tensor) -> list[int] | None:
    """The axes from the slowest to the fastest in memory; None with gaps or overlaps."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    return order if tensor.permute(order).is_contiguous() else None
