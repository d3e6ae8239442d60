"""Decoding in worker processes: order, workers end with their parent, and a dead worker raises an error."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from saga_fast import evaluate
from saga_fast import train as trainer
from saga_fast.config import PRESETS, DataConfig
from saga_fast.data import ClassBalancedSampler, ImageFolder, PixelLoader, cores
from saga_fast.data.loader import prefetch
from saga_fast.evaluate import load_images
from saga_fast.utils.errors import InputError

from ..small import changed, killed_after
from .released import CLASSES, fill


@pytest.fixture
def root(tmp_path) -> Path:
    return fill(tmp_path / "images", *CLASSES, images=5)


def children() -> set[int]:
    """Process ids of the children of this process, dead and unburied ones included."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile, as those that feed workers do
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def gone(pids: set[int], seconds: float) -> bool:
    """Whether all of them end in that time."""
    until = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_order_and_can_be_taken_up_again(root, workers):
    data = ImageFolder(root)
    alone = PixelLoader(data, 8)
    loader = PixelLoader(data, 8, workers, memory_limit=0)
    wanted = list(islice(ClassBalancedSampler(data.labels, 2, 2, seed=1), 9))

    sampler = ClassBalancedSampler(data.labels, 2, 2, seed=1)
    stream = loader.stream(sampler)
    for indices, batch in zip(wanted[:4], stream):
        assert batch.indices == indices and torch.equal(batch.pixels, alone.batch(indices).pixels)
    assert sampler.dealt > 4, "workers decode ahead of what was taken"
    state = sampler.state_dict(4)
    del stream, batch

    again = ClassBalancedSampler(data.labels, 2, 2, seed=1)
    again.load_state_dict(state)
    assert [batch.indices for batch in islice(loader.stream(again), 5)] == wanted[4:]


def test_no_process_is_left_when_a_stream_is_spent_dropped_or_fails(root):
    data = ImageFolder(root)
    before = children()
    loader = PixelLoader(data, 8, 2, memory_limit=0)
    assert gone(children() - before, 10)
    stream = loader.stream(ClassBalancedSampler(data.labels, 2, 2))
    next(stream)
    assert len(children() - before) == 2
    del stream
    assert gone(children() - before, 10)
    data.paths[3].write_bytes(b"")
    with pytest.raises(InputError, match="class_0/3.jpg"):
        list(loader.stream([[0], [3]]))
    assert gone(children() - before, 10)


class Deadly(torch.utils.data.Dataset):
    def __getitem__(self, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_worker_that_is_killed_is_said_so():
    with pytest.raises(
        InputError, match=r"--data.workers: 1, one of them died \(DataLoader worker .*/dev/shm"
    ) as caught:
        list(prefetch(Deadly(), range(3), 1))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "killed while a worker starts", "by itself"])
def test_workers_do_not_outlive_the_process(root, end):
    script = f"""
        import time
        import torch.utils.data._utils.worker as theirs

        class Late(theirs.ManagerWatchdog):
            def __init__(self):
                if theirs.get_worker_info().id == 1:
                    time.sleep({5 if "starts" in end else 0})
                super().__init__()

        theirs.ManagerWatchdog = Late
        from saga_fast.data import ImageFolder, PixelLoader
        loader = PixelLoader(ImageFolder({str(root)!r}), 8, 2, memory_limit=0)
        stream = loader.stream([i % 20] for i in range(10**9))
        next(stream)
        print("streaming", flush=True)
        {"time.sleep(600)" if "killed" in end else "raise SystemExit(3)"}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"streaming\n"
    group = {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _group(p) == process.pid}
    if "killed" in end:
        assert len(group) == 3
        process.kill()
    assert process.wait() == (-signal.SIGKILL if "killed" in end else 3)
    assert gone(group, 30)


def _group(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[2])
    except (OSError, IndexError):
        return None


def test_how_many_workers_unless_said(root):
    def workers(**data):
        return [half.workers for half in load_images(DataConfig(**data), 16)]

    assert workers(name="folder", root=root) == [min(8, cores())] * 2
    assert workers(name="folder", root=root, workers=0) == [0, 0]
    assert workers(name="drawn-birds", species=4, images_per_species=2) == [0, 0]


@pytest.mark.slow
def test_a_run_that_decodes_as_it_goes_resumes_to_the_same_bytes(root, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PixelLoader", functools.partial(PixelLoader, memory_limit=0))
    config = changed(
        PRESETS["folder"],
        data={"root": root, "image_size": 64, "classes_per_batch": 2, "images_per_class": 2, "workers": 2},
        optim={"steps": 5},
        lambda_={"lm": 0.0, "kl": 0.0},
        log={"checkpoint_every": 2, "evaluate_every": None, "patience": None},
    )
    final = trainer.train(config, tmp_path / "unbroken")
    with killed_after(step=2):  # one after the checkpoint
        trainer.train(config, tmp_path / "broken")
    assert trainer.train(config, tmp_path / "broken", resume=True) == final
    weights = [(tmp_path / run / "encoder/model.safetensors").read_bytes() for run in ("unbroken", "broken")]
    assert weights[0] == weights[1]
