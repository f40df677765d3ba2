"""`optimize-cli`: every message and exit code that it promises, on small files of a user's own."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import looplift
import pytest
import torch
from looplift import Differs
from looplift.cli import app, main, spread, stop_on_failure
from looplift.loading import BadInput, parse_input
from looplift.passes import ORDER
from typer.testing import CliRunner

FAST = ("--no-measure", "--mode", "inference")
IMPORTS = "import torch\nfrom torch import nn\n"
LOOP = IMPORTS + """
class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(3, 5)

    def forward(self, x):
        outputs = []
        for t in range(x.shape[1]):
            outputs.append(torch.tanh(self.cell(x[:, t])))
        return torch.stack(outputs, 1)
"""
INPUTS = """
def example_inputs():
    return (torch.randn(2, 6, 3),)
"""
GOOD = LOOP + INPUTS
VARIANTS = LOOP + """
class Doubled(Loop):
    def forward(self, x):
        return super().forward(x) * 1

class Wrong(Loop):
    def forward(self, x):
        return super().forward(x) + 1e-6

class Raising(Loop):
    def forward(self, x):
        raise ValueError("mine")
""" + INPUTS


def forward(*lines: str) -> str:
    """A file whose model has this forward, from line 6 on."""
    body = "".join(f"        {line}\n" for line in lines)
    return f"{IMPORTS}\nclass Model(nn.Module):\n    def forward(self, x):\n{body}{INPUTS}"


Run = Callable[..., Any]  # typer's Result: exit_code, stdout, stderr, output


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """`--threads` is for the whole process."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.py"


@pytest.fixture
def run(file: Path) -> Run:
    """Run the command on a file with this source; `@` in its words stands for the file."""

    def invoke(source: str | None, *words: str, **options: Any) -> Any:
        if source is not None:
            file.write_text(source)
        return CliRunner().invoke(app, [w.replace("@", str(file)) for w in words], **options)

    return invoke


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of a few milliseconds, and a torch.compile that does nothing."""
    from looplift.optimizer import measure, select

    interleaved = measure.interleaved

    def short(candidates: Any, **options: Any) -> measure.Comparison:
        return interleaved(candidates, **{**options, "seconds": 0.02, "rounds": 3})

    monkeypatch.setattr(measure, "interleaved", short)
    monkeypatch.setattr(select, "interleaved", short)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)


# Bad input


BAD: dict[str, tuple[str | None, tuple[str, ...], int, tuple[str, ...]]] = {
    "no such file": (None, ("@",), 2, ("there is no file", "mine.py")),
    "no such file, with a name": (None, ("@:Model",), 2, ("there is no file", "mine.py")),
    "a syntax error": ("x = 1\ndef f(:\n", ("@",), 2, (
        "mine.py has a syntax error in line 2", "def f(:")),
    "a failing import": ("import no_such_module\n", ("@",), 2, (
        "mine.py can't be imported", "line 1", "No module named 'no_such_module'")),
    "no model": ("x = 1\n", ("@",), 2, ("has no nn.Module", "FILE:NAME")),
    "several models": (VARIANTS, ("@",), 2, (
        "several models (Loop, Doubled, Wrong, Raising)", "FILE:NAME")),
    "no such model": (GOOD, ("@:Other",), 2, ("has no 'Other'; it has Loop",)),
    "something else than a model": (GOOD + "k = 3\n", ("@:k",), 2, (
        "k is a int, not a function or class",)),
    "a function returning something else": (GOOD + "def k(): return 3\n", ("@:k",), 2, (
        "k is a int, not an nn.Module",)),
    "a constructor with arguments": (
        IMPORTS + "class Model(nn.Linear):\n    def __init__(self, size, bias): pass\n", ("@",), 2,
        ("needs arguments (size, bias)", "write a function without any")),
    "a constructor that raises": (
        IMPORTS + "def model():\n    raise ValueError('mine')\n", ("@",), 2,
        ("the model can't be made", 'mine.py", line 4', "ValueError: mine")),
    "no inputs": (LOOP, ("@",), 2, (
        "has no example_inputs()", '--inputs "f32[4,128,256]" "i64[4,128]<50257"')),
    "inputs of another kind": (LOOP + "def example_inputs(): return 3\n", ("@",), 2, (
        "example_inputs returned a int; a tensor, a tuple, or a dict",)),
    "inputs that raise": (LOOP + "def example_inputs():\n    raise ValueError('mine')\n", ("@",), 2,
                          ("example_inputs can't be made", "line 15", "ValueError: mine")),
    "inputs of another shape": (
        LOOP + "def example_inputs(): return torch.randn(2, 6, 4)\n", ("@",), 2,
        ("the model raises on these inputs", 'mine.py", line 12, in forward',
         "mat1 and mat2 shapes cannot be multiplied")),
    "too many inputs": (
        LOOP + "def example_inputs(): return torch.randn(2, 6, 3), 1\n", ("@",), 2,
        ("the model raises on these inputs", "takes 2 positional arguments but 3 were given")),
    "an exception in forward": (forward("y = x", "raise ValueError('mine')"), ("@",), 2, (
        "the model raises on these inputs", 'mine.py", line 7, in forward', "ValueError: mine")),
    "no steps": (LOOP, ("@", "--inputs", "f32[2,0,3]"), 2, (
        'mine.py", line 13, in forward', "stack expects a non-empty TensorList")),
    "control flow": (forward("if x.sum() > 0:", "    return x", "return -x"), ("@",), 4, (
        "could not be captured", "asks for the value of a tensor", "mine.py:6 in forward",
        "if x.sum() > 0:")),
    "item": (forward("return x * x.max().item()"), ("@",), 4, (
        "could not be captured", "`.item()`", "mine.py:6 in forward", "x.max().item()")),
    "a shape from data": (forward("return x[x > 0]"), ("@",), 4, (
        "output shape depends on the data", "mine.py:6 in forward")),
    "an array of NumPy": (forward("return torch.from_numpy(x.numpy())"), ("@",), 4, (
        "could not be captured: forward asks for the value of a tensor", "mine.py:6 in forward")),
    "an assignment": (forward("self.last = {x}", "return x"), ("@",), 4, (
        "forward assigns the attribute 'last', an effect",)),
    "a compiled model": (GOOD + "model = torch.compile(Loop(), backend='eager')\n", ("@",), 2, (
        "the model is compiled already; optimize the module inside (`_orig_mod`)",)),
    "a wrapper": (GOOD + """
