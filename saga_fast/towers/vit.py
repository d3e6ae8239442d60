"""Vision models of transformers on their own: DINOv2 and v3, SigLIP, CLIP, ViT, Swin and similar ones."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from saga_fast.towers.base import VisionTower, VisualFeatures, checkpoint_layers
from saga_fast.utils.errors import first_line
from saga_fast.utils.releases import OWN_CODE, SAFE_LOADING, Release, quiet


class VitTower(VisionTower):
    """The patches' last hidden states, after the last norm, without class token and registers.

    There is no dropout or jitter in training, as a batch may go through in chunks, and chunks again.
    model: the result of `without_pooler`, with `patch_size` in its configuration.
    """

    kinds = ()  # every vision model that is not in another tower's kinds

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        resampled = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._sizes = {"interpolate_pos_encoding": True} if resampled else {}
        self.train()

    @classmethod
    def model_from_config(cls, config: dict[str, Any]) -> PreTrainedModel:
        return without_pooler(AutoModel.from_config(AutoConfig.for_model(**config), dtype=torch.float32))

    @property
    def width(self) -> int:
        return _last(self.model.config.hidden_sizes if _staged(self.model.config) else self.model.config.hidden_size)

    @property
    def cell(self) -> tuple[int, int]:
        config = self.model.config
        patch = config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        halved = 2 ** (
            len(getattr(config, "depths", (0,))) - 1
        )  # towers in stages halve the grid from each to the next
        return rows * halved, columns * halved

    def train(self, mode: bool = True) -> VitTower:
        super().train(False)
        for layer in self.model.modules():  # which checkpoint only in training mode
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = mode
        return self

    def checkpoint_blocks(self, on: bool = True) -> None:
        checkpoint_layers(self.model, on)

    def forward(self, pixels: Tensor) -> VisualFeatures:
        rows, columns = self.grid(*pixels.shape[-2:])
        x = self.model(pixel_values=self.normalize(pixels, self.model.dtype), **self._sizes).last_hidden_state
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        if self.model.config.model_type == "clip_vision_model":  # whose last norm covers the class token alone
            x = self.model.post_layernorm(x)
        return VisualFeatures(self.patches(x, rows * columns), ())


def load_vit(name: str | Path) -> PreTrainedModel:
    """The vision model of a folder or hub id; of CLIP and SigLIP, which have a text model too, the vision model.

    Weights must be safetensors, and a model's own code is never run. Raises InputError for anything else.
    """
    release = Release(name, "encoder.tower")
    release.expect_configuration(_ACCEPTED)
    release.expect_files()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if getattr(config, "auto_map", None):
            raise ValueError("trust_remote_code")
    except Exception as error:  # of any kind: a configuration's class computes with what it finds
        if "trust_remote_code" in str(error):
            raise release.refused(OWN_CODE) from error
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise release.refused(f"is no model ({kind}{first_line(error)}); {_ACCEPTED}") from error
    release.expect_no_adapter()
    if hasattr(config, "image_token_id"):
        raise release.refused(
            f"is a {config.model_type!r}, a multimodal language model; "
            "name it with --supervisor.model, and its tower is trained"
        )
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "patch_size"):
        raise release.refused(f"is a {vision.model_type!r}, which has no patches; {_ACCEPTED}")
    release.expect_safetensors()
    release.expect_weights()
    statistics = release.pixel_statistics()
    if hasattr(vision, "vision_use_head"):
        vision.vision_use_head = False
    with release.telling("could not be loaded ({})"), quiet():
        model, loaded = AutoModel.from_pretrained(
            name, config=vision, dtype=torch.float32, output_loading_info=True, **SAFE_LOADING
        )
    without_pooler(model)
    release.expect_no_adapter(sorted(loaded["unexpected_keys"]))
    kept = model.state_dict()
    if missing := sorted(key for key in loaded["missing_keys"] if key in kept):
        some = f"{len(missing)} of its weights are in no file, the first is {missing[0]}"
        raise release.refused(f"is not whole ({some}); restore it")
    model.config.update(statistics)
    if not Path(name).exists():  # a folder's name says nothing to others
        model.config.weights = {"source": str(name), "license": "unknown"}
    return model


def without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """`model` without its pooler, whose output a tower does not use."""
    if isinstance(getattr(model, "pooler", None), torch.nn.Module):
        model.register_module("pooler", None)
    return model


_ACCEPTED = "give a folder or hub id of a vision model such as DINOv2, SigLIP or CLIP, timm:NAME, or efficientnet-lite0"


def _staged(config: PretrainedConfig) -> bool:
    return hasattr(config, "hidden_sizes") and not hasattr(config, "hidden_size")


def _last(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[-1]
