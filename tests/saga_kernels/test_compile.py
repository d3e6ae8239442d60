"""Shipped kernels compile for every chip, without a GPU; changes in registers or shared memory fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
RECORDED = REPOSITORY / "bench/results/compile.json"
OPS = {path.stem for path in (REPOSITORY / "kernels/gpu").glob("[!_]*.py")} - {"shipped", "softmax"}
LOOKED_AT = ("registers", "shared", "tensor_cores")

WRONG = """
import triton, triton.language as tl
from bench.compile import figures
from saga_kernels.gpu.shipped import Shipped

@triton.jit
def spills(x, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.load(x + at, at < size, 0.0)
    tl.store(x + at, row - tl.max(row), at < size)

@triton.jit
def too_large(x, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(x + at, tl.trans(tl.load(x + at)))

@triton.jit
def unknown(x, size, BLOCK: tl.constexpr):
    tl.store(x, no_such_name)

def verdict(kernel, block, warps=1, **more):
    row = figures("op", Shipped("name", kernel, {"x": "*fp32", "size": "i32"}, {"BLOCK": block}, warps, **more), 86)
    print("; ".join(row["wrong"]))

verdict(spills, 1 << 14)
verdict(spills, 1 << 14, spills_allowed="on purpose")
verdict(spills, 1 << 8, tensor_cores=True)
verdict(too_large, 256, 32)
verdict(unknown, 1)
"""


def run(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def now(tmp_path_factory) -> dict:
    """What compiles here, as `bench.compile` tells it."""
    file = tmp_path_factory.mktemp("compiled") / "compile.json"
    done = run("-m", "bench.compile", "--json", file, TRITON_INTERPRET="1")
    assert file.exists(), done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.mark.slow
def test_what_ships_compiles(now):
    assert {name.split("/")[0] for name in now["kernels"]} == OPS
    assert {name.rsplit("_")[-1] for name in now["kernels"]} == {"80", "86", "90", "100", "120"}
    wrong = {name: row["wrong"] for name, row in now["kernels"].items() if "wrong" in row}
    if (
        now["triton"] != json.loads(RECORDED.read_text())["triton"]
    ):  # another compiler may spill where this one does not
        wrong = {name: [fault for fault in faults if not fault.startswith("spills")] for name, faults in wrong.items()}
    assert not any(wrong.values()), wrong


@pytest.mark.slow
def test_figures_are_those_on_record(now):
    changes = compared(json.loads(RECORDED.read_text()), now)
    mend = "if that is meant: python -m bench.compile --json bench/results/compile.json"
    assert not changes, "\n".join([*changes, mend])


def compared(recorded: dict, now: dict) -> list[str]:
    """A line for each configuration whose figures are others now. Another compiler's say nothing, which skips."""
    if recorded["triton"] != now["triton"]:
        said = f"compared NOTHING: the figures on record are Triton {recorded['triton']}'s, here is {now['triton']}"
        pytest.skip(f"{said}; python -m bench.compile --json bench/results/compile.json records this one's")
    before, after = (
        {name: {figure: row[figure] for figure in LOOKED_AT} for name, row in file["kernels"].items()}
        for file in (recorded, now)
    )
    return [
        f"{name}: {before.get(name)} recorded, {after.get(name)} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def test_a_change_is_seen_and_another_triton_is_said_to_compare_nothing():
    recorded = json.loads(RECORDED.read_text())
    name, row = next(iter(recorded["kernels"].items()))
    larger = {**recorded, "kernels": {**recorded["kernels"], name: {**row, "registers": row["registers"] + 1}}}
    assert not compared(recorded, recorded)
    (line,) = compared(recorded, larger)
    assert line.startswith(f"{name}: ")
    with pytest.raises(
        pytest.skip.Exception, match="compared NOTHING: the figures on record are Triton .*'s, here is 0"
    ):
        compared(recorded, {**larger, "triton": "0.0"})


@pytest.mark.slow
def test_what_is_wrong_is_found(tmp_path):
    script = tmp_path / "wrong.py"  # Triton reads a kernel's source from its file
    script.write_text(WRONG)
    done = run(script, PYTHONPATH=str(REPOSITORY), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    spills, allowed, no_tensor_cores, too_large, unknown = done.stdout.splitlines()
    assert spills.startswith("spills: ") and allowed == "" and no_tensor_cores == "no tensor-core instruction"
    assert too_large.endswith("bytes of shared memory, the chip has 101376")
    assert unknown.startswith("does not compile: ") and "no_such_name" in unknown
