"""The tower of LLaVA-OneVision: each image is one view, as in any prompt of several images."""

from __future__ import annotations

import torch
from torch import Tensor

from saga_fast.towers.projected import ProjectedTower


class OnevisionTower(ProjectedTower):
    """LLaVA's tower without `get_image_features`, which splits a single image into views and appends the newline
    embedding to each; the newline belongs to the prompt, not to the image."""

    kinds = ("llava_onevision",)
    not_vision = ("language_model", "image_newline")

    def project(self, x: Tensor) -> Tensor:
        config = self.model.config
        hidden = self.vit(x, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        layer = config.vision_feature_layer
        chosen = torch.cat([hidden[i] for i in ([layer] if isinstance(layer, int) else layer)], -1)
        return self.model.multi_modal_projector(
            chosen[:, 1:] if config.vision_feature_select_strategy == "default" else chosen
        )
