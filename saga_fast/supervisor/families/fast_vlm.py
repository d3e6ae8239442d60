"""FastVLM: LLaVA whose tower is timm's, and gives a feature map."""

from saga_fast.supervisor.families.base import Family
from saga_fast.supervisor.families.llava import DECODERS

FAMILY = Family(name="FastVLM", kinds=("fast_vlm",), decoders=DECODERS)
