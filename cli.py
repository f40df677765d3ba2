"""`optimize-cli`: parse, call, render, exit code; no logic."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from .optimizer.module import OptimizedModule
    from .optimizer.rewrite import Pass

DONE, INTERNAL, BAD_INPUT, DIFFERENT, NOT_CAPTURED = range(5)


class OptimizeByDefault(TyperGroup):
    """`optimize-cli FILE …` means `optimize-cli optimize FILE …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = next((a for a in args if not a.startswith("-")), None)
        if args and first not in self.commands and not {"--help", "-h"} & set(args[:1]):
            args = ["optimize", *args]
        return super().parse_args(ctx, spread(args))


def spread(args: list[str]) -> list[str]:
    """`--inputs A B` as `--inputs A --inputs B`, for as long as the words describe inputs."""
    result: list[str] = []
    inside = False
    for word in args:
        if inside and "[" in word and word.split("[")[0].isalnum() and result[-1] != "--inputs":
            result.append("--inputs")
        result.append(word)
        inside = word == "--inputs" or (inside and not word.startswith("-") and "[" in word)
    return result


app = typer.Typer(
    cls=OptimizeByDefault, add_completion=False, no_args_is_help=True, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="optimize-cli FILE[:NAME] is short for optimize-cli optimize FILE[:NAME]. "
    "Exit codes: 0 done, also when nothing was worth rewriting; 1 internal error; 2 bad usage or "
    "input; 3 a verification failed (nothing is written); 4 the model could not be captured.",
)


@app.callback()
def about() -> None:
    """Naive PyTorch models, rewritten into fast ones; every rewrite verified and measured."""


Target = Annotated[str, typer.Argument(
    metavar="FILE[:NAME]", show_default=False,
    help="A Python file, and in it an nn.Module class, instance, or function returning one. "
    "Without NAME: `model`, or the only module of the file.",
)]
Inputs = Annotated[list[str] | None, typer.Option(
    "--inputs", metavar="SPEC …", show_default=False,
    help='Inputs, as in "f32[4,128,256]" "i64[4,128]<50257"; else the file\'s example_inputs().',
)]
Size = Annotated[str | None, typer.Option(
    help="Passed to the file's functions that take `size`.", show_default=False)]
Mode = Annotated[str, typer.Option(help="inference, training or both.")]
Seed = Annotated[int, typer.Option(help="Of all random inputs.")]
Threads = Annotated[int | None, typer.Option(
    help="Threads that torch computes with.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no report.")]


@app.command()
def optimize(
    target: Target,
    inputs: Inputs = None,
    mode: Mode = "both",
    only: Annotated[list[str] | None, typer.Option(
        "--pass", metavar="NAME", show_default=False, help="Run only these passes.")] = None,
    skip: Annotated[list[str] | None, typer.Option(
        "--skip", metavar="NAME", show_default=False, help="Run all passes but these.")] = None,
    allow_approximate: Annotated[bool, typer.Option(
        "--allow-approximate", help="Also rewrites that change results (tanh GELU).")] = False,
    no_measure: Annotated[bool, typer.Option(
        "--no-measure", help="Keep every rewrite that verifies, untimed.")] = False,
    compiled: Annotated[bool, typer.Option(
        "--compile", help="Add torch.compile columns to the timing table.")] = False,
    json: Annotated[Path | None, typer.Option(
        show_default=False, help="Write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(
        show_default=False, help="Write the report as an HTML page.")] = None,
    code: Annotated[Path | None, typer.Option(
        show_default=False, help="Write the rewritten model's Python source, without its "
        "tables of numbers.")] = None,
    dynamic: Annotated[list[str] | None, typer.Option(
        "--dynamic", metavar="ARG:AXIS=NAME", show_default=False,
        help="An input axis that may have any size, as in x:1=T; several may share a name.",
    )] = None,
    size: Size = None,
    seed: Seed = 0,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Optimize a model and report what was rewritten, what it was worth, and what was not."""
    for path in (json, html, code):
        check_writable(path)
    with errors_explained(), progress(quiet) as step:
        from .api import apply_passes
        from .loading import find_inputs, find_model, load
        from .optimizer.render.html import as_html
        from .optimizer.render.json import as_json

        passes = chosen_passes(only or [], skip or [])
        prepare(threads, mode, seed)
        step("loading")
        file, name = split_target(target)
        module = load(file)
        model = find_model(module, name, size)
        args, kwargs = find_inputs(module, inputs or [], size, seed)
        try_once(model, args, kwargs)
        fast = apply_passes(
            model, args, kwargs, passes=passes, mode=mode, allow_approximate=allow_approximate,
            measure=not no_measure, seed=seed, dynamic_shapes=dynamic_shapes(dynamic or []),
            progress=step,
        )
        columns = with_compile(fast, args, kwargs, mode, step) if compiled else ()
    if not quiet:
        out = Console()
        out.print(fast.report)
        for comparison in columns:
            from .optimizer.render.terminal import comparison_table

            out.print(comparison_table(comparison))
    stop_on_failure(fast)
    for path, text in ((json, as_json(fast.report)), (html, as_html(fast.report, page=True)),
                       (code, f"import looplift\nimport torch\n\n\n{fast.code}")):
        if path is not None:
            path.write_text(text)


@app.command()
def verify(
    a: Target, b: Target, inputs: Inputs = None, mode: Mode = "both",
    tolerance: Annotated[float | None, typer.Option(
        show_default="1e-9", help="Relative difference allowed in float64.")] = None,
    size: Size = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> None:
    """Whether model B computes the same as model A: values, gradients, behaviour."""
    with errors_explained(), progress(quiet) as step:
        from .optimizer.verdict import Equal
        from .optimizer.verify import verify as compare_results

        prepare(threads, mode, seed)
        one, other, args, kwargs = two_models(a, b, inputs or [], size, seed)
        step("verifying")
        verdict = compare_results(one, other, args, kwargs, mode=mode, seed=seed,
                                  tolerance=tolerance)
    if not quiet:
        print(verdict)
        if isinstance(verdict, Equal):
            print(f"not proven: {'; '.join(verdict.unproven)}")
    raise typer.Exit(DONE if verdict else DIFFERENT)


@app.command()
def bench(
    a: Target, b: Target, inputs: Inputs = None, mode: Mode = "both",
    compiled: Annotated[bool, typer.Option(
        "--compile", help="Add both under torch.compile.")] = False,
    size: Size = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> None:
    """Calibrated, interleaved timings and peak memory of models A and B."""
    with errors_explained(), progress(quiet) as step:
        import torch

        from .optimizer.measure import compare_all
        from .optimizer.render.terminal import comparisons

        prepare(threads, mode, seed)
        one, other, args, kwargs = two_models(a, b, inputs or [], size, seed)
        models: dict[str, Any] = {a: one, b: other}
        if compiled:
            models |= {f"{name} compiled": torch.compile(m) for name, m in models.items()}
        step("measuring")
        measured = compare_all(models, args, kwargs, mode=mode)
    Console().print(comparisons(measured))


@app.command()
def passes() -> None:
    """The passes, in the order in which they run, with their specifications."""
    import inspect

    from .passes import ORDER

    for one in ORDER:
        spec = inspect.getdoc(inspect.getmodule(type(one))) or ""
        title, _, rest = spec.partition("\n")
        print(f"{one.name}: {title}\n{rest}\n")


def chosen_passes(only: list[str], skip: list[str]) -> tuple[Pass, ...]:
    from .loading import BadInput
    from .passes import ORDER

    known = [p.name for p in ORDER]
    for name in (*only, *skip):
        if name not in known:
            raise BadInput(f"there is no pass {name!r}; the passes are {', '.join(known)}")
    return tuple(p for p in ORDER if p.name not in skip
                 and (not only or p.name in only or p.name == known[-1]))


def dynamic_shapes(named: list[str]) -> dict[str, dict[int, Any]] | None:
    """`x:1=T` as torch.export has it: `{"x": {1: Dim("T")}}`."""
    from torch.export import Dim

    from .loading import BadInput

    shapes: dict[str, dict[int, Any]] = {}
    dims: dict[str, Any] = {}
    for text in named:
        match = re.fullmatch(r"(\w+):(-?\d+)=([A-Za-z_]\w*)", text)
        if match is None:
            raise BadInput(f"--dynamic takes ARG:AXIS=NAME, as in x:1=T, not {text!r}")
        name, axis, dim = match.groups()
        shapes.setdefault(name, {})[int(axis)] = dims.setdefault(dim, Dim(dim))
    return shapes or None


def prepare(threads: int | None, mode: str, seed: int) -> None:
    import torch

    from .loading import BadInput
    from .optimizer.measure import keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(seed)
    if mode not in ("inference", "training", "both"):
        raise BadInput(f"--mode is inference, training or both, not {mode!r}")
    if threads is not None:
        if threads < 1:
            raise BadInput(f"--threads is 1 or more, not {threads}")
        torch.set_num_threads(threads)


def split_target(target: str) -> tuple[str, str | None]:
    file, colon, name = target.rpartition(":")
    return (file, name) if colon and not Path(target).exists() else (target, None)


def two_models(
    a: str, b: str, specs: list[str], size: str | None, seed: int
) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    from .loading import find_inputs, find_model, load

    files = [split_target(t) for t in (a, b)]
    modules = [load(file) for file, _ in files]
    one, other = (find_model(m, name, size) for m, (_, name) in zip(modules, files, strict=True))
    args, kwargs = find_inputs(modules[0], specs, size, seed)
    try_once(one, args, kwargs)
    return one, other, args, kwargs


def try_once(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a copy of the model as it is, so that its own errors come first."""
    import copy

    import torch

    from .loading import BadInput, user_traceback

    if hasattr(model, "_orig_mod"):
        raise BadInput("the model is compiled already; optimize the module inside (`_orig_mod`)")
    try:
        with torch.no_grad():
            copy.deepcopy(model)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except Exception as error:
        raise BadInput(f"the model raises on these inputs:\n{user_traceback(error)}") from error


def with_compile(
    fast: OptimizedModule, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str,
    step: Callable[[str], None],
) -> tuple[Any, ...]:
    import torch

    from .optimizer.measure import compare_all

    step("compiling with torch.compile")
    models: dict[str, Any] = {
        "naive": fast.original, "looplift": fast,
        "naive, torch.compile": torch.compile(fast.original),
        "looplift, torch.compile": torch.compile(fast.original, backend="looplift"),
    }
    return compare_all(models, args, kwargs, mode=mode)


def check_writable(path: Path | None) -> None:
    if path is None:
        return
    try:
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        fail(f"{path} can't be written: {error.strerror}", BAD_INPUT)


def stop_on_failure(fast: OptimizedModule) -> None:
    from .optimizer.verdict import Differs

    for signature in fast.report.signatures:
        if signature.failure is not None:
            fail(f"the model could not be captured: {signature.failure}", NOT_CAPTURED)
        for mode in signature.modes:
            if isinstance(mode.verdict, Differs):
                fail(f"the result {mode.verdict}", DIFFERENT)


def fail(message: str, code: int) -> None:
    Console(stderr=True, soft_wrap=True).print(f"optimize-cli: {message}", markup=False,
                                               highlight=False)
    raise typer.Exit(code)


@contextmanager
def errors_explained() -> Iterator[None]:
    """What the user can mend as a message and exit code 2; all else with a traceback, 1."""
    from .loading import BadInput

    try:
        yield
    except BadInput as error:
        fail(str(error), BAD_INPUT)
    except (TypeError, ValueError) as error:
        if "optimize" not in str(error) and "dynamic_shapes" not in str(error):
            raise
        fail(str(error), BAD_INPUT)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, on stderr, while it is done."""
    console = Console(stderr=True)
    if quiet:
        yield lambda message: None
    elif console.is_terminal:
        with console.status("starting") as status:
            yield lambda message: status.update(message)
    else:
        yield lambda message: console.print(f"… {message}", highlight=False)


def main() -> None:
    """The entry point: `app`, with exit code 1 and a traceback for what nobody foresaw."""
    try:
        app()
    except Exception:
        import traceback

        traceback.print_exc()
        sys.exit(INTERNAL)


if __name__ == "__main__":
    main()
