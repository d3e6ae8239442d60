"""A run that is killed at any point, any number of times, and resumed ends in the bytes of an uninterrupted one.

pytest -m faults tests/saga_fast/test_faults.py     # 50 kills; `make test-all` has 3
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from saga_fast.config import parse
from saga_fast.data import PixelLoader
from saga_fast.runtime import checkpoint, run
from saga_fast.runtime.signals import StopSignals
from saga_fast.tiny.birds import DrawnBirds
from saga_fast.train import train

from . import small

STEPS = 4
FLAGS = small.small_flags(
    data={"seed": 1},
    rollout={"pairs": 1, "pairs_per_batch": 2, "max_batches": 1},
    optim={"steps": STEPS},
    lambda_={"adaptive": True},
    log={"checkpoint_every": 1},
)


def start(out: Path, *flags: str) -> subprocess.Popen:
    """The run in `out`, begun or, where it has begun, resumed."""
    return small.start(out, *FLAGS, *flags, *(["--resume"] if (out / "config.json").exists() else []))


def product(out: Path) -> dict[str, bytes]:
    """What a run leaves for good: the encoder's weights and the figures."""
    return {name: (out / name).read_bytes() for name in ("encoder/model.safetensors", "final.json")}


def steps(out: Path) -> list[int]:
    """The steps that metrics.jsonl tells of."""
    return [line["step"] for line in small.lines(out)]


class Unbroken(NamedTuple):
    """A run nobody disturbed, and the seconds it took."""

    out: Path
    product: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Unbroken:
    out, began = tmp_path_factory.mktemp("runs") / "unbroken", time.monotonic()
    small.finished(start(out), out)
    return Unbroken(out, product(out), time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.faults)])
def test_killed_anywhere_it_resumes_to_the_same_bytes(kills, unbroken, tmp_path):
    """Every other kill waits for a checkpoint to be half written."""
    out, moments = tmp_path / "killed", random.Random(kills)
    for kill in range(kills):
        run = start(out)
        if kill % 2:
            while run.poll() is None and not any(out.glob("checkpoint/.step-*.partial")):
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.05))
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(moments.uniform(0, unbroken.seconds))
        run.send_signal(signal.SIGKILL)
        assert run.wait() in (0, -signal.SIGKILL), out.with_suffix(".log").read_text()
    small.finished(start(out), out)
    assert product(out) == unbroken.product


def stepping(run: subprocess.Popen, out: Path) -> subprocess.Popen:
    """`run`, once it has finished a step."""
    while run.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(number, unbroken, tmp_path):
    out = tmp_path / "a run"
    run = stepping(start(out, "--log.checkpoint-every", "100"), out)
    run.send_signal(number)
    assert run.wait() == 0
    said = out.with_suffix(".log").read_text()
    (step,) = re.findall(r"stopped, and saved, after step (\d+); go on with\n", said)
    assert steps(out) == list(range(int(step))) and not (out / "final.json").exists()
    command = shlex.split(said.splitlines()[-1])
    assert command[1:] == ["-m", "saga_fast.train", "--out", str(out), "--resume"]
    subprocess.run(command, check=True, capture_output=True)
    assert product(out) == unbroken.product


def test_the_second_ctrl_c_stops_at_once_and_the_handlers_go_with_the_loop():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_signals_are_left_alone():
    def enter():
        with StopSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    found = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.slow
def test_a_ctrl_c_that_reaches_the_decoding_processes_too_ends_none_of_them():
    data = DrawnBirds("train", species=8, images_per_species=4)
    batches = PixelLoader(data, 16, workers=2, memory_limit=0).stream([[i] for i in range(len(data))])
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == len(data) - 1


@pytest.fixture
def broken_run(unbroken, tmp_path) -> Path:
    """A copy of the unbroken run as if it had been killed after its last step."""
    out = shutil.copytree(unbroken.out, tmp_path / "run")
    (out / "final.json").unlink()
    return out


