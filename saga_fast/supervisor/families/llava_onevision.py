"""LLaVA-OneVision. Two images are taken whole, as its processor takes the images of any prompt that has several."""

from saga_fast.supervisor.families.base import Family
from saga_fast.supervisor.families.llava import DECODERS

FAMILY = Family(name="LLaVA-OneVision", kinds=("llava_onevision",), decoders=DECODERS, newline="image_newline")
