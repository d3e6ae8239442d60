"""A run's folder, and the run's place in it: what is written while it goes, and what `--resume` goes on from."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from saga_fast import checkpoint, distributed
from saga_fast.board import Board
from saga_fast.card import model_card
from saga_fast.config import Config
from saga_fast.data import PixelLoader
from saga_fast.encoder import Encoder
from saga_fast.gallery import as_rows, gallery
from saga_fast.report import write_report
from saga_fast.samples import overlays
from saga_fast.supervisor.prompt import Prompt
from saga_fast.telemetry import Telemetry


class Run:
    """A run's folder and its place in it: what `--resume` needs to go on to the same bytes.

    Of several ranks the first alone writes, and all read: the folder is one that every host sees. Nothing saved is of a
    rank, so any number of them can go on.
    """

    def __init__(
        self, out: Path, config: Config, encoder: Encoder, dml: nn.Module, optimizer, schedule, sampler
    ) -> None:
        self.out, self.config = out, config
        self.encoder, self.dml, self.optimizer, self.schedule, self.sampler = encoder, dml, optimizer, schedule, sampler
        self.step = self.batches = self.skipped = self.skipped_in_a_row = 0
        self.drawn = self.contributing = 0
        self.before: dict[str, float] = {}
        self.telemetry = Telemetry(next(encoder.parameters()).device)

    @property
    def contribution_rate(self) -> float:
        """Share of the pairs drawn so far that contributed; half before anything is known."""
        return (self.contributing + 1) / (self.drawn + 2)

    def begin(self, before: dict[str, float], neighbours: Tensor, prompt: Prompt | None) -> None:
        """neighbours: what the gallery compares with; prompt: what the supervisor is asked, if there is one."""
        self.before = before
        if distributed.rank() > 0:
            return
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        described = {
            "config": self.config.to_dict(),
            "prompt": prompt and dataclasses.asdict(prompt),
            "versions": versions,
            "commit": git_commit(),
        }
        # Made aside and renamed, as checkpoints are: a folder that is there can be resumed.
        aside = self.out.absolute().with_name(f".{self.out.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        (aside / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        (aside / "gallery").mkdir()
        np.save(aside / "gallery" / "before.npy", neighbours.numpy(), allow_pickle=False)
        self.save(aside)
        aside.rename(self.out)
        self.board = Board(self.out, self.config.tracker, described)

    def restore(self) -> None:
        folder = checkpoint.latest(self.out / "checkpoint")
        parts, state = checkpoint.load(folder)
        self.encoder.load_state_dict(parts["encoder"])
        self.dml.load_state_dict(parts["dml"])
        checkpoint.unpack_optimizer(self.optimizer, parts["optimizer"], state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.sampler.load_state_dict(state["sampler"])
        checkpoint.unpack_rng(parts["rng"], state["rng"])
        self.step, self.batches, self.before = state["step"], state["batches"], state["before"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.drawn, self.contributing = state["drawn"], state["contributing"]
        if distributed.rank() > 0:
            return
        # Steps after the checkpoint are run again, so their lines go.
        for path in (self.out / "metrics.jsonl", self.out / "telemetry.jsonl"):
            lines = path.read_text().splitlines(keepends=True)[: self.step] if path.exists() else []
            path.write_text("".join(lines))
        self.board = Board(self.out, self.config.tracker, self.config.to_dict(), self.step)

    def save(self, out: Path | None = None) -> None:
        if distributed.rank() > 0:
            return
        optimizer, optimizer_rest = checkpoint.pack_optimizer(self.optimizer)
        rng, rng_rest = checkpoint.pack_rng()
        parts = {"encoder": self.encoder.state_dict(), "dml": self.dml.state_dict(), "optimizer": optimizer, "rng": rng}
        state = {
            "step": self.step,
            "batches": self.batches,
            "before": self.before,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "drawn": self.drawn,
            "contributing": self.contributing,
            "optimizer": optimizer_rest,
            "schedule": self.schedule.state_dict(),
            "sampler": self.sampler.state_dict(self.batches),
            "rng": rng_rest,
        }
        checkpoint.save((out or self.out) / "checkpoint", self.step, parts, state)

    def record(self, step: int, batches: int, log: dict[str, float]) -> None:
        """One more step is done: a line of metrics.jsonl, what it cost in telemetry.jsonl, and both to TensorBoard."""
        self.step, self.batches = step + 1, self.batches + batches
        if distributed.rank() > 0:
            return
        cost = self.telemetry.read()
        for name, line in (("metrics.jsonl", log), ("telemetry.jsonl", cost)):
            with open(self.out / name, "a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
        self.board.scalars(step, log | cost)

    def sample(self, step: int, described: dict[str, Any], sheet: Tensor) -> None:
        """A step's rollouts, see `samples.describe`, and the images they are about, uint8 (rows, columns, 3)."""
        folder, name = self.out / "samples", f"step-{step:06d}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(sheet.numpy()).save(folder / f"{name}.jpg", quality=90)
        # Renamed last: a JSON file that is there is whole, and so is its picture.
        (folder / f".{name}.partial").write_text(json.dumps({"step": step, **described}))
        os.replace(folder / f".{name}.partial", folder / f"{name}.json")
        if picture := overlays(described, sheet):
            self.board.image(step, "attention", picture)

    def finish(
        self, after: dict[str, float], supervisor: str | None, images: PixelLoader, neighbours: Tensor
    ) -> dict[str, Any]:
        """images, neighbours: of the test half, after training; with those of before they make the gallery."""
        final = {
            "before": self.before,
            "after": after,
            "steps": self.step,
            "skipped": self.skipped,
            "supervisor_sha256": supervisor,
        }
        if distributed.rank() > 0:
            return final
        self.encoder.card = model_card(self.config, self.before, after, self.step)
        self.encoder.save_pretrained(self.out / "encoder")
        (self.out / "final.json").write_text(json.dumps(final, indent=2) + "\n")
        before_neighbours = torch.from_numpy(np.load(self.out / "gallery" / "before.npy"))
        described, thumbnails = gallery(images, before_neighbours, neighbours)
        thumbnails.save(self.out / "gallery" / "gallery.jpg", quality=85)
        (self.out / "gallery" / "gallery.json").write_text(json.dumps(described))
        self.board.image(self.step, "retrieval", as_rows(described, thumbnails))
        self.board.close()
        write_report(self.out)
        return final


def git_commit() -> str | None:
    """The commit of the source that runs, if it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
