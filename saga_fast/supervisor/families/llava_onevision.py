"""LLaVA-OneVision. Images are not split, as its processor does not split those of a prompt with several."""

from saga_fast.supervisor.families.base import Family
from saga_fast.supervisor.families.llava import DECODERS

FAMILY = Family(name="LLaVA-OneVision", kinds=("llava_onevision",), decoders=DECODERS, newline="image_newline")
