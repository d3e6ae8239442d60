"""Attention over packed groups: all completions of a group attend to one copy of its prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]  # noqa: F401  registers the compiled kernels
from .checks import FLOATS, accumulator, expect, expect_same_device, expect_tensor
from .layout import GroupLayout

GPU_HEAD_DIM = 128  # the largest the GPU kernels hold in registers
BLOCK_ROWS = 128  # query rows per block: bounds the score matrix and the masked half of a causal square


class AttentionOnto:
    """Query rows, each with a run of key columns, whose attention the backward pass of `group_attention` returns.

    It computes the probabilities anyway, and writes their mean over heads into `attention`. `attention_onto` computes
    the same without a backward pass.

    Args:
        layout: of the packed sequence.
        rows: R rows of the queries, in any order; a row may be repeated with other columns.
        first_columns: R, the first of each row's columns. columns: C, columns of each row, all visible to it.
        dtype: of `attention`: float32, or float64 for float64 inputs.

    Attributes:
        attention: (R, C), zeros until the backward pass has run.

    Raises:
        ValueError: the lists differ in length, a row is not in the layout, or its columns are not all visible to it.
    """

    def __init__(
        self,
        layout: GroupLayout,
        rows: Sequence[int],
        first_columns: Sequence[int],
        columns: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        expect(len(first_columns) == len(rows), "first_columns", len(first_columns), f"as many as rows, {len(rows)}")
        expect(columns > 0, "columns", columns, "1 or more")
        occurrences: Counter[int] = Counter()
        levels = []
        for i, (row, first) in enumerate(zip(rows, first_columns, strict=True)):
            expect(0 <= row < layout.queries, f"rows[{i}]", row, f"0 to {layout.queries - 1}, the packed queries")
            visible = [(keys.start, keys.stop) for keys in layout.visible(row)]
            expect(
                any(start <= first and first + columns <= stop for start, stop in visible),
                f"first_columns[{i}]",
                f"columns {first} to {first + columns - 1}",
                f"all of them seen by row {row}: within " + " or ".join(f"{a} to {b - 1}" for a, b in visible if a < b),
            )
            levels.append(occurrences[row])
            occurrences[row] += 1
        # Kernels look up the reverse: the index, among the R, of a query. A repeated row takes a level per repetition.
        device = layout.segment_offsets.device
        table = torch.tensor([levels, list(rows), list(first_columns)], dtype=torch.int64, device=device)
        self.row_index = torch.full((max(levels, default=-1) + 1, layout.queries), -1, dtype=torch.int32, device=device)
        self.row_index[table[0], table[1]] = torch.arange(len(rows), dtype=torch.int32, device=device)
        self.first_columns = table[2].to(torch.int32)
        self.layout = layout
        self.attention = torch.zeros(len(rows), columns, dtype=dtype, device=device)


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: GroupLayout,
    scale: float | None = None,
    onto: AttentionOnto | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each prefix, and of each completion onto its prefix and itself (`GroupLayout`).

    Args:
        q: (queries, heads, head_dim). k, v: (tokens, kv_heads, head_dim); heads is a multiple of kv_heads, and query
            head h reads key head h // (heads / kv_heads). All of one floating dtype and device, of any stride. On a GPU
            head_dim is 128 at most (float64 apart, which is the reference there too).
        layout: of exactly these queries and tokens.
        scale: of the scores, above 0; head_dim ** -0.5 by default.
        onto: whose `attention` the backward pass fills. Something of q, k, v must require a gradient.

    Returns:
        o: like q. lse: (heads, queries), natural-log sum of exponentials of the scaled scores, float32 (float64 for
        float64), not differentiable. Gradients flow to q, k and v.
    """
    expect_tensor("q", q, (layout.queries, None, None), FLOATS)
    expect_tensor("k", k, (layout.tokens, None, q.shape[2]), (q.dtype,))
    expect_tensor("v", v, tuple(k.shape), (q.dtype,))
    _expect_heads(q, k)
    expect_same_device(q=q, k=k, v=v, layout=layout.segment_offsets)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    expect(scale > 0, "scale", scale, "a number above 0")
    if onto is None:
        return _group_attention(q, k, v, *layout.offsets, scale)
    expect(onto.layout is layout, "onto", "another layout", "one made with this call's layout")
    expect_tensor("onto", onto.attention, tuple(onto.attention.shape), (accumulator(q.dtype),))
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    expect(differentiable, "onto", "q, k, v without gradient", "one that requires it, or attention_onto instead")
    return _GroupAttentionOnto.apply(q, k, v, scale, onto)


