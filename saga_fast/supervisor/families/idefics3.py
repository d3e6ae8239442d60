"""Idefics3 and SmolVLM. An image is not split: it is passed as the global image that the processor adds to its
tiles."""

from saga_fast.supervisor.families.base import Family, ImageText


def image_text(around: str, whole: str) -> ImageText:
    return ImageText(None, around + whole, around)


FAMILY = Family(
    name="Idefics3, SmolVLM",
    kinds=("idefics3", "smolvlm"),
    decoders=("llama", "qwen2", "qwen3"),
    language_model="text_model",
    marks=(("fake_image_token", "<fake_token_around_image>"), ("global_image_token", "<global-img>")),
    image_text=image_text,
)
