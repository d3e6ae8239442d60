"""Vision towers, run over equal-sized images as one batch: those of multimodal models, and vision models that stand
alone. Called by the encoder and by whoever needs visual tokens alone; imports utils alone.

Transformers' models take seconds to import, so the towers' files are imported when the first tower is made.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from saga_fast.towers.base import VisionTower, VisualFeatures

__all__ = ["VisionTower", "VisualFeatures", "load_tower", "tower_from_config", "tower_of"]


def load_tower(name: str | Path) -> nn.Module:
    """The pretrained vision model `name`, which `tower_of` makes a tower of: efficientnet-lite0 (1, 2), timm:NAME, or a
    folder or hub id of a vision model of transformers. Raises InputError where there is none."""
    from saga_fast.towers.timm import LITE, PREFIX, load_lite, load_timm
    from saga_fast.towers.vit import load_vit

    name = str(name)
    if name in LITE:
        return load_lite(name)
    return load_timm(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else load_vit(name)


def tower_of(model: nn.Module) -> VisionTower:
    """The tower around a `Qwen3VLVisionModel`, a model that had its `language_model` taken out, or what `load_tower`
    gave."""
    from saga_fast.towers.projected import ProjectedTower
    from saga_fast.towers.qwen3_vl import Qwen3VLVisionModel, QwenTower
    from saga_fast.towers.timm import TimmNetwork, TimmTower
    from saga_fast.towers.vit import VitTower

    if isinstance(model, Qwen3VLVisionModel):
        return QwenTower(model)
    if isinstance(model, TimmNetwork):
        return TimmTower(model)
    return ProjectedTower(model) if hasattr(model, "multi_modal_projector") else VitTower(model)


def tower_from_config(config: dict) -> VisionTower:
    """A tower with fresh weights from what `model.config.to_diff_dict()` said."""
    kind = config.get("model_type", "qwen3_vl_vision")
    if kind == "qwen3_vl_vision":
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        return tower_of(Qwen3VLVisionModel(Qwen3VLVisionConfig(**config)))
    from saga_fast.towers.timm import TimmConfig, TimmNetwork

    if kind == TimmConfig.model_type:
        return tower_of(TimmNetwork(TimmConfig(**config)))
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    if not hasattr(model, "language_model"):
        from saga_fast.towers.vit import VitTower, bare

        return VitTower(bare(model))
    del model.language_model
    return tower_of(model)
