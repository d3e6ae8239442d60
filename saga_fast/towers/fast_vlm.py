"""The tower of FastVLM: a model of timm that gives a feature map, whose every place is projected to a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from saga_fast.towers.base import VisionTower
from saga_fast.towers.projected import ProjectedTower
from saga_fast.towers.timm import checkpoint_blocks, faults, import_timm
from saga_fast.utils.errors import InputError, first_line


class FastVlmTower(ProjectedTower):
    """It stays in evaluation mode, as `TimmTower` does and for the same reasons: batch norm is frozen."""

    kinds = ("fast_vlm",)

    def __init__(self, model: PreTrainedModel) -> None:
        VisionTower.__init__(self, model, model.config.vision_config)  # timm attends as it will
        self.train()

    @classmethod
    def model_from_config(cls, config: dict[str, Any]) -> PreTrainedModel:
        import_timm()
        vision = AutoConfig.for_model(**config).vision_config
        for fault in faults(getattr(vision, "architecture", None), getattr(vision, "model_args", None)):
            raise InputError(f"encoder: its tower's {fault}")
        return super().model_from_config(config)

    @property
    def network(self) -> Any:
        return self.vit.timm_model

    @property
    def cell(self) -> tuple[int, int]:
        side: int = self.network.feature_info[-1]["reduction"]
        return side, side

    def train(self, mode: bool = True) -> FastVlmTower:
        return super().train(False)

    def checkpoint_blocks(self, on: bool = True) -> None:
        checkpoint_blocks(self.network, self.model.config.vision_config.architecture, on)

    def project(self, x: Tensor) -> Tensor:
        config = self.model.config.vision_config
        try:
            features = self.vit(x.contiguous(memory_format=torch.channels_last), do_pooling=False).last_hidden_state
        except AssertionError as error:  # a network for images of one size
            raise InputError(
                f"data.image-size: {x.shape[-1]} is no size for timm's {config.architecture}, the tower of "
                f"supervisor.model ({first_line(error)})"
            ) from error
        if features.ndim != 4 or features.shape[1] != config.hidden_size:
            raise InputError(
                f"supervisor.model: its tower, timm's {config.architecture}, gives features of shape "
                f"{tuple(features.shape[1:])}, where a 'fast_vlm' reads a map of {config.hidden_size} channels"
            )
        return self.model.multi_modal_projector(features.flatten(2).mT)
