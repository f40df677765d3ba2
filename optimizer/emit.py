"""A graph → readable Python source, and the function that this source defines.

What is shown is what runs: the source uses torch's own functions and operators, which also
cost less per call than operator overloads. Scans that were lowered appear as `for` loops.
"""

from __future__ import annotations

import builtins
import keyword
import linecache
import math
import operator
import re
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import count
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from .builder import output_node, placeholders
from .facts import (
    aten,
    body_of,
    bytes_of,
    has_body,
    is_kernel,
    is_view,
    only_last,
    shape,
    source_line,
    stacked_as,
)
from .formula import Symbolic, SymbolicFloat
from .lines import folded, from_loop, front_axis, is_piece, is_unpacked, last_uses, only_counts

INDENT = "    "
ROOT = __name__.partition(".")[0]  # the package, whose `fused_scan` a source may call
LARGE = 1 << 16  # bytes: when locals of so much are used no more, they are deleted

INFIX = {
    aten.add.Tensor: "+", aten.sub.Tensor: "-", aten.mul.Tensor: "*", aten.div.Tensor: "/",
    aten.matmul.default: "@", aten.pow.Tensor_Scalar: "**", aten.lt.Tensor: "<",
    aten.gt.Tensor: ">", aten.le.Tensor: "<=", aten.ge.Tensor: ">=",
}
METHODS = {
    aten.reshape.default: "reshape", aten.permute.default: "permute", aten.expand.default: "expand",
    aten.unsqueeze.default: "unsqueeze", aten.select.int: "select", aten.unfold.default: "unfold",
    aten.contiguous.default: "contiguous", aten.clone.default: "clone",
    aten.detach.default: "detach", aten.new_zeros.default: "new_zeros",
    aten.squeeze.dim: "squeeze", aten.split_with_sizes.default: "split", aten.neg.default: "neg",
}
FUNCTIONAL = {
    aten.linear.default: "linear", aten.gelu.default: "gelu", aten.silu.default: "silu",
    aten.scaled_dot_product_attention.default: "scaled_dot_product_attention",
}
TORCH_FUNCTIONS = {
    aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.exp.default,
    aten.log.default, aten.sigmoid.default, aten.tanh.default, aten.softmax.int,
    aten.log_softmax.int, aten.logsumexp.default, aten.amax.default, aten.amin.default,
    aten.stack.default, aten.cat.default, aten.where.self, aten.maximum.default,
    aten.minimum.default, aten.sqrt.default, aten.rsqrt.default, aten.relu.default,
    aten.abs.default, aten.sin.default, aten.cos.default, aten.cumsum.default, aten.bmm.default,
    aten.addmm.default, aten.einsum.default, aten.layer_norm.default, aten.flip.default,
    aten.slice_scatter.default, aten.select_scatter.default, aten.index_select.default,
    aten.embedding.default, aten.zeros_like.default, aten.full_like.default, aten.rsub.Scalar,
    aten.mm.default, aten.baddbmm.default, aten.clamp.default, aten.reciprocal.default,
    aten.addcmul.default, aten.full.default, aten.zeros.default, aten.ones.default,
    aten.ones_like.default,
}


def emit(graph_module: GraphModule, name: str = "forward") -> str:
    """Python source of a function that computes what `graph_module` does.

    Its arguments are the graph's placeholders (parameters under their own names first); its
    constants and autocast calls are global names, bound by `compiled`.
    """
    return _Source(graph_module).function(name)


def compiled(graph_module: GraphModule) -> tuple[Callable[..., Any], str]:
    """The function that `emit`'s source defines, and the source; tracebacks show its lines."""
    writer = _Source(graph_module)
    source = writer.function("forward")
    filename = f"<looplift {next(_NUMBERS)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope: dict[str, Any] = {"torch": torch, "inf": float("inf"), "nan": float("nan"),
                             **writer.globals}
    exec(compile(source, filename, "exec"), scope)
    return cast(Callable[..., Any], scope["forward"]), source


def sourced(graph_module: GraphModule, name: str) -> tuple[str, list[str]]:
    """The source of a function without comments, and the global names that it needs; the same
    whatever the sizes of its tensors."""
    writer = _Source(graph_module, large=math.inf)
    lines = writer.function(name).splitlines(True)
    return "".join(line for line in lines if not line.lstrip().startswith("#")), [*writer.globals]


_NUMBERS = count()


