"""Pointwise operations → C++ expressions on vectors, with the functions that eager kernels use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .facts import aten

SAME = {aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default,
        aten.lift_fresh_copy.default}
TEMPLATES = {
    **{name: f"{{0}}.{name}()" for name in (
        "exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "neg", "abs", "sin", "cos", "erf",
        "expm1", "log1p", "floor", "ceil", "trunc", "round", "tan", "sinh", "cosh", "asin", "acos",
        "atan", "erfc", "erfinv", "exp2", "log2", "log10")},
    **{name: f"{{0}}.{name}({{1}})" for name in ("atan2", "fmod", "hypot", "copysign")},
    "mul": "{0} * {1}", "div": "{0} / {1}", "add": "{0} + {alpha} * {1}",
    "sub": "{0} - {alpha} * {1}", "rsub": "{1} - {alpha} * {0}",
    **dict.fromkeys(("maximum", "clamp_min"), "at::vec::maximum({0}, {1})"),
    **dict.fromkeys(("minimum", "clamp_max"), "at::vec::minimum({0}, {1})"),
    "sigmoid": "(V(S(1)) + {0}.neg().exp()).reciprocal()",
    "relu": "at::vec::maximum({0}, V(S(0)))",
    "sign": "V::blendv(V::blendv(V(S(0)), V(S(-1)), {0} < V(S(0))), V(S(1)), {0} > V(S(0)))",
}
COMPARISONS = {"gt": ">", "lt": "<", "ge": ">=", "le": "<=", "eq": "==", "ne": "!="}
JUNCTIONS = {"logical_and": "&", "bitwise_and": "&", "mul": "&", "logical_or": "|",
             "bitwise_or": "|"}
POWERS = {2.0: "{0} * {0}", 1.0: "{0}", 3.0: "{0} * {0} * {0}", 0.5: "{0}.sqrt()",
          -1.0: "{0}.reciprocal()"}
CONSTANTS = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}  # where the number is


class Unsupported(Exception):
    """Why no kernel can run a step."""


def no_rule(target: Any) -> Unsupported:
    """What to raise for an operation that a kernel can't compute."""
    name = getattr(target, "_opname", None) or getattr(target, "__name__", target)
    return Unsupported(f"the loop computes {name}, which the kernel has no rule for")


def _is_of(leaf: Any, dtype: torch.dtype) -> bool:
    return isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), Tensor) \
        and bool(leaf.meta["val"].dtype == dtype)


def is_mask(leaf: Any) -> bool:
    return _is_of(leaf, torch.bool)


def is_integer(leaf: Any) -> bool:
    return _is_of(leaf, torch.int64)


def number(leaf: Any) -> str:
    """A number as a vector."""
    if not isinstance(leaf, (bool, int, float)):
        raise Unsupported(f"an operand of it is {leaf!r}")
    leaf = float(leaf)
    text = repr(leaf)
    if leaf != leaf:
        text = "std::numeric_limits<double>::quiet_NaN()"
    elif leaf in (float("inf"), float("-inf")):
        text = f"{'-' * (leaf < 0)}std::numeric_limits<double>::infinity()"
    return f"V(S({text}))"


def constant(node: Node) -> Any:
    """The number that fills a value, or None."""
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
    if name in ("zeros", "new_zeros", "zeros_like", "empty_permuted"):  # or anything
        return 0
    if name in ("ones", "new_ones", "ones_like"):
        return 1
    return node.args[CONSTANTS[name]] if name in CONSTANTS else None


def expression(node: Node, read: Callable[[Node], str]) -> str:
    """The value of an operation; `read` gives the variable that holds an operand."""
    if not isinstance(node.target, torch._ops.OpOverload):
        raise no_rule(node.target)
    name = node.target._schema.name.removeprefix("aten::")

    def plain(leaf: Any) -> str:
        return read(leaf) if isinstance(leaf, Node) else number(leaf)

    def value(leaf: Any) -> str:  # masks count as 0 and 1
        return f"V::blendv(V(S(0)), V(S(1)), {read(leaf)})" if is_mask(leaf) else plain(leaf)

    args: tuple[Any, ...] = node.args
    masks = [is_mask(leaf) for leaf in args]
    if node.target in SAME and is_integer(node) and not is_integer(args[0]) and not masks[0]:
        return f"{plain(args[0])}.trunc()"
    if node.target in SAME:
        return f"({plain(args[0])} != V(S(0)))" if is_mask(node) and not masks[0] else \
            plain(args[0]) if is_mask(node) else value(args[0])
    if name in COMPARISONS:
        return f"({value(args[0])} {COMPARISONS[name]} {value(args[1])})"
    if name in JUNCTIONS and all(masks[:2]):
        return f"({plain(args[0])} {JUNCTIONS[name]} {plain(args[1])})"
    if name in ("logical_not", "bitwise_not") and masks[0]:
        return f"(V::blendv(V(S(1)), V(S(0)), {plain(args[0])}) == V(S(1)))"
    if name == "isnan":
        return f"({value(args[0])} != {value(args[0])})"
    if is_mask(node):
        raise no_rule(node.target)
    if name == "masked_fill":
        return f"V::blendv({value(args[0])}, {plain(args[2])}, {plain(args[1])})"
    if name == "where" and masks[0]:
        return f"V::blendv({value(args[2])}, {value(args[1])}, {plain(args[0])})"
    if name == "clamp" and not node.kwargs:
        text = value(args[0])
        for bound, function in zip([*args[1:], None, None], ("maximum", "minimum"), strict=False):
            if bound is not None:
                text = f"at::vec::{function}({text}, {value(bound)})"
        return text
    if name == "pow":
        known = POWERS.get(args[1]) if isinstance(args[1], (int, float)) else None
        return (known or "{0}.pow({1})").format(*map(value, args))
    template = TEMPLATES.get(name)
    if template is None or set(node.kwargs) - {"alpha"}:
        raise no_rule(node.target)
    alpha = node.kwargs.get("alpha", 1)
    if alpha == 1:
        template = template.replace("{alpha} * ", "")
    return template.format(*map(value, args), alpha=number(alpha))
