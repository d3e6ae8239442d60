"""What is imported is declared, and what is declared is imported; the trainer starts with the base install alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
OURS = {"saga_fast", "saga_kernels"}

# Distributions by what they are imported as, where the two differ by more than a dash.
DISTRIBUTIONS = {"PIL": "pillow", "faiss": "faiss-cpu", "pynvml": "nvidia-ml-py", "sklearn": "scikit-learn"}
# Needed, and imported by others: torch.utils.tensorboard is a shell around it.
NOT_IMPORTED = {"tensorboard"}
# Asked for by name, if the user wants it: never a dependency.
TRACKERS = {"trackio", "wandb"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirements: list[str]) -> set[str]:
    return {canonical(re.match(r"[A-Za-z0-9._-]+", requirement)[0]) for requirement in requirements}


BASE = named(PROJECT["dependencies"])
EXTRAS = set().union(*(named(packages) for packages in PROJECT["optional-dependencies"].values())) - {"saga-fast"}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(top-level package, whether importing the module needs it) of each import that `source` holds.

    Not needed is what a function imports, what `try` guards against ImportError, and what only types need.
    """

    def walk(nodes: list[ast.stmt], needed: bool) -> Iterator[tuple[str, bool]]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], needed) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.split(".")[0], needed
            elif isinstance(node, ast.Try):
                guarded = any("ImportError" in ast.unparse(handler.type or node) for handler in node.handlers)
                yield from walk(node.body, needed and not guarded)
                yield from walk([*node.orelse, *node.finalbody], needed)
                for handler in node.handlers:
                    yield from walk(handler.body, needed)
            elif isinstance(node, ast.If):
                yield from walk(node.body, needed and "TYPE_CHECKING" not in ast.unparse(node.test))
                yield from walk(node.orelse, needed)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(node.body, False)
            elif isinstance(node, ast.ClassDef | ast.With | ast.For | ast.While):
                yield from walk(node.body, needed)

    yield from walk(ast.parse(source).body, True)


def distribution(package: str) -> str:
    return canonical(DISTRIBUTIONS.get(package, package))


def undeclared(source: str, on_gpu_alone: bool = False) -> list[str]:
    """The packages that `source` imports and pyproject.toml does not declare where they are needed.

    on_gpu_alone: a module that is imported only where a GPU asks for it, and may need an extra.
    """
    missing = []
    for package, needed in imports(source):
        if package in OURS or package in sys.stdlib_module_names:
            continue
        declared = BASE if needed and not on_gpu_alone else BASE | EXTRAS
        if distribution(package) not in declared and package != "tomllib":
            missing.append(package)
    return missing


def modules() -> list[Path]:
    return sorted([*(REPOSITORY / "saga_fast").rglob("*.py"), *(REPOSITORY / "kernels").rglob("*.py")])


@pytest.mark.parametrize("module", modules(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_are_declared(module):
    assert not undeclared(module.read_text(), on_gpu_alone=module.parent == REPOSITORY / "kernels/gpu")


def test_the_base_install_holds_nothing_that_is_not_imported():
    used = {distribution(package) for module in modules() for package, _ in imports(module.read_text())}
    assert BASE - used == NOT_IMPORTED


def test_extras_are_not_needed_twice():
    assert not named(PROJECT["optional-dependencies"]["gpu"]) & BASE and not TRACKERS & (BASE | EXTRAS)


@pytest.mark.parametrize(
    "source,found",
    [
        ("import requests", ["requests"]),
        ("from requests.sessions import Session", ["requests"]),
        ("import onnx", ["onnx"]),
        ("class A:\n    import requests", ["requests"]),
        ("if True:\n    import requests", ["requests"]),
        ("def f():\n    import requests", ["requests"]),
        ("def f():\n    import onnx", []),
        ("try:\n    import onnx\nexcept ImportError:\n    onnx = None", []),
        ("try:\n    import onnx\nexcept ValueError:\n    onnx = None", ["onnx"]),
        ("from . import requests\nimport saga_fast.train, json, torch, PIL.Image, faiss", []),
    ],
)
def test_what_is_undeclared_is_found(source, found):
    assert undeclared(source) == found


@pytest.mark.slow
def test_the_trainer_starts_without_any_extra():
    """What only an extra brings is made impossible to import."""
    absent = sorted({name.replace("-", "_") for name in EXTRAS - BASE} | TRACKERS)
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import saga_fast.train, saga_fast.export"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
