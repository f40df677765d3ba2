"""Rows of a table that a step looks up, or adds to, as what masks leave of all rows.

What no mask takes is never read, so the sum is exact beside infinities and NaN, but for the sign
of a zero. PyTorch raises where an index is out of range, and a kernel can't: such a step returns
NaN beside its results then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from .facts import aten, is_tensor, value
from .pointwise import Unsupported

MOST_ROWS = 1 << 12  # of a table, each of which a kernel reads in each step
MOST_READ = 1 << 22  # elements that it reads for a lookup


def _left(mask: Tensor, rows: Tensor, axes: list[int]) -> Tensor:
    """The sum over some axes of what a mask leaves."""
    read = torch.broadcast_shapes(mask.shape, rows.shape).numel()  # type: ignore[no-untyped-call]
    if read > MOST_READ:
        raise Unsupported(f"for its lookups a kernel would read {read} elements in each step")
    if rows.is_floating_point():
        return torch.where(mask, rows, 0.0).sum(axes)
    return torch.where(mask, rows.to(torch.float32), 0.0).sum(axes).to(rows.dtype)


def _is_row(index: Tensor, size: int) -> Tensor:
    """A mask [*index, size] of the row that each index tells, counted from the end below 0."""
    if size > MOST_ROWS:
        raise Unsupported(f"it looks up one of {size} rows, all of which a kernel would read")
    rows = torch.arange(size, dtype=torch.float32)
    index = index.unsqueeze(-1)
    return torch.where(index < 0, index + size, index) == rows


def _gather(x: Tensor, axis: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    if not x.dim() or sparse_grad:
        return NotImplemented
    for other, size in enumerate(index.shape):
        x = x if other == axis % x.dim() else x.narrow(other, 0, size)
    rows = x.movedim(axis, -1).unsqueeze(axis % x.dim())
    return _left(_is_row(index, rows.shape[-1]), rows, [-1])


def _index_select(x: Tensor, axis: int, index: Tensor) -> Any:
    return _index(x, [*[None] * (axis % x.dim()), index.reshape(-1)]) if x.dim() \
        else NotImplemented


def _mask(x: Tensor, indices: Sequence[Tensor | None]) -> tuple[Tensor, int, int] | None:
    """What `x[:, i, j]` takes as a mask [*sizes of i and j, *sizes of the axes, 1 …], the first of
    these axes and how many they are; None if they are apart, or not by integers."""
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    given = torch.broadcast_tensors(  # type: ignore[no-untyped-call]
        *(index for index in indices if index is not None))
    first, count = axes[0], len(axes)
    sizes = x.shape[first : first + count]
    if axes != list(range(first, first + count)) or any(
            index.dtype in (torch.bool, torch.uint8) for index in given):
        return None
    after = [1] * (x.dim() - first - count)
    masks = [_is_row(index, size).reshape(
        *index.shape, *(size if i == k else 1 for i in range(count)), *after)
        for k, (index, size) in enumerate(zip(given, sizes, strict=True))]
    return reduce(torch.logical_and, masks), first, count


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """`x[:, i, j]`: neighbouring axes by integers that broadcast."""
    if (found := _mask(x, indices)) is None:
        return NotImplemented
    mask, first, count = found
    new = mask.dim() - (x.dim() - first)
    rows = x.reshape(*x.shape[:first], *[1] * new, *x.shape[first:])
    return _left(mask, rows, list(range(first + new, first + new + count)))


def _index_put(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Any:
    """What is added at places; which of several values remains at one, PyTorch doesn't say."""
    if not accumulate or not x.is_floating_point() or (found := _mask(x, indices)) is None:
        return NotImplemented
    mask, first, count = found
    new = mask.dim() - (x.dim() - first)
    shape, after = mask.shape[:new], x.shape[first + count :]
    values = values.expand(*x.shape[:first], *shape, *after).reshape(
        *x.shape[:first], *shape, *[1] * count, *after)
    return x + _left(mask, values, list(range(first, first + new)))


