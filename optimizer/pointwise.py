"""A step of pointwise operations → C++ that walks all steps with the carries in registers.

The step is Python source, `def step(carry_0, …, slice_0, …, invariant_0, …)` on tensors of one
size. It is traced to core operations; each becomes one expression on vectors of lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from textwrap import dedent
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .facts import aten

Step = Callable[..., list[Tensor]]
BLOCK = 4  # vectors of lanes that one walk carries along

SAME = {aten.detach.default, aten.alias.default, aten.clone.default, aten.expand.default,
        aten.view.default, aten._to_copy.default}
FUNCTIONS = {
    aten.exp.default: "exp", aten.log.default: "log", aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt", aten.reciprocal.default: "reciprocal", aten.tanh.default: "tanh",
    aten.neg.default: "neg", aten.abs.default: "abs", aten.sin.default: "sin",
    aten.cos.default: "cos", aten.erf.default: "erf", aten.expm1.default: "expm1",
    aten.log1p.default: "log1p", aten.floor.default: "floor", aten.ceil.default: "ceil",
}
COMPARISONS = {
    aten.gt: ">", aten.lt: "<", aten.ge: ">=", aten.le: "<=", aten.eq: "==", aten.ne: "!=",
}
COMPOSED = [aten.gelu, aten.gelu_backward, aten.elu, aten.elu_backward, aten.leaky_relu,
            aten.leaky_relu_backward, aten.hardtanh, aten.hardsigmoid, aten.hardswish]  # not core


class Unsupported(Exception):
    """Why no kernel can run a step."""


@lru_cache(maxsize=256)
def step_function(source: str) -> Step:
    """The function that `source` defines."""
    scope: dict[str, Any] = {"torch": torch, "inf": float("inf"), "nan": float("nan")}
    exec(dedent(source), scope)
    return scope["step"]  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def traced(source: str, arguments: int) -> GraphModule:
    """The step in core operations, on vectors."""
    step = step_function(source)
    lanes = [torch.full((8,), 0.5) for _ in range(arguments)]
    rules = {**core_aten_decompositions(), **get_decompositions(COMPOSED)}
    return make_fx(step, decomposition_table=rules)(*lanes)


def cpp(source: str, carries: int, slices: int, invariants: int) -> str:
    """The C++ source of the kernel: `run(arguments, sizes, steps, threads)` in both precisions."""
    graph_module = traced(source, carries + slices + invariants)
    body, results = _expressions(graph_module)
    names = [n.name for n in graph_module.graph.nodes if n.op == "placeholder"]
    held, read, fixed = (names[:carries], names[carries : carries + slices],
                         names[carries + slices :])
    stored = results[carries:]
    first = {name: k for k, name in enumerate(names)}
    out, count = len(names), len(names) + carries + len(stored)
    moving = [*(first[name] for name in read), *range(out + carries, count)]

    def lines(indent: int, texts: Sequence[str]) -> str:
        return "".join(" " * indent + text + "\n" for text in texts)

    def loaded(name: str) -> str:
        k = first[name]
        return f"load<S, whole>(p{k} + (b{k} ? 0 : i * W), b{k}, n)"

    return PREFIX + f"""
template <typename S, int N, bool whole>
void walk(const Argument<S>* a, const int64_t* at, int64_t steps, int64_t lane, int64_t n) {{
  using V = Vectorized<S>;
  constexpr int64_t W = V::size();
{lines(2, [f"const bool b{k} = a[{k}].strides[2] == 0;" for k in range(out)])}\
{lines(2, [f"S* p{k} = a[{k}].data + at[{k}] + lane * a[{k}].strides[2];" for k in range(count)])}\
{lines(2, [f"const int64_t d{k} = a[{k}].step;" for k in moving])}\
{lines(2, [f"V {name}_[N];" for name in (*held, *fixed)])}\
  for (int i = 0; i < N; ++i) {{
{lines(4, [f"{name}_[i] = {loaded(name)};" for name in (*held, *fixed)])}  }}
  for (int64_t t = 0; t < steps; ++t) {{
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {{
{lines(6, [f"const V {name} = {name}_[i];" for name in (*held, *fixed)])}\
{lines(6, [f"const V {name} = {loaded(name)};" for name in read])}\
{lines(6, body)}\
{lines(6, [f"store<S, whole>({value}, p{out + carries + k} + i * W, n);"
           for k, value in enumerate(stored)])}\
{lines(6, [f"{name}_[i] = {value};" for name, value in zip(held, results, strict=False)])}    }}
{lines(4, [f"p{k} += d{k};" for k in moving])}  }}
  for (int i = 0; i < N; ++i) {{
{lines(4, [f"store<S, whole>({name}_[i], p{out + k} + i * W, n);"
           for k, name in enumerate(held)])}  }}
}}

