"""`make bench`: every model at its full size, naive, by hand, and by looplift, each compiled too.

One row is one model at one size in one mode, measured in a process of its own, since what others
left on the heap may be in its way: one interleaved run, ratios to naive with their spread, peak
memory, and the time that optimizing took. torch.compile joins where the naive graph is small enough
to compile within the time given (`--compile-nodes`); its compile time is in the data.

This is a benchmark: it asserts nothing. The table goes to the screen, all data to
build/bench.json.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BUILD = Path(__file__).parent.parent / "build"


@dataclass(frozen=True)
class Row:
    """One model at one size; `naive` and `hand`, if there is one, are functions of its module."""

    name: str
    module: str
    naive: str = "model"
    hand: str = "by_hand"
    inputs: str = "example_inputs"
    options: tuple[tuple[str, Any], ...] = ()  # for the models
    input_options: tuple[tuple[str, Any], ...] = ()


BY_HAND = {"Gru": "GruByHand", "Evolution": "EvolutionByHand"}  # of the recurrent models
AT_ONCE = {"Evolution": "EvolutionAtOnce"}  # by PyTorch's associative_scan
LONGER = {"Gru": (512,), "SelectiveScan": (1024,), "Evolution": (4096,)}  # lengths, beside 64, 256
ROWS = (
    Row("eigenstate T=128", "eigenstate", input_options=(("length", 128),)),
    Row("eigenstate T=1024", "eigenstate", input_options=(("length", 1024),)),
    Row("eigenstate, coupling, T=512", "eigenstate", "model_with_coupling",
        "by_hand_with_coupling", input_options=(("length", 512),)),
    Row("alternating patches T=1024", "alternating_patches"),
    Row("alternating patches T=1200", "alternating_patches", input_options=(("length", 1200),)),
    Row("dilated attention 2k", "dilated_attention", input_options=(("length", 2048),)),
    Row("dilated attention 8k", "dilated_attention", input_options=(("length", 8192),)),
    Row("vision transformer 512²", "vision_transformer"),
    Row("text encoder S=50", "vision_transformer", "text_encoder", "text_encoder_by_hand",
        "text_inputs"),
    Row("hyper-connections, mHC", "hyper_connections"),
    Row("hyper-connections, mHC of each token", "hyper_connections", "hyper_connections",
        "hyper_connections_by_hand", options=(("mode", "mhc"), ("dynamic", True))),
    Row("hyper-connections, plain Sinkhorn", "hyper_connections", "hyper_connections",
        "hyper_connections_by_hand", options=(("mode", "mhc"), ("sinkhorn_domain", "plain"))),
    Row("hyper-connections, orthostochastic", "hyper_connections", "hyper_connections",
        "hyper_connections_by_hand", options=(("mode", "orthostochastic"),)),
    Row("hyper-connections, dynamic, 2 fractions", "hyper_connections", "hyper_connections",
        "hyper_connections_by_hand", options=(("mode", "hc"), ("num_fracs", 2))),
    *(Row(f"{name}, T={length}", "looplift.tests.recurrences", name,
          BY_HAND.get(name, ""), input_options=(("length", length),))
      for name in ("Gru", "Lstm", "GatedDeltaRule", "GatedLinearAttention", "Rwkv4", "Rwkv6",
                   "SelectiveScan", "MatrixLstm", "Spiking", "RunningStatistics", "NeuralOde",
                   "Evolution")
      for length in (64, 256, *LONGER.get(name, ()))),
)


def measure(row: Row, size: str, compile_nodes: int, seconds: float, mode: str,
            scans: bool) -> Any:
    """One row's data; run in its own process."""
    import looplift
    import torch
    from looplift.optimizer.measure import call, compare_all, keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
    name = row.module if "." in row.module else f"looplift.models.{row.module}"
    module = importlib.import_module(name)
    naive = getattr(module, row.naive)(size, **dict(row.options))
    hand = getattr(module, row.hand)(size, **dict(row.options)) if row.hand else None
    if hand is not None:
        hand.load_state_dict(naive.state_dict())
    inputs = getattr(module, row.inputs)(size, **dict(row.input_options))
    start = time.perf_counter()
    fast = looplift.apply_passes(naive, inputs, mode=mode)
    data: dict[str, Any] = {"row": asdict(row), "size": size,
                            "optimize_seconds": time.perf_counter() - start,
                            "report": fast.report.to_dict()}
    by_hand = {} if hand is None else {"by hand": hand}
    models: dict[str, Any] = {"naive": naive, **by_hand, "looplift": fast}
    nodes = max((m["nodes"][0] for m in data["report"]["modes"]), default=0)
    compiled: dict[str, Any] = {}
    if nodes <= compile_nodes:
        compiled |= {"naive compiled": torch.compile(naive),
                     **{f"{n} compiled": torch.compile(m) for n, m in by_hand.items()},
                     "looplift compiled": torch.compile(naive, backend="looplift")}
    if scans:
        from looplift.tests.peers import AsScan

        compiled["scan compiled"] = torch.compile(AsScan(naive, inputs))
        if row.naive in AT_ONCE:
            at_once = getattr(module, AT_ONCE[row.naive])(size, **dict(row.options))
            at_once.load_state_dict(naive.state_dict())
            compiled["associative_scan compiled"] = torch.compile(at_once)
    for name, model in compiled.items():
        start = time.perf_counter()
        try:
            call(model, inputs, {}, mode == "training")()
        except Exception as error:  # what PyTorch does not compile is missing in the table
            print(f"  {name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            continue
        data[f"{name} seconds"] = time.perf_counter() - start
        models[name] = model
    [comparison] = compare_all(models, inputs, mode=mode, seconds=seconds)
    return data | {"comparison": asdict(comparison)}


def table(rows: list[Any]) -> Any:
    from looplift.optimizer.render.terminal import duration, size
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "mode", "naive", "by hand", "looplift", "spread", "naive c.", "hand c.",
                   "looplift c.", "scan c.", "assoc. c.", "memory", "noise", "optimize"):
        made.add_column(column, justify="left" if column in ("model", "mode") else "right")
    for data in rows:
        comparison = data["comparison"]
        by_name = {t["name"]: t for t in comparison["timings"]}

        def ratio(name: str, by_name: dict[str, Any] = by_name) -> str:
            return f"{by_name[name]['ratio']:.2f}x" if name in by_name else "–"

        ours, naive = by_name["looplift"], by_name["naive"]
        memory = ours["memory"] / max(naive["memory"], 1)
        made.add_row(
            data["row"]["name"], comparison["mode"], duration(naive["seconds"]),
            ratio("by hand"), ratio("looplift"), f"{ours['low']:.2f}–{ours['high']:.2f}",
            ratio("naive compiled"), ratio("by hand compiled"), ratio("looplift compiled"),
            ratio("scan compiled"), ratio("associative_scan compiled"),
            f"{memory:.2f}x of {size(naive['memory'])}", f"{comparison['noise']:.0%}",
            f"{data['optimize_seconds']:.0f} s",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="only rows whose name contains one of these")
    parser.add_argument("--size", default="full")
    parser.add_argument("--compile-nodes", type=int, default=2500,
                        help="join torch.compile where the naive graph has at most so many nodes")
    parser.add_argument("--scans", action="store_true",
                        help="join PyTorch's scan and associative_scan, compiled")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring, per mode")
    parser.add_argument("--modes", nargs="+", default=["inference", "training"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        row = next(r for r in ROWS if r.name == given.one)
        print(json.dumps(measure(row, given.size, given.compile_nodes, given.seconds,
                                 given.modes[0], given.scans)))
        return
    chosen = [r for r in ROWS if not given.rows or any(g in r.name for g in given.rows)]
    done = []
    for row, mode in itertools.product(chosen, given.modes):
        print(f"… {row.name}, {mode}", file=sys.stderr, flush=True)
        finished = subprocess.run(
            [sys.executable, __file__, "--one", row.name, "--size", given.size, "--compile-nodes",
             str(given.compile_nodes), "--seconds", str(given.seconds), "--modes", mode,
             *["--scans"] * given.scans],
            stdout=subprocess.PIPE, text=True, check=False,
        )
        if finished.returncode:
            print(f"  failed with exit code {finished.returncode}", file=sys.stderr)
            continue
        done.append(json.loads(finished.stdout.splitlines()[-1]))
    BUILD.mkdir(exist_ok=True)
    (BUILD / "bench.json").write_text(json.dumps(done, indent=1))
    from rich.console import Console

    Console(width=160).print(table(done))


if __name__ == "__main__":
    main()
