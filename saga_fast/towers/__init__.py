"""Vision towers of multimodal models, run over equal-sized images as one batch. Called by the encoder and by
whoever needs visual tokens alone; imports utils alone.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from saga_fast.towers.base import VisionTower, VisualFeatures
from saga_fast.towers.gemma3 import Gemma3Tower
from saga_fast.towers.idefics3 import Idefics3Tower
from saga_fast.towers.llava_onevision import OnevisionTower
from saga_fast.towers.projected import ProjectedTower
from saga_fast.towers.qwen_vl import QwenTower

__all__ = ["TOWERS", "VisionTower", "VisualFeatures", "tower_from_config", "tower_of"]

# By the model type of the configuration that stands beside the weights.
TOWERS: dict[str, type[VisionTower]] = {
    kind: tower
    for tower in (QwenTower, ProjectedTower, OnevisionTower, Idefics3Tower, Gemma3Tower)
    for kind in tower.kinds
}


def tower_of(model: PreTrainedModel) -> VisionTower:
    """The tower around a vision model, or around a multimodal model that had its language model taken out."""
    return TOWERS[model.config.model_type](model)


def tower_from_config(config: dict) -> VisionTower:
    """A tower with fresh weights from what `model.config.to_diff_dict()` said."""
    tower = TOWERS[config.get("model_type", "qwen3_vl_vision")]
    return tower(tower.model_from_config(config))