class DistributedDataParallel(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)

def model(): return DistributedDataParallel(Loop())
""", ("@",), 4, ("wrapped in DistributedDataParallel; optimize the module inside (`.module`)",)),
    "no such pass": (GOOD, ("@", "--pass", "faster"), 2, (
        "there is no pass 'faster'; the passes are reroll-loops, ",)),
    "no such pass to skip": (GOOD, ("@", "--skip", "faster"), 2, ("there is no pass 'faster'",)),
    "no such mode": (GOOD, ("@", "--mode", "backwards"), 2, (
        "--mode is inference, training or both, not 'backwards'",)),
    "no threads": (GOOD, ("@", "--threads", "0"), 2, ("--threads is 1 or more, not 0",)),
    "no such option": (GOOD, ("@", "--faster"), 2, ("No such option", "--faster")),
    "not an input": (LOOP, ("@", "--inputs", "f31[2]"), 2, (
        "'f31[2]' describes no input; write dtype[sizes]", "bf16", '"i64[4,128]<50257"')),
    "a bound that leaves no number": (LOOP, ("@", "--inputs", "i64[2]<0"), 2, (
        "no number from 0 on is below 0",)),
    "a bound for floats": (LOOP, ("@", "--inputs", "f32[2]<7"), 2, (
        "'f32[2]<7': an upper bound is for integers",)),
    "no dynamic axis": (GOOD, ("@", "--dynamic", "x=T"), 2, (
        "--dynamic takes ARG:AXIS=NAME, as in x:1=T, not 'x=T'",)),
    "a dynamic argument that is not there": (GOOD, ("@", "--dynamic", "z:1=T"), 2, (
        "dynamic_shapes names z, but forward is given x",)),
    "an unwritable report": (GOOD, ("@", "--json", "/no/such/folder/report.json"), 2, (
        "/no/such/folder/report.json can't be written: No such file or directory",)),
    "a folder for a report": (GOOD, ("@", "--json", "."), 2, ("can't be written: Is a directory",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, run: Run, file: Path) -> None:
    source, words, code, told = BAD[case]
    report = file.with_name("report.json")
    own = () if "--json" in words or code == 2 else ("--json", str(report))
    modes = () if "--mode" in words else ("--mode", "inference")
    result = run(source, *words, "--no-measure", *modes, *own)
    assert result.exit_code == code, result.output
    stderr = re.sub(r"[│\s]+", " ", result.stderr)
    for part in told:
        assert re.sub(r"\s+", " ", part) in stderr
    assert "Traceback" not in result.stderr
    assert not report.exists()
    assert source is None or file.read_text() == source


def test_other_files_than_python(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    result = CliRunner().invoke(app, [str(tmp_path / "notes.txt")])
    assert result.exit_code == 2
    assert "notes.txt is no Python file" in result.stderr


def test_an_unwritable_report_is_told_before_any_work(run: Run) -> None:
    result = run(None, "@", "--json", "/no/such/folder/report.json")
    assert "can't be written" in result.stderr
    assert "there is no file" not in result.stderr


ODD: dict[str, tuple[str, tuple[str, ...]]] = {
    "integers": (forward("return x + 1"), ("--inputs", "i64[2,4]<9")),
    "complex numbers": (forward("return x * x.conj()"), ("--inputs", "c64[2,4]")),
    "booleans": (forward("return ~x"), ("--inputs", "bool[2]")),
    "no elements": (LOOP, ("--inputs", "f32[0,4,3]")),
    "one step": (LOOP, ("--inputs", "f32[2,1,3]")),
    "a number": (forward("return x * 2"), ("--inputs", "f32[]")),
    "gaps between elements": (
        LOOP + "def example_inputs(): return torch.randn(6, 3, 2).permute(2, 0, 1)\n", ()),
    "keywords": (LOOP + "def example_inputs(): return {'x': torch.randn(2, 6, 3)}\n", ()),
    "tied parameters": (GOOD + "def model():\n    loop = Loop()\n    both = nn.Sequential(loop, "
                        "nn.Linear(5, 3))\n    both.append(loop)\n    return both\n", ()),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_input(case: str, run: Run) -> None:
    source, words = ODD[case]
    result = run(source, "@", *words, *FAST)
    assert result.exit_code == 0, result.output
    assert "not captured" not in result.stdout


def test_a_failing_backward_is_no_error(run: Run) -> None:
    result = run(forward("y = (x + self.shift).sigmoid()", "y += 1", "return y").replace(
        "    def forward", "    def __init__(self):\n        super().__init__()\n"
        "        self.shift = nn.Parameter(torch.zeros(()))\n\n    def forward"), "@",
        "--no-measure", "--mode", "training")
    assert result.exit_code == 0
    assert "nothing was worth rewriting" in result.stdout


# What is printed, written and left alone


def test_report_on_stdout_progress_on_stderr(run: Run, file: Path) -> None:
    result = run(GOOD, "@", "--no-measure")
    assert result.exit_code == 0
    for part in ("Loop(float32[2, 6, 3])", "inference ──", "training ──", "reroll-loops",
                 "mine.py:12", "6 × 2 operations → one scan", "6 × (linear, tanh) → 1",
                 "not proven: shapes other than (2, 6, 3)"):
        assert part in result.stdout, part
    for part in ("… loading", "… capturing", "… verifying"):
        assert part in result.stderr
        assert part not in result.stdout
    assert "\x1b" not in result.output
    assert file.read_text() == GOOD
    assert [p.name for p in file.parent.iterdir() if p.name != "__pycache__"] == ["mine.py"]


def test_quiet(run: Run) -> None:
    result = run(GOOD, "@", "--quiet", *FAST)
    assert (result.exit_code, result.output) == (0, "")


def test_quiet_errors_are_told(run: Run) -> None:
    result = run(None, "@", "-q")
    assert result.exit_code == 2
    assert result.stderr.startswith("optimize-cli: there is no file")


def test_json(run: Run, file: Path) -> None:
    written = file.with_name("report.json")
    result = run(GOOD, "@", "--no-measure", "--json", str(written), "--seed", "5", "--skip",
                 "slice-indices")
    assert result.exit_code == 0
    report = json.loads(written.read_text())
    assert report["schema_version"] == 1
    assert report["model"] == "Loop"
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["seed"] == report["options"]["seed"] == 5
    assert report["options"]["mode"] == "both"
    assert report["options"]["measure"] is False
    assert report["options"]["passes"] == [p.name for p in ORDER if p.name != "slice-indices"]
    assert isinstance(report["declined"], list)
    assert {r["pass_name"] for r in report["rewrites"]} >= {"reroll-loops"}
    assert {r["mode"] for r in report["rewrites"]} == {"inference", "training"}
    for rewrite in report["rewrites"]:
        assert re.fullmatch(r"mine\.py:\d+", rewrite["where"])
        assert rewrite["summary"]
        assert rewrite["verdict"].startswith(("exact", "same function"))
    assert [m["verdict"]["kind"] for m in report["modes"]] == ["equal", "equal"]


def test_near_misses_are_in_the_report(run: Run, file: Path) -> None:
    written = file.with_name("report.json")
    source = forward("return x.index_select(1, x[0, :, 0].long())").replace(
        "torch.randn(2, 6, 3)", "torch.zeros(2, 6, 3)")
    result = run(source, "@", *FAST, "--json", str(written))
    assert result.exit_code == 0
    (miss,) = json.loads(written.read_text())["declined"]
    assert (miss["pass_name"], miss["where"]) == ("slice-indices", "mine.py:6")
    assert "computed from data" in miss["reason"]
    assert "computed from" in result.stdout


def test_run_as_a_module(file: Path) -> None:
    found = subprocess.run([sys.executable, "-m", "looplift.cli", "passes"], cwd=file.parent,
                           capture_output=True, text=True, check=True)
    assert "reroll-loops" in found.stdout


def test_html_and_code(run: Run, file: Path) -> None:
    html, code = file.with_name("report.html"), file.with_name("fast.py")
    assert run(GOOD, "@", *FAST, "--html", str(html), "--code", str(code)).exit_code == 0
    assert html.read_text().lstrip().lower().startswith("<!doctype html>")
    assert "reroll-loops" in html.read_text()
    assert code.read_text().startswith("import looplift\nimport torch\n")
    compile(code.read_text(), "fast.py", "exec")
    assert "linear" in code.read_text()


def test_measured(run: Run, file: Path, quick: None) -> None:
    written = file.with_name("report.json")
    result = run(GOOD, "@", "--json", str(written), "--mode", "inference", "--compile")
    assert result.exit_code == 0, result.output
    (mode,) = json.loads(written.read_text())["modes"]
    names = [t["name"] for t in mode["comparison"]["timings"]]
    assert names[:1] == ["naive"]
    for part in ("peak memory", "ratio", "noise", "interleaved rounds", "looplift, torch.compile"):
        assert part in result.stdout


def test_pass_and_skip(run: Run, file: Path) -> None:
    written = file.with_name("report.json")

    def applied(*words: str) -> set[str]:
        assert run(GOOD, "@", *FAST, "--json", str(written), *words).exit_code == 0
        return {r["pass_name"] for r in json.loads(written.read_text())["rewrites"]}

    assert "vectorize-patches" in applied()
    assert "vectorize-patches" not in applied("--skip", "vectorize-patches")
    assert applied("--pass", "reroll-loops") == {"reroll-loops", "lower-scans"}
    assert applied("--pass", "lower-einops", "--skip", "lower-einops") == set()


def test_dynamic(run: Run, file: Path) -> None:
    code = file.with_name("fast.py")
    result = run(GOOD, "@", *FAST, "--dynamic", "x:1=steps", "--code", str(code))
    assert result.exit_code == 0, result.output
    assert "one program for steps from 1" in result.stdout
    assert "steps = input_0.shape[1]" in code.read_text()


def test_several_inputs(run: Run) -> None:
    source = IMPORTS + """
