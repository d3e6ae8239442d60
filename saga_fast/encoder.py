"""The encoder: vision tower and pooler. The only thing that is trained, and the only thing deployed.

    z = pooler(tower(image)),  |z| = 1                                       (SAGA, arXiv 2606.15134)

The tower is the MLLM's own, see `towers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from saga_fast.errors import InputError
from saga_fast.images import open_rgb, to_pixels, to_rgb
from saga_fast.towers import VisionTower, VisualFeatures

__all__ = ["Encoder", "Pooler", "VisionTower", "VisualFeatures"]

POOLERS = ("attention", "mean", "max")


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
        self.tower = VisionTower.from_config(vision_config)
        self.pooler = Pooler(self.tower.width, embedding_dim, pooler)
        self.tower.grid(image_size, image_size)

    @classmethod
    def from_tower(cls, model: PreTrainedModel, pooler: str, embedding_dim: int, image_size: int) -> Encoder:
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
