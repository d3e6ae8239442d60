"""The tower of Idefics3 and SmolVLM: SigLIP, whose learned positions stretch over any size, then pixel shuffle."""

from __future__ import annotations

from torch import Tensor

from saga_fast.towers.projected import ProjectedTower


class Idefics3Tower(ProjectedTower):
    """transformers' `get_image_features` takes an image of zeros for padding and drops it; a picture may be that."""

    kinds = ("idefics3", "smolvlm")
    vit_name, not_vision = "vision_model", ("text_model",)

    @property
    def merge(self) -> int:
        return self.model.config.scale_factor

    def project(self, x: Tensor) -> Tensor:
        return self.model.connector(self.vit(pixel_values=x).last_hidden_state)