class Lookup(nn.Module):
    def forward(self, table, rows, scale):
        return table[rows] * scale
"""
    specs = ("f64[4,2]", "i64[3]<4", "f64[2]")
    together = run(source, "@", "--inputs", *specs, *FAST)
    assert "Lookup(float64[4, 2], int64[3], float64[2])" in together.stdout
    repeated = run(source, "@", *(w for s in specs for w in ("--inputs", s)), *FAST)
    assert "Lookup(float64[4, 2], int64[3], float64[2])" in repeated.stdout
    before = run(source, "--inputs", *specs, "@", *FAST)
    assert "Lookup(float64[4, 2], int64[3], float64[2])" in before.stdout


def test_words_that_describe_inputs() -> None:
    assert spread(["--inputs", "f32[2]", "i64[3]<4", "m.py", "f32[1]"]) == [
        "--inputs", "f32[2]", "--inputs", "i64[3]<4", "m.py", "f32[1]"]
    assert set(parse_input("i8[100]<3").tolist()) == {0, 1, 2}
    assert parse_input("bf16[2, 3]").dtype == torch.bfloat16
    with pytest.raises(BadInput, match="describes no input"):
        parse_input("f32[2,-3]")


FOUND = {
    "the only class": (GOOD, "@", "Loop"),
    "one class of several": (VARIANTS, "@:Doubled", "Doubled"),
    "an instance": (GOOD + "net = Loop()\n", "@:net", "Loop"),
    "a function": (GOOD + "def make(): return nn.Tanh()\n", "@:make", "Tanh"),
    "model, a function": (GOOD + "def model(): return nn.Tanh()\n", "@", "Tanh"),
    "model, an instance": (GOOD + "model = nn.Tanh()\n", "@", "Tanh"),
    "model, a class": (GOOD + "class model(Loop): pass\n", "@", "model"),
    "imported modules don't count": ("from torch.nn import Linear, Tanh\n" + GOOD, "@", "Loop"),
}


@pytest.mark.parametrize("case", FOUND)
def test_models_are_found(case: str, run: Run) -> None:
    source, target, name = FOUND[case]
    result = run(source, target, *FAST)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{name}(float32[2, 6, 3])")


def test_size(run: Run) -> None:
    source = LOOP + """
