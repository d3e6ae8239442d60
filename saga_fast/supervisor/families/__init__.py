"""The families of multimodal models that can be loaded, one file each; docs/contributing says how to add one."""

from __future__ import annotations

from saga_fast.supervisor.families import fast_vlm, gemma3, idefics3, internvl, llava, llava_onevision, qwen_vl
from saga_fast.supervisor.families.base import PLAIN, Family, ImageText

__all__ = ["FAMILIES", "KINDS", "PLAIN", "Family", "ImageText"]

FAMILIES = (
    qwen_vl.FAMILY, internvl.FAMILY, llava.FAMILY, llava_onevision.FAMILY, fast_vlm.FAMILY, idefics3.FAMILY,
    gemma3.FAMILY,
)  # fmt: skip
KINDS = {kind: family for family in FAMILIES for kind in family.kinds}
