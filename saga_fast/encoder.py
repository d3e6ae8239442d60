"""The encoder: vision tower and pooler. The only thing that is trained, and the only thing deployed.

    z = pooler(tower(image)),  |z| = 1                                       (SAGA, arXiv 2606.15134)

The tower is the MLLM's own. It is run here over equal-sized images as one batch: transformers' loop attends image by
image outside FlashAttention, and resamples position embeddings anew for every image.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionBlock,
    Qwen3VLVisionModel,
    apply_rotary_pos_emb_vision,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from saga_fast.errors import InputError
from saga_fast.images import open_rgb, to_pixels, to_rgb

POOLERS = ("attention", "mean", "max")


class VisualFeatures(NamedTuple):
    """What a language model reads of B images: `tokens` (B, N, D), and per DeepStack level a tensor (B, N, D)."""

    tokens: Tensor
    deepstack: tuple[Tensor, ...]

    def detach(self) -> VisualFeatures:
        return VisualFeatures(self.tokens.detach(), tuple(level.detach() for level in self.deepstack))

    def select(self, images: Tensor) -> VisualFeatures:
        """The features of `images` (n,) int64, in that order."""
        return VisualFeatures(self.tokens[images], tuple(level[images] for level in self.deepstack))


class VisionTower(nn.Module):
    """A Qwen3-VL vision model over a batch of equal-sized images.

    `forward(pixels)`: uint8 (B, 3, H, W) → `VisualFeatures` of N = H·W / (patch·merge)² merged tokens of width D.
    Raises ValueError unless H and W are multiples of patch·merge.
    """

    def __init__(self, model: Qwen3VLVisionModel) -> None:
        super().__init__()
        self.model = model
        self._positions = functools.lru_cache(maxsize=8)(self._grid_positions)

    @property
    def width(self) -> int:
        return self.model.config.out_hidden_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Merged tokens per column and row of an image of (height, width) pixels."""
        cell = self.model.config.patch_size * self.model.config.spatial_merge_size
        if height % cell or width % cell:
            raise ValueError(f"pixels: got {height}x{width}; both sides must be multiples of patch x merge = {cell}")
        return height // cell, width // cell

    def forward(self, pixels: Tensor) -> VisualFeatures:
        model = self.model
        x = self._embed_patches(pixels)
        batch, patches, _ = x.shape
        indices, weights, cos, sin = self._positions(pixels.shape[-2], pixels.shape[-1], x.device)
        x = x + (model.pos_embed(indices) * weights[..., None]).sum(1).to(x.dtype)
        deepstack = []
        for i, block in enumerate(model.blocks):
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
        x = pixels.to(proj.weight.dtype) / 127.5 - 1
        x = x.unflatten(3, (columns, merge, patch)).unflatten(2, (rows, merge, patch))
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(pixels), rows * columns * merge**2, -1)
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
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    x = x + attention.proj(o.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


class Pooler(nn.Module):
    """Pools tokens (B, N, D) into unit vectors (B, D_e), and says where it looked.

    attention: β = softmax(q W_k Xᵀ / √D) with a learnable query q and key projection W_k, pooled = βX (the paper's);
    mean, max: its baselines. All are followed by a linear map to D_e and L2 normalisation. The query starts at zero, so
    that training starts from mean pooling; the linear map starts orthogonal, so that it starts from the tower's space.
    """

    def __init__(self, width: int, embedding_dim: int, kind: str = "attention") -> None:
        super().__init__()
        if kind not in POOLERS:
            raise InputError(f"encoder.pooler: got {kind!r}; choose one of {', '.join(POOLERS)}")
        self.kind = kind
        if kind == "attention":
            self.query = nn.Parameter(torch.zeros(width))
            self.key = nn.Parameter(torch.eye(width))
        self.project = nn.Linear(width, embedding_dim, bias=False)
        nn.init.orthogonal_(self.project.weight)

    def attention(self, tokens: Tensor) -> Tensor:
        """β (B, N): the pooler's attention over each image's tokens. Raises ValueError for mean and max pooling."""
        if self.kind != "attention":
            raise ValueError(f"pooler: {self.kind} pooling has no attention; build it with kind='attention'")
        scores = tokens @ (self.query @ self.key) * tokens.shape[-1] ** -0.5
        return scores.float().softmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.kind == "attention":
            pooled = torch.einsum("bn,bnd->bd", self.attention(tokens).to(tokens.dtype), tokens)
        else:
            pooled = tokens.mean(1) if self.kind == "mean" else tokens.amax(1)
        return F.normalize(self.project(pooled).float(), dim=-1)


class Encoder(nn.Module, PyTorchModelHubMixin):
    """Images in, unit vectors out: a plain module with the hub's `from_pretrained`, `save_pretrained`, `push_to_hub`.

    vision_config: the tower's configuration as a dict; pooler: "attention", "mean" or "max"; embedding_dim: D_e;
    image_size: the side in pixels that images are resized to.
    """

    def __init__(
        self, vision_config: dict, pooler: str = "attention", embedding_dim: int = 4096, image_size: int = 224
    ):
        super().__init__()
        self.image_size = image_size
        self.tower = VisionTower(Qwen3VLVisionModel(Qwen3VLVisionConfig(**vision_config)))
        self.pooler = Pooler(self.tower.width, embedding_dim, pooler)
        self.tower.grid(image_size, image_size)

    @classmethod
    def from_tower(cls, model: Qwen3VLVisionModel, pooler: str, embedding_dim: int, image_size: int) -> Encoder:
        """A new encoder around a copy of an MLLM's own tower, in fp32, with a fresh pooler."""
        encoder = cls(model.config.to_diff_dict(), pooler, embedding_dim, image_size)
        encoder.tower.model.load_state_dict(model.state_dict())
        return encoder

    def forward(self, images: Tensor | Sequence[Image.Image | str | Path]) -> Tensor:
        """uint8 pixels (B, 3, S, S), or a sequence of PIL images or paths → unit vectors (B, D_e), float32."""
        if not isinstance(images, Tensor):
            opened = [to_rgb(image) if isinstance(image, Image.Image) else open_rgb(image) for image in images]
            images = torch.stack([to_pixels(image, self.image_size) for image in opened])
        return self.pooler(self.tower(images.to(self.pooler.project.weight.device)).tokens)
