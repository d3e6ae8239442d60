"""The interface of vision towers: pixels in, visual tokens out, normalised by the pixel statistics of their
pretraining. Attention is by flash-attn where that is installed and supports the inputs, else by PyTorch.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saga_fast.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# (mean, std) by the type of the ViT, for checkpoints without: those of the published processors.
STATISTICS = {
    "qwen3_vl_vision": (HALF, HALF),
    "internvl_vision": (IMAGENET_MEAN, IMAGENET_STD),
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "siglip_vision_model": (HALF, HALF),
    "idefics3_vision": (HALF, HALF),
    "smolvlm_vision": (HALF, HALF),
    "qwen2_vl_vision": (CLIP_MEAN, CLIP_STD),
    "qwen2_5_vl_vision": (CLIP_MEAN, CLIP_STD),
    "vit": (HALF, HALF),
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
    "dinov2_with_registers": (IMAGENET_MEAN, IMAGENET_STD),
    "dinov3_vit": (IMAGENET_MEAN, IMAGENET_STD),
}


class VisualFeatures(NamedTuple):
    """A language model's input from B images: `tokens` (B, N, D), and per DeepStack level a tensor (B, N, D)."""

    tokens: Tensor
    deepstack: tuple[Tensor, ...]

    @classmethod
    def of(cls, levels: Sequence[Tensor]) -> VisualFeatures:
        """From a sequence of tokens, then the DeepStack levels."""
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

    model: a vision model, with its projector where a language model reads it, see `tower_of`. Its config may have
    `image_mean` and `image_std`, of channels in 0..1; else they follow from the type of the ViT. Raises InputError if
    neither is known.
    vit: the configuration of the ViT in it, where that is not the model's own.
    kinds: model types of the configurations it serves. not_vision: attributes of the multimodal model that are removed,
    for a tower that wraps the multimodal model itself.
    """

    kinds: ClassVar[tuple[str, ...]]
    not_vision: ClassVar[tuple[str, ...]] = ()
    model: Any  # another library's module, whose parts are typed only at run time
    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, vit: PretrainedConfig | None = None) -> None:
        super().__init__()
        self.model = model
        config = config_of(model)
        vit = vit or config
        known = STATISTICS.get(vit.model_type, (None, None))
        mean = getattr(config, "image_mean", known[0])
        std = getattr(config, "image_std", known[1])
        if mean is None or std is None:
            raise InputError(
                f"tower: pixel mean and standard deviation of a {vit.model_type!r} are unknown; "
                "add the model's preprocessor_config.json"
            )
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        self.register_buffer("scale", (255 * std).float(), persistent=False)
        self.register_buffer("shift", (mean / std).float(), persistent=False)

    @classmethod
    @abstractmethod
    def model_from_config(cls, config: dict[str, Any]) -> nn.Module:
        """The `model` of a configuration dict, with new weights in fp32."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D, the width of a visual token."""

    @property
    @abstractmethod
    def cell(self) -> tuple[int, int]:
        """Height and width in pixels of the image area behind one token."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens per column and row of an image of (height, width) pixels. Raises InputError if they do not divide, and
        for a configuration by which a token has no pixels."""
        rows, columns = self.cell
        if min(rows, columns) < 1:
            raise InputError(f"tower: a token of {rows}x{columns} pixels, by its configuration; restore config.json")
        if height % rows or width % columns:
            cell = f"{rows}" if rows == columns else f"{rows}x{columns}"
            raise InputError(
                f"pixels: got {height}x{width}; both sides must be multiples of patch x merge = {cell} "
                "(--data.image-size, in training)"
            )
        return height // rows, width // columns

    @abstractmethod
    def checkpoint_blocks(self, on: bool = True) -> None:
        """Turn gradient checkpointing of the blocks on or off: keep only their inputs between forward and backward, and
        run each block again in the backward. Raises InputError for a tower that does not support it."""

    def normalize(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        return (pixels / self.scale - self.shift).to(dtype)

    def patches(self, tokens: Tensor, count: int) -> Tensor:
        """The last `count` of tokens (B, n, D), without class token and registers, which come first. Raises InputError
        if there are fewer."""
        if tokens.shape[1] < count:
            raise InputError(
                f"tower: a {self.model.config.model_type!r} that gives {tokens.shape[1]} tokens where its patches make "
                f"{count}; towers that drop tokens are not supported"
            )
        return tokens[:, tokens.shape[1] - count :]


def config_of(model: nn.Module) -> PretrainedConfig:
    """The configuration of a vision model, whichever its library."""
    return cast("PretrainedConfig", model.config)


def checkpoint_layers(model: nn.Module, on: bool) -> None:
    """Turn gradient checkpointing of transformers' layers in `model` on or off."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # seconds to import

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = on
            # Not declared, as transformers sets it from outside.
            cast(Any, layer)._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention without a mask: q, k, v (B, n, heads, head_dim) → o of that shape."""
    if flash_attn_func is not None and _flash_runs(q):
        return flash_attn_func(q, k, v, softmax_scale=scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _flash_runs(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256
