"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: their own tower, M-RoPE. Their templates write the tokens around an image."""

from saga_fast.supervisor.families.base import Family

FAMILY = Family(
    name="Qwen-VL",
    kinds=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    decoders=("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
    visual="visual",
)
