"""Pointwise operations → expressions of C++ on vectors, or of Triton on blocks, with the functions
that eager kernels use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .facts import aten, spelled

SAME = {aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default,
        aten.lift_fresh_copy.default}
# operations on integers that are the same on floating numbers which hold them and their results
WHOLE = (aten.where.self, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default,
         aten.abs.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default,
         aten.maximum.default, aten.minimum.default, aten.fmod.Tensor)
COMMON = {"mul": "{0} * {1}", "div": "{0} / {1}", "add": "{0} + {alpha} * {1}",
          "sub": "{0} - {alpha} * {1}", "rsub": "{1} - {alpha} * {0}"}
COMPARISONS = {"gt": ">", "lt": "<", "ge": ">=", "le": "<=", "eq": "==", "ne": "!="}
JUNCTIONS = {"logical_and": "&", "bitwise_and": "&", "mul": "&", "logical_or": "|",
             "bitwise_or": "|"}
POWERS = {2.0: "{0} * {0}", 1.0: "{0}", 3.0: "{0} * {0} * {0}", 0.5: "sqrt", -1.0: "reciprocal"}
CONSTANTS = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}  # where the number is


class Unsupported(Exception):
    """Why no kernel can run a step."""


@contextlib.contextmanager
def tracing_a_step() -> Iterator[None]:
    """What PyTorch refuses within it is why no kernel can run the step."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise Unsupported("the loop factorizes matrices or solves linear systems") from error
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise Unsupported(f"the loop's step can't be traced ({reason})") from error


@dataclass(frozen=True)
class Language:
    """How kernels of a language spell operations, by PyTorch's names; `choose`: of `mask`, `yes`,
    `no`; `full`: one number everywhere; `inf`, `nan`: such numbers; `whole`: the integer that a
    number is rounded to, between `least` and `most`."""

    functions: Mapping[str, str]
    choose: str
    full: str
    inf: str
    nan: str
    whole: str

    def number(self, leaf: Any) -> str:
        """A number as an operand."""
        if not isinstance(leaf, (bool, int, float)):
            raise Unsupported(f"an operand of it is {leaf!r}")
        leaf = float(leaf)
        text = repr(leaf)
        if leaf != leaf:
            text = self.nan
        elif leaf in (float("inf"), float("-inf")):
            text = f"{'-' * (leaf < 0)}{self.inf}"
        return self.full.format(text)

    def counted(self, mask: str) -> str:
        """A mask as 0 and 1."""
        return self.choose.format(mask=mask, yes=self.number(1), no=self.number(0))

    def as_mask(self, text: str) -> str:
        """Numbers as a mask: which are not 0."""
        return f"({text} != {self.number(0)})"


CPP = Language(
    functions={
        **COMMON,
        **{name: f"{{0}}.{name}()" for name in (
            "exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "neg", "abs", "sin", "cos", "erf",
            "expm1", "log1p", "floor", "ceil", "trunc", "round", "tan", "sinh", "cosh", "asin",
            "acos", "atan", "erfc", "erfinv", "exp2", "log2", "log10")},
        **{name: f"{{0}}.{name}({{1}})" for name in (
            "atan2", "fmod", "hypot", "copysign", "pow")},
        **dict.fromkeys(("maximum", "clamp_min"), "at::vec::maximum({0}, {1})"),
        **dict.fromkeys(("minimum", "clamp_max"), "at::vec::minimum({0}, {1})"),
        "sigmoid": "(V(S(1)) + {0}.neg().exp()).reciprocal()",
        "relu": "at::vec::maximum({0}, V(S(0)))",
        "sign": "V::blendv(V::blendv(V(S(0)), V(S(-1)), {0} < V(S(0))), V(S(1)), "
                "{0} > V(S(0)))",
    },
    choose="V::blendv({no}, {yes}, {mask})", full="V(S({}))",
    inf="std::numeric_limits<double>::infinity()",
    nan="std::numeric_limits<double>::quiet_NaN()",
    # as processors do it: the least of all integers for NaN and what is none of them; no -0.0
    whole="V::blendv({least}, {0}.trunc() + V(S(0)), {0}.abs() < {most})",
)


