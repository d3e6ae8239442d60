"""The ONNX graph in onnxruntime against pictures embedded by PyTorch, for batches of any size."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from saga_fast import export as module
from saga_fast.encoder import Encoder
from saga_fast.export import Disagreement, export, main
from saga_fast.utils.errors import InputError

from ..sweep import sweep
from .small import save_encoder, save_pictures


@pytest.fixture(scope="module", params=sweep([("crown", "leg", "tail"), ()]), ids=["attributes", "attention"])
def encoder(tmp_path_factory, request) -> Path:
    save_encoder(folder := tmp_path_factory.mktemp("encoders") / "one", 0, request.param)
    return folder


def test_the_graph_is_the_encoder(encoder, tmp_path, capsys):
    main(["--encoder", str(encoder), "--out", str(tmp_path / "encoder.onnx")])
    assert "pixels uint8 (batch, 3, 32, 32) -> embeddings float32 (batch, 16)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("pixels", "tensor(uint8)", [3, 32, 32])
    assert (given.name, given.type) == ("embeddings", "tensor(float)") and isinstance(taken.shape[0], str)
    model = Encoder.from_pretrained(encoder)
    for count in (1, 2, 7):
        pictures = save_pictures(tmp_path / str(count), count, seed=count)
        (found,) = session.run(None, {"pixels": model.pixels(pictures).numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(found, model(pictures).numpy(), atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_graph_that_computes_something_else_is_not_written(encoder, tmp_path, monkeypatch):
    (tmp_path / "encoder.onnx").write_text("an earlier one")
    other = save_encoder(tmp_path / "other", seed=1)
    write = module._write
    monkeypatch.setattr(module, "_write", lambda encoder, file: write(other, file))
    with pytest.raises(Disagreement, match="differs from PyTorch by"):
        export(Encoder.from_pretrained(encoder), tmp_path / "encoder.onnx")
    assert (tmp_path / "encoder.onnx").read_text() == "an earlier one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "other"]


def test_bad_input_is_one_line(encoder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--encoder: missing"):
        main(["--out", str(tmp_path / "a.onnx")])
    with pytest.raises(InputError, match="--out: .* cannot be written"):
        main(["--encoder", str(encoder), "--out", str(tmp_path / "no" / "a.onnx")])
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        InputError, match="^--out: '.*folder' is a folder; name a file, such as '.*folder/encoder.onnx'"
    ):
        main(["--encoder", str(encoder), "--out", str(tmp_path / "folder")])
    (tmp_path / "folder").rmdir()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="onnxruntime is not installed; pip install 'saga-fast"):
        main(["--encoder", str(encoder), "--out", str(tmp_path / "a.onnx")])
    assert not list(tmp_path.iterdir())
