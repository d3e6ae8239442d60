"""Training losses: the deep-metric term by name, and the two terms the supervisor gives (alignment, policy)."""

from __future__ import annotations

from collections.abc import Callable

from pytorch_metric_learning.losses import MultiSimilarityLoss, NTXentLoss, ProxyAnchorLoss
from torch import nn

from saga_fast.losses.potential_field import PotentialField
from saga_fast.utils.errors import InputError

METRIC_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "potential-field": PotentialField,
    "proxy-anchor": lambda classes, dim, margin=0.1, alpha=32: ProxyAnchorLoss(classes, dim, margin, alpha),
    "multi-similarity": lambda _, __, alpha=2, beta=50, base=0.5: MultiSimilarityLoss(alpha, beta, base),
    "nt-xent": lambda _, __, temperature=0.07: NTXentLoss(temperature),
}


def metric_loss(name: str, num_classes: int, embedding_dim: int, **settings: float) -> nn.Module:
    """The deep-metric loss `name`: a module called as loss(embeddings (B, D) fp32 of unit length, labels (B,) int64), a
    scalar averaged over the batch. Its parameters, if any, are class proxies. Defaults are the published settings of
    each loss. Raises InputError for an unknown name."""
    if name not in METRIC_LOSSES:
        raise InputError(f"loss.metric: {name!r} is unknown; use one of {', '.join(METRIC_LOSSES)}")
    return METRIC_LOSSES[name](num_classes, embedding_dim, **settings)
