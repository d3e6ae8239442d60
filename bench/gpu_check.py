"""Every check that needs a GPU: `make gpu-check OUT=DIR`, or `python -m bench.gpu_check --out DIR`.

From a bare checkout, without internet; it needs PyTorch, Triton and pytest, and uses nvcc, compute-sanitizer and rival
packages where they are; `bench.full_size` needs the trainer's own. The extension is built in place, and `saga_kernels`
is found through a link, so nothing is installed. Each part is a process of its own with a time limit, and
DIR/gpu_check.json is rewritten after every part: a kernel that hangs costs its own part alone. Tests run in parallel,
as compiling kernels takes most of their time; timed parts run alone. Exit code 0: every part passed;
1: one did not; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import machine, write_json

REPOSITORY = Path(__file__).parents[1]
SITE = REPOSITORY / "build/site"  # holds one link, saga_kernels -> kernels
TOTAL_SECONDS = 460
TAIL = 4000  # characters of a part's output that its JSON keeps; DIR/gpu_check.log has all of it


class Part(NamedTuple):
    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = {}
    json: Path | None = None


def build(without_cuda: bool = False) -> Part:
    """The extension, in place, for this card alone. Without nvcc, and after a failed build with it, in C++ alone."""
    major, minor = torch.cuda.get_device_capability()
    headers = Path(torch.__file__).parents[1].glob("nvidia/cu*/include")  # PyTorch's own, if the toolkit lacks some
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "CPATH": os.pathsep.join(map(str, headers))}
    if without_cuda:
        environment["SAGA_CUDA"] = "0"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    return Part("build in C++ alone" if without_cuda else "build", command, 150, environment)


def checks() -> Iterator[Part]:
    """Correctness; memory errors and races in the tests called "small"."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = sorted((REPOSITORY / "tests/gpu").glob("test_*.py"))
    for test in tests:
        yield Part(f"test {test.stem.removeprefix('test_')}", [*pytest, str(test)], 150)
    if tests and (sanitizer := shutil.which("compute-sanitizer")):
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest, "-k", "small", "tests/gpu"]
            yield Part(tool, command, 150, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def timings(out: Path) -> Iterator[Part]:
    """A step at full size, then each op beside its rivals."""
    file = out / "full_size.json"
    yield Part("full size", [sys.executable, "-m", "bench.full_size", "--json", str(file)], 240, json=file)
    for op in sorted(path.stem for path in (REPOSITORY / "bench/gpu").glob("[!_]*.py")):
        file = out / f"{op}.json"
        yield Part(f"time {op}", [sys.executable, "-m", "bench.gpu", op, "--json", str(file)], 60, json=file)


def run(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Runs one part, and kills it with all its children after its time limit."""
    limit, start = min(part.seconds, seconds), time.monotonic()
    if limit < 5:
        return {"part": part.name, "verdict": "not run: no time left"}
    path = os.pathsep.join((str(SITE), str(REPOSITORY), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **part.environment}
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            part.command, cwd=REPOSITORY, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            verdict = "passed" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            verdict = f"failed: not done after {limit:.0f} s"
        said.seek(0)
        output = said.read().decode(errors="replace")
    with (out / "gpu_check.log").open("a") as log:  # in one write, as others may end at the same time
        log.write(f"==== {part.name}: {' '.join(part.command)}\n{output}")
    figures = {"part": part.name, "verdict": verdict, "seconds": round(time.monotonic() - start, 1)}
    if part.json is not None and part.json.exists():
        measured = json.loads(part.json.read_text())
        part.json.unlink()
        figures |= {name: value for name, value in measured.items() if name != "machine"}
        if code == 0:
            return figures
    return {**figures, "output": output[-TAIL:]}


def driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description="Check and time the ops on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and gpu_check.log")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="parts whose name holds one of these")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no GPU that PyTorch can use; nothing was checked", file=sys.stderr)
        return 2
    out, deadline = arguments.out.resolve(), time.monotonic() + arguments.seconds
    out.mkdir(parents=True, exist_ok=True)
    SITE.mkdir(parents=True, exist_ok=True)
    link = SITE / "saga_kernels"
    if not link.is_symlink():
        link.symlink_to(REPOSITORY / "kernels", target_is_directory=True)
    about = {"driver": driver(), "cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability()}
    about["sanitizer"] = shutil.which("compute-sanitizer")
    done: list[dict[str, Any]] = []

    def carry_out(parts: Iterable[Part], at_once: int = 1) -> bool:
        """Whether all of them passed."""
        wanted = [part for part in parts if any(word in part.name for word in arguments.only)]
        with ThreadPoolExecutor(at_once) as pool:
            for figures in pool.map(lambda part: run(part, out, deadline - time.monotonic()), wanted):
                done.append(figures)
                print(f"{figures['part']:28} {figures['verdict']} ({figures.get('seconds', 0):.0f} s)", flush=True)
                write_json(out / "gpu_check.json", {**about, "parts": done})
        return all(figures["verdict"] == "passed" for figures in done[len(done) - len(wanted) :])

    if carry_out([build()]) or carry_out([build(without_cuda=True)]):
        carry_out(checks(), at_once=max(1, (os.cpu_count() or 1) - 1))
        carry_out(timings(out))
    passed = sum(part["verdict"] == "passed" for part in done)
    print(f"{machine()['gpu']}: {passed} of {len(done)} parts passed; {out / 'gpu_check.json'}")
    return int(passed < len(done))


if __name__ == "__main__":
    sys.exit(main())
