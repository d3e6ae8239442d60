"""FastVLM: LLaVA with a tower of timm, which returns a feature map."""

from saga_fast.supervisor.families.base import Family
from saga_fast.supervisor.families.llava import DECODERS

FAMILY = Family(name="FastVLM", kinds=("fast_vlm",), decoders=DECODERS)
