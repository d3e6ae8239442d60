"""The encoder: vision tower and pooler. The only thing that is trained, and the only thing deployed.

    z = pooler(tower(image)),  |z| = 1                                       (SAGA, arXiv 2606.15134)

The tower is the MLLM's own, see `towers`. Its folder:

    model.safetensors   the weights
    config.json         the constructor's arguments
    manifest.json       the SHA-256 of both, so that what loads is what was saved
    README.md           the model card
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from saga_fast.towers import VisionTower, VisualFeatures, tower_from_config
from saga_fast.utils.errors import InputError, first_line
from saga_fast.utils.files import sha256
from saga_fast.utils.images import as_rgb, open_rgb, to_pixels

__all__ = ["Encoder", "Pooler", "VisionTower", "VisualFeatures"]

POOLERS = ("attention", "mean", "max")
CONFIG, WEIGHTS, MANIFEST, CARD = "config.json", "model.safetensors", "manifest.json", "README.md"
Picture = Image.Image | str | Path | Tensor


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
    image_size: the side S in pixels that images are resized to.
    `card`: the text of its README.md; `sha256`: of configuration and weights, known once it is loaded from a folder.
    """

    def __init__(
        self, vision_config: dict, pooler: str = "attention", embedding_dim: int = 4096, image_size: int = 224
    ):
        super().__init__()
        self.image_size, self.embedding_dim = image_size, embedding_dim
        self.card: str | None = None
        self.sha256: str | None = None
        self.tower = tower_from_config(vision_config)
        self.pooler = Pooler(self.tower.width, embedding_dim, pooler)
        self.tower.grid(image_size, image_size)

    @classmethod
    def from_tower(cls, model: PreTrainedModel, pooler: str, embedding_dim: int, image_size: int) -> Encoder:
        """A new encoder around a copy of an MLLM's own tower, in fp32, with a fresh pooler."""
        encoder = cls(model.config.to_diff_dict(), pooler, embedding_dim, image_size)
        encoder.tower.model.load_state_dict(model.state_dict())
        return encoder

    def forward(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """Unit vectors (B, D_e), float32, of uint8 pixels (B, 3, S, S), or of pictures as `pixels` takes them."""
        if not (isinstance(images, Tensor) and images.ndim == 4):
            images = self.pixels(images)
        if images.dtype != torch.uint8 or images.shape[1] != 3:
            raise InputError(
                f"images: got {images.dtype} {tuple(images.shape)}; accepted are uint8 pixels (B, 3, S, S)"
            )
        return self.pooler(self.tower(images.to(self.pooler.project.weight.device)).tokens)

    def pixels(self, images: Picture | Sequence[Picture]) -> Tensor:
        """uint8 (B, 3, S, S) of one or several PIL images, paths, or uint8 tensors (3, H, W) of any size."""
        images = [images] if isinstance(images, Picture) else images
        return torch.stack([to_pixels(_open(image), self.image_size) for image in images])

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, map_location: str | torch.device = "cpu", **download: Any
    ) -> Encoder:
        """The encoder of a folder or a hub id, in evaluation mode, on the device `map_location`.

        download: `revision`, `token`, ... as `huggingface_hub.snapshot_download` takes them. Raises InputError, naming
        the file, where one is missing, damaged or of something else.
        """
        if not str(pretrained_model_name_or_path):
            raise InputError("--encoder: missing; give the encoder/ folder of a run, or a hub id")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = _download(str(pretrained_model_name_or_path), download)
        hashes = _check(folder)
        try:
            encoder = cls(**json.loads((folder / CONFIG).read_bytes()))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{str(folder / CONFIG)!r}: describes no encoder ({first_line(error)})") from error
        try:
            load_model(encoder, folder / WEIGHTS, strict=True)
        except (RuntimeError, SafetensorError) as error:
            raise InputError(f"{str(folder / WEIGHTS)!r}: not this encoder's weights ({first_line(error)})") from error
        encoder.sha256 = hashlib.sha256("".join(hashes[name] for name in (CONFIG, WEIGHTS)).encode()).hexdigest()
        if (folder / CARD).is_file():
            encoder.card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        return encoder.eval().to(map_location)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        config: dict | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push: Any,
    ) -> str | None:
        """The mixin's own, with this encoder's card and a manifest. Returns the commit's URL if it is pushed."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.card is not None:  # the mixin leaves a card alone that is there
            (folder / CARD).write_text(self.card, encoding="utf-8")
        super().save_pretrained(folder, config=config, model_card_kwargs=model_card_kwargs)
        hashes = {name: sha256(folder / name) for name in (CONFIG, WEIGHTS)}
        (folder / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n")
        return self.push_to_hub(repo_id or folder.name, **push) if push_to_hub else None


def _open(image: Picture) -> Image.Image:
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise InputError(f"images: got {image.dtype} {tuple(image.shape)}; accepted are uint8 tensors (3, H, W)")
        return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
    return as_rgb(image) if isinstance(image, Image.Image) else open_rgb(image)


def _download(name: str, options: dict[str, Any]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, MANIFEST, CARD], **options))
    except (OSError, ValueError) as error:
        raise InputError(
            f"encoder: {name!r} is no folder, and on the hub it was not found ({first_line(error)}); "
            "give the encoder/ folder of a run, or a hub id"
        ) from error


def _check(folder: Path) -> dict[str, str]:
    """The SHA-256 of configuration and weights, by name, which are as the manifest says. Raises InputError if not."""
    for name in (CONFIG, WEIGHTS, MANIFEST):
        if not (folder / name).is_file():
            raise InputError(f"encoder: {str(folder)!r} holds no {name}; give a whole encoder/ folder of a run")
    try:
        hashes = {name: str(json.loads((folder / MANIFEST).read_bytes())["sha256"][name]) for name in (CONFIG, WEIGHTS)}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(folder / MANIFEST)!r}: not an encoder's manifest; restore the folder") from error
    for name in hashes:
        if sha256(folder / name) != hashes[name]:
            raise InputError(f"{str(folder / name)!r}: its SHA-256 is not the one in {MANIFEST}; restore the file")
    return hashes
