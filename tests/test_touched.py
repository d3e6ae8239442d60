"""The look at what the fast set touches finds what it does not, in one process and in several."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import touched

REPOSITORY = Path(__file__).parents[1]
FILES = {
    "pyproject.toml": """
        [tool.pytest.ini_options]
        addopts = ["--import-mode=importlib", "-m", "not slow"]
        markers = ["slow: a sweep"]
        testpaths = ["tests"]
        pythonpath = ["."]
        """,
    "tests/conftest.py": """
        from .touched import Touched, asked_for
        def pytest_configure(config):
            if asked_for(config):
                config.pluginmanager.register(Touched())
        """,
    "saga_fast/__init__.py": "",
    "saga_fast/constants.py": "SQUARES = [x * x for x in range(3)]",  # nothing that could run but on import
    "saga_fast/one.py": "def one(): return 1",
    "saga_fast/inner/two.py": """
        from dataclasses import dataclass
        @dataclass
        class Two:
            def two(self): return 2
        """,
    "kernels/__init__.py": """
        from .ops import first, second
        __all__ = ["Layout", "first", "second"]
        """,
    "kernels/ops.py": """
        def first(): pass
        def second(): pass
        """,
    "tests/test_one.py": """
        from saga_fast import one
        def test_one(): assert one.one() == 1
        """,
    "tests/test_two.py": """
        import pytest, kernels.ops
        from saga_fast.inner.two import Two
        def test_first(): kernels.ops.first()
        @pytest.mark.slow
        def test_two(): assert Two().two() == 2; kernels.ops.second()
        """,
}


@pytest.fixture
def project(tmp_path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text.replace("\n        ", "\n"))
    shutil.copy(touched.__file__, tmp_path / "tests")
    return tmp_path


def run(project: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "loadfile")], ids=["alone", "workers"])
def test_what_is_not_touched_fails_the_run(project, workers):
    code, said = run(project, *workers)
    assert code == 1 and "2 passed" in said
    _, missing = said.split("not touched by the fast set")
    assert missing.splitlines()[1:3] == ["saga_fast/inner/two.py", "op second"] and "one.py" not in missing
    text = (project / "tests/test_two.py").read_text()
    (project / "tests/test_two.py").write_text(text.replace("@pytest.mark.slow\n", ""))
    code, said = run(project, *workers)
    assert code == 0 and "3 passed" in said and "touched" not in said


@pytest.mark.parametrize("chosen", [["tests/test_one.py"], ["-k", "one"], ["-m", "slow"], ["--collect-only"]])
def test_only_the_whole_fast_set_is_looked_at(project, chosen):
    assert run(project, *chosen)[0] == 0


def test_every_module_is_looked_at_and_every_op():
    """In this tree, where nothing ran: what has functions, and what is public."""
    missing = touched.untouched(REPOSITORY, set())
    assert {"saga_fast/train.py", "saga_fast/losses/policy.py", "kernels/gpu/nf4.py", "op nf4_matmul"} <= set(missing)
    assert len(missing) > 100 and len(touched.public_ops(REPOSITORY)) > 10
    assert all((REPOSITORY / package).is_dir() for package in touched.PACKAGES)
