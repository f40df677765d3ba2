"""looplift: naive PyTorch models, rewritten into fast ones; verified, and measured.

>>> import looplift                                             # doctest: +SKIP
>>> fast = looplift.apply_passes(model, (x,))                   # doctest: +SKIP
>>> print(fast.report)                                          # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import apply_passes as apply_passes
    from .api import compare as compare
    from .api import verify as verify
    from .optimizer.fused import fused_scan as fused_scan
    from .optimizer.module import OptimizedModule as OptimizedModule
    from .optimizer.verdict import Differs as Differs
    from .optimizer.verdict import Equal as Equal

__version__ = "0.1.0"
__all__ = ["Differs", "Equal", "OptimizedModule", "apply_passes", "compare", "fused_scan", "verify"]

_HOMES = {
    "apply_passes": "api", "verify": "api", "compare": "api",
    "OptimizedModule": "optimizer.module", "fused_scan": "optimizer.fused",
    "Equal": "optimizer.verdict", "Differs": "optimizer.verdict",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `optimize-cli --help` answers without importing torch."""
    from importlib import import_module

    if name == "passes":
        return import_module(f"{__name__}.passes")
    if name not in _HOMES:
        raise AttributeError(f"module 'looplift' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