constexpr int COUNT = {count}, BLOCK = {BLOCK};
""" + SUFFIX


def _expressions(graph_module: GraphModule) -> tuple[list[str], list[str]]:
    """One statement for each operation, and the values that the step returns."""
    statements: list[str] = []
    results: list[str] = []
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            if node.meta["val"].dtype not in (torch.float32, torch.bool):
                raise Unsupported(f"the loop computes {node.meta['val'].dtype} numbers")
            statements.append(f"const V {node.name} = {_expression(node)};")
        elif node.op == "output":
            if any(map(_is_mask, node.args[0])):
                raise Unsupported("it returns what is no number")
            results = [_operand(leaf) for leaf in node.args[0]]
        elif node.op == "get_attr":
            held = getattr(graph_module, str(node.target))
            if not isinstance(held, Tensor) or held.numel() != 1:
                raise Unsupported("it reads a constant tensor")
            statements.append(f"V {node.name} = V(S({_number(held.item())}));")
    return statements, results


def _operand(leaf: Any) -> str:
    if isinstance(leaf, Node):
        return leaf.name
    if isinstance(leaf, (bool, int, float)):
        return f"V(S({_number(leaf)}))"
    raise Unsupported(f"an operand of it is {leaf!r}")


def _number(number: float) -> str:
    number = float(number)
    if number != number:
        return "std::numeric_limits<double>::quiet_NaN()"
    if number in (float("inf"), float("-inf")):
        return f"{'-' * (number < 0)}std::numeric_limits<double>::infinity()"
    return repr(number)


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), Tensor) \
        and leaf.meta["val"].dtype == torch.bool


def _values(leaves: Sequence[Any]) -> list[str]:
    """Operands as numbers: masks count as 0 and 1."""
    return [f"V::blendv(V(S(0)), V(S(1)), {leaf.name})" if _is_mask(leaf) else _operand(leaf)
            for leaf in leaves]


def _expression(node: Node) -> str:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise Unsupported(f"the loop computes {target}, which the kernel has no rule for")
    name, packet = target._schema.name.removeprefix("aten::"), target.overloadpacket
    tensors = [leaf for leaf in node.args if isinstance(leaf, Node)]
    if name in ("full", "full_like", "scalar_tensor"):
        return _operand(node.args[0] if name == "scalar_tensor" else node.args[1])
    if name in ("zeros_like", "new_zeros", "zeros"):
        return "V(S(0))"
    if name in ("ones_like", "new_ones", "ones"):
        return "V(S(1))"
    if target in SAME:
        if _is_mask(tensors[0]) and not _is_mask(node):
            return _values(tensors[:1])[0]
        return _operand(tensors[0])
    if target in FUNCTIONS:
        return f"{_values(node.args[:1])[0]}.{FUNCTIONS[target]}()"
    if packet in COMPARISONS:
        left, right = _values(node.args[:2])
        return f"({left} {COMPARISONS[packet]} {right})"
    if name in ("logical_and", "bitwise_and", "logical_or", "bitwise_or") and all(
        map(_is_mask, node.args[:2])
    ):
        return f"({_operand(node.args[0])} {'&' if 'and' in name else '|'} " \
            f"{_operand(node.args[1])})"
    if name in ("logical_not", "bitwise_not") and _is_mask(node.args[0]):
        return f"V::blendv(V(S(1)), V(S(0)), {_operand(node.args[0])}) == V(S(1))"
    if _is_mask(node):
        raise Unsupported(f"the loop computes {name}, which the kernel has no rule for")
    if name == "masked_fill":
        return f"V::blendv({_values(node.args[:1])[0]}, {_operand(node.args[2])}, " \
            f"{_operand(node.args[1])})"
    if name == "where":
        if not _is_mask(node.args[0]):
            raise Unsupported(f"the loop computes {name}, which the kernel has no rule for")
        yes, no = _values(node.args[1:3])
        return f"V::blendv({no}, {yes}, {_operand(node.args[0])})"
    values = _values([leaf for leaf in node.args if isinstance(leaf, (Node, int, float))])
    scale = node.kwargs.get("alpha", 1)
    if name in ("add", "sub") and len(values) >= 2:
        right = values[1] if scale == 1 else f"{values[1]} * {_operand(scale)}"
        return f"{values[0]} {'+' if name == 'add' else '-'} {right}"
    if name == "rsub" and scale == 1:
        return f"{values[1]} - {values[0]}"
    if name in ("mul", "div") and not node.kwargs and len(values) == 2:
        return f"{values[0]} {'*' if name == 'mul' else '/'} {values[1]}"
    if name == "addcmul":
        scale = node.kwargs.get("value", 1)
        product = f"{values[1]} * {values[2]}"
        return f"{values[0]} + {product if scale == 1 else f'{_operand(scale)} * {product}'}"
    if name in ("maximum", "minimum"):
        return f"at::vec::{name}({values[0]}, {values[1]})"
    if name == "sigmoid":
        return f"(V(S(1)) + {values[0]}.neg().exp()).reciprocal()"
    if name == "relu":
        return f"at::vec::maximum({values[0]}, V(S(0)))"
    if name == "sign":
        above, below = (f"V::blendv(V(S(0)), V(S(1)), {values[0]} {sign} V(S(0)))" for sign in "><")
        return f"{above} - {below}"
    if name == "clamp" and not tensors[1:]:
        text = _values(node.args[:1])[0]
        bounds = [*node.args[1:], None, None][:2]
        for bound, function in zip(bounds, ("maximum", "minimum"), strict=True):
            if bound is not None:
                text = f"at::vec::{function}({text}, {_operand(bound)})"
        return text
    if name == "pow" and isinstance(node.args[1], (int, float)):
        exponent = float(node.args[1])
        simple = {2.0: f"{values[0]} * {values[0]}", 1.0: values[0],
                  3.0: f"{values[0]} * {values[0]} * {values[0]}", 0.5: f"{values[0]}.sqrt()",
                  -1.0: f"{values[0]}.reciprocal()"}
        return simple.get(exponent, f"{values[0]}.pow(V(S({_number(exponent)})))")
    raise Unsupported(f"the loop computes {name}, which the kernel has no rule for")


PREFIX = """
#include <ATen/cpu/vec/vec.h>
#include <cstdint>
#include <limits>
using at::vec::Vectorized;

