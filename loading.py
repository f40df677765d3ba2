"""A model and its inputs from a user's Python file."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

TORCH = str(Path(torch.__file__).parent)
DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
    "i8": torch.int8, "u8": torch.uint8, "i16": torch.int16, "i32": torch.int32,
    "i64": torch.int64, "bool": torch.bool, "c64": torch.complex64, "c128": torch.complex128,
}
INPUT = re.compile(r"^(?P<dtype>[a-z]+\d*)\[(?P<sizes>[\d,\s]*)\](?:<(?P<below>\d+))?$")


class BadInput(Exception):
    """Something in what the user gave is wrong; the message says what, and what to do."""


def load(path: str) -> ModuleType:
    """Import the file at `path` as a module, its folder on the import path."""
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"there is no file {path}")
    if file.suffix != ".py":
        raise BadInput(f"{path} is no Python file")
    name = f"looplift_user_{file.stem}_{abs(hash(str(file.resolve())))}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise BadInput(
            f"{path} has a syntax error in line {error.lineno}: {error.msg}\n    {error.text or ''}"
        ) from error
    except (Exception, SystemExit) as error:
        raise BadInput(f"{path} can't be imported:\n{user_traceback(error)}") from error
    return module


def user_traceback(error: BaseException) -> str:
    """The traceback of an exception from the first line of the user's own source on."""
    frames = traceback.extract_tb(error.__traceback__)
    own = str(Path(__file__).parent)
    outside = [f for f in frames if not f.filename.startswith(own + "/optimizer")
               and f.filename not in (__file__, own + "/cli.py") and "importlib" not in f.filename]
    while outside and outside[0].filename.startswith(TORCH):
        outside = outside[1:]
    shown = "".join(traceback.format_list(outside or frames))
    return shown + "".join(traceback.format_exception_only(error)).rstrip()


def find_model(module: ModuleType, name: str | None, size: str | None) -> nn.Module:
    """The model called `name`; without one `model`, or the only `nn.Module` of the file.

    A class is constructed, a function called (with `size`, where both have it).
    """
    found = getattr(module, name, None) if name else _only_model(module)
    if found is None:
        raise BadInput(
            f"{module.__file__} has no {name!r}; it has {', '.join(_candidates(module)) or 'none'}"
        )
    made = found if isinstance(found, nn.Module) else _called(found, name or "the model", size)
    if not isinstance(made, nn.Module):
        raise BadInput(f"{name or found} is a {type(made).__name__}, not an nn.Module")
    return made


def _candidates(module: ModuleType) -> dict[str, Any]:
    """The file's own nn.Module classes and instances, by name."""
    return {
        name: held for name, held in vars(module).items()
        if isinstance(held, nn.Module)
        or (inspect.isclass(held) and issubclass(held, nn.Module)
            and held.__module__ == module.__name__)
    }


def _only_model(module: ModuleType) -> Any:
    if hasattr(module, "model"):
        return module.model
    found = _candidates(module)
    if not found:
        raise BadInput(f"{module.__file__} has no nn.Module; name a function that returns one: "
                       "FILE:NAME")
    instances = {n: m for n, m in found.items() if isinstance(m, nn.Module)}
    if len(found) > 1 and len(instances) == 1:
        return next(iter(instances.values()))
    if len(found) > 1:
        raise BadInput(f"{module.__file__} has several models ({', '.join(found)}); "
                       "say which: FILE:NAME")
    return next(iter(found.values()))


def _called(maker: Any, name: str, size: str | None) -> Any:
    if not callable(maker):
        raise BadInput(f"{name} is a {type(maker).__name__}, not a function or class")
    try:
        parameters = inspect.signature(maker).parameters
    except ValueError:
        parameters = inspect.Signature().parameters
    needed = [p.name for p in parameters.values()
              if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
              and not (p.name == "size" and size)]
    if needed:
        raise BadInput(f"{name} needs arguments ({', '.join(needed)}); write a function without "
                       "any that returns the model, and name it: FILE:NAME")
    try:
        return maker(size) if size and "size" in parameters else maker()
    except Exception as error:
        raise BadInput(f"{name} can't be made:\n{user_traceback(error)}") from error


def find_inputs(
    module: ModuleType, specs: Sequence[str], size: str | None, seed: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs: from `specs`, or from the file's `example_inputs()`."""
    if specs:
        generator = torch.Generator().manual_seed(seed)
        return tuple(parse_input(spec, generator) for spec in specs), {}
    maker = getattr(module, "example_inputs", None)
    if maker is None:
        raise BadInput(f"{module.__file__} has no example_inputs(); write one that returns the "
                       'inputs, or describe them: --inputs "f32[4,128,256]" "i64[4,128]<50257"')
    made = _called(maker, "example_inputs", size)
    if isinstance(made, dict):
        return (), made
    if isinstance(made, torch.Tensor):
        return (made,), {}
    if isinstance(made, (tuple, list)):
        return tuple(made), {}
    raise BadInput(f"example_inputs returned a {type(made).__name__}; a tensor, a tuple, or a dict "
                   "of keyword arguments is wanted")


def parse_input(spec: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """A random tensor from its description.

    >>> parse_input("f32[2,3]").shape
    torch.Size([2, 3])
    >>> int(parse_input("i64[100]<7").max()) < 7
    True
    """
    match = INPUT.match(spec)
    if match is None or match["dtype"] not in DTYPES:
        raise BadInput(f"{spec!r} describes no input; write dtype[sizes] with one of "
                       f'{", ".join(DTYPES)}, as in "f32[4,128]" or "i64[4,128]<50257"')
    dtype = DTYPES[match["dtype"]]
    sizes = [int(s) for s in match["sizes"].split(",") if s.strip()]
    if dtype.is_floating_point or dtype.is_complex:
        if match["below"]:
            raise BadInput(f"{spec!r}: an upper bound is for integers")
        return torch.randn(sizes, generator=generator, dtype=torch.float32 if not dtype.is_complex
                           else dtype).to(dtype)
    below = int(match["below"] or 2)
    if below < 1:
        raise BadInput(f"{spec!r}: no number from 0 on is below {below}")
    return torch.randint(0, below, sizes, generator=generator).to(dtype)
