"""C++ source → a loaded library, by Inductor's builder, which caches on disk by content."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from unittest import mock

import torch

HEADER = "ATen/cpu/vec/functional.h"  # reading it is most of the work of compiling a kernel

log = logging.getLogger(__name__)


class _NotBuilt(Exception):
    """The library is not on the disk."""


@lru_cache(maxsize=256)
def compiled(source: str) -> Any:
    """The library of `source`, or None with a note in the log where it can't be built."""
    from torch._inductor import codecache

    plain = codecache.CppCodeCache

    class WithHeader(plain):  # type: ignore[misc, valid-type]
        """Compiles over `HEADER`, compiled once and kept: 1.5 s instead of 3.7 s a kernel."""

        @classmethod
        def _get_uncompiled_header(cls, device: str) -> str:
            return HEADER

    ways: tuple[Callable[[], Any], ...] = (
        lambda: plain.load_async(source, submit_fn=_not_built)(),
        lambda: WithHeader.load(source), lambda: plain.load(source))
    reason = ""
    with mock.patch.object(codecache, "pick_vec_isa", _instructions):
        for way in ways:
            try:
                return way()
            except Exception as error:  # no compiler, or one that fails; nothing on the disk yet
                reason = str(error).partition("\n")[0]
    log.warning("no fused loops here, plain ones run: %s", reason)
    return None


def _not_built(build: Callable[[], None]) -> Any:
    raise _NotBuilt


def _instructions() -> Any:
    """The vector instructions that PyTorch's own kernels use here.

    Inductor's choice compiles and starts a probe for every set that a CPU has: for nine of them
    18 seconds in the first process on a machine, 2 in each further one.
    """
    from torch._inductor import cpu_vec_isa

    known = {"AVX2": cpu_vec_isa.VecAVX2, "AVX512": cpu_vec_isa.VecAVX512}
    found = known.get(torch.backends.cpu.get_cpu_capability())
    return cpu_vec_isa.pick_vec_isa() if found is None else found()
