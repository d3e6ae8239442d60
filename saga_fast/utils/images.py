"""How any image file becomes a plain 8-bit RGB picture, and a picture the pixels that the encoder reads.

Image files come from anywhere, so they are opened with suspicion: only raster formats that Pillow decodes itself (an
EPS named .jpg would start Ghostscript), only regular files (a pipe would hang), only up to `MAX_PIXELS` (image bombs).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from saga_fast.utils.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 64 * 2**20  # 8192 x 8192: 192 MB once decoded


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Decode a whole image file to mode RGB: upright by its EXIF tag, transparency laid on white, 16 bits scaled to 8.

    Of an animation, the first frame. Raises InputError, naming the file, if it is no whole image in one of `FORMATS`.
    """
    try:
        if not os.path.isfile(path):
            raise OSError("not a regular file" if os.path.lexists(path) else "no such file")
        # Not by its name: then Pillow maps an uncompressed TIFF into memory, and gets the shape of a lying one wrong.
        with open(path, "rb") as file, _no_bombs(), Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            cause = f"none of {', '.join(FORMATS)}"
        if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
            cause = f"more than {MAX_PIXELS} pixels"
        cause = " ".join(cause.split())
        raise InputError(f"{os.fspath(path)!r}: unreadable image ({cause}); replace or remove it") from error


@contextmanager
def _no_bombs() -> Iterator[None]:
    """Pillow warns of the size of some bombs before ours is asked, in words and with a limit of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB: transparency laid on white, 16 bits scaled to 8."""
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255, not scale it
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """uint8 (3, size, size) of an RGB picture: Pillow's bicubic, the whole picture, aspect ratio not kept."""
    return torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
