"""Pictures as data URIs, for self-contained HTML pages."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def data_uri(picture: Image.Image, format: str, **options: int) -> str:
    """The picture as a data URI; options: as Pillow's `save` takes."""
    picture.save(data := io.BytesIO(), format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def shade(attention: np.ndarray) -> str:
    """A PNG of one pixel per token, as a data URI, to lay over the image: darker where attention is lower.

    attention: (rows, columns), at least 0. Transparent at the peak; a map whose peak is below four times the uniform
    value is dark all over.
    """
    scale = max(attention.max(), 4 / attention.size)
    alpha = np.rint(170 * (1 - attention / scale)).astype(np.uint8)
    grey = Image.new("L", alpha.shape[::-1])
    return data_uri(Image.merge("LA", (grey, Image.fromarray(alpha))), "PNG")
