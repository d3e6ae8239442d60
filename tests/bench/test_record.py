import json
import subprocess
from dataclasses import replace

import pytest
import torch

from bench import record
from bench.record import SHAPES, Log, child, ending_at, model, supervisor

SMALL = SHAPES["small"]


def test_shape_of_record():
    shape = SHAPES["record"]
    layer = 2 * shape.width * shape.head_dim * (shape.heads + shape.kv_heads) + 3 * shape.width * shape.ffn
    assert shape.vocabulary * shape.width / (shape.layers * layer) == pytest.approx(0.09, abs=0.005)
    for mean in (shape.short, shape.long):
        lengths = torch.tensor(shape.lengths(mean))
        assert lengths.shape == (8, 8) and lengths.float().mean() == pytest.approx(mean, abs=0.5)
        assert lengths.float().std() > 0.2 * mean and shape.lengths(mean) == lengths.tolist()


def test_question_fills_the_prefix_and_rollouts_end_where_they_are_told_to(tmp_path):
    folder = model(SMALL, tmp_path)
    encoder, judge = supervisor(SMALL, folder, 64)
    assert len(judge.prefix) == SMALL.prefix
    lengths = SMALL.lengths(SMALL.short)
    with torch.no_grad(), ending_at(lengths, judge.eos_token_ids[0]):
        completions = judge.rollout(encoder.tower(SMALL.pixels()), torch.arange(SMALL.pairs))
    assert [[len(completion) for completion in group] for group in completions] == lengths
    for group in completions:
        assert all(completion.index(judge.eos_token_ids[0]) == len(completion) - 1 for completion in group)
        assert all(judge.text(completion) for completion in group)


def test_model_is_written_once_and_anew_for_another_shape(tmp_path):
    tiny = replace(SMALL, layers=1)
    weights = model(tiny, tmp_path) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    model(tiny, tmp_path)
    assert weights.stat().st_mtime_ns == before
    model(replace(tiny, ffn=64), tmp_path)
    assert weights.stat().st_mtime_ns != before


def test_child_tells_the_memory_of_the_work_alone(tmp_path, monkeypatch):
    (tmp_path / "measured.py").write_text(
        "import numpy\n"
        "def allocate(before, during):\n"
        "    first = numpy.ones(before, numpy.uint8); del first\n"
        "    return lambda: {'sum': int(numpy.ones(during, numpy.uint8).sum())}\n"
        "def broken():\n"
        "    raise SystemExit(3)\n"
        "def endless():\n"
        "    import time; time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = child("measured:allocate", 300 << 20, 100 << 20)
    assert found["sum"] == 100 << 20 and found["seconds"] > 0
    assert 98 << 20 <= found["growth_bytes"] < 130 << 20 < found["peak_bytes"]  # the kernel counts in batches
    with pytest.raises(RuntimeError, match="measured:broken failed with exit code 3"):
        child("measured:broken")
    with pytest.raises(subprocess.TimeoutExpired):
        child("measured:endless", timeout=0.5)
    monkeypatch.setattr(record, "SETTING_UP", 0.0)
    assert record.child_within(0.5, "measured:endless") == {"broken_off_after": 0.5}


def test_log_goes_on_where_it_stopped_but_not_in_another_environment(tmp_path, monkeypatch):
    path, calls = tmp_path / "figures.jsonl", []

    def measured():
        calls.append(1)
        return {"seconds": len(calls)}

    assert Log(path).once({"repeat": 0}, measured) == Log(path).once({"repeat": 0}, measured) == {"seconds": 1}
    assert Log(path).once({"repeat": 1}, measured) == {"seconds": 2}
    monkeypatch.setattr(record, "environment", lambda: {"commit": "another"})
    assert Log(path).once({"repeat": 0}, measured) == {"seconds": 3}
    assert len(path.read_text().splitlines()) == 3 and json.loads(path.read_text().splitlines()[0])["key"]
