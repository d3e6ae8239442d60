"""Atomic checkpoints.

    checkpoint/
      step-000123/
        NAME.safetensors   the tensors of each part (encoder, optimizer, rng, ...)
        state.json         everything else: step, schedule, sampler, ...
        manifest.json      format version, whose run it is, and the SHA-256 of every other file

A checkpoint is written to a hidden sibling, flushed to disk and renamed, so a kill or a full disk leaves the earlier
ones intact. `latest` checks the hashes and skips a damaged checkpoint, or one of another run. Nothing is pickled, so
loading runs no code.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saga_fast.utils.errors import InputError
from saga_fast.utils.files import flush, read_regular, sha256

FORMAT = 1
Parts = dict[str, dict[str, Tensor]]


def save(
    folder: str | os.PathLike[str], step: int, parts: Parts, state: dict[str, Any], keep: int = 2, run: str = ""
) -> Path:
    """Write the checkpoint of `step` into `folder`, then drop all but the newest `keep`; return its path.

    parts: {part: {name: tensor}}, one file per part, on any device; state: JSON-able (int keys come back as strings).
    run: the id of the run, which `latest` compares.
    Checkpoints of later steps, which a resume skips as damaged, are dropped too.
    Raises OSError if the disk is full or read-only; the earlier checkpoints are then intact.
    """
    folder = Path(folder)
    final = folder / f"step-{step:06d}"
    staging, old = folder / f".{final.name}.partial", folder / f".{final.name}.old"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    try:
        staging.mkdir()
        for part, tensors in parts.items():
            _write(tensors, staging / f"{part}.safetensors")
        (staging / "state.json").write_text(json.dumps(state))
        hashes = {path.name: sha256(path) for path in sorted(staging.iterdir())}
        (staging / "manifest.json").write_text(json.dumps({"format": FORMAT, "run": run, "sha256": hashes}, indent=1))
        for path in (*staging.iterdir(), staging):
            flush(path)
        if final.exists():  # a damaged one that was skipped, or the same step saved again
            os.rename(final, old)
        os.rename(staging, final)
        flush(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if old.exists() and not final.exists():
            os.rename(old, final)
        raise
    others = [path for path in _steps(folder) if path != final]
    older = [path for path in others if _step(path) < step]
    for path in (old, *others[: len(others) - len(older)], *older[keep - 1 :]):
        shutil.rmtree(path, ignore_errors=True)
    return final


def latest(folder: str | os.PathLike[str], run: str = "") -> Path | None:
    """The newest intact checkpoint of `run` in `folder`, None if there are no checkpoints; warns of those it skips.

    Raises InputError if there are checkpoints and every one is damaged or foreign.
    """
    steps = _steps(Path(folder))
    for path in steps:
        if not (fault := _fault(path, run)):
            return path
        warnings.warn(f"damaged checkpoint skipped: {fault}", stacklevel=2)
    if steps:
        raise InputError(f"{os.fspath(folder)!r}: every checkpoint in it is damaged; start again with another --out")
    return None


def load(path: str | os.PathLike[str], run: str = "") -> tuple[Parts, dict[str, Any]]:
    """(parts, state) as `run` saved them, on the CPU. Raises InputError, naming the file, if damaged or foreign."""
    path = Path(path)
    if fault := _fault(path, run):
        raise InputError(f"{fault}; resume from another checkpoint")
    try:
        parts = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        state = json.loads((path / "state.json").read_text())
    except (
        OSError,
        ValueError,
        RecursionError,
        SafetensorError,
    ) as error:  # hashed right, but not ours
        raise InputError(f"{os.fspath(path)!r}: not a checkpoint ({error}); resume from another") from error
    if not isinstance(state, dict):
        raise InputError(f"{os.fspath(path / 'state.json')!r}: not a checkpoint's state; resume from another")
    return parts, state


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state_dict as ({"<parameter number>.<name>": tensor}, JSON-able rest).

    Dictionaries within a parameter's state, as bitsandbytes has them, become "<parameter number>.<name>.<key>".
    """
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                put(f"{key}.{name}", inner)
        else:
            (tensors if isinstance(value, Tensor) else scalars)[key] = value

    for number, values in packed["state"].items():
        put(str(number), values)
    return tensors, {"scalars": scalars, "param_groups": packed["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Load the result of `pack_optimizer` into `optimizer`, also after a round trip through JSON. Raises ValueError if
    the groups differ."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | rest["scalars"]).items():
        number, *path, name = key.split(".")
        values = state.setdefault(int(number), {})
        for part in path:
            values = values.setdefault(part, {})
        values[name] = value
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in rest["param_groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def pack_rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The global generators of torch (CPU and every CUDA device), NumPy and Python, as (tensors, JSON-able rest)."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "numpy": torch.from_numpy(np.asarray(keys, np.int64)),
        **{f"cuda.{device}": torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())},
    }
    return tensors, {"python": [version, gauss], "numpy": [name, position, has_gauss, cached]}


def unpack_rng(tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Restore the generators' states from `pack_rng`; those of missing CUDA devices are skipped."""
    torch.set_rng_state(tensors["torch"])
    for device in range(torch.cuda.device_count()):
        if f"cuda.{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{device}"], device)
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, *position = rest["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *position))


def _steps(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first."""
    steps = [path for path in folder.glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name)]
    return sorted(steps, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fault(path: Path, run: str) -> str | None:
    """The fault of the checkpoint at `path`, naming the file; None if it is intact, and of `run`."""
    manifest = path / "manifest.json"
    try:
        recorded = json.loads(read_regular(manifest, 2**20))
        version, hashes = recorded["format"], recorded["sha256"]
        if version != FORMAT:
            return f"{str(manifest)!r}: format {version!r}, this version reads {FORMAT}"
        if recorded["run"] != run:
            return f"{str(manifest)!r}: of another run"
        files = sorted(file for file in path.iterdir() if file != manifest)
        if set(hashes) != {file.name for file in files}:
            return f"{str(manifest)!r}: lists {sorted(hashes)}, the folder holds {[file.name for file in files]}"
        for file in files:
            if not file.is_file():
                return f"{str(file)!r}: not a regular file"
            if sha256(file) != hashes[file.name]:
                return f"{str(file)!r}: its SHA-256 is not the one in manifest.json"
    except OSError as error:
        return f"{str(error.filename or path)!r}: {error.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{str(manifest)!r}: not a checkpoint's manifest"
    return None


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(_without_shared_storage(tensors), path)
    except SafetensorError as error:  # its error on a full disk
        raise OSError(f"{path}: {error}") from error


def _without_shared_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage, as safetensors wants them (optimizers share lookup tables)."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate
