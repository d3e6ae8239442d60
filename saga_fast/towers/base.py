"""Vision towers of multimodal models, run over equal-sized images as one batch.

`QwenTower` runs Qwen3-VL's blocks itself: transformers' loop attends image by image outside FlashAttention, and
resamples position embeddings anew for every image. `ProjectedTower` is every model that sends a plain ViT through a
projector (InternVL, LLaVA): transformers runs those in batches already. Each knows the pixel statistics it was taught
with. Attention is flash-attn's where that is installed and can run, else PyTorch's.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionBlock,
    Qwen3VLVisionModel,
    apply_rotary_pos_emb_vision,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from saga_fast.utils.errors import InputError

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# (mean, std) by the type of the ViT, for checkpoints that do not say: the published processors' own.
STATISTICS = {
    "qwen3_vl_vision": (HALF, HALF),
    "internvl_vision": (IMAGENET_MEAN, IMAGENET_STD),
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "siglip_vision_model": (HALF, HALF),
}
ATTENTION = "images"  # the name under which transformers finds `attend`


class VisualFeatures(NamedTuple):
    """What a language model reads of B images: `tokens` (B, N, D), and per DeepStack level a tensor (B, N, D)."""

    tokens: Tensor
    deepstack: tuple[Tensor, ...]

    @classmethod
    def of(cls, levels: Sequence[Tensor]) -> VisualFeatures:
        """tokens, then the DeepStack levels."""
        return cls(levels[0], tuple(levels[1:]))

    @property
    def levels(self) -> tuple[Tensor, ...]:
        return (self.tokens, *self.deepstack)

    def detach(self) -> VisualFeatures:
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> VisualFeatures:
        return VisualFeatures(function(self.tokens), tuple(map(function, self.deepstack)))

    def select(self, images: Tensor) -> VisualFeatures:
        """The features of `images` (n,) int64, in that order."""
        return self.map(lambda level: level[images])


class VisionTower(nn.Module, ABC):
    """Pixels in, visual tokens out: `forward(pixels)`, uint8 (B, 3, H, W) → `VisualFeatures` of N tokens of width D.

    model: a transformers vision model with its projector, see `VisionTower.of`. Its config may hold `image_mean` and
    `image_std`, of channels in 0..1; else they follow from the type of the ViT. Raises InputError if neither is known.
    """

    def __init__(self, model: PreTrainedModel, vit: PretrainedConfig) -> None:
        super().__init__()
        self.model = model
        known = STATISTICS.get(vit.model_type, (None, None))
        mean = getattr(model.config, "image_mean", known[0])
        std = getattr(model.config, "image_std", known[1])
        if mean is None or std is None:
            raise InputError(
                f"supervisor.model: pixel mean and standard deviation of a {vit.model_type!r} are unknown; "
                "add the model's preprocessor_config.json"
            )
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        self.register_buffer("scale", (255 * std).float(), persistent=False)
        self.register_buffer("shift", (mean / std).float(), persistent=False)

    @staticmethod
    def of(model: PreTrainedModel) -> VisionTower:
        """The tower around a `Qwen3VLVisionModel`, or around a model that had its `language_model` taken out."""
        return QwenTower(model) if isinstance(model, Qwen3VLVisionModel) else ProjectedTower(model)

    @staticmethod
    def from_config(config: dict) -> VisionTower:
        """A tower with fresh weights from what `model.config.to_diff_dict()` said."""
        if config.get("model_type", "qwen3_vl_vision") == "qwen3_vl_vision":
            return QwenTower(Qwen3VLVisionModel(Qwen3VLVisionConfig(**config)))
        model = AutoModel.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        del model.language_model
        return ProjectedTower(model)

    @property
    @abstractmethod
    def width(self) -> int:
        """D, of a visual token."""

    @property
    @abstractmethod
    def cell(self) -> tuple[int, int]:
        """Height and width in pixels that one token stands for."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens per column and row of an image of (height, width) pixels. Raises InputError if they do not divide."""
        rows, columns = self.cell
        if height % rows or width % columns:
            cell = f"{rows}" if rows == columns else f"{rows}x{columns}"
            raise InputError(f"pixels: got {height}x{width}; both sides must be multiples of patch x merge = {cell}")
        return height // rows, width // columns

    @abstractmethod
    def checkpoint_blocks(self) -> None:
        """From now on keep only the blocks' inputs between forward and backward, and run each block again there."""

    def normalize(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        return (pixels / self.scale - self.shift).to(dtype)


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

    def checkpoint_blocks(self) -> None:
        self._checkpointing = True

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


class ProjectedTower(VisionTower):
    """A ViT, a choice of its layer with or without CLS, perhaps pixel shuffle, and a projector; square images.

    model: a transformers model with `vision_tower`, `multi_modal_projector` and `get_image_features`, whose
    `language_model` is gone; of its `config.text_config` only the width is read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, model.config.vision_config)
        model.vision_tower.set_attn_implementation(ATTENTION)

    @property
    def width(self) -> int:
        return self.model.config.text_config.hidden_size

    @property
    def cell(self) -> tuple[int, int]:
        patch, shuffle = self.model.config.vision_config.patch_size, getattr(self.model.config, "downsample_ratio", 1)
        return tuple(round(side / shuffle) for side in ((patch, patch) if isinstance(patch, int) else patch))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height != width:
            raise InputError(f"pixels: got {height}x{width}; this tower takes square images")
        return super().grid(height, width)

    def checkpoint_blocks(self) -> None:
        for layer in self.model.vision_tower.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, pixels: Tensor) -> VisualFeatures:
        rows, columns = self.grid(*pixels.shape[-2:])
        x = self.normalize(pixels, self.model.dtype)
        tokens = self.model.get_image_features(pixel_values=x, interpolate_pos_encoding=True).pooler_output
        tokens = tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))
        if tokens.shape[1] != rows * columns:
            raise InputError(
                f"supervisor.model: its tower gives {tokens.shape[1]} tokens for {pixels.shape[-2]} pixels a side, "
                f"where patches make {rows * columns}; towers that add or drop tokens are not supported"
            )
        return VisualFeatures(tokens, ())


def _attend_block(block: Qwen3VLVisionBlock, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One transformer block of the tower on x (B, patches, hidden), every image attending to itself."""
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1)).unbind(2)
    q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
    x = x + attention.proj(attend(q, k, v).flatten(2))
    return x + block.mlp(block.norm2(x))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention without a mask, of q, k, v (B, n, heads, head_dim); o alike."""
    if flash_attn_func is not None and _flash_runs(q):
        return flash_attn_func(q, k, v, softmax_scale=scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _flash_runs(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256


def _attend_transformers(module, query, key, value, attention_mask, scaling=None, **_) -> tuple[Tensor, None]:
    """`attend` behind transformers' attention interface: (B, heads, n, head_dim) in, (B, n, heads, head_dim) out."""
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scaling), None


AttentionInterface.register(ATTENTION, _attend_transformers)
