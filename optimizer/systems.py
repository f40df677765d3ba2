"""Small matrices factorized element by element, as a kernel's steps do it.

Gaussian elimination with partial pivoting, and Cholesky's, as LAPACK's `getrf` and `potrf` (Golub
and Van Loan, "Matrix Computations", sections 3.4 and 4.2). Gradients are of the results, not of
each operation. Where PyTorch may raise, for a matrix that is about singular or not positive
definite, NaN comes out of a step that tells so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .facts import aten

MOST_ROWS = 4  # what is written out takes a minute to compile with eight
SMALL = 1e-6  # a pivot relative to its matrix: LAPACK, which rounds otherwise, may find zero

telling: ContextVar[bool] = ContextVar("telling", default=False)

# while it is `telling`, NaN where PyTorch raises, or may give another sign
TELLING = {aten.linalg_inv.default, aten.inverse.default, aten.linalg_solve.default,
           aten.linalg_cholesky.default, aten.cholesky.default, aten.logdet.default,
           aten.linalg_slogdet.default, aten.slogdet.default}


def _small(function: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for real matrices of a few rows alone."""

    def rule(a: Tensor, *args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (a, *args) if isinstance(t, Tensor)]
        rows = max(t.shape[-2] if t.dim() > 1 else 1 for t in (a, *tensors[:1]))
        if rows > MOST_ROWS or not all(t.is_floating_point() for t in tensors):
            return NotImplemented
        return function(a, *args, **kwargs)

    return rule


def _applied(function: type[Function], plain: Callable[..., Any], *args: Tensor) -> Any:
    """`plain`, by the `function` that has its gradient where there is one."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in args)
    apply: Any = function.apply
    return apply(*args) if wanted else plain(*args)


def _told(pivot: Tensor, a: Tensor) -> Tensor:
    """A pivot [..., 1] of matrices `a`; NaN, where that is told, if it is about zero."""
    if not telling.get():
        return pivot
    size = a.abs().amax((-2, -1)).unsqueeze(-1)
    return torch.where(pivot.abs() > SMALL * size, pivot, torch.nan)


def _eliminated(a: Tensor, b: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The pivots [..., 1], for each the rest of its row and of `b` [..., n − k + r], and the sign
    of the permutation [..., 1]."""
    joined = a if b is None else torch.cat([a, b], -1)
    rows = [joined.select(-2, i) for i in range(a.shape[-1])]
    sign = torch.ones_like(rows[0].narrow(-1, 0, 1))
    pivots, rests = [], []
    while rows:
        for i in range(1, len(rows)):
            larger = rows[i].narrow(-1, 0, 1).abs() > rows[0].narrow(-1, 0, 1).abs()
            rows[0], rows[i] = (torch.where(larger, rows[i], rows[0]),
                                torch.where(larger, rows[0], rows[i]))
            sign = torch.where(larger, -sign, sign)
        width = rows[0].shape[-1] - 1
        first, *others = rows
        pivot, rest = first.narrow(-1, 0, 1), first.narrow(-1, 1, width)
        divisor = torch.where(pivot == 0, 1.0, pivot)  # then what it divides is zero too
        rows = [row.narrow(-1, 1, width) - row.narrow(-1, 0, 1) / divisor * rest for row in others]
        pivots.append(pivot)
        rests.append(rest)
    return pivots, rests, sign


def _solved(a: Tensor, b: Tensor) -> Tensor:
    """x in a·x = b, [..., n, n] and [..., n, r]; NaN, if told, where `a` is about singular."""
    pivots, rests, _ = _eliminated(a, b)
    found: list[Tensor] = []  # the last row first
    columns = b.shape[-1]
    for pivot, rest in zip(reversed(pivots), reversed(rests), strict=True):
        x = rest.narrow(-1, rest.shape[-1] - columns, columns)
        for k, known in enumerate(reversed(found)):
            x = x - rest.narrow(-1, k, 1) * known
        found.append(x / _told(pivot, a))
    return torch.stack(found[::-1], -2)


def _identity(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=torch.float32).to(a).expand(a.shape)


def _inverse(a: Tensor) -> Tensor:
    return _solved(a, _identity(a))


