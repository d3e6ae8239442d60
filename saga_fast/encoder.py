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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from saga_fast.towers import VisionTower, VisualFeatures, config_of, tower_from_config
from saga_fast.utils.errors import InputError, first_line
from saga_fast.utils.files import is_lfs_pointer, sha256
from saga_fast.utils.images import as_rgb, open_rgb, to_pixels

if TYPE_CHECKING:
    from huggingface_hub.hub_mixin import DataclassInstance

__all__ = ["AttributePooler", "Encoder", "Pooler", "VisionTower", "VisualFeatures", "make_pooler"]

POOLERS = ("attributes", "attention", "mean", "max")
CONFIG, WEIGHTS, MANIFEST, CARD = "config.json", "model.safetensors", "manifest.json", "README.md"
DIVERGED = "it is damaged, or its training diverged: take the encoder of an earlier checkpoint, or of another run"
Picture = Image.Image | str | Path | Tensor


class Pooler(nn.Module):
    """Pools tokens (B, N, D) into unit vectors (B, D_e): the paper's learned query, or mean or max pooling.

    attention: β = softmax(q W_k Xᵀ / √D) with a learnable query q and key projection W_k, pooled = βX (the paper's);
    mean, max: its baselines. All are followed by a linear map to D_e and L2 normalisation. The query starts at zero, so
    that training starts from mean pooling; the linear map starts orthogonal, so that it starts from the tower's space.
    """

    def __init__(self, width: int, embedding_dim: int, kind: str = "attention") -> None:
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.query = nn.Parameter(torch.zeros(width))
            self.key = nn.Parameter(torch.eye(width))
        self.project = nn.Linear(width, embedding_dim, bias=False)
        nn.init.orthogonal_(self.project.weight)

    def attention(self, tokens: Tensor) -> Tensor:
        """β (B, 1, N): the query's attention over each image's tokens. Raises ValueError for mean and max pooling."""
        if self.kind != "attention":
            raise ValueError(f"pooler: {self.kind} pooling has no attention; build it with kind='attention'")
        scores = tokens @ (self.query @ self.key) * tokens.shape[-1] ** -0.5
        return scores.float().softmax(-1)[:, None]

    def forward(self, tokens: Tensor) -> Tensor:
        if self.kind == "attention":
            pooled = torch.einsum("bn,bnd->bd", self.attention(tokens)[:, 0].to(tokens.dtype), tokens)
        else:
            pooled = tokens.mean(1) if self.kind == "mean" else tokens.amax(1)
        return F.normalize(self.project(pooled).float(), dim=-1)


