"""`make opinfo`: every operator of PyTorch's own database, batched over steps against looped.

For each operator and each of its float32 and float64 sample inputs, a step is captured, put
into a scan of three steps (once with only the first tensor read at each step, once with all of
them), and batched as `vectorize-patches` does. What comes out must equal the operator called
three times, in values and in float64's gradients. The table counts samples: batched, left in a
loop because neither a rule nor torch.vmap covers an operation, not captured, and wrong. No
operator may be wrong.

    python tests/opinfo.py [NAME ...] [--samples N] [--write docs/opinfo.md]
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from looplift.optimizer.apply import tidy
from looplift.optimizer.builder import Builder, output_node, placeholders
from looplift.optimizer.capture import Capture, capture
from looplift.optimizer.contract import Seen, results
from looplift.optimizer.emit import compiled
from looplift.optimizer.facts import Facts, body_of, is_random, is_scan
from looplift.optimizer.pipeline import run_passes
from looplift.optimizer.refused import CaptureError
from looplift.passes.lower_scans import LowerScans
from looplift.passes.vectorize_patches import VectorizePatches
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

STEPS = (1.0, 0.5, 0.75)  # by which the float values of the three steps are scaled
DTYPES = (torch.float32, torch.float64)


@dataclass
class Tally:
    """What became of one operator's samples."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, outcome: str, reason: str = "") -> None:
        self.counts[outcome] += 1
        if reason:
            self.reasons[f"{outcome}: {reason}"] += 1


class Step(nn.Module):
    """One call of an operator; its tensors are the inputs, everything else is fixed."""

    def __init__(self, operator: Any, sample: Any) -> None:
        super().__init__()
        self.operator = operator
        self.leaves, self.spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.leaves[i].detach() for i in self.places]

    def forward(self, *tensors: Tensor) -> Any:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        first, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.operator(first, *args, **kwargs)


def lanes(step: Step, varied: Sequence[int]) -> list[list[Tensor]] | None:
    """The inputs of each step, different in `varied`; None if the operator takes none such."""
    steps = []
    for number, scale in enumerate(STEPS):
        tensors = step.tensors
        for k in varied:
            one = tensors[k]
            if one.is_floating_point() or one.is_complex():
                tensors[k] = one * scale
            elif one.dim():
                tensors[k] = one.roll(number, -1)
        steps.append(tensors)
    try:
        for tensors in steps:
            step(*tensors)
    except Exception:
        return None
    return steps


def in_scan(captured: Capture, steps: list[list[Tensor]], varied: Sequence[int]) -> GraphModule:
    """A graph on the steps' stacked inputs (and the fixed ones) that scans the captured step."""
    mode, graph = captured.fake_mode, Graph()
    outer = GraphModule(nn.Module(), graph)
    given = []
    for k, tensor in enumerate(steps[0]):
        like = torch.stack([s[k] for s in steps]) if k in varied else tensor
        node = graph.placeholder(f"input_{k}")
        node.meta["val"] = mode.from_tensor(like, static_shapes=True)
        given.append(node)
    build = Builder(outer, graph.output([]), mode)
    inner = captured.graph_module
    heads, body, moved = placeholders(inner), Graph(), {}
    fixed = [k for k in range(len(heads)) if k not in varied]
    for kind, places in (("slice", varied), ("invariant", fixed)):
        for number, k in enumerate(places):
            moved[heads[k]] = body.placeholder(f"{kind}_{number}")
            moved[heads[k]].meta.update(heads[k].meta)
    for node in inner.graph.nodes:
        if node.op != "placeholder":
            moved[node] = body.node_copy(node, moved.__getitem__)
    scanned = GraphModule(inner, body)
    results = build.scan(scanned, [], [given[k] for k in varied], [given[k] for k in fixed])
    output_node(outer).args = (results,)
    tidy(outer, mode)
    return outer


