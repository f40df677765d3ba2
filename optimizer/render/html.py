"""The report as one HTML fragment, for notebooks, or as a page of its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, Template

from ..report import Report
from .terminal import candidate, duration, headline, size


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, size=size)
    return environment.get_template("report.html.jinja")


def as_html(report: Report, page: bool = False) -> str:
    """HTML of the report; with `page`, a whole document."""
    return _template().render(report=report, headline=lambda mode: headline(mode).plain,
                              candidate=candidate, page=page)