class _Source:
    """Writes one function, loops of its scans included; it deletes what is dead where that is
    `large`, in bytes."""

    def __init__(self, graph_module: GraphModule, large: float = LARGE) -> None:
        self.graph_module, self.large = graph_module, large
        self.names: dict[Node, str] = {}
        self.taken: set[str] = {"torch", "looplift", "inf", "nan", "forward", *dir(builtins)}
        self.globals: dict[str, Any] = {}
        self.lines: list[str] = []
        self.at: str = ""
        self.dead: list[Node] = []  # used no more, not deleted yet
        self.deleted: set[Node] = set()

    def function(self, name: str) -> str:
        lengths = self.graph_module.meta.get("lengths", {})
        self.taken |= set(lengths)
        heads = [self._name(n) for n in placeholders(self.graph_module)]
        self.lines += [f"{INDENT}{name} = {heads[place]}.shape[{axis}]"
                       for name, (place, axis) in lengths.items()]
        self._block(self.graph_module, INDENT)
        self.lines.append(f"{INDENT}return {self._text(output_node(self.graph_module).args[0])}")
        signature = _wrapped(f"def {name}(", heads, "):")
        return "\n".join([signature, *self.lines]) + "\n"

    def _name(self, node: Node) -> str:
        if node not in self.names:
            base = re.sub(r"_default|_tensor|_int|_dim_int_list|_scalar", "", node.name)
            base = re.sub(r"_\d+$", "", base) if node.op != "placeholder" else node.name
            base = "piece" if is_piece(node) else base
            if keyword.iskeyword(base) or not base.isidentifier():
                base = f"{base}_"
            self.names[node] = self._fresh(base)
        return self.names[node]

    def _block(self, graph_module: GraphModule, indent: str) -> None:
        last = last_uses(graph_module)
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                held = _attribute(graph_module, str(node.target))
                if table := graph_module.meta.get("tables", {}).get(id(held)):
                    self.lines.append(f"{indent}{self._name(node)} = {table.source}")
                elif isinstance(held, torch.Tensor):
                    self.globals[self._name(node)] = held
            elif node.op == "call_function" and not folded(node):
                self._where(node, indent)
                self.dead += last.get(node, [])
                if has_body(node):
                    self._loop(node, indent)
                elif is_kernel(node):
                    self._kernel(node, indent)
                elif not from_loop(node) and not is_piece(node):
                    self.lines.append(f"{indent}{self._target(node)} = {self._expression(node)}")
                if self._much_is_dead():
                    self._delete(self.dead, indent)

    def _where(self, node: Node, indent: str) -> None:
        line = source_line(node)
        if line is not None and str(line) != self.at:
            self.at = str(line)
            self.lines.append(f"{indent}# {line}  {line.text}".rstrip())

    def _much_is_dead(self) -> bool:
        return sum(map(bytes_of, self.dead)) >= self.large

    def _delete(self, nodes: Sequence[Node], indent: str) -> None:
        gone = [n for n in dict.fromkeys(nodes) if n in self.names and n not in self.deleted]
        if names := list(map(self._name, gone)):
            self.lines.append(f"{indent}del {', '.join(names)}")
        self.deleted.update(nodes)
        self.dead.clear()

    def _loop(self, node: Node, indent: str) -> None:
        """A lowered scan as a `for` loop over unbound slices."""
        body = body_of(node)
        for inner in body.graph.nodes:  # scans may share a body; each loop has names of its own
            self.names.pop(inner, None)
            self.deleted.discard(inner)
        carries, slices, fixed = (cast(list[Node], node.args[i]) for i in (1, 2, 3))
        heads = placeholders(body)
        held, read = len(carries), len(slices)
        outputs = cast(tuple[Node, ...], output_node(body).args[0])
        users = {cast(int, u.args[1]): u for u in node.users}
        for head, outer in zip(heads[held + read :], fixed, strict=True):
            self.names[head] = self._name(outer)
        for head, start in zip(heads[:held], carries, strict=True):
            self.lines.append(f"{indent}{self._name(head)} = {self._text(start)}")
        last = {k: self._name(users[k]) for k in only_last(node) if k in users}
        kept = [k for k in range(held, len(outputs)) if k in users and k not in last]
        columns = {k: self._fresh("outputs") for k in kept}
        for name in columns.values():
            self.lines.append(f"{indent}{name} = []")
        steps = [self._name(head) for head in heads[held : held + read]]
        sources = [self._unbound(s) for s in slices]
        if read == 1 and only_counts(slices[0]):
            self.lines.append(f"{indent}for _ in range({self._text(slices[0].args[0])}):")
        elif read == 1:
            self.lines.append(f"{indent}for {steps[0]} in {sources[0]}:")
        else:
            self.lines.append(_wrapped(f"{indent}for {', '.join(steps)} in zip(", sources, "):"))
        inner = indent + INDENT
        dead, self.dead = self.dead, []
        self._block(body, inner)
        self.dead = dead
        for k in kept:
            self.lines.append(f"{inner}{columns[k]}.append({self._text(outputs[k])})")
        for k, name in last.items():
            self.lines.append(f"{inner}{name} = {self._text(outputs[k])}")
        pairs = zip(heads[:held], outputs, strict=False)
        moved = [(self._name(h), self._text(o)) for h, o in pairs if h is not o]
        if moved:
            left, right = (", ".join(side) for side in zip(*moved, strict=True))
            self.lines.append(f"{inner}{left} = {right}")
        # what the last step made is what the carries hold
        self.dead += [o for o in dict.fromkeys(outputs) if o.op == "call_function"]
        if self._much_is_dead():
            # before the results are stacked, and with the last step's views, which hold memory
            lanes = [] if only_counts(slices[0]) else heads[held : held + read]
            lanes += [n for n in body.graph.nodes if is_view(n) and n.args[0] in lanes]
            self._delete([*lanes, *self.dead], indent)
        for k, user in sorted(users.items()):
            if k < held:
                self.names[user] = self._name(heads[k])
            if k < held or k in last:
                continue
            target, axis = stacked_as(user)
            self.lines.append(
                f"{indent}{self._name(target)} = torch.stack({columns[k]}, {axis})"
            )
            self.lines.append(f"{indent}del {columns[k]}")

    def _kernel(self, node: Node, indent: str) -> None:
        """A fused scan, its step written out."""
        step = self._fresh("step")
        text = textwrap.indent(str(node.args[0]), indent + INDENT)
        self.lines.append(f'{indent}{step} = """\n{text}{indent}"""')
        rest = [self._text(a) for a in node.args[1:]]
        self.globals["looplift"] = import_module(ROOT)
        called = f"{indent}{self._name(node)} = looplift.fused_scan("
        self.lines.append(_wrapped(called, [step, *rest], ")"))

    def _target(self, node: Node) -> str:
        """What an assignment of `node` binds: of a split, its pieces."""
        if not is_unpacked(node):
            return self._name(node)
        pieces = sorted(node.users, key=lambda u: cast(int, u.args[1]))
        names = ", ".join(map(self._name, pieces))
        return names if len(pieces) > 1 else f"[{names}]"

    def _fresh(self, base: str) -> str:
        name, number = base, 0
        while name in self.taken:
            number += 1
            name = f"{base}_{number}"
        self.taken.add(name)
        return name

    def _unbound(self, node: Node) -> str:
        axis = front_axis(node)
        if axis is not None and folded(node):
            return f"{self._text(node.args[0])}.unbind({axis})"
        return f"{self._text(node)}.unbind(0)"

    def _text(self, leaf: Any) -> str:
        match leaf:
            case Node():
                if folded(leaf):
                    return self._expression(leaf)
                return self._name(leaf)
            case list() | tuple():
                inner = ", ".join(self._text(item) for item in leaf)
                return f"[{inner}]"
            case torch.device():
                return f"torch.device({str(leaf)!r})"
            case torch.Size():
                return self._text(list(leaf))
            case _:
                return repr(leaf)

    def _expression(self, node: Node) -> str:
        target = node.target
        args = [self._text(a) for a in node.args]
        named = [f"{k}={self._text(v)}" for k, v in node.kwargs.items()]
        if target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        if target in INFIX and not named and len(args) == 2:
            left, right = map(_operand, node.args, args)
            return f"{left} {INFIX[target]} {right}"
        if target is aten.slice.Tensor and len(args) == 5:
            return f"{args[0]}[{_slice_text(node)}]"
        if target in METHODS and args:
            return f"{args[0]}.{METHODS[target]}({', '.join(args[1:] + named)})"
        return f"{self._callee(target)}({', '.join(args + named)})"

    def _callee(self, target: Any) -> str:
        if target in FUNCTIONAL:
            return f"torch.nn.functional.{FUNCTIONAL[target]}"
        if target in TORCH_FUNCTIONS:
            return f"torch.{target._opname}"
        if isinstance(target, torch._ops.OpOverload):
            space, _, name = target._schema.name.partition("::")
            return f"torch.ops.{space}.{name}.{target._overloadname}"
        name = f"call{getattr(target, '__name__', '')}"  # such as call_enter_autocast
        self.taken.add(name)
        self.globals[name] = target
        return name


