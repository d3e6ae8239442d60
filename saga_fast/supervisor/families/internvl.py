"""InternVL as transformers ships it."""

from saga_fast.supervisor.families.base import PLAIN, Family, ImageText


def image_text(tokenizer) -> ImageText:
    """The processor, not the template, writes these around an image's tokens; the tokenizer names them."""
    before, after = (getattr(tokenizer, f"{end}_image_token", None) for end in ("start", "end"))
    return ImageText(None, before, after) if before and after else PLAIN


FAMILY = Family(name="InternVL", kinds=("internvl",), decoders=("llama", "qwen2", "qwen3"), image_text=image_text)
