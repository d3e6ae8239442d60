"""L_KL: the pooler's attention follows the supervisor's attention from the tokens that describe an image's attributes.
The paper's single query follows all of them; with one query per attribute, each follows its own attribute's tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_targets(attention: Tensor, query: Tensor, queries: int) -> Tensor:
    """ᾱ of one image in one rollout, for each of the pooler's queries: (queries, N), rows that sum to 1.

    attention: (T, N), of each of T attribute tokens onto the image's N patches, averaged over heads: a slice of a
    softmax over all keys of the token. query: (T,) int64, the pooler's query that learns from each token; the paper's
    pooler has one, which learns from all. Each token is renormalised over the patches first, so that tokens with little
    attention on the image weigh as much as the others; then the tokens of a query are averaged. Tokens without mass on
    the image are left out; a query without tokens has a row of zeros, for which `alignment_kl` is zero.
    """
    mass = attention.sum(1, keepdim=True)
    renormalised = attention / mass.clamp_min(torch.finfo(attention.dtype).tiny)
    counts = attention.new_zeros(queries, 1).index_add_(0, query, (mass > 0).to(attention.dtype))
    return attention.new_zeros(queries, attention.shape[1]).index_add_(0, query, renormalised) / counts.clamp_min(1)


def alignment_kl(target: Tensor, beta: Tensor) -> Tensor:
    """KL(target || beta) in nats, averaged over the queries that were described. target, beta: (R, queries, N), each
    row a distribution or, in target, zeros for a query that was not described. Returns (R,), fp32 (fp64 for fp64).
    Gradient into beta only. Zeros are safe on either side: 0 log 0 = 0, and beta is floored at the smallest normal
    number."""
    dtype = torch.promote_types(beta.dtype, torch.float32)
    target, beta = target.detach().to(dtype), beta.to(dtype)
    divergence = torch.xlogy(target, target) - target * beta.clamp_min(torch.finfo(dtype).tiny).log()
    return divergence.sum((1, 2)) / (target > 0).any(2).sum(1).clamp_min(1)
