"""Several processes by torchrun, Gloo between them: the gradients and weights of one process, also after one is killed.

pytest -m faults tests/saga_fast/runtime/test_distributed.py  # 4 processes, another number on resuming, elastic restart
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from saga_fast.config import PRESETS, parse
from saga_fast.runtime import distributed
from saga_fast.utils.errors import InputError

from ..small import broken_off, command, finished, lines, small_flags, start

SHARES = ("idle_share", "rollout_waste")  # they depend on how many ranks there are

# Batches of 14 images and buffers of 3 pairs are shared evenly by no number of ranks here; the metric loss has proxies
# and is weighed so that no term's gradient drowns the others'.
FLAGS = small_flags(
    data={"classes_per_batch": 7},
    rollout={"pairs": 3, "pairs_per_batch": 4},
    dml={"loss": "potential-field"},
    lambda_={"dml": 1e-4},
    log={"checkpoint_every": 1},
)
METHODS = {
    "the paper's": ("--encoder.pooler", "attention", "--rollout.credit", "verdict"),
    "every term": (
        *("--encoder.pooler", "attributes", "--encoder.embedding-dim", "40", "--rollout.credit", "attributes"),
    ),
}


def train(processes: int, out: Path, steps: int, *flags: str, launch: tuple[str, ...] = ()) -> subprocess.Popen:
    said = ("--optim.steps", str(steps), "--seed", "1")
    return start(out, *FLAGS, *said, *flags, processes=processes, launch=launch)


def assert_same_step(one: Path, several: Path) -> None:
    """After step 1: the gradient (a tenth of it is AdamW's first moment) and the weights, to 1e-6 of their norm."""
    for part in ("optimizer", "encoder", "dml"):
        ours, theirs = (load_file(out / f"checkpoint/step-000001/{part}.safetensors") for out in (several, one))
        assert ours.keys() == theirs.keys()
        names = [name for name in theirs if part != "optimizer" or name.endswith(".exp_avg")]
        ours, theirs = ([tensors[name].double().flatten() for name in names] for tensors in (ours, theirs))
        deviation = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs)]
        whole = (torch.cat(ours) - torch.cat(theirs)).norm() / torch.cat(theirs).norm()
        assert whole <= 1e-6 and max(deviation) <= 1e-5, (part, whole, names[deviation.index(max(deviation))])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.faults)])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_take_the_step_that_one_process_takes(method, processes, tmp_path):
    alone = finished(train(1, tmp_path / "alone", 1, *METHODS[method]), tmp_path / "alone")
    out = finished(train(processes, tmp_path / "several", 1, *METHODS[method]), tmp_path / "several")
    (line,) = lines(alone, SHARES)
    assert line["pairs_replayed"] == 3, "that would test less"
    assert ("value_entropy" in line) == (method == "every term")
    assert lines(out, SHARES)[0] == pytest.approx(line, rel=1e-5, abs=1e-6)
    assert_same_step(alone, out)
    shown = out.with_suffix(".log").read_text()
    assert shown.count("R@1") == shown.count("run: ") == 1, "one rank speaks"


@given(st.lists(st.integers(1, 10_000), max_size=40), st.integers(1, 9))
def test_balanced_shares_differ_by_no_more_than_the_largest_item(sizes, shares):
    dealt = distributed.balance_loads(sizes, shares)
    assert sorted(i for items in dealt for i in items) == list(range(len(sizes))) and len(dealt) == shares
    loads = [sum(sizes[i] for i in items) for items in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_the_longest_are_dealt_first():
    assert distributed.balance_loads([1, 1, 2, 4, 4], 2) == [[2, 3], [0, 1, 4]]


def test_a_restart_resumes_where_there_is_a_run(tmp_path):
    arguments = ["drawn-birds", "--out", str(tmp_path / "run")]
    assert not parse(arguments, restarted=True).resume
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"config": PRESETS["drawn-birds"].to_dict()}))
    assert parse(arguments, restarted=True).resume
    with pytest.raises(InputError, match="exists; go on with --resume"):
        parse(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it runs")
def test_a_gpu_that_does_not_run_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="device: cuda:0 does not run with PyTorch .*CUDA_VISIBLE_DEVICES="):
        distributed.device()


