"""The report in a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..measure import Comparison
from ..report import ModeReport, Report, SignatureReport
from ..verdict import Equal


def as_rich(report: Report) -> RenderableType:
    """The whole report as one rich renderable."""
    parts: list[RenderableType] = []
    for signature in report.signatures:
        parts += _signature(report.model, signature)
    if not parts:
        parts.append(Text("nothing optimized yet: the first call will be"))
    return Group(*parts)


def as_text(report: Report, width: int = 100) -> str:
    """The report without colours."""
    console = Console(file=io.StringIO(), width=width, no_color=True, force_terminal=False)
    console.print(as_rich(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in str(text).splitlines())


def _signature(model: str, signature: SignatureReport) -> Iterator[RenderableType]:
    state = "train" if signature.training else "eval"
    title = Text.assemble((model, "bold"), f"({', '.join(signature.inputs)}), {state} state")
    title.append(f", captured in {signature.capture_seconds:.1f} s", "dim")
    yield title
    if signature.lengths is not None:
        yield Text(signature.lengths, "dim")
    if signature.failure is not None:
        yield Text.assemble(("not captured, the original runs: ", "bold red"), signature.failure)
    for mode in signature.modes:
        yield Text()
        yield Rule(Text(mode.mode, "bold"), align="left", style="dim")
        yield from _mode(mode)


def _mode(mode: ModeReport) -> Iterator[RenderableType]:
    yield headline(mode)
    if mode.rewrites:
        yield Padding(_rewrites(mode), (1, 0, 0, 0))
    if mode.declined:
        yield Padding(Text("not done", "bold"), (1, 0, 0, 0))
        yield Padding(_declined(mode), (0, 0, 0, 2))
    if mode.comparison is not None:
        yield Padding(comparison_table(mode.comparison, bool(mode.rewrites)), (1, 0, 0, 0))
    if isinstance(mode.verdict, Equal):
        yield Padding(
            Text("not proven: " + "; ".join(mode.verdict.unproven), "dim"), (1, 0, 0, 0)
        )


def headline(mode: ModeReport) -> Text:
    """One line: how much faster, and how sure that it computes the same."""
    if not mode.rewrites:
        return Text("the original runs: nothing was worth rewriting", "yellow")
    text = Text()
    if mode.comparison is not None:
        text.append(f"{mode.comparison.gain('looplift'):.2f}x as fast as naive", "bold green")
        text.append(mode.comparison.measured_in("looplift") + ", ")
    before, after = mode.nodes
    text.append(f"{before} → {after} nodes; {mode.verdict}; in {mode.seconds:.1f} s")
    return text


def _rewrites(mode: ModeReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=False)
    table.add_column("rewrite", style="cyan", no_wrap=True)
    table.add_column("where", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("worth", justify="right", no_wrap=True)
    told = set()  # lines, each shown once
    for row in mode.rewrites:
        times = f" ({row.count} times)" if row.count > 1 else ""
        what = Text(f"{row.summary}{times}")
        if row.text and row.where not in told:
            told.add(row.where)
            what.append(f"\n{row.text}", "dim italic")
        worth = f"{row.worth:.2f}x" if row.worth is not None else "–"
        table.add_row(row.pass_name, row.where, what, worth)
    return table


def _declined(mode: ModeReport) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    above = None
    for row in mode.declined:
        reason = Text("as above", "dim") if row.reason == above else row.reason
        table.add_row(row.pass_name, row.where, reason)
        above = row.reason
    return table


def candidate(name: str, kept: bool) -> str:
    """A candidate's name, with a word where it is not what runs."""
    return "looplift, not kept" if name == "looplift" and not kept else name


def comparison_table(comparison: Comparison, kept: bool = True) -> Table:
    """Times, ratios with their spread, and peak memory of all candidates."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column(comparison.mode)
    for column in ("time", "ratio", "spread", "peak memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for timing in comparison.timings:
        memory = size(timing.memory) if timing.memory is not None else "–"
        table.add_row(
            candidate(timing.name, kept), duration(timing.seconds), f"{timing.ratio:.2f}x",
            f"{timing.low:.2f}–{timing.high:.2f}", memory,
        )
    table.caption = (
        f"noise {comparison.noise:.1%} · {comparison.rounds} interleaved rounds · "
        f"{comparison.threads} threads"
    )
    table.caption_justify = "left"
    return table


def comparisons(all_modes: Sequence[Comparison]) -> RenderableType:
    return Group(*(comparison_table(c) for c in all_modes))


def duration(seconds: float) -> str:
    """Seconds with a unit that suits them.

    >>> duration(0.0123)
    '12.3 ms'
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def size(count: int) -> str:
    """Bytes with a unit that suits them.

    >>> size(3_500_000)
    '3.34 MiB'
    """
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} GiB"