def judged(tally: Tally, operator: Any, sample: Any, dtype: torch.dtype) -> None:
    """Try one sample, with one and with all tensors read at each step."""
    step = Step(operator.op, sample)
    if any(t.layout is not torch.strided for t in step.tensors) or not step.places:
        tally.add("not captured", "no dense tensor")
        return
    try:
        captured = capture(step, wanting_gradients(step.tensors))
    except CaptureError as error:
        tally.add("not captured", str(error).split(":")[0].split("\n")[0][:60])
        return
    except Exception:
        tally.add("not captured", "the sample raises an error by itself")
        return
    if captured.written or captured.constants or captured.state:
        tally.add("not captured", "it writes to its inputs, or returns no tensors")
        return
    everything = list(range(len(step.places)))
    for varied in dict.fromkeys(((0,), tuple(everything))):
        if any(is_random(n) for n in captured.graph_module.graph.nodes):
            tally.add("in a loop", "random")
            continue
        if "empty" in operator.name:
            tally.add("not captured", "its values are whatever was in memory")
            continue
        steps = lanes(step, varied)
        if steps is None:
            tally.add("not captured", "other values are no valid input")
            continue
        outcome, reason = batched(captured, step, steps, varied, dtype)
        tally.add(outcome, reason if outcome != "wrong" else "")
        if outcome == "wrong":
            shapes = [tuple(t.shape) for t in step.tensors]
            rest = pytree.tree_map(lambda x: "·" if isinstance(x, Tensor) else x,
                                   (sample.args, sample.kwargs))
            tally.wrong.append(f"{dtype} {shapes} {rest} {varied}: {reason}")


def batched(
    captured: Capture, step: Step, steps: list[list[Tensor]], varied: tuple[int, ...],
    dtype: torch.dtype,
) -> tuple[str, str]:
    """What became of one sample, and why."""
    graph_module = in_scan(captured, steps, varied)
    anyhow = (Seen(),) * len(results(graph_module))  # no memory layout is to be given back
    scanned = replace(captured, graph_module=graph_module, seen=anyhow, begun={})
    outcome = run_passes(scanned, [VectorizePatches()])
    left = [n for n in outcome.graph_module.graph.nodes if is_scan(n)]
    final = replace(scanned, graph_module=outcome.graph_module, begun={})
    run, _ = compiled(run_passes(final, [LowerScans()]).graph_module)
    inputs = [torch.stack([s[k] for s in steps]) if k in varied else steps[0][k]
              for k in range(len(steps[0]))]
    got = run(*inputs)
    for number, tensors in enumerate(steps):
        want, _ = pytree.tree_flatten(step(*tensors))
        for place, (one, other) in enumerate(zip(want, got, strict=True)):
            if one.layout is not torch.strided:
                return "not captured", "no dense tensor"
            try:
                torch.testing.assert_close(other[number], one, equal_nan=True, rtol=0,
                                           atol=tolerance(one))
            except AssertionError as error:
                if dtype is torch.float64 or not as_accurate(
                    step, tensors, place, one, other[number]
                ):
                    return "wrong", " ".join(str(error).split())[:200]
    if left:
        return "in a loop", ", ".join(sorted({
            str(n.target) for scan in left for n in Facts(body_of(scan)).operations
            if not str(n.target).startswith("<")}))
    if dtype is torch.float64 and (reason := other_gradients(run, step, inputs, varied)):
        return "wrong", reason
    return "batched", ""


def wanting_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors]


def other_gradients(
    run: Callable[..., list[Any]], step: Step, inputs: list[Tensor], varied: tuple[int, ...]
) -> str:
    """How the gradients of the batched operator differ from those of the three calls."""
    leaves = wanting_gradients(inputs)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def of(results: list[Tensor]) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(1)
        loss: Any = 0.0
        for r in results:
            weight = torch.rand(r.shape, generator=generator, dtype=torch.float64)
            r = torch.view_as_real(r.resolve_conj()).sum(-1) if r.is_complex() else r
            loss = loss + (r * weight).sum()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return [None for _ in wanted]
        return list(torch.autograd.grad(loss, wanted, allow_unused=True))

    try:
        calls = [pytree.tree_leaves(step(*(
            leaf[k] if i in varied else leaf for i, leaf in enumerate(leaves)
        ))) for k in range(len(STEPS))]
        kept = [i for i, r in enumerate(calls[0]) if r.requires_grad]
        want = of([torch.stack([call[i] for call in calls]) for i in kept])
    except Exception:
        return ""  # the operator has no gradients
    try:
        results = run(*leaves)
        got = of([results[i] for i in kept])
    except Exception as error:
        return f"its backward raises {type(error).__name__}: {str(error)[:80]}"
    for one, other in zip(want, got, strict=True):
        one = torch.zeros_like(other) if one is None and other is not None else one
        other = torch.zeros_like(one) if other is None and one is not None else other
        if one is not None and other is not None and not torch.allclose(
            one, other, rtol=0, atol=1e2 * tolerance(one), equal_nan=True
        ):
            return f"another gradient, by {float((one - other).abs().max()):.1e}"
    return ""


