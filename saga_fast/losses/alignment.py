"""L_KL: the pooler should look where the supervisor looked while it described the image's attributes."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_target(attention: Tensor) -> Tensor:
    """ᾱ of one image in one rollout.

    attention: (T, N), of each of T attribute tokens onto the image's N patches, averaged over heads: a slice of a
    softmax over everything the token sees. Each token is renormalised over the patches first, so that a token that
    hardly looks at the image weighs as much as one that stares, then the tokens are averaged. Returns (N,), summing to
    1. Tokens with no mass on the image at all are left out; if none is left (T = 0 too) the result is all zeros, for
    which `alignment_kl` is zero.
    """
    mass = attention.sum(1, keepdim=True)
    renormalised = attention / mass.clamp_min(torch.finfo(attention.dtype).tiny)
    return renormalised.sum(0) / (mass > 0).sum().clamp_min(1)


def alignment_kl(target: Tensor, beta: Tensor) -> Tensor:
    """KL(target || beta) of each row, in nats. target, beta: (R, N), each row a distribution. Returns (R,), fp32 (fp64
    for fp64). Gradient into beta only. Zeros are safe on either side: 0 log 0 = 0, and beta is floored at the smallest
    normal number."""
    dtype = torch.promote_types(beta.dtype, torch.float32)
    target, beta = target.detach().to(dtype), beta.to(dtype)
    return (torch.xlogy(target, target) - target * beta.clamp_min(torch.finfo(dtype).tiny).log()).sum(1)