def attention_onto(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, columns: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of chosen query rows onto chosen key columns, averaged over heads, from the LSE of a finished forward.

    Args:
        q: (queries, heads, head_dim). k: (tokens, kv_heads, head_dim). lse: (heads, queries) of `group_attention`.
        rows: (R,) int64, of q. columns: (C,) int64, of k, each visible to every row (not checked).
        scale: as given to `group_attention`.

    Returns:
        (R, C) probabilities mean_h exp(q_h . k_h * scale - lse_h), of lse's dtype, without gradient. A row sums to the
        share of its attention that falls on these columns.
    """
    expect_tensor("q", q, (None, None, None), FLOATS)
    expect_tensor("k", k, (None, None, q.shape[2]), (q.dtype,))
    _expect_heads(q, k)
    expect_tensor("lse", lse, (q.shape[1], q.shape[0]), (accumulator(q.dtype),))
    expect_tensor("rows", rows, (None,), (torch.int64,))
    expect_tensor("columns", columns, (None,), (torch.int64,))
    expect_same_device(q=q, k=k, lse=lse, rows=rows, columns=columns)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return _attention_onto(q.detach(), k.detach(), lse.detach(), rows, columns, scale)


def group_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_offsets: Tensor,
    segment_prefix: Tensor,
    query_offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Forward of `group_attention` in plain PyTorch: blocks of query rows against at most two ranges of keys."""
    kv_heads = k.shape[1]
    queries = _by_head(q, kv_heads).mul_(scale)
    keys, values = _by_head(k, kv_heads)[:, 0], _by_head(v, kv_heads)[:, 0]
    o, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:3])
    for rows, ranges in _blocks(segment_offsets, segment_prefix, query_offsets):
        scores = _masked_scores(queries, keys, rows, ranges)
        row_max = scores.amax(-1, keepdim=True)
        weights = scores.sub_(row_max).exp_()
        row_sum = weights.sum(-1, keepdim=True)
        block = (weights @ _gather(values, ranges)).div_(row_sum)
        o[:, :, rows] = block.view_as(o[:, :, rows])
        lse[:, :, rows] = row_sum.log_().add_(row_max).view_as(lse[:, :, rows])
    return _by_token(o).to(q.dtype), lse.flatten(0, 1)


def group_attention_backward_reference(
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
    row_index: Tensor | None,
    first_columns: Tensor | None,
    attention: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `group_attention`: P again from the LSE, then dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), and, times
    the scale, dQ = dS K and dK = dS^T Q (FlashAttention-2, arXiv 2307.08691).

    The last three come together, from `AttentionOnto`: row_index (levels, queries) int32, the index of a query among
    the R rows, or -1; first_columns (R,) int32; attention (R, C), written. They have no defaults, as PyTorch 2.11 does
    not find mutated arguments that are left at their default.
    """
    kv_heads = k.shape[1]
    queries, d_o = _by_head(q, kv_heads).mul_(scale), _by_head(do, kv_heads)
    keys, values = _by_head(k, kv_heads)[:, 0], _by_head(v, kv_heads)[:, 0]
    delta = (d_o * _by_head(o, kv_heads)).sum(-1)
    lse = lse.view(delta.shape)
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, ranges in _blocks(segment_offsets, segment_prefix, query_offsets):
        d_out = d_o[:, :, rows].flatten(1, 2)
        weights = _masked_scores(queries, keys, rows, ranges).sub_(lse[:, :, rows].flatten(1, 2)[..., None]).exp_()
        if attention is not None and row_index is not None and first_columns is not None:
            _emit(weights, rows, ranges, row_index, first_columns, attention)
        d_value = weights.mT @ d_out
        d_scores = (d_out @ _gather(values, ranges).mT).sub_(delta[:, :, rows].flatten(1, 2)[..., None]).mul_(weights)
        d_key = d_scores.mT @ queries[:, :, rows].flatten(1, 2)
        dq[:, :, rows] = (d_scores @ _gather(keys, ranges)).view_as(dq[:, :, rows])
        done = 0
        for columns in ranges:  # blocks come in packed order, so sums over completions have a fixed order
            size = columns.stop - columns.start
            dk[:, columns] += d_key[:, done : done + size]
            dv[:, columns] += d_value[:, done : done + size]
            done += size
    dq, dk, dv = (_by_token(x).to(q.dtype) for x in (dq.mul_(scale), dk[:, None], dv[:, None]))
    return dq, dk, dv


def attention_onto_reference(q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """`attention_onto` in plain PyTorch: gathered matmul and the LSE."""
    queries, keys = _by_head(q[rows], k.shape[1]), _by_head(k[columns], k.shape[1])
    scores = (queries @ keys.mT).flatten(0, 1).mul_(scale)
    return scores.sub_(lse[:, rows, None]).exp_().mean(0)


def _expect_heads(q: Tensor, k: Tensor) -> None:
    fits = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    expect(fits, "q", f"{q.shape[1]} heads", f"a multiple of k's {k.shape[1]}, which is not 0")


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """(tokens, heads, d) -> a fresh contiguous (kv_heads, rep, tokens, d), wide enough to sum in."""
    by_head = x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    return torch.empty(by_head.shape, dtype=accumulator(x.dtype), device=x.device).copy_(by_head)


def _by_token(x: Tensor) -> Tensor:
    """(kv_heads, rep, tokens, d) -> (tokens, heads, d), contiguous."""
    return x.permute(2, 0, 1, 3).contiguous().flatten(1, 2)


def _blocks(
    segment_offsets: Tensor, segment_prefix: Tensor, query_offsets: Tensor
) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of query rows, each with its visible ranges of keys; the last range ends on the block's diagonal."""
    offsets, prefixes, queries = segment_offsets.tolist(), segment_prefix.tolist(), query_offsets.tolist()
    for segment, prefix in enumerate(prefixes):
        (start, stop), (first_row, last_row) = offsets[segment : segment + 2], queries[segment : segment + 2]
        whole_prefix = [] if prefix == segment else [slice(*offsets[prefix : prefix + 2])]
        for first in range(first_row, last_row, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, last_row)
            yield slice(first, last), [*whole_prefix, slice(start, stop - last_row + last)]


