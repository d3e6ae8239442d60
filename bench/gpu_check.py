"""All that only a GPU can say, in three commands of four minutes at most, from a bare checkout, without internet.

    python -m bench.gpu_check check      is it right: every op at the 8B's shapes, steps beside a CPU's, CUDA graphs
    python -m bench.gpu_check sanitize   memory errors and races: compute-sanitizer on the smallest case of each kernel
    python -m bench.gpu_check bench      how fast: a step at full size and on a card of 24 GB, each op beside its rivals

`make gpu-check`, `gpu-sanitize` and `gpu-bench` run them. They need PyTorch, Triton, pytest and the trainer's own
packages, and use nvcc, compute-sanitizer and rivals where those are. The extension is built in place, once for all
three, and `saga_kernels` is found through a link, so nothing is installed. What is found is OUT/CARD/check.json and so
on, written anew after every part, with the figures of each in a file of its own; the log is in build/. What is timed
runs alone. `--dry-run` says what would be run; `--rehearse` runs what a CPU can, small, and takes its time.

Exit code 0: every part passed; 1: one did not; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import card, machine
from bench.parts import REPOSITORY, SITE, Part, Stage, carry_out, plan

SECONDS = 232  # of a command, of the 240 that it may take
SLOWER = 3  # times as long as on a machine with a GPU may a rehearsal take
GB = 10**9
BIG = 60 * GB  # of memory: all tests of the ops fit at once
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
TOOLS = ("memcheck", "racecheck")
# By the worth of their figures: what comes last is what is not run where time is short.
OPS = ("nf4", "decode", "attention", "sampling", "logprob", "swiglu", "norm", "rope", "advantage")
FULL_SIZE = (
    "check", "decode, 64 rows", "decode, 128 rows", "step", "rollout", "replay", "decode, 64 rows, resident",
    "decode, 128 rows, resident", "decode, 8 rows",
)  # fmt: skip
AGAINST_CPU = {"tiny run": 150, "tiny step": 100, "bf16 step": 100, "graphs": 90}  # seconds at most


def python(module: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", module, *arguments]


def collected(word: str) -> Part:
    """The tests that a command runs, found and imported, which takes no GPU."""
    return Part(f"tests of {word}", [*PYTEST, "--collect-only", "-k", word, "tests/gpu"], 60)


def check(out: Path, rehearse: bool) -> list[Stage]:
    """Beside a CPU, which takes longest, and the ops' own tests, all at once: compiling takes most of their time."""
    few = ("--steps", "2") if rehearse else ()
    parts = [
        Part(name, python("bench.against_cpu", name.replace(" ", "-"), *few, "--json", file), seconds, writes=file)
        for name, seconds in AGAINST_CPU.items()
        for file in [out / f"{name.replace(' ', '_')}.json"]
    ]
    if rehearse:
        return [Stage([*parts, collected("8b")])]
    tests = [Part(f"test {op}", [*PYTEST, "-k", "8b", f"tests/gpu/test_{op}.py"], 110) for op in OPS]
    return [Stage([*parts, *tests], _at_once(len(parts) + len(tests)))]


def sanitize(out: Path, rehearse: bool) -> list[Stage]:
    """Each kernel's smallest case: once as it is, which also compiles it, then under each tool."""
    if rehearse:
        return [Stage([collected("smallest")])]

    def of(op: str) -> list[str]:
        return [*PYTEST, "-k", "smallest", f"tests/gpu/test_{op}.py"]

    tools = [
        Part(
            f"{tool} {op}",
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *of(op)],
            120,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTORCH_ALLOC_CONF": ""},
            program="compute-sanitizer",
        )
        for tool in TOOLS
        for op in OPS
    ]
    warm = [Part(f"smallest {op}", of(op), 90) for op in OPS]
    return [Stage(warm, _at_once(len(warm))), Stage(tools, _at_once(8))]


def bench(out: Path, rehearse: bool) -> list[Stage]:
    """One at a time, by worth. `generate` is left to `python -m bench.full_size`: it takes a minute."""
    small = ("--shape", "small") if rehearse else ()
    parts = []

    def of(name: str, module: str, *arguments: str, seconds: float, file: str) -> None:
        command = python(module, *arguments, "--json", out / file)
        parts.append(Part(name, command, seconds, writes=out / file))

    of("full size", "bench.full_size", *small, "--parts", *FULL_SIZE, seconds=125, file="full_size.json")
    if not rehearse:
        of("time nf4", "bench.gpu", "nf4", seconds=35, file="nf4.json")
    of("full size, 24 GiB", "bench.full_size", *small, "--card-gib", "24", seconds=85, file="full_size_24.json")
    for op in () if rehearse else OPS[1:]:
        of(f"time {op}", "bench.gpu", op, seconds=35, file=f"{op}.json")
    return [Stage(parts)]


CHECKS: dict[str, Callable[[Path, bool], list[Stage]]] = {"check": check, "sanitize": sanitize, "bench": bench}


def _at_once(most: int) -> int:
    """As many processes as the machine's cores, and the card's memory, have room for."""
    cores = max(1, (os.cpu_count() or 1) - 1)
    roomy = not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory > BIG
    return min(most, cores if roomy else 3)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=CHECKS)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench/results", help="the card's folder goes there")
    parser.add_argument("--seconds", type=float, help=f"for everything; {SECONDS}, and as long as it takes to rehearse")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="parts whose name holds one of these")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and with which limits")
    parser.add_argument("--rehearse", action="store_true", help="run what a CPU can run of it, small")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if not (gpu or options.dry_run or options.rehearse):
        print("gpu-check: no GPU that PyTorch can use; nothing was checked", file=sys.stderr)
        return 2
    out = options.out.resolve() / (card() or "cpu")
    stages = [
        stage._replace(parts=[part for part in stage.parts if any(word in part.name for word in options.only)])
        for stage in CHECKS[options.what](out, options.rehearse)
    ]
    stages.insert(0, Stage([Part("build", python("bench.build"), 150)], needed=True))
    if options.rehearse:
        stages = [
            stage._replace(parts=[p._replace(seconds=SLOWER * p.seconds) for p in stage.parts]) for stage in stages
        ]
    seconds = options.seconds or (sum(stage.worst for stage in stages) if options.rehearse else SECONDS)
    if options.dry_run:
        print(*plan(stages, seconds), sep="\n")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    SITE.mkdir(parents=True, exist_ok=True)
    if not (link := SITE / "saga_kernels").is_symlink():
        link.symlink_to(REPOSITORY / "kernels", target_is_directory=True)
    log = REPOSITORY / f"build/gpu_check_{options.what}.log"
    log.unlink(missing_ok=True)
    about = {"command": options.what, "rehearsal": options.rehearse, "sanitizer": shutil.which("compute-sanitizer")}
    failed = carry_out(stages, out / f"{options.what}.json", log, seconds, about)
    print(f"{machine()['gpu'] or 'no GPU'}: {failed or 'none'} of the parts did not pass; {out}, {log}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
