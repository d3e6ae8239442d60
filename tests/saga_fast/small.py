"""An encoder of random weights, small enough to embed a picture in a millisecond, and pictures for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from saga_fast.encoder import Encoder


def save_encoder(folder: Path, seed: int = 0, attributes: Sequence[str] = ()) -> Encoder:
    """Saves an encoder of 32 x 32 pixels, 4 x 4 tokens and 16 numbers in `folder`, which keeps `attributes` apart if
    there are any; it, loaded from there."""
    torch.manual_seed(seed)
    config = Qwen3VLVisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
        out_hidden_size=24, num_position_embeddings=36, deepstack_visual_indexes=[0], initializer_range=0.2,
    )  # fmt: skip
    pooler = "attributes" if attributes else "attention"
    encoder = Encoder.from_tower(Qwen3VLVisionModel(config), pooler, 16, 32, attributes)
    if attributes:  # queries start so small that they look everywhere alike
        torch.nn.init.normal_(encoder.pooler.query)
    encoder.save_pretrained(folder)
    return Encoder.from_pretrained(folder)


def save_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Saves `count` different pictures of a few coloured squares in `folder`; their paths, sorted."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        squares = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        squares.resize((40, 30), Image.Resampling.NEAREST).save(folder / f"{i:04}.png")
    return sorted(folder.iterdir())
