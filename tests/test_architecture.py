"""Imports go one way, as docs/architecture.md says, and functions take few parameters."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FOLDERS = {"saga_fast": REPOSITORY / "saga_fast", "saga_kernels": REPOSITORY / "kernels"}


def module_name(package: str, file: Path) -> str:
    return ".".join([package, *file.relative_to(FOLDERS[package]).with_suffix("").parts]).removesuffix(".__init__")


FILES = {module_name(package, file): file for package, folder in FOLDERS.items() for file in folder.rglob("*.py")}


def imported(name: str, everywhere: bool = False) -> set[str]:
    """Our modules that the module `name` imports as it loads, or `everywhere` in it."""
    tree = ast.parse(FILES[name].read_text())
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree) if everywhere else _loaded(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # What is imported may be a module itself; a package is then not asked for more than its name.
            inner = {f"{base}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= inner if len(inner) == len(node.names) else inner | {base}
    # A package is there before what is in it: to ask for it there, as for its compiled part, is no circle.
    return {other for other in found & FILES.keys() if other != name and not f"{name}.".startswith(f"{other}.")}


def _loaded(body: list[ast.stmt]) -> list[ast.stmt]:
    nested = [inner for node in body if isinstance(node, ast.If | ast.Try) for inner in _loaded(node.body)]
    return [*body, *nested]


def test_no_import_goes_in_a_circle():
    graph = {name: imported(name) for name in FILES}
    assert sum(map(len, graph.values())) > 150, "imports that are not found are no circle either"
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names it


def test_nothing_imports_the_trainer():
    assert not [name for name in FILES if "saga_fast.train" in imported(name, everywhere=True)]


def test_the_lowest_floors_know_nothing_of_the_others():
    for name in FILES:
        if name.startswith("saga_kernels"):
            assert not [other for other in imported(name, everywhere=True) if other.startswith("saga_fast")], name
        if name.startswith("saga_fast.utils"):
            assert not [o for o in imported(name, everywhere=True) if not o.startswith("saga_fast.utils")], name


def test_an_encoder_is_deployed_without_the_trainer():
    needed, wanted = set(), ["saga_fast.encoder"]
    while wanted:
        needed.add(name := wanted.pop())
        wanted += imported(name) - needed
    assert {name.split(".")[1] for name in needed} == {"encoder", "towers", "utils"}


def test_ruff_refuses_a_function_of_saga_fast_with_more_than_six_parameters():
    def refused(parameters: str, file: str) -> bool:
        command = [sys.executable, "-m", "ruff", "check", "--select", "PLR0913", "--stdin-filename", file, "-"]
        code = f"class Model:\n    def __init__(self, {parameters}): ...\n"
        done = subprocess.run(command, input=code, cwd=REPOSITORY, text=True, capture_output=True)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode == 1

    assert refused("a, b, c, d=1, *, e=2, f, g", "saga_fast/supervisor/model.py")
    assert not refused("a, b, c, d=1, *, e=2, f", "saga_fast/supervisor/model.py")
    checked = [sys.executable, "-m", "ruff", "check", "--select", "PLR0913", "saga_fast"]
    done = subprocess.run(checked, cwd=REPOSITORY, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