class AttributePooler(nn.Module):
    """Pools tokens (B, N, D) into unit vectors (B, D_e) of M blocks, one per attribute, each with a query of its own.

    β_m = softmax(s q_m W_k X̂ᵀ / √D), where X̂ are the tokens after a LayerNorm without weights and s is `SHARPNESS`;
    block m = (W_m β_m X + b_m) / |W_m β_m X + b_m|; z = the blocks side by side, over √M. So the cosine of two images
    is the mean of the cosines of their blocks. D_e is divided among the blocks, whose sizes differ by one at most.
    Each W_m starts orthogonal. Raises InputError where D_e < M.
    """

    kind = "attributes"
    SHARPNESS = 4.0
    used: Tensor
    place: Tensor

    def __init__(self, width: int, embedding_dim: int, attributes: Sequence[str]) -> None:
        super().__init__()
        count = len(attributes)
        if not 1 <= count <= embedding_dim:
            raise InputError(
                f"encoder.embedding-dim: {embedding_dim} cannot be divided among {count} attributes; "
                f"give {max(1, count)} or more, or ask for fewer attributes"
                if count
                else "encoder.pooler: 'attributes' without attribute names; name one or more, or take 'attention'"
            )
        sizes = torch.tensor([embedding_dim // count + (m < embedding_dim % count) for m in range(count)])
        size = int(sizes.max())
        self.query = nn.Parameter(0.02 * torch.randn(count, width))
        self.key = nn.Parameter(torch.eye(width))
        # The last row of a block that is one number shorter than the longest is not part of the embedding.
        self.weight = nn.Parameter(torch.stack([nn.init.orthogonal_(torch.empty(size, width)) for _ in sizes]))
        self.bias = nn.Parameter(torch.zeros(count, size))
        used = torch.arange(size) < sizes[:, None]
        self.register_buffer("used", used, persistent=False)
        self.register_buffer("place", used.flatten().nonzero().flatten(), persistent=False)

    def attention(self, tokens: Tensor) -> Tensor:
        """β (B, M, N): each query's attention over each image's tokens."""
        width = tokens.shape[-1]
        keys = F.layer_norm(tokens, (width,)) @ (self.query @ self.key).T
        return (keys * (self.SHARPNESS * width**-0.5)).float().softmax(1).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled = self.attention(tokens).to(tokens.dtype) @ tokens  # (B, M, D)
        blocks = torch.einsum("bmd,med->bme", pooled, self.weight) + self.bias
        blocks = F.normalize(blocks.float() * self.used, dim=-1) * len(self.used) ** -0.5
        return blocks.flatten(1).index_select(1, self.place)

    def blocks(self, z: Tensor) -> Tensor:
        """The unit blocks (B, M, d) of embeddings z (B, D_e); shorter ones are padded with a zero."""
        blocks = z.new_zeros(len(z), self.used.numel()).index_copy(1, self.place, z)
        return blocks.unflatten(1, self.used.shape) * len(self.used) ** 0.5


def make_pooler(kind: str, width: int, embedding_dim: int, attributes: Sequence[str] = ()) -> Pooler | AttributePooler:
    """Raises InputError for an unknown kind, and for more attributes than D_e."""
    if kind not in POOLERS:
        raise InputError(f"encoder.pooler: got {kind!r}; choose one of {', '.join(POOLERS)}")
    if kind == "attributes":
        return AttributePooler(width, embedding_dim, attributes)
    return Pooler(width, embedding_dim, kind)


class Encoder(nn.Module, PyTorchModelHubMixin):
    """Images in, unit vectors out: a plain module with the hub's `from_pretrained`, `save_pretrained`, `push_to_hub`.

    vision_config: the tower's configuration as a dict; pooler: "attributes", "attention", "mean" or "max";
    embedding_dim: D_e; image_size: the side S in pixels that images are resized to; attributes: the M names of the
    blocks of an embedding, where the pooler is "attributes".
    `card`: the text of its README.md; `sha256`: of configuration and weights; empty until it is loaded from a folder.
    """

    def __init__(
        self,
        vision_config: dict[str, Any],
        pooler: str = "attention",
        embedding_dim: int = 4096,
        image_size: int = 224,
        attributes: Sequence[str] = (),
    ):
        super().__init__()
        self.vision_config, self.image_size, self.embedding_dim = vision_config, image_size, embedding_dim
        self.attributes: tuple[str, ...] = tuple(attributes) if pooler == "attributes" else ()
        self.card: str | None = None
        self.sha256 = ""
        self.tower = tower_from_config(vision_config)
        self.pooler = make_pooler(pooler, self.tower.width, embedding_dim, self.attributes)
        self.tower.grid(image_size, image_size)

    @classmethod
    def from_tower(
        cls, model: nn.Module, pooler: str, embedding_dim: int, image_size: int, attributes: Sequence[str] = ()
    ) -> Encoder:
        """A new encoder around a copy of `model`, as `tower_of` takes it, in fp32, with a fresh pooler."""
        named = {"attributes": tuple(attributes)} if pooler == "attributes" else {}
        encoder = cls(config_of(model).to_diff_dict(), pooler, embedding_dim, image_size, **named)
        encoder.tower.model.load_state_dict(model.state_dict())
        return encoder

    def forward(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """Unit vectors (B, D_e), float32, of uint8 pixels (B, 3, S, S), or of pictures as `pixels` takes them."""
        return self.pooler(self.tower(self._as_pixels(images)).tokens)

    def _as_pixels(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        if not (isinstance(images, Tensor) and images.ndim == 4):
            images = self.pixels(images)
        if images.dtype != torch.uint8 or images.shape[1] != 3:
            raise InputError(
                f"images: got {images.dtype} {tuple(images.shape)}; accepted are uint8 pixels (B, 3, S, S)"
            )
        return images.to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.pooler.parameters()).device

    def blocks(self, z: Tensor) -> Tensor:
        """The embeddings z (B, D_e) attribute by attribute: unit vectors (B, M, d), d = ⌈D_e / M⌉; shorter blocks are
        padded with a zero. Raises ValueError where the pooler has no attributes."""
        return self._attribute_pooler().blocks(z)

    @property
    def block_sizes(self) -> dict[str, int]:
        """Attribute → size of its block, in the order of the embedding; empty without attributes."""
        return dict(zip(self.attributes, self._attribute_pooler().used.sum(1).tolist())) if self.attributes else {}

    def attention(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """β (B, M, rows, columns) of images as `forward` takes them: the attention of each attribute's query, M = 1 in
        the paper's pooler. Raises ValueError for mean and max pooling."""
        tokens = self.tower(self._as_pixels(images)).tokens
        return self.pooler.attention(tokens).unflatten(2, self.tower.grid(self.image_size, self.image_size))

    def compare(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Cosine (B, M) of each block of z_a with that of z_b, both (B, D_e) or one of them (1, D_e), in the order of
        `attributes`. Their mean is the cosine of z_a and z_b. Raises ValueError where the pooler has no attributes."""
        return (self.blocks(z_a) * self.blocks(z_b)).sum(-1)

    def _attribute_pooler(self) -> AttributePooler:
        if not isinstance(self.pooler, AttributePooler):
            raise ValueError(
                f"pooler: {self.pooler.kind} pooling has no attributes; train with --encoder.pooler attributes"
            )
        return self.pooler

    def pixels(self, images: Picture | Sequence[Picture]) -> Tensor:
        """uint8 (B, 3, S, S) of one or several PIL images, paths, or uint8 tensors (3, H, W) of any size."""
        images = [images] if isinstance(images, Picture) else list(images)
        if not images:
            raise InputError("images: none; give one or more")
        return torch.stack([to_pixels(_open(image), self.image_size) for image in images])

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, map_location: str | torch.device = "cpu", **download: Any
    ) -> Encoder:
        """The encoder of a folder or a hub id, in evaluation mode, on the device `map_location`.

        download: `revision`, `token`, ... as `huggingface_hub.snapshot_download` takes them. Raises InputError, naming
        the file, where one is missing, damaged or not an encoder's.
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
        for name, values in encoder.state_dict().items():
            if not values.isfinite().all():
                raise InputError(f"{str(folder / WEIGHTS)!r}: {name} has numbers that are not finite; {DIVERGED}")
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
        config: dict[str, Any] | DataclassInstance | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push: Any,
    ) -> str | None:
        """The mixin's own, with this encoder's card and a manifest. Returns the commit's URL if it is pushed."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.card is not None:  # the mixin keeps an existing card
            (folder / CARD).write_text(self.card, encoding="utf-8")
        super().save_pretrained(folder, config=config, model_card_kwargs=model_card_kwargs)
        hashes = {name: sha256(folder / name) for name in (CONFIG, WEIGHTS)}
        (folder / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n")
        return self.push_to_hub(repo_id or folder.name, **push) if push_to_hub else None


def expect_finite(vectors: Tensor) -> Tensor:
    """`vectors`. Raises InputError if any is not finite: such a vector has no neighbours."""
    if not vectors.isfinite().all():
        raise InputError(f"encoder: its vectors are not finite; {DIVERGED}")
    return vectors


def _open(image: Picture) -> Image.Image:
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise InputError(f"images: got {image.dtype} {tuple(image.shape)}; accepted are uint8 tensors (3, H, W)")
        return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
    if not isinstance(image, Picture):
        accepted = "PIL images, paths, and uint8 tensors (3, H, W)"
        raise InputError(f"images: got a {type(image).__name__}; accepted are {accepted}")
    return as_rgb(image) if isinstance(image, Image.Image) else open_rgb(image)


def _download(name: str, options: dict[str, Any]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, MANIFEST, CARD], **options))
    except (OSError, ValueError) as error:
        raise InputError(
            f"encoder: {name!r} is no folder, and was not found on the hub ({first_line(error)}); "
            "give the encoder/ folder of a run, or a hub id"
        ) from error


def _check(folder: Path) -> dict[str, str]:
    """name → SHA-256 of configuration and weights. Raises InputError if they are not those of the manifest."""
    for name in (CONFIG, WEIGHTS, MANIFEST):
        if not (folder / name).is_file():
            raise InputError(f"encoder: {str(folder)!r} has no {name}; give a whole encoder/ folder of a run")
    try:
        hashes = {name: str(json.loads((folder / MANIFEST).read_bytes())["sha256"][name]) for name in (CONFIG, WEIGHTS)}
        found = {name: sha256(folder / name) for name in hashes}
    except OSError as error:
        raise InputError(f"encoder: {error.filename!r} cannot be read ({error.strerror}); restore it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(folder / MANIFEST)!r}: not an encoder's manifest; restore the folder") from error
    for name in hashes:
        if found[name] != hashes[name]:
            mend = "fetch it with git lfs pull" if is_lfs_pointer(folder / name) else "restore the file"
            raise InputError(f"{str(folder / name)!r}: its SHA-256 is not the one in {MANIFEST}; {mend}")
    return hashes
