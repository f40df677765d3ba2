"""What was done to a model, as plain data."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import torch

from .measure import Comparison
from .select import Declined, Options, Selection
from .verdict import Differs, Equal, NotVerified, Verdict

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RewriteRow:
    """The rewrites of one pass at one line that say the same, counted."""

    pass_name: str
    where: str
    text: str
    summary: str
    count: int
    verdict: str
    worth: float | None


@dataclass(frozen=True)
class ModeReport:
    """One mode of one signature."""

    mode: str
    rewrites: tuple[RewriteRow, ...]
    declined: tuple[Declined, ...]
    verdict: Verdict
    comparison: Comparison | None
    nodes: tuple[int, int]
    seconds: float


@dataclass(frozen=True)
class SignatureReport:
    """One call signature: its inputs, how capture went, and each mode's outcome."""

    inputs: tuple[str, ...]
    training: bool  # the model's own train/eval state
    capture_seconds: float
    failure: str | None = None
    modes: tuple[ModeReport, ...] = ()
    lengths: str | None = None  # at which the program is known, or why at this one alone


@dataclass
class Report:
    """The account of everything that was optimized, kept out, and why.

    Prints itself in a terminal and in a notebook; `to_dict` gives JSON-ready data with a
    `schema_version`.
    """

    model: str
    options: dict[str, Any]
    signatures: list[SignatureReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        modes = [(s, m) for s in self.signatures for m in s.modes]
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "machine": {
                "processor": platform.machine(), "threads": torch.get_num_threads(),
                "cuda": torch.cuda.is_available(),
            },
            "seed": self.options.get("seed"),
            "options": self.options,
            "captures": [
                {"inputs": list(s.inputs), "training": s.training, "failure": s.failure,
                 "seconds": s.capture_seconds, "lengths": s.lengths}
                for s in self.signatures
            ],
            "rewrites": [{"mode": m.mode, "inputs": list(s.inputs), **asdict(r)}
                         for s, m in modes for r in m.rewrites],
            "declined": [{"mode": m.mode, "inputs": list(s.inputs), **asdict(d)}
                         for s, m in modes for d in m.declined],
            "modes": [
                {"mode": m.mode, "inputs": list(s.inputs), "verdict": verdict_data(m.verdict),
                 "nodes": list(m.nodes), "seconds": m.seconds,
                 "comparison": asdict(m.comparison) if m.comparison else None}
                for s, m in modes
            ],
        }

    def __str__(self) -> str:
        from .render.terminal import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from .render.terminal import as_rich

        return as_rich(self)

    def _repr_html_(self) -> str:
        from .render.html import as_html

        return as_html(self)


def verdict_data(verdict: Verdict) -> dict[str, Any]:
    kind = {Equal: "equal", Differs: "differs", NotVerified: "not verified"}[type(verdict)]
    assert is_dataclass(verdict)
    return {"kind": kind, "text": str(verdict), **asdict(verdict)}


def mode_report(selection: Selection) -> ModeReport:
    """The account of one selection, equal rewrites counted."""
    counted: dict[tuple[str, str, str], list[Any]] = {}
    for kept in selection.kept:
        applied = kept.applied
        key = (applied.pass_name, str(applied.line or "?"), applied.summary)
        counted.setdefault(key, []).append(kept)
    rows = tuple(
        RewriteRow(
            name, where, same[0].applied.line.text if same[0].applied.line else "", summary,
            len(same), str(same[0].verdict), same[0].worth,
        )
        for (name, where, summary), same in counted.items()
    )
    return ModeReport(selection.mode, rows, tuple(dict.fromkeys(selection.declined)),
                      selection.verdict, selection.comparison, selection.nodes, selection.seconds)


def option_data(options: Options) -> dict[str, Any]:
    return {
        "passes": [p.name for p in options.passes], "mode": options.mode,
        "allow_approximate": options.allow_approximate,
        "allow_random_reorder": options.allow_random_reorder, "verify": options.verify,
        "measure": options.measure, "tolerance": options.tolerance,
        "memory_budget": options.memory_budget, "seed": options.seed,
    }


def described_inputs(leaves: Sequence[Any]) -> tuple[str, ...]:
    """`float32[4, 128]` for tensors, the value itself for everything else."""
    return tuple(
        f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in leaves
    )
