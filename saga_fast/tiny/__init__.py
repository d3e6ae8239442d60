"""The embedded default: birds drawn by code, a tiny Qwen3-VL that supervises on them, and its recipe."""

from pathlib import Path

SUPERVISOR = Path(__file__).parent / "supervisor"  # a model folder that transformers loads
