"""Calls of an optimized model run side by side; what swaps the model's tensors runs alone."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import nn

TRACING = threading.RLock()  # PyTorch keeps the modes of a trace in one stack for all threads
_of_models: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()
_finding = threading.Lock()


class Turns:
    """Two context managers: `shared`, for calls, and `alone`, while none of another thread runs.

    Both may be entered again by a thread that is in one of them. A call that nobody keeps out
    takes no lock: it notes itself, then looks; who wants to be alone says so, then looks.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside: dict[int, int] = {}  # how deep each thread is in `shared`
        self.owner: int | None = None
        self.depth = self.waiting = 0
        self.shared, self.alone = _Shared(self), _Alone(self)

    @classmethod
    def of(cls, model: nn.Module) -> Turns:
        """Those of `model`, whoever optimizes it."""
        with _finding:
            return _of_models.setdefault(model, cls())

    def others(self, me: int) -> bool:
        return any(depth and thread != me for thread, depth in list(self.inside.items()))


class _Shared:
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __enter__(self) -> None:
        turns, me = self.turns, threading.get_ident()
        depth = turns.inside.get(me, 0)
        turns.inside[me] = depth + 1
        if not depth and turns.owner != me and (turns.owner is not None or turns.waiting):
            with turns.changed:
                turns.inside[me] = 0
                turns.changed.notify_all()
                turns.changed.wait_for(lambda: turns.owner is None and not turns.waiting)
                turns.inside[me] = 1

    def __exit__(self, *raised: Any) -> None:
        turns, me = self.turns, threading.get_ident()
        turns.inside[me] -= 1
        if not turns.inside[me]:
            del turns.inside[me]
            if turns.waiting:
                with turns.changed:
                    turns.changed.notify_all()


class _Alone:
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __enter__(self) -> None:
        turns, me = self.turns, threading.get_ident()
        with turns.changed:
            turns.waiting += 1
            try:
                turns.changed.wait_for(
                    lambda: turns.owner in (None, me) and not turns.others(me))
            finally:
                turns.waiting -= 1
                turns.changed.notify_all()
            turns.owner, turns.depth = me, turns.depth + 1

    def __exit__(self, *raised: Any) -> None:
        turns = self.turns
        with turns.changed:
            turns.depth -= 1
            if not turns.depth:
                turns.owner = None
                turns.changed.notify_all()
