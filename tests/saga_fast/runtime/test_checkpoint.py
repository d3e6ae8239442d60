"""Checkpoints: bit-exact, atomic, and errors that name damaged files."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import warnings
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch

from saga_fast.runtime import checkpoint
from saga_fast.utils.errors import InputError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]


def parts(seed: int = 0) -> checkpoint.Parts:
    generator = torch.Generator().manual_seed(seed)
    tensors = {str(dtype): (torch.randn(3, 4, generator=generator) * 9).to(dtype) for dtype in DTYPES}
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 5e-324], dtype=torch.float64)
    return {
        "encoder": {**tensors, "scalar": torch.tensor(2.5), "none": torch.empty(0, 3)},
        "odd": {"x": odd},
        "void": {},
    }


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def test_round_trip_is_bit_exact(tmp_path):
    saved, state = parts(), {"step": 7, "lr": 0.1 + 0.2, "best": None, "nested": {"list": [1, "ü\n", True]}}
    del saved["encoder"]["torch.bfloat16"]  # NumPy has none; compared below
    half = torch.randn(5).bfloat16()
    path = checkpoint.save(tmp_path / "checkpoint", 7, {**saved, "half": {"x": half}}, state)
    assert path.name == "step-000007"
    loaded, read = checkpoint.load(path)
    assert torch.equal(loaded.pop("half")["x"].view(torch.int16), half.view(torch.int16))
    assert read == state and loaded.keys() == saved.keys()
    for part, tensors in saved.items():
        assert tensors.keys() == loaded[part].keys()
        assert all(same_bytes(tensor, loaded[part][name]) for name, tensor in tensors.items())


def test_views_and_shared_storage_are_saved_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {
        "a": base,
        "again": base,
        "column": base[:, 1],
        "turned": base.T,
        "row": base[2],
        "grad": base.clone().requires_grad_(),
    }
    loaded, _ = checkpoint.load(checkpoint.save(tmp_path, 1, {"views": views}, {}))
    assert all(torch.equal(views[name], loaded["views"][name]) for name in views)


def test_keeps_the_newest_and_drops_abandoned_later_steps(tmp_path):
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, step, parts(step), {"step": step})
    assert sorted(os.listdir(tmp_path)) == ["step-000015", "step-000020"]
    checkpoint.save(tmp_path, 16, parts(), {"step": 16}, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["step-000015", "step-000016"]
    checkpoint.save(tmp_path, 16, parts(), {"step": "again"}, keep=1)
    assert os.listdir(tmp_path) == ["step-000016"]
    assert checkpoint.load(checkpoint.latest(tmp_path))[1] == {"step": "again"}


def test_nothing_to_resume(tmp_path):
    assert checkpoint.latest(tmp_path / "missing") is None
    (tmp_path / ".step-000001.partial").mkdir()
    (tmp_path / "step-one").mkdir()
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("call", ["rename", "fsync", "mkdir"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [1, 2])
def test_a_save_cut_short_leaves_the_old_one(tmp_path, monkeypatch, call, error, step):
    checkpoint.save(tmp_path, 1, parts(1), {"step": 1})

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        if call == "mkdir":
            real = Path.mkdir
            patch.setattr(Path, "mkdir", lambda self, **kwargs: real(self, **kwargs) if kwargs else fail())
        else:
            patch.setattr(os, call, fail)
        with pytest.raises(type(error)):
            checkpoint.save(tmp_path, step, parts(2), {"step": 2})
    assert os.listdir(tmp_path) == ["step-000001"]
    assert checkpoint.load(checkpoint.latest(tmp_path))[1] == {"step": 1}


def test_the_old_one_returns_if_the_second_of_two_renames_fails(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, parts(1), {"step": 1})
    real = os.rename

    def rename(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.save(tmp_path, 1, parts(2), {"step": 2})
    assert checkpoint.load(checkpoint.latest(tmp_path))[1] == {"step": 1}


def test_remains_of_a_kill_are_ignored_and_swept(tmp_path):
    checkpoint.save(tmp_path, 1, parts(), {})
    remains = tmp_path / ".step-000002.partial"
    remains.mkdir()
    (remains / "encoder.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "step-000001"
    checkpoint.save(tmp_path, 2, parts(), {})
    assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000002"]


def test_a_full_disk_is_an_os_error(tmp_path):
    checkpoint.save(tmp_path, 1, parts(), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            checkpoint.save(tmp_path, 2, {"big": {"x": torch.zeros(2**16)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["step-000001"] and checkpoint.latest(tmp_path)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "bit flip":
        data[len(data) // 2] ^= 4
    path.write_bytes(data[:-1] if how == "truncation" else data)
    if how == "deletion":
        path.unlink()


@pytest.mark.parametrize("how", ["bit flip", "truncation", "deletion"])
@pytest.mark.parametrize("file", ["encoder.safetensors", "state.json", "manifest.json"])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, file, how):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, parts(step), {"step": step})
    damage(tmp_path / "step-000002" / file, how)
    with pytest.warns(UserWarning, match=f"step-000002.*{'manifest' if how == 'deletion' else file}"):
        assert checkpoint.latest(tmp_path).name == "step-000001"
    with pytest.raises(InputError, match="step-000002"):
        checkpoint.load(tmp_path / "step-000002")
    damage(tmp_path / "step-000001" / file, how)
    with pytest.warns(UserWarning), pytest.raises(InputError, match="every checkpoint in it is damaged"):
        checkpoint.latest(tmp_path)


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"a": {"x": torch.ones(1)}}, {})
    whole = (path / "manifest.json").read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        (path / "manifest.json").write_bytes(flipped)
        try:
            checkpoint.load(path)
        except InputError:
            continue
        assert json.loads(flipped) == json.loads(whole)  # white space that stayed white


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", '"x"', "{}", "[" * 100_000, '{"format": 2, "sha256": {}}', '{"format": 1, "sha256": 5}',
     '{"format": 1, "sha256": {"../../etc/passwd": "0"}}', '{"format": 1, "sha256": ["state.json"]}', "\udcff"],
)  # fmt: skip
def test_a_foreign_manifest_is_refused(tmp_path, text):
    path = checkpoint.save(tmp_path, 1, parts(), {})
    (path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"step-000001/manifest.json"):
        checkpoint.load(path)


def model_and_optimizer(seed: int, dtype: torch.dtype = torch.float32, adamw=torch.optim.AdamW):
    torch.manual_seed(seed)
    # 8-bit states begin at 4096 weights: one layer has them, the others do not.
    model = torch.nn.Sequential(torch.nn.Linear(4, 128), torch.nn.Linear(128, 64), torch.nn.Linear(64, 2)).to(dtype)
    groups = [{"params": model[:2].parameters(), "lr": 2e-2}, {"params": model[2].parameters(), "lr": 1e-1}]
    return model, adamw(groups, betas=(0.8, 0.95))


def train(model, optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 4, dtype=model[0].weight.dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "dtype,adamw",
    [
        (torch.float32, torch.optim.AdamW),
        (torch.bfloat16, torch.optim.AdamW),
        (torch.float32, bitsandbytes.optim.AdamW8bit),
    ],
)
def test_training_goes_on_to_the_same_bytes(tmp_path, dtype, adamw):
    model, optimizer = model_and_optimizer(0, dtype, adamw)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 1 / 3
    tensors, rest = checkpoint.pack_optimizer(optimizer)
    assert any(tensor.dtype == torch.uint8 for tensor in tensors.values()) == (adamw is not torch.optim.AdamW)
    rng, rng_rest = checkpoint.pack_rng()
    saved = {"model": model.state_dict(), "optimizer": tensors, "rng": rng}
    path = checkpoint.save(tmp_path, 3, saved, {"optimizer": rest, "rng": rng_rest})
    train(model, optimizer, 4)

    resumed, fresh = model_and_optimizer(1, dtype, adamw)
    loaded, state = checkpoint.load(path)
    resumed.load_state_dict(loaded["model"])
    checkpoint.unpack_optimizer(fresh, loaded["optimizer"], state["optimizer"])
    checkpoint.unpack_rng(loaded["rng"], state["rng"])
    train(resumed, fresh, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert fresh.param_groups[0]["lr"] == 1 / 3 and fresh.param_groups[0]["betas"] == (0.8, 0.95)
    (ours, our_rest), (theirs, their_rest) = map(checkpoint.pack_optimizer, (fresh, optimizer))
    assert ours.keys() == theirs.keys() and our_rest["scalars"] == their_rest["scalars"]
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_an_optimizer_that_has_not_stepped_and_one_of_other_groups(tmp_path):
    _, optimizer = model_and_optimizer(0)
    tensors, rest = checkpoint.pack_optimizer(optimizer)
    loaded, state = checkpoint.load(checkpoint.save(tmp_path, 0, {"optimizer": tensors}, rest))
    checkpoint.unpack_optimizer(optimizer, loaded["optimizer"], state)
    with pytest.raises(ValueError, match="parameter group"):
        checkpoint.unpack_optimizer(torch.optim.AdamW([torch.ones(2)]), tensors, rest)


def test_a_dictionary_within_a_parameters_state_comes_back_as_one():
    class Optimizer:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return {"state": self.state, "param_groups": []}

        def load_state_dict(self, values):
            self.state = values["state"]

    state = {0: {"step": 3, "packed": {"moment": torch.arange(3), "inner": {"scale": 0.5}}}, 1: {"step": 4}}
    restored = Optimizer(None)
    tensors, rest = checkpoint.pack_optimizer(Optimizer(state))
    assert list(tensors) == ["0.packed.moment"]
    checkpoint.unpack_optimizer(restored, tensors, json.loads(json.dumps(rest)))
    assert torch.equal(restored.state[0]["packed"].pop("moment"), state[0]["packed"].pop("moment"))
    assert restored.state == state


def test_every_generator_is_resumed():
    def draw():
        return [torch.rand(2).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()]

    draw()  # odd counts: both gaussian generators hold a value back
    tensors, rest = checkpoint.pack_rng()
    rest = json.loads(json.dumps(rest))
    expected = draw()
    assert draw() != expected
    checkpoint.unpack_rng(tensors, rest)
    assert draw() == expected


def test_loading_runs_no_pickle(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, 1, parts(), {})
    monkeypatch.setattr("pickle.loads", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("unpickled"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load(path)
