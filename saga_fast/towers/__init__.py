"""Vision towers of multimodal models, run over equal-sized images as one batch. Called by the encoder and by
whoever needs visual tokens alone; imports utils alone.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from saga_fast.towers.base import VisionTower, VisualFeatures
from saga_fast.towers.projected import ProjectedTower
from saga_fast.towers.qwen3_vl import QwenTower

__all__ = ["VisionTower", "VisualFeatures", "tower_from_config", "tower_of"]


def tower_of(model: PreTrainedModel) -> VisionTower:
    """The tower around a `Qwen3VLVisionModel`, or around a model that had its `language_model` taken out."""
    return QwenTower(model) if isinstance(model, Qwen3VLVisionModel) else ProjectedTower(model)


def tower_from_config(config: dict) -> VisionTower:
    """A tower with fresh weights from what `model.config.to_diff_dict()` said."""
    if config.get("model_type", "qwen3_vl_vision") == "qwen3_vl_vision":
        return QwenTower(Qwen3VLVisionModel(Qwen3VLVisionConfig(**config)))
    model = AutoModel.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    del model.language_model
    return ProjectedTower(model)
