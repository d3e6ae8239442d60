"""Potential Field metric loss (arXiv 2405.18560, CVPR 2025): every point attracts its class and repels the others,
with a strength that fades with distance, and each class has proxies that stand in for samples outside the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below this distance fp32 dot products no longer resolve d² to a per cent, and d^(-α) is far beyond any useful force.
RESOLVED = 1e-2


class PotentialField(nn.Module):
    """Potential energy of the batch and `proxies_per_class` learned proxies per class, averaged per batch sample.

    With d the Euclidean distance, an ordered pair of distinct points (samples and proxies alike) has the energy

        same class:       -δ^(-α) where d < δ, else -d^(-α)     attracts from δ outwards
        different class:   d^(-α) where d < δ, else  δ^(-α)     repels up to δ

    Terms at ±δ^(-α) are constant. They carry no force, and at 100 classes they add up to some 3e8, in which fp32 loses
    everything else; so they are left out, and the value returned is the energy up to a constant, which steps when a
    pair crosses δ. The gradient is that of the full energy. The published energy is a sum; here it is divided by the
    batch size, as the other terms of the training loss are averages too.

    Two different-class points nearer than `RESOLVED` follow the tangent (in d²) of their potential: the force stays
    finite, still repels, and is zero where they coincide and no direction is defined.
    """

    proxy_labels: Tensor

    def __init__(
        self, num_classes: int, embedding_dim: int, alpha: float = 3.0, delta: float = 0.2, proxies_per_class: int = 15
    ):
        super().__init__()
        self.alpha, self.delta = alpha, delta
        self.proxies = nn.Parameter(torch.randn(num_classes * proxies_per_class, embedding_dim))
        classes = torch.arange(num_classes).repeat_interleave(proxies_per_class)
        self.register_buffer("proxy_labels", classes, persistent=False)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings: (B, D) of unit length. labels: (B,) int64 in [0, num_classes). Returns a scalar, fp32 or fp64.

        Distances are computed in fp32 even under autocast: in bf16 they would not resolve δ.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            points = torch.cat([embeddings.to(dtype), F.normalize(self.proxies.to(dtype), dim=1)])
            squares = points.square().sum(1)
            d2 = squares[:, None] + squares - 2 * points @ points.T

            labels = torch.cat([labels, self.proxy_labels])
            same = labels[:, None] == labels
            near = d2 < self.delta**2
            # +1 repels, -1 attracts, 0 no force. A point and itself are `same` and `near`: no pair, no force.
            sign = (~same & near).to(dtype) - (same & ~near).to(dtype)

            nearest = RESOLVED**2
            slope = self.alpha / 2 * nearest ** (-self.alpha / 2 - 1)
            potential = d2.clamp_min(nearest) ** (-self.alpha / 2) + slope * (nearest - d2).clamp_min(0)
            return (sign * potential).sum() / len(embeddings)
