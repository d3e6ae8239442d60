"""InternVL, in the format of transformers."""

from saga_fast.supervisor.families.base import Family, ImageText


def image_text(before: str, after: str) -> ImageText:
    return ImageText(None, before, after)


FAMILY = Family(
    name="InternVL",
    kinds=("internvl",),
    decoders=("llama", "qwen2", "qwen3"),
    marks=(("start_image_token", "<img>"), ("end_image_token", "</img>")),
    image_text=image_text,
)