def as_accurate(step: Step, tensors: list[Tensor], place: int, one: Tensor, other: Tensor) -> bool:
    """Whether `other` is at most four times as far from float64's result as `one` is."""
    exact = step(*[t.double() if t.dtype is torch.float32 else t for t in tensors])
    reference = pytree.tree_leaves(exact)[place]
    errors = [float((r - reference).abs().max()) for r in (one, other)]
    return errors[1] <= 4 * errors[0]


def tolerance(want: Tensor) -> float:
    """Of the largest value: batched matrix products add in another order."""
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0
    finite = want[want.isfinite()].abs()
    largest = max(float(finite.max()) if finite.numel() else 0.0, 1.0)
    return largest * max(64 * torch.finfo(want.dtype).eps, 1e-10)


def operators(names: Sequence[str]) -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return [o for o in op_db if not names or o.name in names]


def samples(operator: Any, most: int) -> Iterator[tuple[torch.dtype, Any]]:
    """Its sample inputs on the CPU in both dtypes, `most` of each at most."""
    for dtype in DTYPES:
        if dtype in operator.supported_dtypes("cpu"):
            found = operator.sample_inputs("cpu", dtype, requires_grad=False)
            for number, sample in enumerate(found):
                if number >= most:
                    break
                yield dtype, sample


def examined(job: tuple[int, int, list[str]]) -> Tally:
    """One operator's tally; run in a process of its own."""
    index, most, names = job
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    operator = operators(names)[index]
    tally = Tally(" ".join(filter(None, (operator.name, operator.variant_test_name))))
    for dtype, sample in samples(operator, most):
        torch.manual_seed(0)
        try:
            judged(tally, operator, sample, dtype)
        except Exception as error:
            tally.add("wrong")
            tally.wrong.append(f"{dtype}: {type(error).__name__}: {str(error)[:200]}")
    return tally


def table(tallies: Sequence[Tally], most: int) -> str:
    """The summary and what was not batched, as Markdown."""
    total: Counter[str] = Counter()
    why: dict[str, list[str]] = defaultdict(list)
    kinds: Counter[str] = Counter()
    for tally in tallies:
        total += tally.counts
        kinds["every sample batched" if set(tally.counts) == {"batched"} else
              "no sample" if not tally.counts else
              "wrong" if tally.wrong else
              "some samples batched" if tally.counts["batched"] else "none batched"] += 1
        for reason in tally.reasons:
            why[reason].append(tally.name)
    lines = ["# PyTorch's operators, batched over steps", "",
             "Written by `make opinfo`: every operator of PyTorch's own test database, float32 and "
             "float64,", "its first tensor or all of its tensors read at each step of a loop of "
             "three;", f"at most {most:,} samples of each operator and dtype.", "", "| samples | |",
             "|---|---|"]
    lines += [f"| {kind} | {count:,} |" for kind, count in total.most_common()]
    lines += ["", "| operators | |", "|---|---|"]
    lines += [f"| {kind} | {count} |" for kind, count in kinds.most_common()]
    lines += ["", "## What was not batched, and why", "", "| why | operators |", "|---|---|"]
    for reason, names in sorted(why.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = ", ".join(f"`{n}`" for n in names[:12])
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        lines.append(f"| {reason.replace('|', '/')} | {shown}{more} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these operators")
    parser.add_argument("--samples", type=int, default=1000, help="of each operator and dtype")
    parser.add_argument("--write", type=Path, help="where the table goes, besides the screen")
    given = parser.parse_args()
    jobs = [(i, given.samples, given.names) for i in range(len(operators(given.names)))]
    tallies = []
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=50) as pool:
        for tally in pool.imap(examined, jobs):
            tallies.append(tally)
            print(f"{len(tallies):4}/{len(jobs)} {tally.name}: {dict(tally.counts)}",
                  file=sys.stderr, flush=True)
            for line in tally.wrong[:5]:
                print(f"       WRONG {line}", file=sys.stderr, flush=True)
    text = table(tallies, given.samples)
    print(text)
    if given.write:
        given.write.write_text(text)
    if any(t.wrong for t in tallies):
        sys.exit(1)


if __name__ == "__main__":
    main()