def _index_add(
    x: Tensor, axis: int, index: Tensor, source: Tensor, *, alpha: Any = 1
) -> Any:
    if not x.dim() or index.dim() != 1 or source.dim() != x.dim():
        return NotImplemented
    source = source if alpha == 1 else source * alpha
    return _index_put(x, [*[None] * (axis % x.dim()), index], source, True)


def _index_fill(x: Tensor, axis: int, index: Tensor, number: Any) -> Any:
    if not x.dim() or (found := _mask(x, [*[None] * (axis % x.dim()), index.reshape(-1)])) is None:
        return NotImplemented
    return torch.where(found[0].any(0), number, x)


def _scattered(x: Tensor, axis: int, index: Tensor) -> Tensor | None:
    """A mask [*index, rows] of where elements go, None if that is not along a whole axis."""
    if not x.dim() or not x.is_floating_point():
        return None
    axis %= x.dim()
    theirs, ours = ([*t.shape[:axis], *t.shape[axis + 1 :]] for t in (index, x))
    return _is_row(index, x.shape[axis]) if theirs == ours else None


def _scatter_add(x: Tensor, axis: int, index: Tensor, source: Tensor) -> Any:
    if (mask := _scattered(x, axis, index)) is None:
        return NotImplemented
    for other, size in enumerate(index.shape):
        source = source.narrow(other, 0, size)
    return x + _left(mask, source.unsqueeze(-1), [axis % x.dim()]).movedim(-1, axis)


def _scatter_value(x: Tensor, axis: int, index: Tensor, number: Any) -> Any:
    if (mask := _scattered(x, axis, index)) is None:
        return NotImplemented
    return torch.where(mask.any(axis % x.dim()).movedim(-1, axis), number, x)


def _embedding(
    weight: Tensor, index: Tensor, padding: int = -1, by_frequency: bool = False,
    sparse: bool = False,
) -> Any:
    if by_frequency or sparse:
        return NotImplemented
    if padding >= 0:  # a row without a gradient
        is_padding = torch.arange(weight.shape[0], dtype=torch.float32) == padding
        weight = torch.where(is_padding.unsqueeze(-1), weight.detach(), weight)
    return _index(weight, [index])


def _one_hot(index: Tensor, classes: int = -1) -> Any:
    return _is_row(index, classes).to(torch.int64) if classes > 0 else NotImplemented


RULES: dict[Any, Any] = {
    aten.one_hot.default: _one_hot,
    aten.gather.default: _gather, aten.index.Tensor: _index, aten.index_put.default: _index_put,
    aten.index_add.default: _index_add, aten.index_fill.int_Scalar: _index_fill,
    aten.scatter_add.default: _scatter_add, aten.scatter.value: _scatter_value,
    **dict.fromkeys((aten.index_select.default, torch.index_select), _index_select),
    **dict.fromkeys((aten.embedding.default, torch.embedding), _embedding),
}
SPELLED = tuple(text for target in RULES if isinstance(target, OpOverload)  # as steps call them
                for text in (str(target), f"torch.{target._opname}("))


def ranges(node: Node) -> Iterator[tuple[Node, int, int]]:
    """The indices of a lookup, and the least and the number of the rows that each may tell."""
    if node.target not in RULES:
        return
    args = cast(tuple[Any, ...], node.args)
    if node.target is aten.one_hot.default:
        yield args[0], 0, args[1]
        return
    sizes = tuple(value(args[0]).shape) or (1,)
    if node.target in (aten.index.Tensor, aten.index_put.default):
        yield from ((index, -size, size) for index, size in zip(args[1], sizes, strict=False)
                    if is_tensor(index))
    elif node.target is aten.embedding.default:
        yield args[1], 0, sizes[0]
    else:
        yield args[2], 0, sizes[args[1]]
