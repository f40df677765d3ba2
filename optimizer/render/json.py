"""The report as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from ..report import Report


def as_json(report: Report) -> str:
    """`report.to_dict()` as JSON text; what JSON has no number for (NaN, Inf) becomes null."""
    return json.dumps(_plain(report.to_dict()), indent=2, ensure_ascii=False) + "\n"


def _plain(item: Any) -> Any:
    match item:
        case dict():
            return {str(key): _plain(held) for key, held in item.items()}
        case list() | tuple():
            return [_plain(held) for held in item]
        case float() if not math.isfinite(item):
            return None
        case str() | int() | float() | bool() | None:
            return item
        case _:
            return str(item)
