"""Vision towers of multimodal models, run over equal-sized images as one batch. Called by the encoder and by
whoever needs visual tokens alone; imports utils alone.

Transformers' models take seconds to import, so the towers' files are imported when the first tower is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from saga_fast.towers.base import VisionTower, VisualFeatures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["VisionTower", "VisualFeatures", "tower_from_config", "tower_of"]


def tower_of(model: PreTrainedModel) -> VisionTower:
    """The tower around a `Qwen3VLVisionModel`, or around a model that had its `language_model` taken out."""
    from saga_fast.towers.projected import ProjectedTower
    from saga_fast.towers.qwen3_vl import Qwen3VLVisionModel, QwenTower

    return QwenTower(model) if isinstance(model, Qwen3VLVisionModel) else ProjectedTower(model)


def tower_from_config(config: dict) -> VisionTower:
    """A tower with fresh weights from what `model.config.to_diff_dict()` said."""
    if config.get("model_type", "qwen3_vl_vision") == "qwen3_vl_vision":
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        return tower_of(Qwen3VLVisionModel(Qwen3VLVisionConfig(**config)))
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    del model.language_model
    return tower_of(model)
