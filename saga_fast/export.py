"""Export an encoder to ONNX, and check the result.

    python -m saga_fast.export --encoder DIR --out encoder.onnx

The graph takes `pixels`, uint8 (B, 3, S, S) for any B, as `Encoder.pixels` makes them, and gives `embeddings`, float32
(B, D_e), unit vectors. Before it is moved to its place, onnxruntime runs it, and the result must agree with PyTorch's.
Needs the extra `onnx`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saga_fast.encoder import Encoder, expect_finite
from saga_fast.utils.errors import InputError, exit_on_input_error
from saga_fast.utils.files import expect_text, hidden
from saga_fast.utils.flags import parse_flags

TOLERANCE = 1e-4  # of each number of a unit vector
OPSET = 18


class Disagreement(RuntimeError):
    """onnxruntime's result differs from PyTorch's."""


def export(encoder: Encoder, out: Path) -> float:
    """Write the graph to the file `out` (weights beyond 1 GiB beside it); returns the largest difference to PyTorch.

    Raises InputError if the packages are not installed or `out` cannot be written, Disagreement beyond `TOLERANCE`.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'saga-fast[onnx]'") from error
    expect_text(out, "--out")
    if out.is_dir():
        raise InputError(f"--out: {str(out)!r} is a folder; name a file, such as {str(out / 'encoder.onnx')!r}")
    staging = hidden(out, "partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
    except OSError as error:
        raise InputError(f"--out: {str(out)!r} cannot be written ({error.strerror}); name another file") from error
    try:
        file = staging / out.name
        _write(encoder, file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        difference = max(_difference(encoder, session, batch) for batch in (1, 3))
        if not difference <= TOLERANCE:
            raise Disagreement(f"{out}: differs from PyTorch by {difference:.1e}, more than {TOLERANCE}; not written")
        del session
        for path in sorted(staging.iterdir(), key=lambda path: path == file):  # the graph after its weights
            os.replace(path, out.parent / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def _write(encoder: Encoder, file: Path) -> None:
    pixels = torch.zeros(2, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
        # The exporter's warnings concern its own parts and optional packages.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        expect_finite(encoder(pixels))  # and the tower's positions are known now: they go in as constants
        torch.onnx.export(
            encoder,
            (pixels,),
            file,
            input_names=["pixels"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            external_data=sum(parameter.nbytes for parameter in encoder.parameters()) > 2**30,
            verbose=False,
        )


def _difference(encoder: Encoder, session: Any, batch: int) -> float:
    """The largest, over `batch` random pictures."""
    size, random = encoder.image_size, torch.Generator().manual_seed(batch)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=random)
    with torch.inference_mode():
        ours = encoder(pixels)
    (theirs,) = session.run(["embeddings"], {"pixels": pixels.numpy()})
    return (ours - torch.from_numpy(theirs)).abs().max().item()


@dataclass(frozen=True)
class ExportArguments:
    encoder: str = ""
    """Folder that holds the encoder, or hub id."""
    out: Path = Path("encoder.onnx")
    """File to write."""


def main(arguments: Sequence[str]) -> None:
    parsed = parse_flags(ExportArguments(), arguments, "python -m saga_fast.export", "Export an encoder to ONNX.")
    encoder = Encoder.from_pretrained(parsed.encoder)
    difference = export(encoder, parsed.out)
    print(
        f"{parsed.out}: pixels uint8 (batch, 3, {encoder.image_size}, {encoder.image_size}) -> embeddings float32 "
        f"(batch, {encoder.embedding_dim}); onnxruntime and PyTorch differ by {difference:.1e} at most"
    )


if __name__ == "__main__":
    with exit_on_input_error():
        main(sys.argv[1:])
