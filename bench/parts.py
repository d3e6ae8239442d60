"""Parts of a check: processes of their own, each with a time limit, whose results are written as they come.

A part that fails, hangs or cannot begin costs itself and nothing else: it is killed with its children when its time is
up, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from bench import write_json

REPOSITORY = Path(__file__).parents[1]
SITE = REPOSITORY / "build/site"  # holds one link, saga_kernels -> kernels
TAIL = 4000  # characters of a failed part's output that the JSON keeps; the log has all of it
LEAST = 5  # seconds: with fewer left a part is not begun
PASSED = "passed"


class Part(NamedTuple):
    """seconds: its limit. environment: beside the process's own. writes: a file of figures of its own, written as they
    come, that need not come to an end. program: what must be on PATH for it."""

    name: str
    command: Sequence[str | Path]
    seconds: float
    environment: Mapping[str, str] = {}
    writes: Path | None = None
    program: str | None = None


class Stage(NamedTuple):
    """Parts, `at_once` of them at a time, the longest first as they stand. needed: without it nothing after it runs."""

    parts: Sequence[Part]
    at_once: int = 1
    needed: bool = False

    @property
    def worst(self) -> float:
        """Seconds that it takes if every part takes all of its time."""
        workers = [0.0] * max(1, min(self.at_once, len(self.parts)))
        for part in self.parts:
            workers[workers.index(min(workers))] += part.seconds
        return max(workers)


def environment(part: Part) -> dict[str, str]:
    """A compiled kernel is kept for the parts that come after, and so is what PyTorch compiles of a rival."""
    path = os.pathsep.join((str(SITE), str(REPOSITORY), os.environ.get("PYTHONPATH", "")))
    kept = {
        "TRITON_CACHE_DIR": str(REPOSITORY / "build/triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(REPOSITORY / "build/inductor"),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # as saga_fast has it, before anything asks for memory
        "OMP_NUM_THREADS": "4",  # as others run beside it
    }
    made = {**kept, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **part.environment}
    made.pop("TRITON_INTERPRET", None)
    return made


def run(part: Part, log: Path, seconds: float) -> dict[str, Any]:
    """One part, with at most `seconds` left for it: its verdict, its time, and, unless it passed, what it said last."""
    limit, start = min(part.seconds, seconds), time.monotonic()
    figures: dict[str, Any] = {"part": part.name, "limit": part.seconds}
    if limit < LEAST:
        return {**figures, "verdict": "not run: no time left"}
    if part.program is not None and shutil.which(part.program) is None:
        return {**figures, "verdict": f"not run: there is no {part.program} here"}
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                list(map(str, part.command)), cwd=REPOSITORY, env=environment(part), stdout=said,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {**figures, "verdict": f"not run: {error}"}
        try:
            code = process.wait(limit)
            verdict = PASSED if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            verdict = f"failed: not done after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it began and left running, too
            process.wait()
        said.seek(0)
        output = said.read().decode(errors="replace")
    with log.open("a") as file:  # in one write, as others may end at the same time
        file.write(f"==== {part.name}: {' '.join(map(str, part.command))}\n{output}")
    figures |= {"verdict": verdict, "seconds": round(time.monotonic() - start, 1)}
    if part.writes is not None and part.writes.exists():
        figures["figures"] = part.writes.name
    return figures if verdict == PASSED else {**figures, "output": output[-TAIL:]}


def carry_out(stages: Sequence[Stage], file: Path, log: Path, seconds: float, about: Mapping[str, Any]) -> int:
    """Runs the stages one after another, within `seconds` in all; `file` is written anew after every part. Returns how
    many parts did not pass."""
    deadline = time.monotonic() + seconds
    done: list[dict[str, Any]] = []

    def note(figures: dict[str, Any]) -> None:
        done.append(figures)
        print(f"{figures['part']:32} {figures['verdict']} ({figures.get('seconds', 0):.0f} s)", flush=True)
        write_json(file, {**about, "parts": done})

    lost = None
    for stage in stages:
        if lost:
            for part in stage.parts:
                note({"part": part.name, "limit": part.seconds, "verdict": f"not run: {lost} failed"})
            continue
        begun = len(done)
        with ThreadPoolExecutor(max(1, stage.at_once)) as pool:
            going = [
                pool.submit(lambda part: run(part, log, deadline - time.monotonic()), part) for part in stage.parts
            ]
            for ended in as_completed(going):
                note(ended.result())
        if stage.needed:
            lost = next((part["part"] for part in done[begun:] if part["verdict"] != PASSED), None)
    return sum(part["verdict"] != PASSED for part in done)


def plan(stages: Sequence[Stage], seconds: float) -> Iterator[str]:
    """What would be run, in lines."""
    for i, stage in enumerate(stages):
        yield f"{i + 1}. {stage.at_once} at a time, {stage.worst:.0f} s at most{'; all else needs it' * stage.needed}"
        for part in stage.parts:
            needs = f"  (needs {part.program})" if part.program else ""
            yield f"   {part.seconds:4.0f} s  {part.name:32} {' '.join(map(str, part.command))}{needs}"
    yield f"in all {sum(stage.worst for stage in stages):.0f} s at most, and broken off after {seconds:.0f}"
