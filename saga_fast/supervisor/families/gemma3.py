"""Gemma 3: an image's tokens attend to each other, most layers have sliding windows; caps of scores or logits are
not supported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from saga_fast.supervisor.families.base import Family, ImageText

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def image_text(begin: str, end: str) -> ImageText:
    """The template writes only the token that begins an image."""
    return ImageText(begin, f"\n\n{begin}", f"{end}\n\n")


def objections(config: PretrainedConfig) -> Iterator[str]:
    text = config.text_config
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(text, field, None)) is not None:
            yield f"caps its numbers by {field} {cap}; a model without caps is needed, as Gemma 3's releases are"
    if getattr(text, "use_bidirectional_attention", False):
        yield "reads text in both directions; a model that writes is needed"


FAMILY = Family(
    name="Gemma 3",
    kinds=("gemma3",),
    decoders=("gemma3_text",),
    bidirectional_images=True,
    marks=(("boi_token", "<start_of_image>"), ("eoi_token", "<end_of_image>")),
    image_text=image_text,
    objections=objections,
)
