"""A run that is killed anywhere, as often as you like, and resumed ends in the bytes of one that was left alone.

pytest -m faults tests/saga_fast/test_faults.py     # 50 kills; the ordinary suite does 3
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FLAGS = (
    *("--data.species", "16", "--data.images-per-species", "4"),
    *("--data.classes-per-batch", "8", "--data.images-per-class", "2"),
    *(
        "--rollout.pairs",
        "1",
        "--rollout.group-size",
        "4",
        "--rollout.pairs-per-batch",
        "4",
        "--rollout.max-batches",
        "1",
    ),
    *("--optim.steps", "8", "--log.checkpoint-every", "1"),
)


def start(out: Path) -> subprocess.Popen:
    """The run in `out`, begun or, where it has begun, resumed."""
    resume = ["--resume"] if (out / "config.json").exists() else []
    command = [sys.executable, "-m", "saga_fast.train", "drawn-birds", "--out", str(out), *FLAGS, *resume]
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def product(out: Path) -> dict[str, bytes]:
    """What a run leaves for good: the encoder's weights and the figures."""
    return {name: (out / name).read_bytes() for name in ("encoder/model.safetensors", "final.json")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """The product of a run nobody disturbed, and the seconds it took."""
    out, began = tmp_path_factory.mktemp("runs") / "unbroken", time.monotonic()
    assert start(out).wait() == 0, out.with_suffix(".log").read_text()
    return product(out), time.monotonic() - began


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.faults)])
def test_killed_anywhere_it_resumes_to_the_same_bytes(kills, unbroken, tmp_path):
    expected, seconds = unbroken
    out, moments = tmp_path / "killed", random.Random(kills)
    for _ in range(kills):
        run = start(out)
        try:
            code = run.wait(moments.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
        else:
            assert code == 0, out.with_suffix(".log").read_text()
    assert start(out).wait() == 0, out.with_suffix(".log").read_text()
    assert product(out) == expected
