"""What is small enough to test on: an encoder of random weights, pictures, and runs on a handful of drawn birds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from saga_fast.config import PRESETS, Config
from saga_fast.encoder import Encoder
from saga_fast.runtime.run import Run

# 16 species of 4 images: 4 steps of 2 contributing pairs.
SMALL: dict[str, dict[str, Any]] = {
    "data": {"species": 16, "images_per_species": 4, "classes_per_batch": 8, "images_per_class": 2},
    "rollout": {"pairs": 2, "group_size": 4, "max_batches": 2, "pairs_per_batch": 8},
    "optim": {"steps": 4},
    "lambda_": {"adaptive": False},
    "log": {"checkpoint_every": 2},
}


def save_encoder(folder: Path, seed: int = 0, attributes: Sequence[str] = ()) -> Encoder:
    """Saves an encoder of 32 x 32 pixels, 4 x 4 tokens and 16 numbers in `folder`, which keeps `attributes` apart if
    there are any; it, loaded from there."""
    torch.manual_seed(seed)
    config = Qwen3VLVisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
        out_hidden_size=24, num_position_embeddings=36, deepstack_visual_indexes=[0], initializer_range=0.2,
    )  # fmt: skip
    pooler = "attributes" if attributes else "attention"
    encoder = Encoder.from_tower(Qwen3VLVisionModel(config), pooler, 16, 32, attributes)
    if attributes:  # queries start so small that they look everywhere alike
        torch.nn.init.normal_(encoder.pooler.query)
    encoder.save_pretrained(folder)
    return Encoder.from_pretrained(folder)


def save_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Saves `count` different pictures of a few coloured squares in `folder`; their paths, sorted."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        squares = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        squares.resize((40, 30), Image.Resampling.NEAREST).save(folder / f"{i:04}.png")
    return sorted(folder.iterdir())


def save_classes(root: Path, names: Sequence[str], count: int) -> Path:
    """Saves `count` such pictures of each class in a folder of its own; `root`."""
    for seed, name in enumerate(names):
        save_pictures(root / name, count, seed)
    return root


def random_pixels(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """uint8 (count, 3, size, size)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with other values in its sections: `changed(config, data={"species": 4}, lambda_={"kl": 0.0})`."""
    replaced = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **replaced)


def small(**sections: dict[str, Any]) -> Config:
    """The default preset in the size of `SMALL`, with other values in its sections."""
    return changed(changed(PRESETS["drawn-birds"], **SMALL), **sections)


def small_flags(**sections: dict[str, Any]) -> tuple[str, ...]:
    """What says the same on a command line."""
    found: list[str] = []
    for name in SMALL | sections:
        for field, value in (SMALL.get(name, {}) | sections.get(name, {})).items():
            no = "no-" if value is False else ""
            found.append(f"--{name.rstrip('_')}.{no}{field}".replace("_", "-"))
            found += [] if isinstance(value, bool) else [str(value)]
    return tuple(found)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def lines(run: Path, without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A run's metrics.jsonl without times, and without what is named."""
    return [
        {name: value for name, value in line.items() if not name.startswith("seconds") and name not in without}
        for line in read_jsonl(run / "metrics.jsonl")
    ]


def broken_off(run: Path, out: Path, step: int) -> Path:
    """Copies the finished run in `run` to `out` as a kill soon after the checkpoint of `step` leaves it; `out`."""
    shutil.copytree(run, out, ignore=lambda folder, names: {"encoder", "final.json"} if Path(folder) == run else ())
    for saved in (out / "checkpoint").glob("step-*"):
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)
    return out


@contextlib.contextmanager
def killed_after(step: int) -> Iterator[None]:
    """The run that goes on within dies once it has told of step `step`."""

    class Killed(BaseException):
        pass

    record = Run.record

    def dies(self, at, *rest):
        record(self, at, *rest)
        if at == step:
            raise Killed

    survived = True
    with mock.patch.object(Run, "record", dies):
        try:
            yield
        except Killed:
            survived = False
    assert not survived, f"there was no step {step}"


def command(*program: str, processes: int = 1, launch: Sequence[str] = ()) -> list[str]:
    """What runs the Python program, in several processes by torchrun with the options `launch`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *launch]
    return [sys.executable, *(torchrun if processes > 1 else []), *program]


def start(out: Path, *arguments: str, processes: int = 1, launch: Sequence[str] = ()) -> subprocess.Popen:
    """A run of the trainer in the folder `out`, in processes of its own, which write to the log beside it."""
    program = ["-m", "saga_fast.train", "drawn-birds", "--out", str(out), *arguments]
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command(*program, processes=processes, launch=launch), stdout=log, stderr=log)


def finished(run: subprocess.Popen, out: Path) -> Path:
    assert run.wait() == 0, out.with_suffix(".log").read_text()
    return out
