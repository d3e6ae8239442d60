"""Qwen3-VL's tower. Its blocks are run here: transformers' loop attends image by image outside FlashAttention, and
resamples position embeddings anew for every image.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionBlock,
    Qwen3VLVisionModel,
    apply_rotary_pos_emb_vision,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from saga_fast.towers.base import VisionTower, VisualFeatures, attend


class QwenTower(VisionTower):
    """Qwen3-VL: 2-D rotary positions over a resampled learned grid, 2x2 patches merged, DeepStack levels."""

    def __init__(self, model: Qwen3VLVisionModel) -> None:
        super().__init__(model, model.config)
        self._positions = functools.lru_cache(maxsize=8)(self._grid_positions)
        self._checkpointing = False

    @property
    def width(self) -> int:
        return self.model.config.out_hidden_size

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
        indices, weights, cos, sin = self._positions(pixels.shape[-2], pixels.shape[-1], x.device)
        x = x + (model.pos_embed(indices) * weights[..., None]).sum(1).to(x.dtype)
        deepstack = []
        for i, block in enumerate(model.blocks):
            if self._checkpointing and torch.is_grad_enabled():
                x = checkpoint(_attend_block, block, x, cos, sin, use_reentrant=False)
            else:
                x = _attend_block(block, x, cos, sin)
            if i in model.deepstack_visual_indexes:
                merger = model.deepstack_merger_list[model.deepstack_visual_indexes.index(i)]
                deepstack.append(merger(x.flatten(0, 1)).unflatten(0, (batch, -1)))
        return VisualFeatures(model.merger(x.flatten(0, 1)).unflatten(0, (batch, -1)), tuple(deepstack))

    def _embed_patches(self, pixels: Tensor) -> Tensor:
        """(B, patches, hidden), patches in the order the merger wants: block by block of merge x merge."""
        config, proj = self.model.config, self.model.patch_embed.proj
        rows, columns = self.grid(*pixels.shape[-2:])
        merge, patch = config.spatial_merge_size, config.patch_size
        x = self.normalize(pixels, proj.weight.dtype)
        x = x.unflatten(3, (columns, merge, patch)).unflatten(2, (rows, merge, patch))
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(pixels.shape[0], rows * columns * merge**2, -1)
        # A still image is the same frame `temporal_patch_size` times over, so the kernel may be summed over time.
        return F.linear(x, proj.weight.sum(2).flatten(1), proj.bias)

    def _grid_positions(self, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
        """For each patch: which entries of the learned grid to mix (n, 4), their weights, rotary cos and sin."""
        model, config = self.model, self.model.config
        grid = torch.tensor([[1, height // config.patch_size, width // config.patch_size]], device=device)
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=model.num_grid_per_side,
            mode=model.interpolation_mode,
            align_corners=model.interpolation_align_corners,
            spatial_merge_size=config.spatial_merge_size,
            kwargs={},
        )
        positions = get_vision_position_ids(grid, config.spatial_merge_size, kwargs={})
        cos, sin = model.rotary_pos_emb(model.pos_embed.weight, positions)
        return indices, weights, cos, sin


def _attend_block(block: Qwen3VLVisionBlock, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One transformer block of the tower on x (B, patches, hidden), every image attending to itself."""
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1)).unbind(2)
    q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
    x = x + attention.proj(attend(q, k, v).flatten(2))
    return x + block.mlp(block.norm2(x))
