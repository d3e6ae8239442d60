"""A run's folder: what is written during training, and the state from which `--resume` continues.

A disk that is full or read-only during training loses what cannot be written, with one warning, and does not stop the
run; before the first step, and at the end, it is an error. Earlier checkpoints stay intact.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import platform
import secrets
import shutil
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from saga_fast.config import Config, record_of
from saga_fast.data import ClassBalancedSampler, PixelLoader
from saga_fast.encoder import Encoder
from saga_fast.losses.balance import Balance
from saga_fast.report import write_report
from saga_fast.report.model_card import model_card
from saga_fast.report.samples import overlays
from saga_fast.retrieval.gallery import as_rows, gallery, neighbours
from saga_fast.runtime import checkpoint, distributed
from saga_fast.runtime.health import Health
from saga_fast.runtime.signals import Stopped, StopSignals
from saga_fast.runtime.telemetry import Telemetry
from saga_fast.runtime.trackers import OptionalTracker, Tracker
from saga_fast.supervisor.agreement import ClassReadings
from saga_fast.supervisor.prompt import Prompt
from saga_fast.utils.errors import InputError, first_line
from saga_fast.utils.files import flush, hidden, locked, replace

LOG_FILES = "metrics.jsonl", "telemetry.jsonl"
COUNTS = "step", "batches", "skipped", "skipped_in_a_row", "drawn", "contributing", "stale"  # running counts
SELECTION_METRIC = "validation_recall_at_1"  # the logged metric that selects best/


def run_lock(out: Path) -> AbstractContextManager[None]:
    """Locks the folder of a run, by the first rank for all. Raises InputError if another process holds the lock."""
    return locked(out, "--out") if distributed.rank() == 0 else nullcontext()


@dataclass(eq=False)
class State:
    """The state that training changes; a checkpoint has it, and the random generators."""

    encoder: Encoder
    dml: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    sampler: ClassBalancedSampler
    balance: Balance = field(default_factory=Balance)
    readings: ClassReadings = field(default_factory=ClassReadings)


class Run:
    """A run's folder and state. On a CPU, with as many ranks and the same memory plan, a resumed run ends in the same
    bytes as an uninterrupted one. On a GPU, where some gradients are summed in varying order (`index_add_`, the
    backward of attention), and with another plan, it is the same up to rounding.

    Only the first rank writes, and all read: every host must see the folder. Nothing in it is specific to a rank, so
    any number of ranks can resume.
    """

    def __init__(self, out: Path, config: Config, state: State, total: int) -> None:
        self.out, self.config, self.state, self.total = out, config, state, total
        self.step = self.batches = self.skipped = self.skipped_in_a_row = 0
        self.drawn = self.contributing = 0
        self.before: dict[str, float] = {}
        self.telemetry = Telemetry(next(state.encoder.parameters()).device)
        self.best: dict[str, float] | None = None
        # Recall@1 on the held-out classes: the best so far, and the number of evaluations since.
        self.recall, self.stale = -1.0, 0
        self.health = Health(state.sampler.batches_per_epoch)
        self._failing: set[str] = set()
        self._unwritten = dict.fromkeys(LOG_FILES, "")

    @property
    def contribution_rate(self) -> float:
        """Share of the pairs drawn so far that contributed (rule of succession): 1/2 before any is drawn."""
        return (self.contributing + 1) / (self.drawn + 2)

    def begin(
        self, before: dict[str, float], neighbours: Tensor, prompt: Prompt | None, supervisor: str | None = None
    ) -> None:
        """Makes the folder, with a checkpoint of step 0. Raises InputError where that cannot be written.

        neighbours: of the test images before training, for the gallery. prompt: the supervisor's, if there is one.
        supervisor: the SHA-256 of its weights.
        """
        self.before, self.id = before, secrets.token_hex(8)
        if distributed.rank() > 0:
            return
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        record = {
            "run": self.id,
            "config": self.config.to_dict(),
            "prompt": prompt and dataclasses.asdict(prompt),
            "tower": self.state.encoder.vision_config,
            "supervisor_sha256": supervisor,
            "versions": versions,
            "commit": git_commit(),
        }
        external = OptionalTracker(self.config.tracker, self.out.name, record)
        # Written to a staging folder and renamed, as checkpoints are: an existing folder can be resumed.
        staging = hidden(self.out, "partial")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            (staging / "config.json").write_text(json.dumps(record, indent=2) + "\n")
            (staging / "gallery").mkdir()
            np.save(staging / "gallery" / "before.npy", neighbours.numpy(), allow_pickle=False)
            self._checkpoint(staging)
            os.rename(staging, os.path.realpath(self.out))
            self.tracker = Tracker(self.out, external)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise InputError(f"--out: {self.out} cannot be written ({error}); free space, or name another") from error

    def restore(self, supervisor: str | None = None) -> None:
        """Restores the newest intact checkpoint. supervisor: the SHA-256 of its weights.

        Raises InputError if there is none, if it is of another configuration or supervisor, or if the folder cannot be
        written.
        """
        record = record_of(self.out)
        self.id = record.get("run", "")
        if supervisor and record.get("supervisor_sha256", supervisor) != supervisor:
            raise InputError(
                f"supervisor.model: {self.config.supervisor.model!r} is another model, or another version of it, than "
                f"{self.out} was started with; give the folder of that model"
            )
        folder = checkpoint.latest(self.out / "checkpoint", self.id)
        if folder is None:
            raise InputError(f"--resume: {self.out} holds no checkpoint; start again with another --out")
        try:
            self._load(*checkpoint.load(folder, self.id))
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"{str(folder)!r}: does not fit the run's configuration ({first_line(error)}); remove it to resume "
                "from the one before, or start again with another --out"
            ) from error
        if distributed.rank() > 0:
            return
        try:
            # Steps after the checkpoint run again, so their log lines are dropped, complete or not.
            for name in LOG_FILES:
                with open(self.out / name, "a+b") as file:
                    file.seek(0)
                    file.truncate(sum(map(len, file.readlines()[: self.step])))
            if record["config"] != self.config.to_dict():
                record["config"] = self.config.to_dict()
                staging = hidden(self.out / "config.json", "partial")
                staging.write_text(json.dumps(record, indent=2) + "\n")
                flush(staging)
                os.replace(staging, self.out / "config.json")
            self.tracker = Tracker(self.out, OptionalTracker(self.config.tracker, self.out.name, record), self.step)
        except OSError as error:
            raise InputError(f"--out: {self.out} cannot be written ({error}); free space, or repair it") from error

    def _load(self, parts: checkpoint.Parts, state: dict[str, Any]) -> None:
        self.state.encoder.load_state_dict(parts["encoder"])
        self.state.dml.load_state_dict(parts["dml"])
        checkpoint.unpack_optimizer(self.state.optimizer, parts["optimizer"], state["optimizer"])
        self.state.schedule.load_state_dict(state["schedule"])
        checkpoint.unpack_rng(parts["rng"], state["rng"])
        for name in COUNTS:
            if type(state[name]) is not int or state[name] < 0:
                raise ValueError(f"{name} is {state[name]!r}, not a count")
            setattr(self, name, state[name])
        # Batches are dealt again on resuming, which an absurd count would make endless.
        if self.step > self.total or self.batches > self.step * self.config.rollout.max_batches:
            raise ValueError(f"{self.batches} batches in {self.step} of {self.total} steps")
        if state["sampler"]["dealt"] != self.batches:
            raise ValueError(f"{state['sampler']['dealt']!r} batches dealt of {self.batches}")
        self.state.sampler.load_state_dict(state["sampler"])
        self.state.balance.load_state_dict(state["balance"])
        self.state.readings.load_state_dict(state["readings"])
        self.before, self.recall = figures(state["before"]), float(state["recall"])
        self.best = figures(state["best"]) if state["best"] else None

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yields the steps `numbers`, and after each saves a checkpoint that is due; ends early when patience runs out.
        Raises Stopped after SIGTERM or Ctrl-C."""
        due = True
        with StopSignals() as stop:
            for step in numbers:
                if self.stale == self.config.log.patience:
                    break
                yield step
                stop_requested = any(distributed.all_gather_object(stop.requested))
                due = stop_requested or self.step % self.config.log.checkpoint_every == 0
                saved = due and self.save()
                if stop_requested and not saved:
                    raise InputError(f"{self.out}: stopped after step {self.step}, which could not be saved")
                if stop_requested:
                    raise Stopped(f"stopped, and saved, after step {self.step}")
        if not due:
            self.save()

    def save(self) -> bool:
        """Saves a checkpoint; returns False, with a warning, if it cannot be written. Raises OutOfSync."""
        distributed.assert_in_sync(self.state.encoder, self.state.dml)
        if distributed.rank() > 0:
            return True
        with self._warn_on_error("a checkpoint"):
            self._checkpoint(self.out)
            return True
        return False

    def _checkpoint(self, out: Path) -> None:
        optimizer, optimizer_rest = checkpoint.pack_optimizer(self.state.optimizer)
        rng, rng_rest = checkpoint.pack_rng()
        encoder, dml = self.state.encoder.state_dict(), self.state.dml.state_dict()
        parts = {"encoder": encoder, "dml": dml, "optimizer": optimizer, "rng": rng}
        state = {
            **{name: getattr(self, name) for name in COUNTS},
            "before": self.before,
            "best": self.best,
            "balance": self.state.balance.state_dict(),
            "readings": self.state.readings.state_dict(),
            "recall": self.recall,
            "optimizer": optimizer_rest,
            "schedule": self.state.schedule.state_dict(),
            "sampler": self.state.sampler.state_dict(self.batches),
            "rng": rng_rest,
        }
        checkpoint.save(out / "checkpoint", self.step, parts, state, self.config.log.keep, self.id)

    @contextmanager
    def _warn_on_error(
        self, what: str, kinds: type[Exception] | tuple[type[Exception], ...] = OSError
    ) -> Iterator[None]:
        """Turns errors of these types inside into a warning, only one until `what` can be written again."""
        try:
            yield
            self._failing.discard(what)
        except kinds as error:
            if what not in self._failing:
                warnings.warn(f"step {self.step}: {what} could not be written ({error}); the run goes on", stacklevel=3)
            self._failing.add(what)

    def count(self, log: dict[str, float]) -> dict[str, int]:
        """Counts a step's pairs and whether its update was applied; returns the running counts for the log."""
        self.drawn += int(log.get("pairs_drawn", 0))
        self.contributing += int(log.get("pairs_contributing", 0))
        applied = log.pop("applied")
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        return {"skipped": self.skipped, "skipped_now": self.skipped_in_a_row}

    def record(self, step: int, log: dict[str, float]) -> None:
        """Records a finished step: a line in metrics.jsonl and telemetry.jsonl, both to the tracker; and saves best/,
        if it is the best so far."""
        self.step, self.batches = step + 1, self.batches + int(log["micro_batches"])
        better = log.get(SELECTION_METRIC, -1.0) > self.recall
        if SELECTION_METRIC in log:
            self.recall = max(self.recall, log[SELECTION_METRIC])
            self.stale = 0 if better else self.stale + 1
        if distributed.rank() > 0:
            return
        self.health.check(step, log)
        cost = self.telemetry.read()
        for name, line in zip(LOG_FILES, (log, cost)):
            self._unwritten[name] += json.dumps({"step": step, **line}) + "\n"
            with self._warn_on_error(name):
                append(self.out / name, self._unwritten[name].encode())
                self._unwritten[name] = ""
        with self._warn_on_error("TensorBoard's events"):
            self.tracker.scalars(step, log | cost)
        if better:
            with self._warn_on_error("best/"):
                self._export("best")
                self.best = {"step": self.step, SELECTION_METRIC: log[SELECTION_METRIC]}

    def sample(self, step: int, content: dict[str, Any], sheet: Tensor) -> None:
        """Writes a step's rollouts. content: see `samples.describe`; sheet: their images, uint8 (rows, columns, 3)."""
        folder, name = self.out / "samples", f"step-{step:06d}"
        with self._warn_on_error("samples/"):
            folder.mkdir(exist_ok=True)
            Image.fromarray(sheet.numpy()).save(folder / f"{name}.jpg", quality=90)
            # Renamed last: an existing JSON file is complete, and so is its picture.
            (folder / f".{name}.partial").write_text(json.dumps({"step": step, **content}))
            os.replace(folder / f".{name}.partial", folder / f"{name}.json")
            if picture := overlays(content, sheet):
                self.tracker.image(step, "attention", picture)

    def _export(self, name: str) -> None:
        """Writes the encoder as `Encoder.from_pretrained` reads it; on an error the earlier one stays."""
        staging = hidden(self.out / name, "partial")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            self.state.encoder.save_pretrained(staging)
        except SafetensorError as error:  # safetensors' error on a full disk
            raise OSError(str(error)) from error
        replace(staging, self.out / name)

    def load_best(self) -> None:
        """Loads the encoder of best/, with `log.patience` and after an evaluation. Raises InputError where it cannot be
        read."""
        if self.config.log.patience is None or self.recall < 0:
            return
        if not (folder := self.out / "best").is_dir():
            raise InputError(f"{folder}: could not be written, so the best encoder is lost; free space and run again")
        self.state.encoder.load_state_dict(Encoder.from_pretrained(folder).state_dict())

    def finish(
        self, after: dict[str, float], supervisor: str | None, images: PixelLoader, embeddings: Tensor
    ) -> dict[str, Any]:
        """Writes encoder/, final.json, gallery and report; returns final.json's content. Raises InputError where
        encoder/ or final.json cannot be written.

        images, embeddings: of the test half, after training.
        """
        final = {
            "before": self.before,
            "after": after,
            "steps": self.step,
            "skipped": self.skipped,
            "supervisor_sha256": supervisor,
            **({"best": self.best} if self.best else {}),
        }
        if distributed.rank() > 0:
            return final
        try:
            weights = getattr(self.state.encoder.tower.model.config, "weights", None)
            self.state.encoder.card = model_card(self.config, self.before, after, self.step, weights)
            self._export("encoder")
            (self.out / "final.json").write_text(json.dumps(final, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"{self.out}: the encoder could not be written ({error}); --resume writes it") from error
        with self._warn_on_error("the report", (OSError, ValueError)):  # the files it reads may be damaged
            before_neighbours = torch.from_numpy(np.load(self.out / "gallery" / "before.npy"))
            encoder = self.state.encoder

            def agreement(a: int, b: int) -> dict[str, float]:
                cosines = encoder.compare(*embeddings[[a, b], None].to(encoder.device))
                return dict(zip(encoder.attributes, cosines[0].tolist()))

            content, thumbnails = gallery(
                images, before_neighbours, neighbours(embeddings), agreement if encoder.attributes else None
            )
            thumbnails.save(self.out / "gallery" / "gallery.jpg", quality=85)
            (self.out / "gallery" / "gallery.json").write_text(json.dumps(content))
            with self._warn_on_error("TensorBoard's events"):
                self.tracker.image(self.step, "retrieval", as_rows(content, thumbnails))
                self.tracker.close()
            write_report(self.out)
        return final


def figures(found: Mapping[str, float]) -> dict[str, float]:
    """A copy. Raises ValueError if not all of them are numbers, AttributeError if it is no mapping."""
    for name, value in found.items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"{name} is {value!r}, not a number")
    return dict(found)


def append(path: Path, data: bytes) -> None:
    """Appends all of `data` or nothing: a partial write on a full disk is truncated."""
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise


def git_commit() -> str | None:
    """The git commit of the running source; None outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
