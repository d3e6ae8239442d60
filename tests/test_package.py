"""What is packed is what a user builds from, whatever the packing machine could compile.

pytest -m package tests/test_package.py     # wheels from the sdist and the tree, minutes long, and a package index
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {"kernels": "saga_kernels", "saga_fast": "saga_fast"}
SKIPPED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs", "shared", "*.so")


def sources(*folders: str) -> set[str]:
    """What these folders of the repository hold, but what is made of it."""
    found = (path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.is_file())
    left = (path for path in found if "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc"))
    return {path.relative_to(REPOSITORY).as_posix() for path in left}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Packed from a copy, by a machine that compiles no CUDA."""
    tree = shutil.copytree(REPOSITORY, tmp_path_factory.mktemp("copy") / "tree", ignore=SKIPPED)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    command = ["env", "SAGA_CUDA=0", sys.executable, "-c", code, str(tree.parent)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tree.parent / done.stdout.split()[-1]


@pytest.mark.slow
def test_an_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
        about = packed.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode().splitlines()
    wanted = sources("csrc", *PACKAGES) | {"pyproject.toml", "setup.py", "README.md", "constraints.txt", "Makefile"}
    assert {"csrc/nf4_cuda.cu", "csrc/vector.h", "saga_fast/report/page.css"} <= wanted
    assert not wanted - held
    assert "License-Expression: Apache-2.0" in about and "License-File: LICENSE" in about and "LICENSE" in held
    assert "Project-URL: Paper, https://arxiv.org/abs/2606.15134" in about


@pytest.mark.package
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "here"])
def test_a_wheel_of_the_sdist_runs_in_a_clean_environment(isolated, sdist, tmp_path):
    pip = [sys.executable, "-m", "pip"]
    here = [] if isolated else ["--no-build-isolation"]
    command = ["env", "SAGA_CUDA=0", *pip, "wheel", "--no-deps", *here, "--wheel-dir", str(tmp_path), str(sdist)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    moved = {f"{PACKAGES[top]}/{rest}" for top, _, rest in (name.partition("/") for name in sources(*PACKAGES))}
    assert not moved - held and any(name.startswith("saga_kernels/_C.") for name in held)
    # Alone on the path but for what it depends on: the compiled ops answer.
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    code = (
        "import saga_kernels, saga_fast.train, torch; assert saga_kernels.__file__.startswith(sys.argv[1]);"
        "print(saga_kernels.group_advantage(torch.tensor([[1.0, 0.0]]))[0].tolist())"
    )
    probe = [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1]); {code}", str(tmp_path / "site")]
    done = subprocess.run(probe, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("[["), done.stderr


@pytest.mark.package
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "here"])
def test_the_tree_installs(isolated, tmp_path):
    tree = shutil.copytree(REPOSITORY, tmp_path / "tree", ignore=SKIPPED)
    here = [] if isolated else ["--no-build-isolation"]
    command = ["env", "SAGA_CUDA=0", sys.executable, "-m", "pip", "install", "--no-deps", *here]
    done = subprocess.run([*command, "--target", str(tmp_path / "site"), "."], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "site/saga_kernels").glob("_C.*")) and (tmp_path / "site/saga_fast/train.py").exists()
