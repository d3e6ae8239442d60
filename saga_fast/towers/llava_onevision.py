"""The tower of LLaVA-OneVision, whose images come in twos here: as in any prompt of several, each is uncut."""

from __future__ import annotations

import torch
from torch import Tensor

from saga_fast.towers.projected import ProjectedTower


class OnevisionTower(ProjectedTower):
    """LLaVA's. `get_image_features` would cut a single image into views, and put the newline behind each, which is of
    the prompt and not of the picture."""

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
