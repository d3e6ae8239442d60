"""Vision towers of multimodal models, run over equal-sized images as one batch. Called by the encoder and by
whoever needs visual tokens alone; imports utils alone.
"""

from saga_fast.towers.base import VisionTower, VisualFeatures

__all__ = ["VisionTower", "VisualFeatures"]
