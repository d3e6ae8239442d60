"""A run's folder, and the run's place in it: what is written while it goes, and what `--resume` goes on from."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from saga_fast import checkpoint, distributed
from saga_fast.card import model_card
from saga_fast.config import Config
from saga_fast.encoder import Encoder
from saga_fast.supervisor.prompt import Prompt


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

    @property
    def contribution_rate(self) -> float:
        """Share of the pairs drawn so far that contributed; half before anything is known."""
        return (self.contributing + 1) / (self.drawn + 2)

    def begin(self, before: dict[str, float], prompt: Prompt | None) -> None:
        """prompt: what the supervisor is asked, if there is one; config.json keeps it."""
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
        self.save(aside)
        aside.rename(self.out)
        self.board = SummaryWriter(self.out)

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
        metrics = self.out / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True)[: self.step] if metrics.exists() else []
        metrics.write_text("".join(lines))
        self.board = SummaryWriter(self.out, purge_step=self.step)

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
        """One more step is done: a line of metrics.jsonl, and the same numbers to TensorBoard."""
        self.step, self.batches = step + 1, self.batches + batches
        if distributed.rank() > 0:
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **log}) + "\n")
        for name, value in log.items():
            self.board.add_scalar(name, value, step)

    def finish(self, after: dict[str, float], supervisor: str | None) -> dict[str, Any]:
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
        self.board.close()
        return final


def git_commit() -> str | None:
    """The commit of the source that runs, if it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
