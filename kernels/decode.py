"""Attention of a decode step: one new token per row, onto its pair's prefix, which G rows share, and its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]  # noqa: F401  registers the compiled kernel
from .checks import FLOATS, expect, expect_same_device, expect_tensor


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    query_slot: Tensor,
    cached: Tensor,
    group: int,
) -> Tensor:
    """softmax(q · keys / √head_dim) @ values over the prefix of each row and its own tokens, the new one included.

    Nothing waits for the device, and all sizes follow from shapes, so that a CUDA graph can capture the step.

    Args:
        q: (n, heads, head_dim). k, v: (n, kv_heads, head_dim), of the new tokens.
        prefix_k: (pairs, kv_heads, head_dim, P), keys transposed for the score GEMM. prefix_v: (pairs, kv_heads, P,
            head_dim). own_k, own_v: (n, kv_heads, end, head_dim), of row i the first cached[i] are valid; k and v are
            written behind them. All of one dtype; views are accepted if their last two axes are dense. On a GPU rows of
            prefix_k may have any stride, and are read fastest where they start on multiples of 16 bytes.
        query_slot: (n,) int64, pair · group + g, each at most once; pairs · group or more for a row that is not read.
        cached: (n,) int64, number of cached tokens, less than `end`; both are checked on a CPU. group: G.

    Returns:
        (n, heads, head_dim). nan where a score or a value is.

    Raises:
        ValueError, TypeError: as the argument named says.
    """
    expect_tensor("q", q, (None, None, None), FLOATS)
    (n, heads, dim), kinds = q.shape, (q.dtype,)
    expect_tensor("k", k, (n, None, dim), kinds)
    kv = k.shape[1]
    expect(kv > 0 and heads % kv == 0, "q", f"{heads} heads", f"a multiple of k's {kv}")
    expect_tensor("v", v, (n, kv, dim), kinds)
    expect_tensor("prefix_k", prefix_k, (None, kv, dim, None), kinds)
    pairs, _, _, length = prefix_k.shape
    expect(length > 0, "prefix_k", f"shape {tuple(prefix_k.shape)}", "one key or more")
    expect_tensor("prefix_v", prefix_v, (pairs, kv, length, dim), kinds)
    expect_tensor("own_k", own_k, (n, kv, None, dim), kinds)
    expect_tensor("own_v", own_v, tuple(own_k.shape), kinds)
    expect_tensor("query_slot", query_slot, (n,), (torch.int64,))
    expect_tensor("cached", cached, (n,), (torch.int64,))
    expect(group > 0, "group", group, "1 or more")
    expect_same_device(
        q=q,
        k=k,
        v=v,
        prefix_k=prefix_k,
        prefix_v=prefix_v,
        own_k=own_k,
        own_v=own_v,
        query_slot=query_slot,
        cached=cached,
    )
    return _decode_attention(q, k, v, prefix_k, prefix_v, own_k, own_v, query_slot, cached, group)


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    query_slot: Tensor,
    cached: Tensor,
    group: int,
) -> Tensor:
    """`decode_attention` in plain PyTorch: both attentions whole, merged by their maxima and sums."""
    (n, _, dim), (pairs, kv) = q.shape, prefix_k.shape[:2]
    row, end = torch.arange(n, device=q.device), own_k.shape[2]
    own_k[row, :, cached], own_v[row, :, cached] = k, v
    q = q * dim**-0.5
    # All queries of a pair, from those of its G rows that are left, in one GEMM per key head with their prefix.
    slot_count = pairs * group
    slot_queries = q.new_zeros(slot_count + 1, *q.shape[1:]).index_copy_(0, query_slot.clamp_max(slot_count), q)[
        :slot_count
    ]
    slot_queries = slot_queries.view(pairs, group, kv, -1, dim).transpose(1, 2).flatten(2, 3)
    onto_prefix = [
        x.unflatten(2, (group, -1)).transpose(1, 2).flatten(0, 1)[query_slot.clamp_max(slot_count - 1)]
        for x in _attend(slot_queries @ prefix_k, prefix_v)
    ]
    masked = (torch.arange(end, device=q.device) > cached[:, None])[:, None, None]
    scores = q.unflatten(1, (kv, -1)) @ own_k.transpose(-1, -2)
    return _merge(onto_prefix, _attend(scores.masked_fill_(masked, -torch.inf), own_v)).flatten(1, 2)


def _attend(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scores (..., queries, keys), overwritten where they are fp32, and v (..., keys, head_dim) → Σ e^(s - top) v,
    Σ e^(s - top) and top = max s, each (..., queries, head_dim or 1)."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    row_max = scores.amax(-1, keepdim=True)
    weights = scores.sub_(row_max).exp_()
    return weights.to(v.dtype) @ v, weights.sum(-1, keepdim=True), row_max


def _merge(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Attention over two sets of keys, from `_attend`'s result of each."""
    row_max = torch.maximum(one[2], other[2])
    (a, b), (o, m), (p, n) = ((part[2] - row_max).exp() for part in (one, other)), one[:2], other[:2]
    return ((o * a + p * b) / (m * a + n * b)).to(o.dtype)


_decode_attention = torch.library.custom_op(
    "saga_kernels::decode_attention", decode_attention_reference, mutates_args=("own_k", "own_v")
)


if torch.ops.saga_kernels.has_avx2():

    @_decode_attention.register_kernel("cpu")
    def _on_cpu(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *rest: Any) -> Any:
        dense = all(x.stride()[-2:] == (x.shape[-1], 1) for x in (q, k, v, prefix_k, prefix_v, *rest[:2]))
        compiled = dense and q.dtype == torch.float32
        op = torch.ops.saga_kernels.decode_attention_cpu if compiled else decode_attention_reference
        return op(q, k, v, prefix_k, prefix_v, *rest)


@_decode_attention.register_kernel("cuda")
def _on_cuda(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, own_k: Tensor, own_v: Tensor, *rest: Any
) -> Any:
    from .gpu import decode  # Triton is needed on a GPU alone

    fits = decode.accepts(q, k, prefix_k, prefix_v, own_k, own_v)
    op = decode.forward if fits else decode_attention_reference
    return op(q, k, v, prefix_k, prefix_v, own_k, own_v, *rest)


@_decode_attention.register_fake
def _(q: Tensor, *rest: Any) -> Any:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