def model(size="small"): return Loop() if size == "tiny" else nn.Tanh()
def example_inputs(size="small"): return torch.randn(2, {"small": 5, "tiny": 2}[size], 3)
"""
    assert run(source, "@", "--size", "tiny", *FAST).stdout.startswith("Loop(float32[2, 2, 3])")
    assert run(source, "@", *FAST).stdout.startswith("Tanh(float32[2, 5, 3])")
    wrong = run(source, "@", "--size", "huge", *FAST)
    assert wrong.exit_code == 2
    assert "KeyError: 'huge'" in wrong.stderr


def test_files_may_import_their_neighbours(run: Run, file: Path) -> None:
    file.with_name("neighbour_of_mine.py").write_text(LOOP)
    assert run(f"import torch\nfrom neighbour_of_mine import Loop\nmodel = Loop()\n{INPUTS}", "@",
               *FAST).exit_code == 0


def test_optimize_may_be_said(run: Run) -> None:
    assert run(GOOD, "optimize", "@", *FAST).exit_code == 0


def test_threads(run: Run, file: Path) -> None:
    written = file.with_name("report.json")
    assert run(GOOD, "@", "--threads", "2", *FAST, "--json", str(written)).exit_code == 0
    assert json.loads(written.read_text())["machine"]["threads"] == 2


def test_colours_on_a_terminal_only(run: Run) -> None:
    colour = re.compile(r"\x1b\[(?:\d+;)*3\d")
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert colour.search(run(GOOD, "@", *FAST, env=terminal).stdout)
    assert not colour.search(run(GOOD, "@", *FAST, env={**terminal, "NO_COLOR": "1"}).stdout)
    assert "\x1b" not in run(GOOD, "@", *FAST).output


def test_a_failed_verification_writes_nothing(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = file.with_name("report.json")
    optimize = looplift.apply_passes

    def differing(*args: Any, **options: Any) -> looplift.OptimizedModule:
        fast = optimize(*args, **options)
        (signature,) = fast.report.signatures
        modes = tuple(dataclasses.replace(m, verdict=Differs("a case", "output 0", "by 1"))
                      for m in signature.modes)
        fast.report.signatures[:] = [dataclasses.replace(signature, modes=modes)]
        return fast

    monkeypatch.setattr("looplift.api.apply_passes", differing)
    result = run(GOOD, "@", *FAST, "--json", str(written))
    assert result.exit_code == 3
    assert "the result differs in output 0 (a case): by 1" in result.stderr
    assert not written.exists()


def test_internal_errors_exit_with_one_and_a_traceback(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("nobody foresaw this")

    file.write_text(GOOD)
    monkeypatch.setattr("looplift.api.apply_passes", fail)
    monkeypatch.setattr(sys, "argv", ["optimize-cli", str(file), "-q"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "RuntimeError: nobody foresaw this" in capsys.readouterr().err


def test_nothing_stops_without_a_failure() -> None:
    stop_on_failure(looplift.apply_passes(torch.nn.Tanh(), measure=False))


# The other commands


def test_verify(run: Run) -> None:
    same = run(VARIANTS, "verify", "@:Loop", "@:Doubled")
    assert same.exit_code == 0
    assert re.match(r"(exact|same function)", same.stdout)
    assert "not proven: shapes other than (2, 6, 3)" in same.stdout
    wrong = run(VARIANTS, "verify", "@:Loop", "@:Wrong")
    assert wrong.exit_code == 3
    assert wrong.stdout.startswith("differs in output 0 (given inputs, inference, float64)")
    raising = run(VARIANTS, "verify", "@:Loop", "@:Raising")
    assert raising.exit_code == 3
    assert "none became ValueError: mine" in raising.stdout


def test_verify_options(run: Run) -> None:
    words = ("verify", "@:Loop", "@:Wrong", "--mode", "inference")
    assert run(VARIANTS, *words, "--tolerance", "1e-4").exit_code == 0
    quiet = run(VARIANTS, *words, "--quiet")
    assert (quiet.exit_code, quiet.output) == (3, "")
    shapes = run(VARIANTS, "verify", "@:Loop", "@:Loop", "--inputs", "f64[1,2,3]")
    assert shapes.exit_code == 2  # the parameters are float32
    assert run(VARIANTS, "verify", "@:Loop", "@:Doubled", "--inputs", "f32[1,2,3]").exit_code == 0


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_two_models_that_are_not_there(command: str, run: Run) -> None:
    result = run(VARIANTS, command, "@:Loop", "@:Other")
    assert result.exit_code == 2
    assert "has no 'Other'; it has Loop, Doubled, Wrong, Raising" in result.stderr
    assert run(VARIANTS, command, "@:Loop").exit_code == 2
    missing = run(VARIANTS, command, "@:Loop", "elsewhere.py:Loop")
    assert missing.exit_code == 2
    assert "there is no file elsewhere.py" in missing.stderr
    raising = run(VARIANTS, command, "@:Raising", "@:Loop")
    assert raising.exit_code == 2
    assert "ValueError: mine" in raising.stderr


def test_bench(run: Run, quick: None) -> None:
    result = run(VARIANTS, "bench", "@:Loop", "@:Doubled", env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for part in ("inference", "training", "mine.py:Loop", "mine.py:Doubled", "1.00x",
                 "peak memory", "noise"):
        assert part in result.stdout
    compiled = run(VARIANTS, "bench", "@:Loop", "@:Doubled", "--compile", "--mode", "inference",
                   env={"COLUMNS": "200"})
    assert compiled.stdout.count(" compiled") == 2


def test_passes_are_listed_with_their_specifications(run: Run) -> None:
    result = run(None, "passes")
    assert result.exit_code == 0
    named = re.findall(r"^([a-z-]+): ", result.stdout, re.MULTILINE)
    assert named == [p.name for p in ORDER]
    for section in ("Before:", "After:", "Wins:", "Sound if:", "Skips:"):
        assert result.stdout.count(f"\n{section}") == len(ORDER), section


def test_help(run: Run) -> None:
    result = run(None, "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for part in ("optimize", "verify", "bench", "passes", "3 a verification failed",
                 "4 the model could not be captured"):
        assert part in result.stdout
    assert run(None).exit_code == 2
    options = run(None, "optimize", "--help", env={"COLUMNS": "200"}).stdout
    for option in ("--json", "--mode", "--pass", "--skip", "--allow-approximate", "--no-measure",
                   "--compile", "--seed", "--threads", "--quiet", "--inputs"):
        assert option in options


def test_tracebacks_start_at_the_users_own_line(run: Run, file: Path) -> None:
    stderr = run(forward("raise ValueError('mine')"), "@").stderr
    first = re.search(r'File "([^"]+)"', stderr)
    assert first is not None
    assert first[1] == str(file)


def test_a_file_that_exits_when_imported(run: Run) -> None:
    result = run("import sys\nsys.exit(7)\n", "@")
    assert result.exit_code == 2


def test_verify_of_a_recurrent_layer(run: Run) -> None:
    source = IMPORTS + "def model(): return nn.GRU(3, 4)\n" + INPUTS
    assert run(source, "verify", "@", "@").exit_code == 0


def test_a_class_and_its_only_instance_are_one_model(run: Run) -> None:
    assert run(GOOD + "net = Loop()\n", "@", *FAST).exit_code == 0


def test_files_may_import_their_neighbours_later(run: Run, file: Path) -> None:
    file.with_name("late_neighbour_of_mine.py").write_text(LOOP)
    source = "import torch\ndef model():\n    from late_neighbour_of_mine import Loop\n" \
             "    return Loop()\n"
    assert run(source + INPUTS, "@", *FAST).exit_code == 0


def test_the_seed_is_that_of_all_random_numbers(run: Run, file: Path) -> None:
    drawn = file.with_name("drawn.txt")
    source = GOOD + f"""
