"""The tower of models with a plain ViT and a projector (InternVL, LLaVA), which transformers runs in batches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModel, PreTrainedModel

from saga_fast.towers.base import VisionTower, VisualFeatures, attend, checkpoint_layers
from saga_fast.utils.errors import InputError

ATTENTION = "images"  # the name under which transformers finds `attend`


class ProjectedTower(VisionTower):
    """A ViT, a choice of its layer with or without CLS, perhaps pixel shuffle, and a projector; square images.

    model: a transformers model with `vision_tower`, `multi_modal_projector` and `get_image_features`, whose parts
    `not_vision` are removed; of its `config.text_config` only the width is read. Subclasses override what other models
    name or compute differently.
    """

    kinds: ClassVar[tuple[str, ...]] = ("internvl", "llava")
    vit_name = "vision_tower"
    not_vision: ClassVar[tuple[str, ...]] = ("language_model",)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, model.config.vision_config)
        self.vit.set_attn_implementation(ATTENTION)

    @classmethod
    def model_from_config(cls, config: dict[str, Any]) -> PreTrainedModel:
        model = AutoModel.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        for part in cls.not_vision:
            delattr(model, part)
        return model

    @property
    def vit(self) -> Any:
        return getattr(self.model, self.vit_name)

    @property
    def width(self) -> int:
        return self.model.config.text_config.hidden_size

    @property
    def merge(self) -> float:
        """Patches per column and row behind one token."""
        return 1 / getattr(self.model.config, "downsample_ratio", 1)

    @property
    def cell(self) -> tuple[int, int]:
        patch = self.model.config.vision_config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        return round(rows * self.merge), round(columns * self.merge)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height != width:
            raise InputError(f"pixels: got {height}x{width}; this tower takes square images")
        return super().grid(height, width)

    def checkpoint_blocks(self, on: bool = True) -> None:
        checkpoint_layers(self.vit, on)

    def forward(self, pixels: Tensor) -> VisualFeatures:
        rows, columns = self.grid(*pixels.shape[-2:])
        tokens = self.project(self.normalize(pixels, self.model.dtype))
        if tokens.shape[1] != rows * columns:
            raise InputError(
                f"supervisor.model: its tower gives {tokens.shape[1]} tokens for {pixels.shape[-2]} pixels a side, "
                f"where patches make {rows * columns}; towers that add or drop tokens are not supported"
            )
        return VisualFeatures(tokens, ())

    def project(self, x: Tensor) -> Tensor:
        """Visual tokens (B, N, D) of normalised pixels (B, 3, S, S)."""
        tokens = self.model.get_image_features(pixel_values=x, interpolate_pos_encoding=True).pooler_output
        return tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))


def _attend_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """`attend` behind transformers' attention interface: (B, heads, n, head_dim) in, (B, n, heads, head_dim) out.
    options: the layer's, of which `scaling` is used."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend(q, k, v, options.get("scaling")), None


AttentionInterface.register(ATTENTION, _attend_transformers)
