"""Attention among the tokens of an image in both directions, as Gemma 3 needs it.

`group_attention` is causal. `add_bidirectional` adds attention onto the later tokens of each image to its result and
merges the two softmaxes by their LSE. The causal backward, given the merged o and LSE, is then exact for the causal
keys, and `bidirectional_backward` adds the share of the later tokens. The scores are N x N per head and image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ImageRows(NamedTuple):
    """rows: (images, N) int64, the rows of q that are an image's tokens. columns: the same among keys and values."""

    rows: Tensor
    columns: Tensor


class Attention(NamedTuple):
    """Arguments and results of `group_attention`: q and o (rows, heads, head_dim), k and v (tokens, kv_heads,
    head_dim), lse (heads, rows)."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor


def add_bidirectional(causal: Attention, images: ImageRows) -> None:
    """Adds attention of each image token onto the later tokens of its image: updates `o` and `lse` in place."""
    q, k, v, o, lse = causal
    scores, values = _scores(q, k, images), _by_head(v[images.columns], k.shape[1])
    causal_lse = _lse(lse, images, k.shape[1])
    full_lse = torch.logaddexp(causal_lse, scores.logsumexp(-1))
    causal_o = _by_head(o[images.rows], k.shape[1]) * (causal_lse - full_lse).exp()[..., None]
    later_o = scores.sub_(full_lse[..., None]).exp_() @ values
    o[images.rows] = _by_token(causal_o + later_o).to(o.dtype)
    lse[:, images.rows] = full_lse.permute(1, 2, 0, 3).flatten(0, 1)


def bidirectional_backward(d_o: Tensor, merged: Attention, d: tuple[Tensor, Tensor, Tensor], images: ImageRows) -> None:
    """Adds the later tokens' share, in place, to `d`: gradients of q, k and v from `group_attention_backward`. merged:
    as `add_bidirectional` leaves it."""
    q, k, v, o, lse = merged
    kv_heads, scale = k.shape[1], q.shape[-1] ** -0.5
    d_out, out = (_by_head(x[images.rows], kv_heads) for x in (d_o, o))
    queries, keys, values = (
        _by_head(x[at], kv_heads) for x, at in ((q, images.rows), (k, images.columns), (v, images.columns))
    )
    weights = _scores(q, k, images).sub_(_lse(lse, images, kv_heads)[..., None]).exp_()
    d_scores = (d_out @ values.mT).sub_((d_out * out).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
    shares = d_scores @ keys, (d_scores.mT @ queries).sum(2, keepdim=True), (weights.mT @ d_out).sum(2, keepdim=True)
    for total, share, at in zip(d, shares, (images.rows, images.columns, images.columns)):
        total[at] += _by_token(share).to(total.dtype)


def _scores(q: Tensor, k: Tensor, images: ImageRows) -> Tensor:
    """(images, kv_heads, rep, N, N): scores of each token onto later ones; -inf elsewhere."""
    kv_heads, count = k.shape[1], images.rows.shape[1]
    scores = (_by_head(q[images.rows], kv_heads) * q.shape[-1] ** -0.5) @ _by_head(k[images.columns], kv_heads).mT
    causal_mask = torch.ones(count, count, dtype=torch.bool, device=q.device).tril_()
    return scores.masked_fill_(causal_mask, -torch.inf)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """(images, N, heads, d) -> (images, kv_heads, rep, N, d), in float32 or wider, for sums."""
    x = x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_token(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _lse(lse: Tensor, images: ImageRows, kv_heads: int) -> Tensor:
    """lse (heads, rows) of the images' rows: (images, kv_heads, rep, N)."""
    return lse[:, images.rows].unflatten(0, (kv_heads, -1)).permute(2, 0, 1, 3)
