"""csrc's C++ compiled with AddressSanitizer and UBSan passes the ops' own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

ROOT = Path(__file__).parents[2]
OPS = "advantage", "attention", "decode", "linear", "norm", "rope", "sampling", "swiglu"
TESTS = [ROOT / f"tests/saga_kernels/test_{op}.py" for op in OPS]

# Loaded before the package, the instrumented library is what registers the ops.
RUN = """
import importlib.util, pathlib, sys
import pytest, torch
spec = importlib.util.spec_from_file_location("saga_kernels._C", sys.argv[1])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
import saga_kernels
loaded = pathlib.Path("/proc/self/maps").read_text()
assert sys.argv[1] in loaded and "kernels/_C." not in loaded
chosen = "(advantage or attention or decode or linear or compiled) and not opcheck"
sys.exit(pytest.main(["-q", "-m", "", "-p", "no:cacheprovider", "-k", chosen, *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_the_ops_tests_pass_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    library = tmp_path / "_C.so"
    compiler = get_cxx_compiler()
    includes = [flag for path in (*include_paths(), sysconfig.get_path("include")) for flag in ("-isystem", path)]
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-O1", "-g1", "-shared", "-fPIC", "-fsanitize=address,undefined"),
            *("-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
            *includes,
            *("-o", library, *(ROOT / "csrc").glob("*.cpp")),
            *(*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"),
        ],
        check=True,
    )  # fmt: skip
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")  # the second so that exceptions can be intercepted
    ]
    ran = subprocess.run(
        [sys.executable, "-c", RUN, library, *TESTS],
        env={
            **os.environ,
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own, at its end
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