def no_rule(target: Any) -> Unsupported:
    """What to raise for an operation that a kernel can't compute."""
    return Unsupported(f"the loop computes {spelled(target)}, which the kernel has no rule for")


def _is_of(leaf: Any, dtype: torch.dtype) -> bool:
    return isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), Tensor) \
        and bool(leaf.meta["val"].dtype == dtype)


def is_mask(leaf: Any) -> bool:
    return _is_of(leaf, torch.bool)


def is_integer(leaf: Any) -> bool:
    return _is_of(leaf, torch.int64) or _is_of(leaf, torch.int32)


def constant(node: Node) -> Any:
    """The number that fills a value, or None."""
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
    if name in ("zeros", "new_zeros", "zeros_like", "empty_permuted"):  # or anything
        return 0
    if name in ("ones", "new_ones", "ones_like"):
        return 1
    return node.args[CONSTANTS[name]] if name in CONSTANTS else None


def expression(node: Node, read: Callable[[Node], str], language: Language) -> str:
    """The value of an operation; `read` gives the variable that holds an operand."""
    number, functions = language.number, language.functions
    if not isinstance(node.target, torch._ops.OpOverload):
        raise no_rule(node.target)
    name = node.target._schema.name.removeprefix("aten::")

    def plain(leaf: Any) -> str:
        return read(leaf) if isinstance(leaf, Node) else number(leaf)

    def value(leaf: Any) -> str:  # masks count as 0 and 1
        return language.counted(read(leaf)) if is_mask(leaf) else plain(leaf)

    def chosen(mask: Any, yes: Any, no: Any) -> str:
        return language.choose.format(mask=plain(mask), yes=value(yes), no=value(no))

    args: tuple[Any, ...] = node.args
    masks = [is_mask(leaf) for leaf in args]
    if node.target in SAME and is_integer(node) and not is_integer(args[0]) and not masks[0]:
        most = float(2 ** (torch.iinfo(node.meta["val"].dtype).bits - 1))
        return language.whole.format(plain(args[0]), most=number(most), least=number(-most))
    if node.target in SAME:
        return language.as_mask(plain(args[0])) if is_mask(node) and not masks[0] else \
            plain(args[0]) if is_mask(node) else value(args[0])
    if name in COMPARISONS:
        return f"({value(args[0])} {COMPARISONS[name]} {value(args[1])})"
    if name in JUNCTIONS and all(masks[:2]):
        return f"({plain(args[0])} {JUNCTIONS[name]} {plain(args[1])})"
    if name in ("logical_not", "bitwise_not") and masks[0]:
        return f"({chosen(args[0], 0, 1)} == {number(1)})"
    if name == "isnan":
        return f"({value(args[0])} != {value(args[0])})"
    if is_mask(node):
        raise no_rule(node.target)
    if name == "masked_fill":
        return chosen(args[1], args[2], args[0])
    if name == "where" and masks[0]:
        return chosen(*args)
    if name == "clamp" and not node.kwargs:
        text = value(args[0])
        for bound, function in zip([*args[1:], None, None], ("maximum", "minimum"), strict=False):
            if bound is not None:
                text = functions[function].format(text, value(bound))
        return text
    if name == "pow":
        known = POWERS.get(args[1]) if isinstance(args[1], (int, float)) else None
        return functions.get(known or name, known or "").format(*map(value, args))
    template = functions.get(name)
    if template is None or set(node.kwargs) - {"alpha"}:
        raise no_rule(node.target)
    alpha = node.kwargs.get("alpha", 1)
    if alpha == 1:
        template = template.replace("{alpha} * ", "")
    return template.format(*map(value, args), alpha=number(alpha))
