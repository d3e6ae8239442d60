"""Compile every shipped Triton kernel for every chip it may run on, without a GPU, and check the results.

    python -m bench.compile [--json FILE] [--only OP] [--jobs N]

A configuration is wrong if it does not compile, spills registers without a stated reason, needs more shared memory
than a block of that chip may have, or uses no tensor cores where it declares them. Exit code 1 if any is wrong.
The committed `bench/results/compile.json` holds the figures of the Triton it names; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 90, 100, 120)
RESERVED = 1024  # bytes of shared memory that the system keeps for itself; the tools count them from sm_90 on
KERNELS = Path(__file__).parents[1] / "kernels/gpu"
SHARED = {"shipped", "softmax"}  # modules there that are no op
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
LOCAL_MEMORY = re.compile(r"\b(?:STL|LDL)\b")


def ops() -> list[str]:
    return sorted({module.name for module in pkgutil.iter_modules([str(KERNELS)])} - SHARED)


def compile_op(task: tuple[str, int]) -> list[dict[str, Any]]:
    """Every configuration of one op on one chip. Runs in a worker process, the only one that imports Triton."""
    op, arch = task
    return [figures(op, shipped, arch) for shipped in import_module(f"saga_kernels.gpu.{op}").shipped(arch)]


def figures(op: str, shipped: Any, arch: int) -> dict[str, Any]:
    """One configuration on one chip: the columns of the table, and the faults under "wrong"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.disasm import path_to_cuobjdump

    from saga_kernels.gpu.shipped import SHARED_MEMORY, launch_options

    row = {"op": op, "name": shipped.name, "arch": arch}
    constexprs = dict.fromkeys(shipped.constants, "constexpr")
    signature = {name: {**shipped.signature, **constexprs}[name] for name in shipped.kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in shipped.aligned
    }
    options = launch_options(shipped.warps, shipped.stages, shipped.fp_fusion)
    source = ASTSource(shipped.kernel, signature, dict(shipped.constants), attrs)
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is this configuration's verdict
        return {**row, "wrong": [f"does not compile: {_last_line(error)}"]}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [path_to_cuobjdump(), what, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", dump("-res-usage"))}
        stack = usage["STACK"] + usage["LOCAL"]
        spills = len(LOCAL_MEMORY.findall(dump("-sass"))) if stack else 0  # disassembly takes its time
    static = max(0, usage["SHARED"] - RESERVED) if arch >= 90 else usage["SHARED"]
    row |= {
        "registers": usage["REG"],
        "spills": spills,
        "stack": stack,
        "shared": kernel.metadata.shared + static,
        "tensor_cores": dict(sorted(Counter(TENSOR_CORES.findall(kernel.asm["ptx"])).items())),
        "bytes": len(kernel.asm["cubin"]),
    }
    wrong = []
    if stack and not shipped.spills_allowed:
        wrong.append(f"spills: {spills} accesses to local memory, stack of {stack} bytes")
    if row["shared"] > SHARED_MEMORY[arch]:
        wrong.append(f"{row['shared']} bytes of shared memory, the chip has {SHARED_MEMORY[arch]}")
    if shipped.tensor_cores and not row["tensor_cores"]:
        wrong.append("no tensor-core instruction")
    return {**row, "wrong": wrong}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1])))


def compile_all(only: str | None = None, jobs: int = 2) -> Iterator[dict[str, Any]]:
    """A row a configuration, in a fixed order, each compiled anew by the real compiler in a fresh process."""
    os.environ.pop("TRITON_INTERPRET", None)  # what the fresh processes inherit, and read before they import Triton
    with tempfile.TemporaryDirectory() as os.environ["TRITON_CACHE_DIR"]:
        tasks = [(op, arch) for op in ([only] if only else ops()) for arch in ARCHITECTURES]
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            for rows in pool.imap(compile_op, tasks):
                yield from rows


def key(row: dict[str, Any]) -> str:
    return f"{row['op']}/{row['name']}/sm_{row['arch']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here; with --only, other ops' figures in it stay")
    parser.add_argument("--only", help="one op: a file of kernels/gpu without its suffix", choices=ops(), metavar="OP")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    rows = []
    form = "{:58} {:>9} {:>6} {:>5} {:>7} {:>7}  {}"
    print(form.format("kernel", "registers", "spills", "stack", "shared", "bytes", "tensor cores"))
    for row in compile_all(arguments.only, arguments.jobs):
        rows.append(row)
        columns = [row.get(name, "-") for name in ("registers", "spills", "stack", "shared", "bytes")]
        cores = " ".join(f"{name} x{count}" for name, count in row.get("tensor_cores", {}).items())
        print(form.format(key(row), *columns, cores), flush=True)
        for verdict in row["wrong"]:
            print(f"    WRONG: {verdict}")
    wrong = sum(bool(row["wrong"]) for row in rows)
    print(f"{len(rows)} configurations, {wrong} wrong")
    if arguments.json is not None:
        write(arguments.json, rows, arguments.only)
    return int(wrong > 0)


def write(path: Path, rows: list[dict[str, Any]], only: str | None) -> None:
    """JSON with one configuration per line, for readable diffs."""
    kernels = json.loads(path.read_text())["kernels"] if only and path.exists() else {}
    kernels = {name: row for name, row in kernels.items() if not name.startswith(f"{only}/")}
    columns = ("registers", "spills", "stack", "shared", "tensor_cores", "bytes", "wrong")
    kernels |= {key(row): {name: row[name] for name in columns if row.get(name) not in (None, [])} for row in rows}
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(kernels.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "triton": "{version("triton")}",\n  "kernels": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    sys.exit(main())
