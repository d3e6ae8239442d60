"""What a data set is, and how any image file becomes a plain 8-bit RGB picture.

Image files come from anywhere, so they are opened with suspicion: only raster formats that Pillow decodes itself (an
EPS named .jpg would start Ghostscript), only regular files (a pipe would hang), only up to `MAX_PIXELS` (image bombs).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from saga_fast.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 64 * 2**20  # 8192 x 8192: 192 MB once decoded


class ImageDataset(Protocol):
    """Labelled images. `labels[i]`, known without decoding, is the index in `classes` of the class of image i."""

    labels: list[int]
    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class Subset:
    """The images of `dataset` at `indices`, in that order, under the same classes."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, list(indices)
        self.labels = [dataset.labels[i] for i in self.indices]
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.dataset[self.indices[index]]


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Decode a whole image file to mode RGB: upright by its EXIF tag, transparency laid on white, 16 bits scaled to 8.

    Of an animation, the first frame. Raises InputError, naming the file, if it is no whole image in one of `FORMATS`.
    """
    try:
        if not os.path.isfile(path):
            raise OSError("not a regular file" if os.path.lexists(path) else "no such file")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            cause = f"none of {', '.join(FORMATS)}"
        cause = " ".join(cause.split())
        raise InputError(f"{os.fspath(path)!r}: unreadable image ({cause}); replace or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255, not scale it
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """uint8 (3, size, size) of an RGB picture: Pillow's bicubic, the whole picture, aspect ratio not kept."""
    return torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def split_classes(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sorted names cut in halves, (train, test); of an odd number train gets the one over."""
    names = sorted(names)
    middle = (len(names) + 1) // 2
    return names[:middle], names[middle:]


def check_classes(dataset: ImageDataset, source: str | Path) -> None:
    """Raise InputError, naming `source` and the class, if a class has fewer than two images: a query needs a match."""
    counts = Counter(dataset.labels)
    for label, name in enumerate(dataset.classes):
        if counts[label] < 2:
            raise InputError(
                f"{str(source)!r}: class {name!r} has {counts[label]} readable image{'s' * (counts[label] != 1)}"
                f" ({' '.join(SUFFIXES)}), retrieval needs 2 or more; add images or remove the class"
            )
