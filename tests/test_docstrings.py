"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import looplift
import pytest
import torch
from torch import nn

SKIPPED = ("tests", "examples", "build", ".venv")


def modules() -> list[str]:
    names = ["looplift"]
    for found in pkgutil.walk_packages(looplift.__path__, "looplift."):
        if not found.name.split(".")[1].startswith(SKIPPED):
            names.append(found.name)
    return names


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    failures, _ = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert failures == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [t for n in modules() for t in finder.find(importlib.import_module(n)) if t.examples]
    assert len(found) >= 6
