"""Pictures inside a page that needs no other file."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def data_uri(picture: Image.Image, format: str, **options: int) -> str:
    """The picture inside an address, as a page holds it that needs no other file; options: as Pillow's `save` takes."""
    picture.save(data := io.BytesIO(), format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def shade(attention: np.ndarray) -> str:
    """A PNG, as a data URI, of one pixel a token: what to lay over the image, darker where less is looked.

    attention: (rows, columns), at least 0. Clear at the peak; a map that peaks below four times an even spread is dark
    all over, as nothing stands out.
    """
    scale = max(attention.max(), 4 / attention.size)
    alpha = np.rint(170 * (1 - attention / scale)).astype(np.uint8)
    grey = Image.new("L", alpha.shape[::-1])
    return data_uri(Image.merge("LA", (grey, Image.fromarray(alpha))), "PNG")
