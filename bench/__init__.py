"""Measurements, run as `python -m bench.NAME`: each prints a table and, with `--json FILE`, writes it too; some plot it
with `--plot FILE.svg`."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def machine() -> dict[str, Any]:
    """Description of the machine and software, stored with the figures."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **({"driver": _said_by(*DRIVER), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "triton")},
        "commit": _said_by("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }


def card() -> str | None:
    """The GPU's name, as the folder of its figures in bench/results is called."""
    if not torch.cuda.is_available():
        return None
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _said_by(*command: str) -> str | None:
    """The first line that a command prints, if there is one."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.split("\n")[0].strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes `figures` and the machine as JSON, if a path is given. The file is the last one or this one, whenever a
    process ends."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
        aside.replace(path)


def write_plot(path: Path | None, svg: str) -> None:
    """Writes an SVG file, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(svg)