template <typename S>
struct Argument {
  S* data;
  int64_t step;        // from one step to the next
  int64_t strides[3];  // along the lanes, the fastest last
};

template <typename S, bool whole>
inline Vectorized<S> load(const S* p, bool broadcast, int64_t n) {
  if (broadcast) return Vectorized<S>(*p);
  if constexpr (whole) return Vectorized<S>::loadu(p);
  return Vectorized<S>::loadu(p, n);
}

template <typename S, bool whole>
inline void store(const Vectorized<S>& v, S* p, int64_t n) {
  if constexpr (whole) v.store(p);
  else v.store(p, n);
}
"""

SUFFIX = """
template <typename S>
void run(const int64_t* packed, const int64_t* sizes, int64_t steps, int64_t threads) {
  const auto* a = reinterpret_cast<const Argument<S>*>(packed);
  constexpr int64_t W = Vectorized<S>::size(), LANES = W * BLOCK;
  const int64_t blocks = (sizes[2] + LANES - 1) / LANES, all = sizes[0] * sizes[1] * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1 && all > 1)
  for (int64_t number = 0; number < all; ++number) {
    const int64_t lane = number % blocks * LANES, outer = number / blocks;
    int64_t at[COUNT];
    for (int k = 0; k < COUNT; ++k)
      at[k] = outer / sizes[1] * a[k].strides[0] + outer % sizes[1] * a[k].strides[1];
    const int64_t left = sizes[2] - lane;
    if (left >= LANES) {
      walk<S, BLOCK, true>(a, at, steps, lane, W);
    } else {
      int64_t done = 0;
      for (; done + W <= left; done += W) walk<S, 1, true>(a, at, steps, lane + done, W);
      if (done < left) walk<S, 1, false>(a, at, steps, lane + done, left - done);
    }
  }
}

extern "C" void run_float(const int64_t* a, const int64_t* s, int64_t steps, int64_t threads) {
  run<float>(a, s, steps, threads);
}
extern "C" void run_double(const int64_t* a, const int64_t* s, int64_t steps, int64_t threads) {
  run<double>(a, s, steps, threads);
}
"""