def spoil(folder: Path, how: str) -> None:
    weights = folder / "encoder.safetensors"
    if how == "foreign":  # whole, but of another run
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "run": "0123456789abcdef"}))
    elif how == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        data = bytearray(weights.read_bytes())
        data[len(data) // 3] ^= 1
        weights.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("how,named", [("foreign", "of another run"), ("truncated", "SHA-256"), ("flipped", "SHA-256")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(how, named, broken_run, unbroken):
    spoil(broken_run / f"checkpoint/step-{STEPS:06d}", how)
    with open(broken_run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss_')  # a line more than the checkpoints know of, and cut off
    with pytest.warns(UserWarning, match=f"damaged checkpoint skipped: .*step-{STEPS:06d}.*{named}"):
        train(*parse(["--out", str(broken_run), "--resume"]))
    assert product(broken_run) == unbroken.product
    assert steps(broken_run) == list(range(STEPS))


@pytest.mark.slow
def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    out = tmp_path / "run"
    flags = ("--log.keep", "3", "--log.evaluate-every", "1", "--data.species", "20")
    flags += ("--lambda.lm", "0", "--lambda.kl", "0", "--optim.encoder-lr", "0.01")  # soon worse than at first
    train(*parse(["--out", str(out), *FLAGS, *flags]))
    kept = ["step-000002", "step-000003", "step-000004"]
    assert sorted(path.name for path in (out / "checkpoint").iterdir()) == kept
    recalls = [line["validation_recall_at_1"] for line in small.lines(out)]
    best = json.loads((out / "final.json").read_text())["best"]
    assert best == {"step": 1 + recalls.index(max(recalls)), "validation_recall_at_1": max(recalls)}
    weights = load_file(out / "best/model.safetensors")
    for step in (2, 3, 4):
        saved = load_file(out / f"checkpoint/step-{step:06d}/encoder.safetensors")
        assert all(torch.equal(weights[name], saved[name]) for name in weights) == (step == best["step"])


def test_held_out_classes_are_none_of_those_trained_on():
    whole = PixelLoader(DrawnBirds("train", species=60, images_per_species=2), 16)
    rest, held_out = whole.hold_out()
    assert rest.dataset.classes == whole.dataset.classes[:27] and set(rest.labels.tolist()) == set(range(27))
    assert set(held_out.labels.tolist()) == {27, 28, 29} and len(rest) + len(held_out) == len(whole)
    for half in (rest, held_out):
        alike = half.batch([1, 3]), PixelLoader(half.dataset, 16).batch([1, 3])
        assert torch.equal(alike[0].pixels, alike[1].pixels) and torch.equal(alike[0].labels, alike[1].labels)


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    run.append(file := tmp_path / "lines", b"first\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError):
            run.append(file, b"second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"first\n"


FULL = """
set -e
mount -t tmpfs -o size=90m saga "$PWD"
cd "$PWD"
"$@" >&2 & run=$!
while kill -0 $run && ! test -e run/checkpoint/step-000001; do sleep 0.02; done
while kill -0 $run; do cat /dev/zero >> filler || sleep 0.02; done 2> /dev/null & fill=$!
code=0; wait $run || code=$?
wait $fill || true
ls -A run/checkpoint
rm filler
"$@" --resume
cp -r run/encoder run/final.json run/metrics.jsonl "$RESCUED"
exit $code
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_and_is_told_once(unbroken, tmp_path):
    """On a real file system of 90 MB, in a mount name space of its own."""
    unshare = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*unshare, "mount", "-t", "tmpfs", "saga", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here; the test below needs no mount")
    (disk := tmp_path / "disk").mkdir()
    (rescued := tmp_path / "rescued").mkdir()
    run = subprocess.run(
        [*unshare, "sh", "-c", FULL, "sh", sys.executable, "-m", "saga_fast.train", "--out", "run", *FLAGS],
        env={**os.environ, "RESCUED": str(rescued)},
        capture_output=True,
        text=True,
        cwd=disk,
    )
    assert run.returncode == 2 and "error: run: the encoder could not be written" in run.stderr, run.stderr
    assert run.stderr.count("a checkpoint could not be written") == 1
    assert run.stdout.splitlines()[:2] == ["step-000000", "step-000001"], "nothing half-written"
    assert product(rescued) == unbroken.product
    assert steps(rescued) == list(range(STEPS))


@pytest.mark.slow
def test_a_folder_that_turns_read_only_is_told_once_and_the_lines_come_when_it_can_be_written(tmp_path, monkeypatch):
    """Written by a patch: whoever may mount may also write into what is read-only."""
    save, add = checkpoint.save, run.append

    def unless_read_only(real, what):
        def write(*args, **kwargs):
            if what in read_only:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))
            return real(*args, **kwargs)

        return write

    def record(self, step, *rest):
        read_only.clear()
        if step in (1, 2):
            read_only.update(("save", "append"))
        recorded(self, step, *rest)

    read_only, recorded = set(), run.Run.record
    monkeypatch.setattr(checkpoint, "save", unless_read_only(save, "save"))
    monkeypatch.setattr(run, "append", unless_read_only(add, "append"))
    monkeypatch.setattr(run.Run, "record", record)
    config = parse(["--out", str(tmp_path / "run"), *FLAGS, "--lambda.lm", "0", "--lambda.kl", "0"]).config
    with pytest.warns(UserWarning) as told:
        train(config, tmp_path / "run")
    messages = [str(warning.message) for warning in told if "Read-only file system" in str(warning.message)]
    told = ["metrics.jsonl", "telemetry.jsonl", "a checkpoint"]
    assert [message.split(" could not")[0] for message in messages] == [f"step 2: {what}" for what in told]
    assert steps(tmp_path / "run") == list(range(STEPS))
    assert sorted(path.name for path in (tmp_path / "run/checkpoint").iterdir()) == ["step-000001", f"step-{STEPS:06d}"]


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file/run"
    flags = ["--data.species", "32", "--data.images-per-species", "2", "--lambda.lm", "0", "--lambda.kl", "0"]
    command = [sys.executable, "-m", "saga_fast.train", "--out", str(out), *flags]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and f"error: --out: '{out}' cannot be written to (" in ended.stderr.splitlines()[-1]
