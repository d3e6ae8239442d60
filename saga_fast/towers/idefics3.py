"""The tower of Idefics3 and SmolVLM: SigLIP, whose learned positions are interpolated to any size, then pixel
shuffle."""

from __future__ import annotations

from torch import Tensor

from saga_fast.towers.projected import ProjectedTower


class Idefics3Tower(ProjectedTower):
    """Does not call transformers' `get_image_features`, which takes an image of zeros for padding and drops it; an
    input may be all zeros."""

    kinds = ("idefics3", "smolvlm")
    vit_name, not_vision = "vision_model", ("text_model",)

    @property
    def merge(self) -> int:
        return self.model.config.scale_factor

    def project(self, x: Tensor) -> Tensor:
        return self.model.connector(self.vit(pixel_values=x).last_hidden_state)
