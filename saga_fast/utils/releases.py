"""Checks of released models, as folders or hub ids, before any of their weights are read. A release may come from
anywhere, and no code of it is run: weights are safetensors, never pickles, and models with code are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

OWN_CODE = (
    "brings code of its own, which is not run; "
    "take the release that transformers reads (of InternVL the one whose name ends in -HF)"
)
SAFETENSORS = (
    "pickles (pytorch_model.bin) run what they hold and are not read: take a release in safetensors, "
    "or convert it by transformers' save_pretrained if you trust it"
)


def pickled(name: str | Path) -> Iterator[str]:
    """Faults of a sharded checkpoint's index: it is malformed, or names files that are no safetensors."""
    if index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False):
        try:
            files = set(json.loads(Path(index).read_text())["weight_map"].values())
            bad = sorted(file for file in files if not file.endswith(".safetensors"))
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"is not whole ({SAFE_WEIGHTS_INDEX_NAME} is malformed); restore the file"
        else:
            if bad:
                yield f"names {bad[0]!r} among its weights; {SAFETENSORS}"


def pixel_statistics(name: str | Path) -> dict[str, list[float]]:
    """`image_mean` and `image_std`, where the model's image processor says them."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return {}
    return {key: settings[key] for key in ("image_mean", "image_std") if key in settings}
