"""`group_attention` in float32 on a CPU, by PyTorch's own flash attention: a call for each range of keys.

A range is seen whole by many rows (a prefix by all its completions) or causally by its own. What two ranges give to a
row is merged by their LSEs; backward, each range takes the merged output and LSE, which makes its gradients exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_offsets: Tensor,
    segment_prefix: Tensor,
    query_offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o (queries, heads, head_dim) and lse (heads, queries), as `group_attention_reference`."""
    heads = q.shape[1]
    o = q.new_zeros(heads, len(q), q.shape[2])
    lse = q.new_full((heads, len(q)), -torch.inf)
    for rows, keys, causal in _parts(segment_offsets, segment_prefix, query_offsets):
        operands = _operands(q[rows], k[keys], v[keys], causal)
        part, its_lse = flash(*operands, 0.0, causal, scale=scale)
        part, its_lse = part.reshape(heads, -1, q.shape[2]), its_lse.reshape(heads, -1)
        total = torch.logaddexp(lse[:, rows], its_lse)
        o[:, rows].mul_((lse[:, rows] - total).exp_()[..., None]).addcmul_(part, (its_lse - total).exp_()[..., None])
        lse[:, rows] = total
    return o.transpose(0, 1).contiguous(), lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    segment_offsets: Tensor,
    segment_prefix: Tensor,
    query_offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, as `group_attention_backward_reference` without attention to write."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    dq, dk, dv = q.new_zeros(heads, len(q), dim), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, causal in _parts(segment_offsets, segment_prefix, query_offsets):
        operands = _operands(q[rows], k[keys], v[keys], causal)
        shape = operands[0].shape
        d_out, out = (_by_head(x[rows]).reshape(shape) for x in (do, o))
        its_lse = lse[:, rows].reshape(shape[:3])
        part = flash_backward(d_out, *operands, out, its_lse, 0.0, causal, scale=scale)
        dq[:, rows] += part[0].reshape(heads, -1, dim)
        for total, d in zip((dk, dv), part[1:]):
            d = d[0] if not causal else d[0].unflatten(0, (kv_heads, -1)).sum(1)
            total[keys] += d.transpose(0, 1)
    return dq.transpose(0, 1).contiguous(), dk, dv


def _parts(
    segment_offsets: Tensor, segment_prefix: Tensor, query_offsets: Tensor
) -> Iterator[tuple[slice, slice, bool]]:
    """Rows of the queries, the range of keys they all see, and whether they see it causally."""
    offsets, home, queries = segment_offsets.tolist(), segment_prefix.tolist(), query_offsets.tolist()
    for segment, prefix in enumerate(home):
        start, stop, rows = offsets[segment], offsets[segment + 1], slice(*queries[segment : segment + 2])
        asking = rows.stop - rows.start
        if prefix == segment:
            end = segment + home.count(segment)  # its completions follow, and see it whole
            readers = slice(rows.stop, queries[end])
            if readers.stop > readers.start:
                yield readers, slice(start, stop), False
            if asking and asking < stop - start:
                yield rows, slice(start, stop - asking), False
        if asking:
            yield rows, slice(stop - asking, stop), True


def _operands(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As flash attention wants them, (1, heads, rows, head_dim). Where all keys are seen, the query heads of a key head
    stand below each other; where a row's place matters, its keys are repeated for each."""
    kv_heads, repeat = k.shape[1], q.shape[1] // k.shape[1]
    q = _by_head(q)
    if causal:
        k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        return q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    return q.reshape(1, kv_heads, -1, q.shape[2]), k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def _by_head(x: Tensor) -> Tensor:
    """(rows, heads, d) → (heads, rows, d), contiguous."""
    return x.transpose(0, 1).contiguous()
