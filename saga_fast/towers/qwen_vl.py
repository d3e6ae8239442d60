"""The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL. Their blocks run here, as transformers' loop attends image by
image outside FlashAttention, and computes positions and windows for every image again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionModel,
    apply_rotary_pos_emb_vision,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from saga_fast.towers.base import VisionTower, VisualFeatures, attend

MODELS = {
    "qwen2_vl_vision": (Qwen2VLVisionConfig, Qwen2VisionTransformerPretrainedModel),
    "qwen2_5_vl_vision": (Qwen2_5_VLVisionConfig, Qwen2_5_VisionTransformerPretrainedModel),
    "qwen3_vl_vision": (Qwen3VLVisionConfig, Qwen3VLVisionModel),
}


class Windows(NamedTuple):
    """patches: (windows, n) int64, a tensor for each size of window. inverse: (patches,) int64, each patch's index in
    the concatenation of all windows."""

    patches: tuple[Tensor, ...]
    inverse: Tensor


class ImageGeometry(NamedTuple):
    """Constants of one image size, patches in the order of `QwenTower._embed_patches`.

    cos, sin: (patches, head_dim), rotary. grid: indices into the learned position grid (patches, 4) and their weights
    for bilinear interpolation; None without a grid. windows: None where all blocks attend to the whole image.
    """

    cos: Tensor
    sin: Tensor
    grid: tuple[Tensor, Tensor] | None
    windows: Windows | None


class QwenTower(VisionTower):
    """2-D rotary positions, 2x2 patches merged. Qwen3-VL adds an interpolated learned position grid and DeepStack
    levels; in Qwen2.5-VL most blocks attend within windows.
    """

    kinds = tuple(MODELS)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._geometry = functools.lru_cache(maxsize=8)(self._compute_geometry)
        self._checkpointing = False

    @classmethod
    def model_from_config(cls, config: dict[str, Any]) -> PreTrainedModel:
        configuration, model = MODELS[config.get("model_type", "qwen3_vl_vision")]
        return model(configuration(**config))

    @property
    def width(self) -> int:
        return getattr(self.model.config, "out_hidden_size", self.model.config.hidden_size)

    @property
    def cell(self) -> tuple[int, int]:
        side = self.model.config.patch_size * self.model.config.spatial_merge_size
        return side, side

    def checkpoint_blocks(self, on: bool = True) -> None:
        self._checkpointing = on

    def forward(self, pixels: Tensor) -> VisualFeatures:
        model = self.model
        x = self._embed_patches(pixels)
        batch, patches, _ = x.shape
        geometry = self._geometry(pixels.shape[-2], pixels.shape[-1], x.device)
        if geometry.grid is not None:
            indices, weights = geometry.grid
            x = x + (model.pos_embed(indices) * weights[..., None]).sum(1).to(x.dtype)
        whole = range(len(model.blocks)) if geometry.windows is None else model.fullatt_block_indexes
        levels, deepstack = getattr(model, "deepstack_visual_indexes", ()), []
        for i, block in enumerate(model.blocks):
            attending = block, x, geometry.cos, geometry.sin, None if i in whole else geometry.windows
            if self._checkpointing and torch.is_grad_enabled():
                x = checkpoint(_attend_block, *attending, use_reentrant=False)
            else:
                x = _attend_block(*attending)
            if i in levels:
                merger = model.deepstack_merger_list[levels.index(i)]
                deepstack.append(merger(x.flatten(0, 1)).unflatten(0, (batch, -1)))
        return VisualFeatures(model.merger(x.flatten(0, 1)).unflatten(0, (batch, -1)), tuple(deepstack))

    def _embed_patches(self, pixels: Tensor) -> Tensor:
        """(B, patches, hidden), patches in the merger's order: block by block of merge x merge."""
        config, proj = self.model.config, self.model.patch_embed.proj
        rows, columns = self.grid(*pixels.shape[-2:])
        merge, patch = config.spatial_merge_size, config.patch_size
        x = self.normalize(pixels, proj.weight.dtype)
        x = x.unflatten(3, (columns, merge, patch)).unflatten(2, (rows, merge, patch))
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(pixels.shape[0], rows * columns * merge**2, -1)
        # An image is the same frame `temporal_patch_size` times, so the kernel is summed over time.
        return F.linear(x, proj.weight.sum(2).flatten(1), proj.bias)

    def _compute_geometry(self, height: int, width: int, device: torch.device) -> ImageGeometry:
        model, config = self.model, self.model.config
        sides = height // config.patch_size, width // config.patch_size
        image = torch.tensor([[1, *sides]], device=device)
        positions = get_vision_position_ids(image, config.spatial_merge_size, kwargs={})
        cos, sin = model.rotary_pos_emb(model.patch_embed.proj.weight, positions)
        grid = windows = None
        if hasattr(model, "pos_embed"):
            grid = get_vision_interpolation_indices_and_weights(
                image,
                num_grid_per_side=model.num_grid_per_side,
                mode=model.interpolation_mode,
                align_corners=model.interpolation_align_corners,
                spatial_merge_size=config.spatial_merge_size,
                kwargs={},
            )
        if hasattr(config, "window_size"):
            side = config.window_size // (config.patch_size * config.spatial_merge_size)
            windows = _windows(*self.grid(height, width), side, config.spatial_merge_size**2, device)
        return ImageGeometry(cos, sin, grid, windows)


def _windows(rows: int, columns: int, side: int, merged: int, device: torch.device) -> Windows | None:
    """Squares of `side` x `side` tokens, of `merged` patches each; smaller ones at the right and lower edge. None where
    one window holds all tokens."""
    tokens = torch.arange(rows * columns, device=device).view(rows, columns)
    squares = [square.flatten() for band in tokens.split(side) for square in band.split(side, 1)]
    if len(squares) == 1:
        return None
    of_token = torch.arange(merged, device=device)
    sizes = sorted({len(square) for square in squares}, reverse=True)
    patches = tuple(
        (torch.stack([square for square in squares if len(square) == size])[..., None] * merged + of_token).flatten(1)
        for size in sizes
    )
    return Windows(patches, torch.cat([group.flatten() for group in patches]).argsort())


def _attend_block(block: Any, x: Tensor, cos: Tensor, sin: Tensor, windows: Windows | None) -> Tensor:
    """One transformer block of the tower on x (B, patches, hidden), with attention within each image, or within
    each window."""
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1)).unbind(2)
    q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
    if windows is None:
        o = attend(q, k, v)
    else:
        within = []
        for patches in windows.patches:
            q_in, k_in, v_in = (part[:, patches].flatten(0, 1) for part in (q, k, v))
            within.append(attend(q_in, k_in, v_in).unflatten(0, (len(x), -1)).flatten(1, 2))
        o = torch.cat(within, 1)[:, windows.inverse]
    x = x + attention.proj(o.flatten(2))
    return x + block.mlp(block.norm2(x))
