"""`make corpus`: the tool on real packages' loops, and on loops as people write them.

    python tests/corpus/run.py [NAME ...] [--seconds S] [--minutes M] [--write docs/corpus.md]

A row for each model and length, each in a process of its own: whether it was captured, how many
loops were folded (or left with their reason) of those that its author wrote, the verdict, the
graph's operations before and after, how long optimizing took, the ratios to the naive model in
inference and training of one interleaved run each, and peak memory. All data go to
build/corpus.json. Exits with 1 if a model crashed the tool.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WHOLE_LOOP = re.compile(r"\d+ × \d+ operations → one scan")
LEFT_LOOP = re.compile(r"a loop of \d+ trips: |\d+ times \w+: ")


@dataclass
class Row:
    """What became of one model at one length."""

    name: str
    length: int
    expected: int  # loops that were written
    failure: str = ""  # why it could not be captured, or what crashed
    crashed: bool = False
    folded: int = 0  # loops that became scans, kept or not
    told: list[str] = field(default_factory=list)  # why other loops were left
    rewrites: int = 0  # kept
    verdicts: dict[str, str] = field(default_factory=dict)  # by mode
    declined: list[str] = field(default_factory=list)  # what was built and dropped
    nodes: tuple[int, int] = (0, 0)
    seconds: float = 0.0  # of optimizing, both modes
    ratios: dict[str, float] = field(default_factory=dict)  # by mode, to the naive model
    noise: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


def examined(name: str, length: int, seconds: float = 0.0) -> Row:
    """One row, in this process; ratios if `seconds` are given to measure them in, per mode."""
    import looplift
    import torch
    from looplift.optimizer.capture import capture
    from looplift.optimizer.measure import compare_all
    from looplift.optimizer.pipeline import run_passes
    from looplift.optimizer.refused import CaptureError
    from looplift.passes import ORDER
    from looplift.tests.corpus.models import ENTRIES

    torch.manual_seed(0)
    entry = next(e for e in ENTRIES if e.name == name)
    row = Row(name, length, entry.loops)
    model, inputs = entry.build(), entry.inputs(length)
    inputs = tuple(i.requires_grad_(i.is_floating_point()) for i in inputs)
    try:
        outcome = run_passes(capture(model, inputs), ORDER)
    except CaptureError as error:
        row.failure = str(error).splitlines()[0]
        return row
    row.folded = sum(bool(WHOLE_LOOP.fullmatch(a.summary)) for a in outcome.applied)
    row.told = [f"{s.line}: {s.reason}" for s in outcome.skips
                if s.pass_name == "reroll-loops" and LEFT_LOOP.match(s.reason)]
    start = time.perf_counter()
    fast = looplift.apply_passes(model, inputs, measure=bool(seconds))
    row.seconds = time.perf_counter() - start
    [signature] = fast.report.signatures
    row.failure = signature.failure or ""
    row.crashed = "internal error" in row.failure
    for mode in signature.modes:
        row.verdicts[mode.mode] = str(mode.verdict)
        row.rewrites = max(row.rewrites, sum(r.count for r in mode.rewrites))
        row.nodes = mode.nodes
        row.declined += [f"{mode.mode}, {d.pass_name} at {d.where}: {d.reason}"
                         for d in mode.declined]
        row.crashed |= any("failed to propose" in d.reason for d in mode.declined)
    if row.rewrites and seconds:
        for compared in compare_all({"naive": model, "looplift": fast}, inputs, seconds=seconds):
            naive, ours = compared.timings
            row.ratios[compared.mode] = ours.ratio
            row.noise[compared.mode] = compared.noise
            row.memory[compared.mode] = (ours.memory or 0) / max(naive.memory or 0, 1)
    return row


def measured(name: str, length: int, seconds: float) -> Row:
    """One row; for a process of its own."""
    import torch
    from looplift.optimizer.measure import keep_freed_memory

    keep_freed_memory()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    return examined(name, length, seconds)


def run(name: str, length: int, seconds: float, minutes: float, loops: int) -> Row:
    """`measured` in a process of its own."""
    command = [sys.executable, __file__, "--one", name, str(length), "--seconds", str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return Row(name, length, loops, f"more than {minutes:g} minutes", crashed=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Row(name, length, loops, lines[-1], crashed=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


COLUMNS = ("model", "length", "loops", "rewrites", "verdict", "nodes", "optimize", "inference",
           "training", "memory", "noise")


def cells(row: Row) -> list[str]:
    def both(values: dict[str, float]) -> str:
        return "–".join(dict.fromkeys(f"{v:.2f}x" for v in sorted(values.values())))

    def ratio(mode: str) -> str:
        return f"{row.ratios[mode]:.2f}x" if mode in row.ratios else "–"

    loops = f"{row.folded} of {row.expected}" + (f", {len(row.told)} told" if row.told else "")
    verdict = " / ".join(dict.fromkeys(v.split(" (")[0] for v in row.verdicts.values()))
    return [
        row.name, str(row.length), loops, str(row.rewrites), row.failure or verdict,
        f"{row.nodes[0]} → {row.nodes[1]}", f"{row.seconds:.1f} s", ratio("inference"),
        ratio("training"), both(row.memory), f"{max(row.noise.values(), default=0):.0%}",
    ]


def document(rows: Sequence[Row]) -> str:
    lines = [
        "# Real packages", "",
        "Made by `make corpus`: random weights, small configurations, one thread. Loops: folded "
        "(or left, with a reason) of those written with three trips or more. Ratios are to the "
        "naive model, in one interleaved run; a dash where nothing was rewritten. Peak memory is "
        "that of the naive model's as well, inference and training; the budget leaves peaks of "
        "about 1 MiB out.", "",
        f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows), "", "## Loops that were left", "",
        *dict.fromkeys(f"- {row.name}: {reason}" for row in rows for reason in row.told), "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only models whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, per mode")
    parser.add_argument("--minutes", type=float, default=10.0, help="at most, per row")
    parser.add_argument("--write", type=Path, help="the table, as Markdown")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(asdict(measured(given.one[0], int(given.one[1]), given.seconds))))
        return
    from looplift.tests.corpus.models import ENTRIES
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = []
    for entry in ENTRIES:
        if given.names and not any(n in entry.name for n in given.names):
            continue
        for length in entry.lengths:
            print(f"… {entry.name}, {length}", file=sys.stderr, flush=True)
            rows.append(run(entry.name, length, given.seconds, given.minutes, entry.loops))
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=160).print(table)
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "corpus.json").write_text(json.dumps([asdict(r) for r in rows], indent=1))
    if given.write:
        given.write.write_text(document(rows))
    sys.exit(any(row.crashed for row in rows))


if __name__ == "__main__":
    main()