@pytest.mark.parametrize(
    "typed,command",
    [
        ("python -u -m saga_fast.train cub --seed 1", "torchrun --nproc-per-node 2 -m saga_fast.train"),
        ("python -u saga_fast/train.py cub --seed 1", "torchrun --nproc-per-node 2 saga_fast/train.py"),
    ],
)
def test_the_command_to_resume_is_the_one_that_was_typed(typed, command, monkeypatch):
    monkeypatch.setattr(distributed.sys, "orig_argv", typed.split())
    monkeypatch.setattr(distributed.sys, "argv", ["train.py", "cub", "--seed", "1"])
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert " ".join(distributed.launcher()) == command


@pytest.mark.slow
def test_collectives_of_three_ranks():
    ranks = command("-m", "tests.saga_fast.runtime.test_distributed", processes=3)  # what stands at this file's end
    done = subprocess.run(ranks, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


def collectives() -> None:
    """What each of three ranks checks: shares and sums against one process's, in float64."""
    torch.manual_seed(0)
    images, truth = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    model = nn.ParameterDict(
        {"weight": torch.randn(4, 3), "proxies": torch.randn(5, 3), "lone": torch.randn(2)}
    ).double()
    rank, ranks = distributed.rank(), distributed.world_size()

    def loss(embeddings, truth):  # as a metric loss, it is no sum over images
        return ((embeddings @ model["proxies"].T - truth) ** 2).sum().sqrt()

    for count in (7, 2):  # shared as 3, 3, 1; and as 1, 1, 0
        rows = distributed.shard_rows(count)
        embeddings = distributed.all_gather_rows((images[rows] @ model["weight"]).tanh(), count)
        (loss(embeddings, truth[:count]) / ranks).backward()
        if rank == 1:
            model["lone"].sum().backward()
        distributed.all_reduce_gradients([*model.values(), unused := nn.Parameter(torch.zeros(1))])
        alone = loss((images[:count] @ model["weight"]).tanh(), truth[:count]) + model["lone"].sum()
        for parameter, gradient in zip(model.values(), torch.autograd.grad(alone, list(model.values()))):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)
        assert unused.grad is None
        model.zero_grad()

    distributed.assert_in_sync(model)
    with torch.no_grad():
        model["proxies"][4, 2] += 1e-12 * (rank == 2)
    with pytest.raises(distributed.OutOfSync, match="rank 2: its proxies"):
        distributed.assert_in_sync(model)


SPEAKS = """
import atexit, os, sys, time
from saga_fast.utils.errors import PATIENCE, InputError, exit_on_input_error
if os.environ["RANK"] == "0" and sys.argv[1] == "012":
    atexit.register(time.sleep, 2 * PATIENCE.total_seconds())  # as on a busy machine: it ends long after its line
with exit_on_input_error():
    if os.environ["RANK"] in sys.argv[1]:
        raise InputError("--out: no such disk")
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "failing,told", [("1", "error: rank 1: --out"), ("012", "error: --out"), ("0", "error: --out")]
)
def test_a_rank_that_fails_alone_is_heard_and_all_together_once(failing, told, tmp_path):
    (tmp_path / "speaks.py").write_text(SPEAKS)
    done = subprocess.run(command(str(tmp_path / "speaks.py"), failing, processes=3), capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("no such disk") == done.stderr.count(f"{told}: no such disk") == 1


@pytest.mark.faults
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    whole = finished(train(1, tmp_path / "whole", 2), tmp_path / "whole")
    out = broken_off(whole, tmp_path / "broken", 1)
    finished(train(3, out, 2, "--resume"), out)
    assert lines(out, SHARES)[1] == pytest.approx(lines(whole, SHARES)[1], rel=1e-5, abs=1e-7)
    ours, theirs = (
        torch.cat([w.flatten() for w in load_file(run / "encoder/model.safetensors").values()]) for run in (out, whole)
    )
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.faults
def test_torchrun_restarts_a_group_one_of_which_was_killed(tmp_path):
    whole = finished(train(2, tmp_path / "whole", 3), tmp_path / "whole")
    out = tmp_path / "killed"
    run = train(2, out, 3, launch=("--max-restarts", "1"))
    while not (out / "checkpoint/step-000001").exists():
        assert run.poll() is None, out.with_suffix(".log").read_text()
        time.sleep(0.05)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    finished(run, out)
    assert "failed (exitcode: -9)" in out.with_suffix(".log").read_text()
    assert lines(out, SHARES) == lines(whole, SHARES)
    assert (out / "encoder/model.safetensors").read_bytes() == (whole / "encoder/model.safetensors").read_bytes()


if __name__ == "__main__":
    with distributed.process_group():
        collectives()
