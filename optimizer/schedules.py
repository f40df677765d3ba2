"""Operations whose numbers are others in each step of a loop, with tensors in place of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from .facts import aten, value

Put = Callable[..., Node]  # an operation and its arguments → its result in the step

# operations whose second argument may be a number, and the form that takes a tensor instead
WITH_TENSOR = {
    aten.add.Tensor: aten.add.Tensor, aten.sub.Tensor: aten.sub.Tensor,
    aten.mul.Tensor: aten.mul.Tensor, aten.div.Tensor: aten.div.Tensor,
    aten.add.Scalar: aten.add.Tensor, aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor, aten.div.Scalar: aten.div.Tensor,
    aten.rsub.Scalar: aten.rsub.Tensor, aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.gt.Scalar: aten.gt.Tensor, aten.ge.Scalar: aten.ge.Tensor,
    aten.lt.Scalar: aten.lt.Tensor, aten.le.Scalar: aten.le.Tensor,
    aten.eq.Scalar: aten.eq.Tensor, aten.ne.Scalar: aten.ne.Tensor,
    aten.fmod.Scalar: aten.fmod.Tensor, aten.remainder.Scalar: aten.remainder.Tensor,
    aten.floor_divide.Scalar: aten.floor_divide.default,
    aten.div.Tensor_mode: aten.div.Tensor_mode, aten.div.Scalar_mode: aten.div.Tensor_mode,
    aten.bitwise_right_shift.Tensor_Scalar: aten.bitwise_right_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar: aten.bitwise_left_shift.Tensor,
}
FILLS = {aten.full.default: 1, aten.new_full.default: 2, aten.full_like.default: 1}


def filled(node: Node) -> int | None:
    """Which of the flat arguments is the number that fills a tensor."""
    place = FILLS.get(cast(Any, node.target))
    return None if place is None else len(pytree.tree_leaves(node.args[:place]))


def scheduled(node: Node) -> tuple[int, ...]:
    """Which of the flat arguments may be another number in each step."""
    target: Any = node.target
    if target is aten.lerp.Scalar and value(node).dtype in (torch.bfloat16, torch.float16):
        return ()  # the weight would be rounded
    places = FORMS[target][0] if target in FORMS else ()
    return (1, *places) if target in WITH_TENSOR else places


def with_tensors(node: Node, args: Any, kwargs: dict[str, Any], put: Put) -> Node:
    """The operation of `node` on arguments some of whose numbers are tensors without axes."""
    target: Any = node.target
    _, form = FORMS.get(target, ((), None))
    if form is None or (target in WITH_TENSOR and not isinstance(kwargs.get("alpha"), Node)):
        return put(WITH_TENSOR[target], *args, **kwargs)
    like = value(node)

    def tensor(leaf: Any) -> Node:
        """A number in the dtype of the result, as a tensor."""
        if isinstance(leaf, Node):
            return put(aten.to.dtype, leaf, like.dtype)
        return put(aten.full.default, [], leaf, dtype=like.dtype, device=like.device)

    return form(put, tensor, *args, **kwargs)


def _where(put: Put, tensor: Put, mask: Node, yes: Any, no: Any) -> Node:
    return put(aten.where.self, mask, *(
        leaf if isinstance(leaf, Node) and value(leaf).dim() else tensor(leaf)
        for leaf in (yes, no)))


def _masked_fill(put: Put, tensor: Put, x: Node, mask: Node, number: Any) -> Node:
    return _where(put, tensor, mask, number, x)


def _clamp(put: Put, tensor: Put, x: Node, *bounds: Any) -> Node:
    return put(aten.clamp.Tensor, x, *(None if b is None else tensor(b) for b in bounds))


def _scaled(target: Any) -> Callable[..., Node]:
    return lambda put, _, a, b, *, alpha: put(target, a, put(aten.mul.Tensor, alpha, b))


def _and_scaled(target: Any) -> Callable[..., Node]:
    """`a + value · (b · c)`, and of a quotient."""
    return lambda put, _, a, b, c, *, value: put(
        aten.add.Tensor, a, put(target, put(aten.mul.Tensor, b, value), c))


# which of the flat arguments may be tensors, in which form
FORMS: dict[Any, tuple[tuple[int, ...], Callable[..., Node]]] = {
    aten.where.ScalarSelf: ((1,), _where), aten.where.ScalarOther: ((2,), _where),
    aten.where.Scalar: ((1, 2), _where), aten.masked_fill.Scalar: ((2,), _masked_fill),
    aten.clamp.default: ((1, 2), _clamp),
    aten.clamp_min.default: ((1,), lambda put, tensor, x, low: _clamp(put, tensor, x, low, None)),
    aten.clamp_max.default: ((1,), lambda put, tensor, x, high: _clamp(put, tensor, x, None, high)),
    aten.lerp.Scalar: (
        (2,), lambda put, tensor, a, b, weight: put(aten.lerp.Tensor, a, b, tensor(weight))),
    aten.pow.Scalar: ((0,), lambda put, _, a, b: put(aten.pow.Tensor_Tensor, a, b)),
    aten.leaky_relu.default: ((1,), lambda put, _, x, slope: put(
        aten.where.self, put(aten.gt.Scalar, x, 0), x, put(aten.mul.Tensor, x, slope))),
    aten.add.Tensor: ((2,), _scaled(aten.add.Tensor)),
    aten.sub.Tensor: ((2,), _scaled(aten.sub.Tensor)),
    aten.addcmul.default: ((3,), _and_scaled(aten.mul.Tensor)),
    aten.addcdiv.default: ((3,), _and_scaled(aten.div.Tensor)),
}
