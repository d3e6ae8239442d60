"""Vision towers, run over equal-sized images as one batch: those of multimodal models, and vision models on their own.
Called by the encoder and by code that needs visual tokens alone; imports utils alone.

Transformers' models take seconds to import, so the towers' files are imported when the first tower is made.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from saga_fast.towers.base import VisionTower, VisualFeatures, config_of

__all__ = ["VisionTower", "VisualFeatures", "config_of", "load_tower", "tower_class", "tower_from_config", "tower_of"]


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
    """The tower around a vision model, a multimodal model without its language model, or the result of `load_tower`."""
    return tower_class(config_of(model).model_type)(model)


def tower_from_config(config: dict[str, Any]) -> VisionTower:
    """A tower with new weights; config: the result of `model.config.to_diff_dict()`."""
    tower = tower_class(config["model_type"])
    return tower(tower.model_from_config(config))


def tower_class(model_type: str) -> type[VisionTower]:
    """The tower class for a configuration's model type."""
    from saga_fast.towers.vit import VitTower

    return _classes().get(model_type, VitTower)


@functools.cache
def _classes() -> dict[str, type[VisionTower]]:
    from saga_fast.towers.fast_vlm import FastVlmTower
    from saga_fast.towers.gemma3 import Gemma3Tower
    from saga_fast.towers.idefics3 import Idefics3Tower
    from saga_fast.towers.llava_onevision import OnevisionTower
    from saga_fast.towers.projected import ProjectedTower
    from saga_fast.towers.qwen_vl import QwenTower
    from saga_fast.towers.timm import TimmTower

    towers = QwenTower, ProjectedTower, OnevisionTower, FastVlmTower, Idefics3Tower, Gemma3Tower, TimmTower
    return {kind: tower for tower in towers for kind in tower.kinds}
