"""The whole vocabulary of a pass: it reads facts and proposes rewrites, or says why not.

A pass never changes a graph. It yields `Rewrite`s, whose `build` is called by the applier,
and `Skip`s, for the places where its anchor operation matched and a condition did not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch.fx import Node

from .facts import Facts, Line

if TYPE_CHECKING:
    from .builder import Builder


@dataclass(frozen=True)
class Rewrite:
    """One proposed replacement of values in a graph.

    `build` is given a builder that inserts right before `at`; it returns one node for each
    node of `replaces`, of the same shape, dtype and device.
    """

    pass_name: str
    summary: str
    line: Line | None
    at: Node
    replaces: tuple[Node, ...]
    build: Callable[[Builder], Sequence[Node]]
    approximate: bool = False
    reorders_random: bool = False
    supersedes: tuple[Node, ...] = ()  # random operations that the new nodes run instead

    @property
    def group(self) -> tuple[str, str]:
        """The rewrites kept or dropped together: one pass at one line of the user's file."""
        return (self.pass_name, str(self.line or "?"))


@dataclass(frozen=True)
class Skip:
    """A place where a pass could have rewritten, and the condition that was missing."""

    pass_name: str
    reason: str
    line: Line | None = None


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass; its fields are its options, its docstring is its specification."""

    @property
    def name(self) -> str:
        """kebab-case name, a verb phrase."""
        ...

    def propose(self, facts: Facts) -> Iterable[Rewrite | Skip]:
        """The rewrites possible in this graph, none overlapping another."""
        ...