def _gather(x: Tensor, ranges: list[slice]) -> Tensor:
    """The tokens of all ranges, from (kv_heads, tokens, d); a copy only where there are two ranges."""
    parts = [x[:, columns] for columns in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _masked_scores(queries: Tensor, keys: Tensor, rows: slice, ranges: list[slice]) -> Tensor:
    """Scores (kv_heads, rep * rows, keys) of scaled queries, -inf above the diagonal.

    The query heads of a key head are stacked as rows, so GQA is a taller matmul and keys are not repeated.
    """
    scores = queries[:, :, rows].flatten(1, 2) @ _gather(keys, ranges).mT
    size = rows.stop - rows.start
    future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
    scores.unflatten(1, (-1, size))[..., -size:].masked_fill_(future, float("-inf"))
    return scores


def _emit(
    weights: Tensor, rows: slice, ranges: list[slice], row_index: Tensor, first_columns: Tensor, attention: Tensor
) -> None:
    """Write the chosen rows of a block, averaged over heads, from weights (kv_heads, rep * rows, keys)."""
    mean = weights.unflatten(1, (-1, rows.stop - rows.start)).mean((0, 1))
    columns = torch.cat([torch.arange(r.start, r.stop, device=weights.device) for r in ranges])
    run = torch.arange(attention.shape[1], device=weights.device)
    for level in row_index[:, rows]:
        chosen = (level >= 0).nonzero().flatten()
        index = level[chosen].long()
        at = torch.searchsorted(columns, first_columns[index].long())
        attention[index] = mean[chosen].gather(1, at[:, None] + run)


_group_attention = torch.library.custom_op("saga_kernels::group_attention", group_attention_reference, mutates_args=())
_group_attention_backward = torch.library.custom_op(
    "saga_kernels::group_attention_backward", group_attention_backward_reference, mutates_args=("attention",)
)
_attention_onto = torch.library.custom_op("saga_kernels::attention_onto", attention_onto_reference, mutates_args=())


@_group_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_offsets: Tensor,
    segment_prefix: Tensor,
    query_offsets: Tensor,
    scale: float,
) -> Any:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (q.shape[1], q.shape[0]), dtype=accumulator(q.dtype)
    )


@_group_attention_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> Any:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


@_attention_onto.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Any:
    return lse.new_empty((rows.shape[0], columns.shape[0]))


if torch.ops.saga_kernels.has_avx2():

    @_group_attention.register_kernel("cpu")
    def _(q: Tensor, *rest: Any) -> Any:
        compiled = q.dtype == torch.float32
        return (torch.ops.saga_kernels.group_attention_cpu if compiled else group_attention_reference)(q, *rest)

    @_group_attention_backward.register_kernel("cpu")
    def _(do: Tensor, *rest: Any) -> Any:
        *inputs, row_index, _, _ = rest
        if do.dtype == torch.float32 and row_index is None:
            return torch.ops.saga_kernels.group_attention_backward_cpu(do, *inputs)
        return group_attention_backward_reference(do, *rest)


def _too_wide(q: Tensor) -> bool:
    """Whether the GPU kernels do not take this: float64, and heads that are too wide."""
    return q.dtype == torch.float64 or q.shape[2] > GPU_HEAD_DIM


@_group_attention.register_kernel("cuda")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    if _too_wide(q):
        return group_attention_reference(q, k, v, *rest)
    from .gpu import attention  # Triton is needed on a GPU alone

    return attention.forward(q, k, v, *rest)


@_group_attention_backward.register_kernel("cuda")
def _(do: Tensor, q: Tensor, *rest: Any) -> Any:
    if _too_wide(q):
        return group_attention_backward_reference(do, q, *rest)
    from .gpu import attention

    return attention.backward(do, q, *rest)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, *offsets, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, *offsets)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the LSE


def _backward(ctx: Any, do: Tensor, _: Any) -> Any:
    dq, dk, dv = _group_attention_backward(do, *ctx.saved_tensors, ctx.scale, None, None, None)
    return dq, dk, dv, None, None, None, None


_group_attention.register_autograd(_backward, setup_context=_setup_context)


class _GroupAttentionOnto(torch.autograd.Function):
    """`group_attention` whose backward also fills `onto.attention`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, onto: AttentionOnto) -> Any:
        inputs = q, k, v, *onto.layout.offsets, scale
        output = _group_attention(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.onto = onto
        return output

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Any) -> Any:
        chosen = ctx.onto.row_index, ctx.onto.first_columns, ctx.onto.attention
        dq, dk, dv = _group_attention_backward(do, *ctx.saved_tensors, ctx.scale, *chosen)
        return dq, dk, dv, None, None
