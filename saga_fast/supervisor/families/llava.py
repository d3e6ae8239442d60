"""LLaVA, the plain case: a ViT, a projector, a decoder."""

from saga_fast.supervisor.families.base import Family

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
FAMILY = Family(name="LLaVA", kinds=("llava",), decoders=DECODERS)
