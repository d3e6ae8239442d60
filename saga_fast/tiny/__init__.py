"""The embedded default: birds drawn by code, a tiny Qwen3-VL that supervises training on them, and the
training recipe of that model."""

from pathlib import Path

SUPERVISOR = Path(__file__).parent / "supervisor"  # a model folder that transformers loads
