"""The tower of every model that sends a plain ViT through a projector (InternVL, LLaVA): transformers runs those in
batches already.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from saga_fast.towers.base import VisionTower, VisualFeatures, attend, checkpoint_layers
from saga_fast.utils.errors import InputError

ATTENTION = "images"  # the name under which transformers finds `attend`


class ProjectedTower(VisionTower):
    """A ViT, a choice of its layer with or without CLS, perhaps pixel shuffle, and a projector; square images.

    model: a transformers model with `vision_tower`, `multi_modal_projector` and `get_image_features`, whose
    `language_model` is gone; of its `config.text_config` only the width is read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, model.config.vision_config)
        model.vision_tower.set_attn_implementation(ATTENTION)

    @property
    def width(self) -> int:
        return self.model.config.text_config.hidden_size

    @property
    def cell(self) -> tuple[int, int]:
        patch, shuffle = self.model.config.vision_config.patch_size, getattr(self.model.config, "downsample_ratio", 1)
        return tuple(round(side / shuffle) for side in ((patch, patch) if isinstance(patch, int) else patch))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height != width:
            raise InputError(f"pixels: got {height}x{width}; this tower takes square images")
        return super().grid(height, width)

    def checkpoint_blocks(self, on: bool = True) -> None:
        checkpoint_layers(self.model.vision_tower, on)

    def forward(self, pixels: Tensor) -> VisualFeatures:
        rows, columns = self.grid(*pixels.shape[-2:])
        x = self.normalize(pixels, self.model.dtype)
        tokens = self.model.get_image_features(pixel_values=x, interpolate_pos_encoding=True).pooler_output
        tokens = tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))
        if tokens.shape[1] != rows * columns:
            raise InputError(
                f"supervisor.model: its tower gives {tokens.shape[1]} tokens for {pixels.shape[-2]} pixels a side, "
                f"where patches make {rows * columns}; towers that add or drop tokens are not supported"
            )
        return VisualFeatures(tokens, ())


def _attend_transformers(module, query, key, value, attention_mask, scaling=None, **_) -> tuple[Tensor, None]:
    """`attend` behind transformers' attention interface: (B, heads, n, head_dim) in, (B, n, heads, head_dim) out."""
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scaling), None


AttentionInterface.register(ATTENTION, _attend_transformers)