def _operand(leaf: Any, text: str) -> str:
    negative = isinstance(leaf, (int, float)) and leaf < 0
    return f"({text})" if negative or isinstance(leaf, (Symbolic, SymbolicFloat)) else text


def _slice_text(node: Node) -> str:
    _, axis, start, stop, step = cast(tuple[Node, int, int, int, int], node.args)
    source = cast(Node, node.args[0])
    begin = str(start) if start or isinstance(start, Symbolic) else ""
    end = str(stop) if stop < shape(source)[axis] or isinstance(stop, Symbolic) else ""
    stride = f":{step}" if step != 1 else ""
    return f"{':, ' * axis}{begin}:{end}{stride}"


def _wrapped(opening: str, items: Sequence[str], closing: str) -> str:
    """`opening` items `closing`, one item to a line if they don't fit on one."""
    flat = f"{opening}{', '.join(items)}{closing}"
    if len(flat) <= 100:
        return flat
    indent = " " * (len(opening) - len(opening.lstrip()) + 8)
    body = "".join(f"\n{indent}{item}," for item in items)
    return f"{opening}{body}\n{indent[8:]}{closing}"


def _attribute(graph_module: GraphModule, path: str) -> Any:
    found: Any = graph_module
    for part in path.split("."):
        found = getattr(found, part)
    return found