def model():
    with open({str(drawn)!r}, "a") as log: print(torch.rand(()).item(), file=log)
    return Loop()
"""
    for before in (1, 2):
        torch.manual_seed(before)
        assert run(source, "@", "--seed", "5", *FAST).exit_code == 0
    one, other = drawn.read_text().split()
    assert one == other


def test_a_compiled_model_is_refused_before_it_runs(run: Run) -> None:
    source = GOOD + """
def never(graph, inputs):
    raise RuntimeError("compiled after all")
model = torch.compile(Loop(), backend=never)
"""
    assert "the model is compiled already" in run(source, "@", *FAST).stderr


def test_inputs_that_are_no_function(run: Run) -> None:
    result = run(LOOP + "example_inputs = torch.randn(2, 6, 3)\n", "@", *FAST)
    assert result.exit_code == 2
    assert "example_inputs is a Tensor, not a function or class" in result.stderr


# As a process of its own


COMMAND = Path(sys.executable).with_name("optimize-cli")
installed = pytest.mark.skipif(not COMMAND.exists(), reason=f"there is no {COMMAND}")


def test_help_answers_without_torch() -> None:
    program = """
import sys
from looplift.cli import main
sys.argv = ["optimize-cli", "--help"]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=True)
    assert "optimize-cli FILE" in done.stdout
    assert done.stdout.endswith("False\n")


@installed
def test_the_installed_command(file: Path) -> None:
    file.write_text(GOOD)
    words = [str(COMMAND), str(file), *FAST, "--threads", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=file.parent,
                          env={**os.environ, "TERM": "xterm-256color"})
    assert done.returncode == 0, done.stderr
    assert "reroll-loops" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert file.read_text() == GOOD


# Known bugs


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_script_module(run: Run) -> None:
    result = run(IMPORTS + "def model(): return torch.jit.script(nn.Linear(3, 3))\n" + INPUTS, "@",
                 *FAST)
    assert result.exit_code == 2
    assert "is a ScriptModule" in result.stderr


def test_source_lines_are_told_in_full(run: Run) -> None:
    stdout = run(GOOD, "@", *FAST, env={"COLUMNS": "80"}).stdout
    assert "torch.tanh(self.cell(x[:,t]))" in re.sub(r"\s+", "", stdout)
