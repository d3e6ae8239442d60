"""A run's folder: resuming, changed settings on resuming, and trackers that fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from saga_fast.config import PRESETS, Config, stored
from saga_fast.data import ClassBalancedSampler
from saga_fast.runtime import checkpoint, run
from saga_fast.runtime.run import Run, State
from saga_fast.runtime.trackers import OptionalTracker
from saga_fast.supervisor.prompt import PROMPTS
from saga_fast.utils.errors import InputError

CONFIG = PRESETS["drawn-birds"]
BEFORE = {"recall_at_1": 0.5}


def make(out: Path, config: Config = CONFIG, seed: int = 0) -> Run:
    """A run whose encoder is a matrix."""
    torch.manual_seed(seed)
    encoder, dml = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    encoder.tower, encoder.attributes = SimpleNamespace(model=SimpleNamespace(config=None)), ()
    encoder.vision_config = {"model_type": "matrix"}
    optimizer = torch.optim.AdamW([*encoder.parameters(), *dml.parameters()])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    sampler = ClassBalancedSampler([0, 0, 1, 1, 2, 2], 2, 2, config.seed)
    return Run(out, config, State(encoder, dml, optimizer, schedule, sampler), 1)


def step(run: Run) -> None:
    run.state.encoder(torch.ones(3)).sum().backward()
    run.state.optimizer.step()
    run.state.schedule.step()
    run.record(run.step, {"loss_dml": 1.0, "micro_batches": 1})


@pytest.fixture
def begun(tmp_path) -> Run:
    """Two steps done, the second not saved."""
    begun = make(tmp_path / "run")
    begun.begin(BEFORE, torch.zeros(4, 2, dtype=torch.int64), PROMPTS["drawn-birds"], "abc")
    step(begun)
    assert begun.save()
    step(begun)
    return begun


def test_it_goes_on_from_the_checkpoint(begun):
    again = make(begun.out, seed=1)
    again.restore("abc")
    assert (again.step, again.batches, again.before, again.id) == (1, 1, BEFORE, begun.id)
    assert json.loads((begun.out / "config.json").read_text())["tower"] == {"model_type": "matrix"}
    assert len((begun.out / "metrics.jsonl").read_text().splitlines()) == 1
    assert again.state.schedule.last_epoch == 1 and stored(begun.out) == CONFIG


def test_what_is_said_anew_is_kept_for_the_next_time(begun):
    data = dataclasses.replace(CONFIG.data, root=Path("/moved"), workers=3)
    make(begun.out, moved := dataclasses.replace(CONFIG, data=data)).restore("abc")
    assert stored(begun.out) == moved
    said = json.loads((begun.out / "config.json").read_text())
    assert said["run"] == begun.id and said["supervisor_sha256"] == "abc" and said["prompt"]["item"]
    assert not list(begun.out.glob(".*"))


def test_another_supervisor_is_refused(begun):
    with pytest.raises(InputError, match="^supervisor.model: 'tiny' is another model, or another version"):
        make(begun.out).restore("abd")
    said = json.loads((begun.out / "config.json").read_text())
    del said["supervisor_sha256"]  # as earlier versions wrote it
    (begun.out / "config.json").write_text(json.dumps(said))
    make(begun.out).restore("abd")


def test_another_data_set_is_refused(begun):
    other = make(begun.out)
    other.state.sampler = ClassBalancedSampler([0, 0, 1, 1, 2, 2, 2], 2, 2)
    with pytest.raises(InputError, match="saved with another training set"):
        other.restore("abc")


@pytest.mark.parametrize("part,change", [("encoder", {}), ("encoder", {"weight": torch.ones(5)}), ("rng", {})])
def test_a_checkpoint_that_fits_no_encoder_of_ours_is_named(begun, part, change):
    """Whole by its hashes: of other code, or made up."""
    folder = checkpoint.latest(begun.out / "checkpoint", begun.id)
    parts, state = checkpoint.load(folder, begun.id)
    checkpoint.save(begun.out / "checkpoint", 9, {**parts, part: change}, state, run=begun.id)
    with pytest.raises(InputError, match=r"step-000009': does not fit the run's configuration \(.*; remove it"):
        make(begun.out).restore("abc")


@pytest.mark.parametrize(
    "name,value",
    [
        *(("step", 0.5), ("step", -1), ("drawn", "x"), ("skipped", True), ("stale", -1), ("stale", None)),
        *(("step", 11), ("batches", 2**63), ("sampler", {"dealt": 2**63}), ("sampler", {"dealt": "1"})),
        *(("before", 3), ("before", {"recall_at_1": "high"}), ("best", [1]), ("best", {"step": "1"}), ("recall", "x")),
        *(("balance", {}), ("balance", {"norm_dml": 0.0, "norm_lm": 0.0, "pairs": [1.0], "rewards": [0.0, 0.0, 0.0]})),
        ("balance", {"norm_dml": "x", "norm_lm": 0.0, "pairs": [0.0, 0.0], "rewards": [0.0, 0.0]}),
    ],
)
def test_a_state_that_no_run_has_is_named(begun, name, value):
    """Found by the hunt: a step of 5e-324 was a TypeError as metrics.jsonl was cut to it."""
    parts, state = checkpoint.load(checkpoint.latest(begun.out / "checkpoint", begun.id), begun.id)
    value = {**state["sampler"], **value} if name == "sampler" else value
    checkpoint.save(begun.out / "checkpoint", 9, parts, {**state, name: value}, run=begun.id)
    with pytest.raises(InputError, match=r"step-000009': does not fit the run's configuration"):
        make(begun.out).restore("abc")


# ── Trackers ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tracker(ModuleType):
    """wandb, as far as it is used; raises where it is told to."""

    Image = staticmethod(lambda picture: picture)

    def __init__(self, fails: str, error: BaseException) -> None:
        super().__init__("wandb")
        self.fails, self.error, self.calls = fails, error, []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise self.error

    def init(self, **_) -> None:
        self._call("init")

    def log(self, values, step) -> None:
        self._call("log")

    def finish(self) -> None:
        self._call("finish")


@pytest.mark.parametrize("error", [RuntimeError("api_key not configured (no-tty).\nSee the docs"), SystemExit(1)])
@pytest.mark.parametrize("fails", ["init", "log", "finish", ""])
def test_a_run_goes_on_without_a_tracker_that_fails(fails, error, tmp_path, monkeypatch):
    tracker = Tracker(fails, error)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setattr(run, "write_report", lambda out: (out / "report.html").write_text("written"))
    monkeypatch.setattr(Run, "_export", lambda self, name: None)
    monkeypatch.setattr(run, "model_card", lambda *_: "")
    monkeypatch.setattr(run, "gallery", lambda *_: ({}, Image.new("RGB", (4, 4))))
    monkeypatch.setattr(run, "as_rows", lambda *_: Image.new("RGB", (4, 4)))
    going = make(tmp_path / "run", dataclasses.replace(CONFIG, tracker="wandb"))
    told = pytest.warns(UserWarning, match="--tracker: wandb failed .*; the run goes on") if fails else warned_not()
    with told as warned:
        going.begin(BEFORE, torch.zeros(4, 2, dtype=torch.int64), None)
        step(going)
        step(going)
        final = going.finish({"recall_at_1": 0.75}, None, SimpleNamespace(), torch.zeros(4, 2))
    assert final["steps"] == 2 and (tmp_path / "run/report.html").exists()
    if fails:
        assert len(warned) == 1 and "\n" not in str(warned[0].message), "told once, and left alone"
        assert tracker.calls[-1] == fails and tracker.calls.count(fails) == 1
    else:
        assert tracker.calls == ["init", "log", "log", "log", "finish"]


@contextlib.contextmanager
def warned_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield []


def test_a_tracker_is_tried_before_anything_is_written(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        run, "OptionalTracker", lambda *_: seen.append((tmp_path / "run").exists()) or OptionalTracker(None, "", {})
    )
    make(tmp_path / "run").begin(BEFORE, torch.zeros(4, 2, dtype=torch.int64), None)
    assert seen == [False]


def test_a_damaged_gallery_costs_the_report_alone(begun, monkeypatch):
    monkeypatch.setattr(Run, "_export", lambda self, name: None)
    monkeypatch.setattr(run, "model_card", lambda *_: "")
    (begun.out / "gallery/before.npy").write_bytes(np.lib.format.MAGIC_PREFIX + b"?")
    with pytest.warns(UserWarning, match="the report could not be written"):
        begun.finish({"recall_at_1": 0.75}, None, SimpleNamespace(), torch.zeros(4, 2))
    assert json.loads((begun.out / "final.json").read_text())["steps"] == 2
