"""L_con: the supervisor's words as labels of the embedding's blocks. Images of which the same is said of an attribute
should be near in that attribute's block, others apart, whatever their classes.

Where GRPO teaches the tower to be read, this teaches the embedding what was read; every rollout drawn counts, also of
pairs that do not contribute. It is supervised contrastive learning (SupCon, arXiv 2004.11362), an attribute at a time
and with the probability that two descriptions agree for a label.
"""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 0.1


def attribute_contrast(blocks: Tensor, alike: Tensor) -> Tensor:
    """Cross-entropy, in nats, between whom an image should be near in a block and whom it is near, averaged over images
    and attributes.

    blocks: (n, M, d) unit vectors. alike: (M, n, n), 0..1, how far images i and j are said to be alike in attribute m.
    Of image i and attribute m the target is alike[m, i] without i, normalised; the prediction the softmax of cosines
    over `TEMPERATURE`. An image that is like no other, as one that was not described, asks for nothing. Returns (),
    fp32 or fp64; zero, with a gradient, where nothing is asked.
    """
    itself = torch.eye(len(blocks), dtype=torch.bool, device=blocks.device)
    cosines = torch.einsum("imd,jmd->mij", blocks, blocks).masked_fill(itself, -torch.inf)
    target = alike.to(cosines).masked_fill(itself, 0)
    mass = target.sum(2, keepdim=True)
    target = target / mass.clamp_min(torch.finfo(target.dtype).tiny)
    near = (cosines / TEMPERATURE).log_softmax(2).masked_fill(itself, 0)
    return -(target * near).sum() / (mass > 0).sum().clamp_min(1)
