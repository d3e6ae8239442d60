"""Compares a run's files with the golden ones: describes the first difference."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..saga_fast.small import lines

FILES = Path(__file__).parent / "files"  # one JSON a run
PACKAGES = ("torch", "transformers", "bitsandbytes", "faiss-cpu", "numpy", "pillow", "scikit-learn")


class Left(NamedTuple):
    """Of a run: its lines of metrics.jsonl without times, final.json, and the SHA-256 of the encoder's weights."""

    metrics: list[dict[str, Any]]
    final: dict[str, Any]
    encoder_sha256: str


class Outcome(NamedTuple):
    """compared: whether there was anything to hold the run against. differences: a line each, none if all is equal."""

    compared: bool
    differences: list[str]
    line: str


def read(run: Path) -> Left:
    """What the finished run in the folder `run` left."""
    hashes = json.loads((run / "encoder/manifest.json").read_text())["sha256"]
    return Left(lines(run), json.loads((run / "final.json").read_text()), hashes["model.safetensors"])


def environment() -> dict[str, str | None]:
    """What rounding depends on: the processor, what PyTorch does with it, and the packages that compute."""
    return {"processor": _processor(), "vectors": torch.backends.cpu.get_cpu_capability(), **_versions()}


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    found: dict[str, str] = {}  # of the first core
    for line in file.read_text().splitlines() if file.exists() else ():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    named = [found[key] for key in ("vendor_id", "cpu family", "model", "model name") if key in found]
    return ", ".join(named) or platform.processor() or platform.machine()


def _versions() -> dict[str, str | None]:
    def known(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: known(package) for package in PACKAGES}


def differences(name: str, found: Left, wanted: Left) -> Iterator[str]:
    """Each line says the run, the place, and both values; of metrics.jsonl the first step that differs is enough, as
    what comes after it follows from it."""
    for step, (ours, theirs) in enumerate(zip_longest(found.metrics, wanted.metrics)):
        if ours is None or theirs is None:
            yield f"{name}: metrics.jsonl has {len(found.metrics)} steps, was {len(wanted.metrics)}"
            break
        if faults := list(_unequal(ours, theirs)):
            yield from (f"{name}: step {step}: {fault}" for fault in faults)
            break
    yield from (f"{name}: final.json: {fault}" for fault in _unequal(found.final, wanted.final))
    if found.encoder_sha256 != wanted.encoder_sha256:
        yield f"{name}: the encoder's weights: SHA-256 {found.encoder_sha256}, was {wanted.encoder_sha256}"


def _unequal(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        here, there = ours.get(key, "nothing"), theirs.get(key, "nothing")
        if isinstance(here, dict) and isinstance(there, dict):
            yield from _unequal(here, there, f"{prefix}{key}.")
        elif json.dumps(here) != json.dumps(there):  # to the last bit: JSON holds the shortest text that reads back
            yield f"{prefix}{key} is {json.dumps(here)}, was {json.dumps(there)}"


def write(name: str, left: Left, made_in: dict[str, str | None], files: Path = FILES) -> None:
    """Makes the golden file of the run `name`: a line a step, so that a diff shows what has changed."""
    files.mkdir(parents=True, exist_ok=True)
    steps = ",\n  ".join(json.dumps(line) for line in left.metrics)
    rest = {"environment": made_in, "encoder_sha256": left.encoder_sha256, "final": left.final}
    head = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rest.items())
    (files / f"{name}.json").write_text(f'{{{head},\n "metrics": [\n  {steps}\n ]}}\n')


def against_golden(name: str, found: Left, now: dict[str, str | None], files: Path = FILES) -> Outcome:
    """`found` beside the golden file of the run `name`, if there is one, made in an environment like `now`."""
    file = files / f"{name}.json"
    if not file.exists():
        return Outcome(False, [], f"{name}: compared NOTHING, there is no {file.name}")
    golden = json.loads(file.read_text())
    if unlike := list(_unequal(now, golden["environment"])):
        return Outcome(False, [], f"{name}: compared NOTHING with {file.name}: {'; '.join(unlike)}")
    faults = list(differences(name, found, Left(golden["metrics"], golden["final"], golden["encoder_sha256"])))
    return _outcome(name, found, faults, file.name)


def against_run(name: str, found: Left, other: str, wanted: Left) -> Outcome:
    """`found` beside another run of the same machine, which should have left the same: compared everywhere."""
    return _outcome(name, found, list(differences(name, found, wanted)), f"the run {other!r}")


def _outcome(name: str, found: Left, faults: list[str], what: str) -> Outcome:
    said = f"differs from {what}" if faults else f"equal to {what}, {len(found.metrics)} steps and the encoder's bytes"
    return Outcome(True, faults, f"{name}: {said}")