class _Inverse(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        made = _inverse(a)
        ctx.save_for_backward(made)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (made,) = ctx.saved_tensors
        return -made.mT @ grads[0] @ made.mT


class _Solve(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        both = _solved(a, torch.cat([b, _identity(a)], -1))
        made = both.narrow(-1, 0, b.shape[-1]).clone()
        ctx.save_for_backward(made, both.narrow(-1, b.shape[-1], a.shape[-1]))
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        made, inverse = ctx.saved_tensors
        to_b = inverse.mT @ grads[0]
        return -to_b @ made.mT, to_b


def _solve(a: Tensor, b: Tensor, *, left: bool = True) -> Any:
    if b.dim() == 1 or b.shape == a.shape[:-1]:
        return NotImplemented if not left else _solve(a, b.unsqueeze(-1)).squeeze(-1)
    if not left:
        return _solve(a.mT, b.mT).mT
    batch: Any = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    return _applied(_Solve, _solved, a.expand(*batch, *a.shape[-2:]),
                    b.expand(*batch, *b.shape[-2:]))


def _sign_and_logarithm(a: Tensor) -> tuple[Tensor, Tensor]:
    """The sign of a determinant, and the logarithm of its size."""
    pivots, _, sign = _eliminated(a, None)
    logarithm = torch.zeros_like(sign)
    for pivot in pivots:
        sign, logarithm = sign * torch.sign(pivot), logarithm + torch.log(_told(pivot, a).abs())
    return sign.squeeze(-1), logarithm.squeeze(-1)


class _Determinant(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        sign, logarithm = _sign_and_logarithm(a)
        ctx.save_for_backward(_inverse(a))
        ctx.mark_non_differentiable(sign)
        return sign, logarithm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return inverse.mT * grads[1][..., None, None]


def _logarithm(a: Tensor) -> Tensor:
    """NaN where the determinant is negative."""
    sign, logarithm = _applied(_Determinant, _sign_and_logarithm, a)
    return torch.where(sign < 0, torch.nan, logarithm)


class _Symmetric(Function):
    """A matrix of which half is read, as PyTorch differentiates it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 0.5 * (grads[0] + grads[0].mT)


def _cholesky(a: Tensor, upper: bool = False) -> Tensor:
    lower = _applied(_Symmetric, Tensor.clone, a.mT if upper else a)
    size, columns = a.shape[-1], list[Tensor]()  # of the factor, from its diagonal down
    for j in range(size):
        column = lower.select(-1, j).narrow(-1, j, size - j)
        for k, known in enumerate(columns):
            part = known.narrow(-1, j - k, size - j)
            column = column - part * part.narrow(-1, 0, 1)
        square = column.narrow(-1, 0, 1)
        square = torch.where(square > 0, _told(square, lower), torch.nan)
        columns.append(column / torch.sqrt(square))
    made = torch.stack([torch.nn.functional.pad(c, (size - c.shape[-1], 0)) for c in columns], -1)
    return made.mT if upper else made


def _triangular(
    a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    if not left:
        return _triangular(a.mT, b.mT, upper=not upper, unitriangular=unitriangular).mT
    order = list(range(a.shape[-1]))
    found: dict[int, Tensor] = {}
    for i in reversed(order) if upper else order:
        x = b.select(-2, i)
        for k, known in found.items():
            x = x - a.select(-2, i).narrow(-1, k, 1) * known
        found[i] = x if unitriangular else x / a.select(-2, i).narrow(-1, i, 1)
    return torch.stack([found[i] for i in order], -2)


def _solved_by(b: Tensor, lower: Tensor) -> Tensor:
    return _triangular(lower.mT, _triangular(lower, b, upper=False), upper=True)


class _CholeskySolve(Function):
    @staticmethod
    def forward(ctx: Any, b: Tensor, lower: Tensor) -> Tensor:
        made = _solved_by(b, lower)
        ctx.save_for_backward(made, lower)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        made, lower = ctx.saved_tensors
        to_b = _solved_by(grads[0], lower)
        moved = to_b @ made.mT
        return to_b, -(moved + moved.mT) @ lower  # PyTorch's gradient is that of the whole factor


def _cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Any:
    return _applied(_CholeskySolve, _solved_by, b, factor.mT if upper else factor)


INVERSE, LOGARITHM = (partial(_applied, *pair) for pair in (
    (_Inverse, _inverse), (_Determinant, _sign_and_logarithm)))
_RULES: dict[Any, Callable[..., Any]] = {
    aten.linalg_inv.default: INVERSE, aten.inverse.default: INVERSE,
    aten.linalg_solve.default: _solve,
    aten.linalg_slogdet.default: LOGARITHM, aten.slogdet.default: LOGARITHM,
    aten.logdet.default: _logarithm,
    aten.linalg_cholesky.default: _cholesky, aten.cholesky.default: _cholesky,
    aten.linalg_solve_triangular.default: _triangular,
    aten.cholesky_solve.default: _cholesky_solve,
}
SYSTEMS = {target: _small(rule) for target, rule in _RULES.items()}
