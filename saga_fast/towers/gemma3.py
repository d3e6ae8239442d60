"""The tower of Gemma 3: SigLIP, whose tokens are averaged in squares, normed and projected."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saga_fast.towers.projected import ProjectedTower


class Gemma3Tower(ProjectedTower):
    """transformers' projector supports the released size alone, 896 pixels; here any size, with averages over squares
    of the same number of patches."""

    kinds = ("gemma3",)

    @property
    def merge(self) -> int:
        return self.model.multi_modal_projector.kernel_size

    def project(self, x: Tensor) -> Tensor:
        projector = self.model.multi_modal_projector
        hidden = self.vit(x, interpolate_pos_encoding=True).last_hidden_state
        side = x.shape[-1] // self.model.config.vision_config.patch_size
        squares = F.avg_pool2d(hidden.mT.unflatten(2, (side, side)), projector.kernel_size)
        return projector.mm_soft_emb_norm(squares.flatten(2).mT) @ projector.mm_input_projection_weight
