"""The wheel holds all that it must; imports inside the package go one way."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("optimizer", "passes", "models")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [*ROOT.glob("*.py"), *(file for folder in CODE for file in (ROOT / folder).rglob("*.py"))]
# each may use what stands left of it
ORDER = ("affine", "facts", "rewrite", "builder", "apply", "capture", "verify", "select", "report",
         "module")


def module_name(file: Path) -> str:
    """`looplift.optimizer.facts` for optimizer/facts.py; a package's name for its __init__."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("looplift", *(part for part in parts if part != "__init__")))


NAMES = {module_name(file): file for file in SOURCES}


def imported(file: Path) -> Iterator[str]:
    """Modules of ours that the file imports when it is imported itself."""
    name = module_name(file)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in executed(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            source = ".".join([*(above if node.level else []), *([node.module or ""])]).rstrip(".")
            for alias in node.names:
                found = f"{source}.{alias.name}" if f"{source}.{alias.name}" in NAMES else source
                if found in NAMES:
                    yield found


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes without those in functions, and without what is imported for the type checker."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from executed(child)


IMPORTS = {name: set(imported(file)) - {name} for name, file in NAMES.items()}


def folder_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in CODE else ""


# Imports


def test_the_reader_of_imports_reads() -> None:
    assert "looplift.optimizer.builder" in IMPORTS["looplift.optimizer.capture"]
    assert "looplift.passes.reroll_loops" in IMPORTS["looplift.passes"]
    assert "looplift.optimizer.verify" in IMPORTS["looplift.api"]
    assert IMPORTS["looplift"] == set()


def test_imports_have_no_cycle() -> None:
    order = [*TopologicalSorter(IMPORTS).static_order()]
    assert len(order) == len(IMPORTS)


@pytest.mark.parametrize(("left", "right"), [*pairwise(ORDER)])
def test_imports_go_one_way(left: str, right: str) -> None:
    def reachable(name: str) -> set[str]:
        return {name}.union(*(reachable(other) for other in IMPORTS[name]))

    assert f"looplift.optimizer.{right}" not in reachable(f"looplift.optimizer.{left}")


@pytest.mark.parametrize("name", [n for n in NAMES if folder_of(n) == "optimizer"])
def test_the_machine_knows_no_pass(name: str) -> None:
    assert {folder_of(other) for other in IMPORTS[name]} <= {"optimizer"}


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("looplift.passes.")])
def test_passes_know_the_machine_alone(name: str) -> None:
    assert {folder_of(other) for other in IMPORTS[name]} <= {"optimizer"}


@pytest.mark.parametrize("name", [n for n in NAMES if folder_of(n) == "models"])
def test_models_know_nothing_of_ours(name: str) -> None:
    assert not IMPORTS[name]
    assert "looplift" not in NAMES[name].read_text()


@pytest.mark.parametrize("name", ["affine", "repeats"])
def test_counting_needs_no_torch(name: str) -> None:
    program = f"""
import sys, types
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location({name!r}, {str(ROOT / "optimizer" / f"{name}.py")!r})
sys.modules[{name!r}] = module = module_from_spec(spec)
spec.loader.exec_module(module)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=True)
    assert done.stdout == "False\n"


def test_only_relative_imports_inside() -> None:
    absolute = [
        name for name, file in NAMES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.ImportFrom) and not node.level
            and (node.module or "").split(".")[0] == "looplift")
        or (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "looplift"
                                                 for a in node.names))
    ]
    assert absolute == []


# The package


def test_every_sub_package_is_listed() -> None:
    folders = {module_name(file) for file in SOURCES if file.name == "__init__.py"}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_every_code_folder_is_a_package() -> None:
    for file in SOURCES:
        assert (file.parent / "__init__.py").exists(), file


def test_versions_agree() -> None:
    import looplift

    assert looplift.__version__ == PROJECT["project"]["version"] == metadata.version("looplift")


def test_public_names_exist() -> None:
    import looplift

    for name in looplift.__all__:
        assert getattr(looplift, name) is not None
    with pytest.raises(AttributeError, match="module 'looplift' has no attribute 'nothing'"):
        _ = looplift.nothing


def test_tested_versions_are_in_the_supported_range() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
                  if "==" in line and not line.startswith("#"))
    assert pinned["torch"].split("+")[0] == "2.13.0"
    wanted = [*PROJECT["project"]["dependencies"],
              *PROJECT["project"]["optional-dependencies"]["dev"]]
    names = {w.split(">")[0].split("<")[0].lower() for w in wanted}
    assert names <= {name.lower() for name in pinned}


def can_build_here() -> bool:
    """Whether setuptools is here and new enough for pyproject.toml; else pip fetches it."""
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy so that nothing is left in the work tree."""
    copy = tmp_path_factory.mktemp("source")
    named = ["pyproject.toml", "README.md", "LICENSE", "py.typed"]
    kept = [*SOURCES, *(ROOT / name for name in named), *(
        file for folder in CODE for file in (ROOT / folder).rglob("*") if file.is_file()
        and file.suffix != ".pyc")]
    for file in kept:
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    built = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--no-deps", "--quiet", "--wheel-dir", str(built), str(copy)]
    pip(*words, *(["--no-build-isolation"] if can_build_here() else []))
    (found,) = built.glob("looplift-*.whl")
    return found


def pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_wheel_contents(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    assert names >= {f"looplift/{file.relative_to(ROOT)}" for file in SOURCES}
    assert "looplift/py.typed" in names
    assert "looplift/optimizer/render/report.html.jinja" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"looplift"}
    assert not [n for n in names if "tests" in n or "__pycache__" in n]


def test_the_wheel_works_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--no-deps", "--no-compile", "--quiet", "--target", str(tmp_path / "site"),
        str(wheel))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = f"""
import sys
sys.path[:] = [{str(tmp_path / "site")!r}, *(p for p in sys.path if p not in ("", {str(ROOT)!r}))]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f).lower()]
import looplift
assert looplift.__file__.startswith({str(tmp_path)!r}), looplift.__file__
import torch
from looplift.models import eigenstate
from looplift.optimizer.render.html import as_html
fast = looplift.apply_passes(eigenstate.model("tiny"), eigenstate.example_inputs("tiny", length=3),
                             measure=False, mode="inference")
assert "reroll-loops" in as_html(fast.report, page=True)
import looplift.backend, looplift.cli
print(fast.report)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "EigenstateNetwork(float32[2, 3, 10])" in done.stdout


def test_entry_points(wheel: Path) -> None:
    archive = ZipFile(wheel)
    (listed,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
    text = archive.read(listed).decode()
    assert "optimize-cli = looplift.cli:main" in text
    assert "[torch_dynamo_backends]\nlooplift = looplift.backend:looplift" in text
