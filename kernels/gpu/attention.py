"""Triton for `group_attention`: FlashAttention-2 (arXiv 2307.08691) over packed groups, forward and backward.

Rows. The heads / kv_heads = REP query heads of one key head are adjacent rows: row r of a key head is query r // REP,
head r % REP, as in memory. So a tile is full for any ratio and any length (a completion of 700 tokens is 21.9 tiles of
128 rows where REP is 4, not four times 5.5), its causal corner is REP times shorter in tokens, and the sum of dK and dV
over query heads is part of the inner product of their matmul.

Tiles. A tile belongs to one segment. Segment s owns the tiles from start(s) // BLOCK + s on, which is enough wherever
it starts, so the grid follows from shapes, without a synchronisation; a program finds its segment by counting such
starts, and a few surplus programs return at once.

Queries and tokens. o, dO, dQ and LSE are indexed by queries as q is, what belongs to k by tokens, and tiles of either
are counted by their own offsets. Queries belong to a segment's last tokens; only a prefix has fewer queries than
tokens, perhaps none; so one shift maps every query of a group to its token.

Ranges. To a query tile its prefix is visible whole, and its own segment up to itself. Full key blocks of both go first,
without a mask; then the prefix's last block and those on the diagonal. In packed order every visible key has column <=
token, so one comparison serves all. A key tile is visible to all queries from its tokens to its segment's end, or for a
prefix its group's.

Head dims up to 128 are padded to 64 or 128 in registers: splitting 80 or 96 would need each matmul twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shipped import SHARED_MEMORY, Cost, Shipped, launch_options
from .softmax import LN2, LOG2E, PRECISION, softmax_step

SEARCH = tl.constexpr(256)  # segments per step of a program's search for its own
DELTA_ROWS, DELTA_WARPS = 64, 4


class Tile(NamedTuple):
    """Rows of queries, keys, and how they are worked on."""

    queries: int
    keys: int
    warps: int
    stages: int


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_offsets: Tensor,
    segment_prefix: Tensor,
    query_offsets: Tensor,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """o (queries, heads, head_dim) of q's dtype and lse (heads, queries) float32; q, k, v of any stride."""
    q, k, v = _rows(q, k, v)
    queries, heads, head_dim = q.shape
    kv_heads, segments, rep = k.shape[1], len(segment_prefix), heads // k.shape[1]
    o, lse = q.new_empty(q.shape), q.new_empty((heads, queries), dtype=torch.float32)
    tile = tile or tile_of("forward", _arch(q.device), q.dtype, head_dim)
    layout = segment_offsets, segment_prefix, query_offsets, segments, queries
    _forward[_tiles(queries * rep, segments, tile.queries), kv_heads](
        q, k, v, o, lse, *layout, *_strides(q, k, v), scale,
        **_constants(rep, head_dim, tile), **launch_options(tile.warps, tile.stages),
    )  # fmt: skip
    return o, lse


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
    row_index: Tensor | None = None,
    first_columns: Tensor | None = None,
    attention: Tensor | None = None,
    query_tile: Tile | None = None,
    key_tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; fills `attention` (R, C) if given. row_index, first_columns: see `AttentionOnto`."""
    do, q, k, v = _rows(do, q, k, v)
    o, lse = o.contiguous(), lse.contiguous()
    queries, heads, head_dim = q.shape
    tokens, kv_heads, segments = len(k), k.shape[1], len(segment_prefix)
    rep, arch = heads // kv_heads, _arch(q.device)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta, lse2 = lse.new_empty((kv_heads, queries * rep)), lse.new_empty((kv_heads, queries * rep))
    _delta[(triton.cdiv(queries * heads, DELTA_ROWS),)](
        do, o, lse, delta, lse2, queries, heads, *_strides(do),
        REP=rep, HEAD_DIM=head_dim, WIDTH=_width(head_dim), ROWS=DELTA_ROWS, **launch_options(DELTA_WARPS),
    )  # fmt: skip
    layout = segment_offsets, segment_prefix, query_offsets, segments, queries
    common = do, q, k, v, delta, lse2, *layout, *_strides(do, q, k, v), scale

    levels, by_head = 0, None
    if attention is not None and row_index is not None:
        levels, by_head = len(row_index), attention.new_empty((heads, *attention.shape))
    tile = query_tile or tile_of("dq onto" if levels else "dq", arch, q.dtype, head_dim)
    _dq[_tiles(queries * rep, segments, tile.queries), kv_heads](
        *common, dq, row_index, first_columns, by_head, *((0, 0) if attention is None else attention.shape),
        LEVELS=levels, **_constants(rep, head_dim, tile), **launch_options(tile.warps, tile.stages),
    )  # fmt: skip
    if attention is not None and by_head is not None:
        torch.mean(by_head, 0, out=attention)

    tile = key_tile or tile_of("dkv", arch, q.dtype, head_dim)
    _dkv[_tiles(tokens, segments, tile.keys), kv_heads, 2](
        *common, dk, dv, **_constants(rep, head_dim, tile), **launch_options(tile.warps, tile.stages)
    )  # fmt: skip
    return dq, dk, dv


@triton.jit
def _segment(offsets, segments, tile, BLOCK: tl.constexpr, REP: tl.constexpr):
    """The last segment whose tiles start at or before `tile`, and how many tiles came before it."""
    found = 0
    for first in range(0, segments, SEARCH):
        s = first + tl.arange(0, SEARCH)
        start = tl.load(offsets + s, s < segments, 0)
        found += tl.sum(((s < segments) & (start * REP // BLOCK + s <= tile)).to(tl.int32))
    segment = found - 1
    return segment, tl.load(offsets + segment) * REP // BLOCK + segment


@triton.jit
def _load(base, rows, valid, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """(rows, WIDTH) from the element offsets `rows`; zeros beyond HEAD_DIM and, if MASKED, where not `valid`."""
    dims = tl.arange(0, WIDTH)
    at = base + rows[:, None] + dims[None, :]
    if MASKED:
        x = tl.load(at, valid[:, None] & (dims < HEAD_DIM)[None, :], 0.0)
    elif HEAD_DIM < WIDTH:
        x = tl.load(at, (dims < HEAD_DIM)[None, :], 0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _store(base, rows, valid, x, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    dims = tl.arange(0, WIDTH)
    tl.store(base + rows[:, None] + dims[None, :], x, valid[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _query_tile(offsets, prefixes, q_offsets, segments, tile, BLOCK_M: tl.constexpr, REP: tl.constexpr):
    """Segment start and stop, its first query and their end, first row of the tile among theirs, and the range of a
    prefix that is not its own (or empty).
    """
    segment, before = _segment(q_offsets, segments, tile, BLOCK_M, REP)
    start, stop = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    prefix_segment = tl.load(prefixes + segment)
    q_start, q_stop = tl.load(q_offsets + segment), tl.load(q_offsets + segment + 1)
    prefix_start = tl.load(offsets + prefix_segment)
    prefix = tl.where(prefix_segment == segment, 0, tl.load(offsets + prefix_segment + 1) - prefix_start)
    return start, stop, q_start, q_stop, (tile - before) * BLOCK_M, prefix_start, prefix


@triton.jit
def _key_blocks(row, queries, keys, prefix, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REP: tl.constexpr):
    """Number of key blocks of a query tile, of the prefix and of its own segment: those visible to every row in full,
    and the rest: the prefix's last block (0 or 1), and the segment's own up to the end of the diagonal.
    """
    row += (keys - queries) * REP
    full_prefix, full_own = prefix // BLOCK_N, (row // REP + 1) // BLOCK_N
    last = tl.minimum(keys, (row + BLOCK_M - 1) // REP + 1)
    return full_prefix, full_own, (prefix % BLOCK_N > 0).to(tl.int32), tl.cdiv(last - full_own * BLOCK_N, BLOCK_N)


@triton.jit
def _first_column(j, of_prefix, prefix_start, own_start, BLOCK_N: tl.constexpr):
    """Where key block j starts, if `of_prefix` blocks from `prefix_start` on come before those from `own_start` on."""
    return tl.where(j < of_prefix, prefix_start + j * BLOCK_N, own_start + (j - of_prefix) * BLOCK_N)


@triton.jit
def _forward(
    q, k, v, o, lse, offsets, prefixes, q_offsets, segments, q_count,
    q_token, q_head, k_token, k_head, v_token, v_head, scale,
    REP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # In reverse: a completion's tiles have most keys, a prefix's first ones fewest, so the light ones run last.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    start, stop, q_start, q_stop, row, prefix_start, prefix = _query_tile(
        offsets, prefixes, q_offsets, segments, tile, BLOCK_M, REP
    )
    if row >= (q_stop - q_start) * REP:
        return
    shift = stop - q_stop  # from a query to its token
    rows = row + tl.arange(0, BLOCK_M)
    query, head = q_start + rows // REP, kv_head * REP + rows % REP
    inside = query < q_stop
    k += kv_head.to(tl.int64) * k_head
    v += kv_head.to(tl.int64) * v_head
    queries = _load(q, query.to(tl.int64) * q_token + head * q_head, inside, HEAD_DIM, WIDTH, True)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    scale2 = scale * LOG2E

    full_prefix, full_own, edge_prefix, edge_own = _key_blocks(
        row, q_stop - q_start, stop - start, prefix, BLOCK_M, BLOCK_N, REP
    )
    for j in range(full_prefix + full_own):
        column = _first_column(j, full_prefix, prefix_start, start, BLOCK_N) + tl.arange(0, BLOCK_N)
        keys = _load(k, column.to(tl.int64) * k_token, inside, HEAD_DIM, WIDTH, False)
        values = _load(v, column.to(tl.int64) * v_token, inside, HEAD_DIM, WIDTH, False)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, values, scale2)

    edge_start, own_start = prefix_start + full_prefix * BLOCK_N, start + full_own * BLOCK_N
    for j in range(edge_prefix + edge_own):
        column = _first_column(j, edge_prefix, edge_start, own_start, BLOCK_N) + tl.arange(0, BLOCK_N)
        valid = column < tl.where(j < edge_prefix, prefix_start + prefix, stop)
        keys = _load(k, column.to(tl.int64) * k_token, valid, HEAD_DIM, WIDTH, True)
        values = _load(v, column.to(tl.int64) * v_token, valid, HEAD_DIM, WIDTH, True)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        visible = ((column - shift)[None, :] <= query[:, None]) & valid[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, values, scale2)

    out = query.to(tl.int64) * (tl.num_programs(1) * REP * HEAD_DIM) + head * HEAD_DIM
    _store(o, out, inside, acc / row_sum[:, None], HEAD_DIM, WIDTH)
    tl.store(lse + head.to(tl.int64) * q_count + query, (row_max + tl.log2(row_sum)) * LN2, inside)


@triton.jit
def _delta(
    do, o, lse, delta, lse2, q_count, heads, do_token, do_head,
    REP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rowsum(dO O), and the LSE in base 2, both (kv_heads, queries * REP): in the order the backward reads them."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query, head = at // heads, at % heads
    inside = query < q_count
    d_out = _load(do, query.to(tl.int64) * do_token + head * do_head, inside, HEAD_DIM, WIDTH, True)
    out = _load(o, at.to(tl.int64) * HEAD_DIM, inside, HEAD_DIM, WIDTH, True)
    to = (head // REP * q_count + query) * REP + head % REP
    tl.store(delta + to, tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1), inside)
    tl.store(lse2 + to, tl.load(lse + head * q_count + query, inside, 0.0) * LOG2E, inside)


@triton.jit
def _dq(
    do, q, k, v, delta, lse2, offsets, prefixes, q_offsets, segments, q_count,
    do_token, do_head, q_token, q_head, k_token, k_head, v_token, v_head, scale,
    dq, row_index, first_columns, by_head, chosen, columns,
    LEVELS: tl.constexpr,
    REP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # light tiles last, as in the forward
    kv_head = tl.program_id(1)
    start, stop, q_start, q_stop, row, prefix_start, prefix = _query_tile(
        offsets, prefixes, q_offsets, segments, tile, BLOCK_M, REP
    )
    if row >= (q_stop - q_start) * REP:
        return
    shift = stop - q_stop  # from a query to its token
    rows = row + tl.arange(0, BLOCK_M)
    query, head = q_start + rows // REP, kv_head * REP + rows % REP
    inside = query < q_stop
    k += kv_head.to(tl.int64) * k_head
    v += kv_head.to(tl.int64) * v_head
    at = (kv_head * q_count + q_start) * REP + rows
    queries = _load(q, query.to(tl.int64) * q_token + head * q_head, inside, HEAD_DIM, WIDTH, True)
    d_out = _load(do, query.to(tl.int64) * do_token + head * do_head, inside, HEAD_DIM, WIDTH, True)
    row_delta, row_lse2 = tl.load(delta + at, inside, 0.0), tl.load(lse2 + at, inside, 0.0)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    scale2 = scale * LOG2E
    low, high = 0, 0
    if LEVELS > 0:
        by_head += (kv_head * REP).to(tl.int64) * chosen * columns
        low, high = _wanted_columns(row_index, first_columns, query, inside, q_count, columns, LEVELS)

    full_prefix, full_own, edge_prefix, edge_own = _key_blocks(
        row, q_stop - q_start, stop - start, prefix, BLOCK_M, BLOCK_N, REP
    )
    for j in range(full_prefix + full_own):
        first = _first_column(j, full_prefix, prefix_start, start, BLOCK_N)
        column = first + tl.arange(0, BLOCK_N)
        keys = _load(k, column.to(tl.int64) * k_token, inside, HEAD_DIM, WIDTH, False)
        values = _load(v, column.to(tl.int64) * v_token, inside, HEAD_DIM, WIDTH, False)
        p = tl.exp2(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2 - row_lse2[:, None])
        if LEVELS > 0:
            _emit(
                by_head, row_index, first_columns, p, query, rows % REP, inside, first, first + BLOCK_N,
                low, high, q_count, chosen, columns, LEVELS, BLOCK_N,
            )  # fmt: skip
        d_scores = p * (tl.dot(d_out, tl.trans(values), input_precision=PRECISION) - row_delta[:, None])
        acc = tl.dot(d_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)

    edge_start, own_start = prefix_start + full_prefix * BLOCK_N, start + full_own * BLOCK_N
    for j in range(edge_prefix + edge_own):
        first = _first_column(j, edge_prefix, edge_start, own_start, BLOCK_N)
        column = first + tl.arange(0, BLOCK_N)
        end = tl.where(j < edge_prefix, prefix_start + prefix, stop)
        valid = column < end
        keys = _load(k, column.to(tl.int64) * k_token, valid, HEAD_DIM, WIDTH, True)
        values = _load(v, column.to(tl.int64) * v_token, valid, HEAD_DIM, WIDTH, True)
        p = tl.exp2(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2 - row_lse2[:, None])
        p = tl.where(((column - shift)[None, :] <= query[:, None]) & valid[None, :], p, 0.0)
        if LEVELS > 0:
            _emit(
                by_head, row_index, first_columns, p, query, rows % REP, inside, first, end,
                low, high, q_count, chosen, columns, LEVELS, BLOCK_N,
            )  # fmt: skip
        d_scores = p * (tl.dot(d_out, tl.trans(values), input_precision=PRECISION) - row_delta[:, None])
        acc = tl.dot(d_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)

    out = query.to(tl.int64) * (tl.num_programs(1) * REP * HEAD_DIM) + head * HEAD_DIM
    _store(dq, out, inside, acc * scale, HEAD_DIM, WIDTH)


@triton.jit
def _wanted_columns(row_index, first_columns, query, inside, q_count, columns, LEVELS: tl.constexpr):
    """The range of columns of the tile's chosen rows; empty where no row is chosen, as in most tiles."""
    low, high = 2147483647, 0
    for level in tl.static_range(LEVELS):
        index = tl.load(row_index + level * q_count + query, inside, -1)
        first = tl.load(first_columns + index, index >= 0, 0)
        low = tl.minimum(low, tl.min(tl.where(index >= 0, first, 2147483647)))
        high = tl.maximum(high, tl.max(tl.where(index >= 0, first + columns, 0)))
    return low, high


@triton.jit
def _emit(
    by_head, row_index, first_columns, p, query, head, inside, first, end, low, high, q_count, chosen, columns,
    LEVELS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the chosen rows of P, each in its columns of by_head (heads, R, C). No place is written twice: the last
    block of a prefix stops at `end`, as the columns behind it belong to the next segment.
    """
    if (first < high) & (end > low):
        column = first + tl.arange(0, BLOCK_N)
        for level in tl.static_range(LEVELS):
            index = tl.load(row_index + level * q_count + query, inside, -1)
            at = column[None, :] - tl.load(first_columns + index, index >= 0, 0)[:, None]
            to = (head * chosen + index)[:, None] * columns + at
            wanted = (index >= 0)[:, None] & (at >= 0) & (at < columns) & (column < end)[None, :]
            tl.store(by_head + to, p, wanted)


@triton.jit
def _dkv(
    do, q, k, v, delta, lse2, offsets, prefixes, q_offsets, segments, q_count,
    do_token, do_head, q_token, q_head, k_token, k_head, v_token, v_head, scale,
    dk, dv,
    REP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    segment, before = _segment(offsets, segments, tile, BLOCK_N, 1)
    start, stop = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    start += (tile - before) * BLOCK_N
    # A prefix's keys are visible to the whole group, ten times the work of a completion's: prefixes run first, and the
    # completions fill the gaps. Hence the grid twice, each half skipping the other's tiles.
    is_prefix = tl.load(prefixes + segment) == segment
    if (start >= stop) | (is_prefix != (tl.program_id(2) == 0)):
        return
    shift = stop - tl.load(q_offsets + segment + 1)
    first = tl.maximum(start - shift, tl.load(q_offsets + segment))
    end = tl.load(q_offsets + segment + tl.where(is_prefix, _members(prefixes, segments, segment), 1))

    column = start + tl.arange(0, BLOCK_N)
    valid = column < stop
    keys = _load(k, column.to(tl.int64) * k_token + kv_head * k_head, valid, HEAD_DIM, WIDTH, True)
    values = _load(v, column.to(tl.int64) * v_token + kv_head * v_head, valid, HEAD_DIM, WIDTH, True)
    d_keys = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    d_values = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    scale2 = scale * LOG2E
    q += (kv_head * REP).to(tl.int64) * q_head
    do += (kv_head * REP).to(tl.int64) * do_head
    delta += (kv_head.to(tl.int64) * q_count + first) * REP
    lse2 += (kv_head.to(tl.int64) * q_count + first) * REP

    # Rows count from `first`, the first query to which the tile is visible: in part to its own tokens, in full to later
    # ones.
    rows = (end - first) * REP
    own = tl.maximum(start - shift + BLOCK_N - first, 0) * REP
    corner = tl.cdiv(tl.minimum(rows, own), BLOCK_M) * BLOCK_M
    for row in range(0, corner, BLOCK_M):
        d_keys, d_values = _dkv_step(
            d_keys, d_values, keys, values, column - shift, do, q, delta, lse2, row, rows, first,
            do_token, do_head, q_token, q_head, scale2, REP, HEAD_DIM, WIDTH, BLOCK_M, True,
        )  # fmt: skip
    for row in range(corner, rows, BLOCK_M):
        d_keys, d_values = _dkv_step(
            d_keys, d_values, keys, values, column - shift, do, q, delta, lse2, row, rows, first,
            do_token, do_head, q_token, q_head, scale2, REP, HEAD_DIM, WIDTH, BLOCK_M, False,
        )  # fmt: skip

    out = column.to(tl.int64) * (tl.num_programs(1) * HEAD_DIM) + kv_head * HEAD_DIM
    _store(dk, out, valid, d_keys * scale, HEAD_DIM, WIDTH)
    _store(dv, out, valid, d_values, HEAD_DIM, WIDTH)


@triton.jit
def _members(prefixes, segments, prefix):
    """How many segments a group has: those whose prefix it is, itself among them."""
    found = 0
    for first in range(0, segments, SEARCH):
        s = first + tl.arange(0, SEARCH)
        found += tl.sum((tl.load(prefixes + s, s < segments, -1) == prefix).to(tl.int32))
    return found


@triton.jit
def _dkv_step(
    d_keys, d_values, keys, values, diagonal, do, q, delta, lse2, row, rows, first,
    do_token, do_head, q_token, q_head, scale2,
    REP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    CORNER: tl.constexpr,
):  # fmt: skip
    """One block of query rows, all matrices transposed. Rows past the end are zeros, and so is all they add.

    diagonal: (BLOCK_N,), each column as a query, the first that sees it.
    """
    at = row + tl.arange(0, BLOCK_M)
    query, head, inside = first + at // REP, at % REP, at < rows
    queries = _load(q, query.to(tl.int64) * q_token + head * q_head, inside, HEAD_DIM, WIDTH, True)
    d_out = _load(do, query.to(tl.int64) * do_token + head * do_head, inside, HEAD_DIM, WIDTH, True)
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    p = tl.exp2(scores * scale2 - tl.load(lse2 + at, inside, 0.0)[None, :])
    if CORNER:
        p = tl.where(diagonal[:, None] <= query[None, :], p, 0.0)
    d_values = tl.dot(p.to(d_out.dtype), d_out, d_values, input_precision=PRECISION)
    d_scores = p * (
        tl.dot(values, tl.trans(d_out), input_precision=PRECISION) - tl.load(delta + at, inside, 0.0)[None, :]
    )
    return tl.dot(d_scores.to(queries.dtype), queries, d_keys, input_precision=PRECISION), d_values


def tile_of(kernel: str, arch: int, dtype: torch.dtype, head_dim: int) -> Tile:
    """Tiles for launcher and `shipped`: the largest without register spills, by the chip's shared memory.

    "dq onto" needs registers for the addresses of P as well.
    """
    if dtype == torch.float32:
        return {"forward": Tile(32, 32, 8, 1), "dkv": Tile(32, 16, 8, 1)}.get(kernel, Tile(16, 32, 8, 1))
    padded = head_dim < _width(head_dim)  # its masks take registers
    if SHARED_MEMORY[arch] < 128 << 10:
        return {"forward": Tile(128, 32, 8, 2), "dkv": Tile(32, 64, 4, 1)}.get(kernel, Tile(64, 32, 4, 2))
    if arch == 80:
        return {
            "forward": Tile(128, 32 if padded else 64, 8, 2),
            "dq": Tile(128, 32, 8, 2),
            "dq onto": Tile(64, 64, 8, 2),
            # Eight warps would do narrow heads' scores twice over.
            "dkv": Tile(32, 64, 4, 2) if head_dim <= 64 else Tile(64, 64, 8, 2),
        }[kernel]
    return {
        "forward": Tile(128, 64, 8, 2),
        "dq": Tile(128, 64, 8, 2),
        "dq onto": Tile(128, 32, 8, 2),
        # With narrow heads the sm_100 compiler stops at 128 registers a thread.
        "dkv": Tile(64, 64 if padded or (arch == 100 and head_dim <= 64) else 128, 8, 2),
    }[kernel]


@lru_cache
def _arch(device: torch.device) -> int:
    """The architecture to look up in the table: of the same family, else the most frugal."""
    if device.type != "cuda":
        return 80  # interpreted
    major, minor = torch.cuda.get_device_capability(device)
    arch = 10 * major + min(minor, 6 if major == 8 else 0)
    return arch if arch in SHARED_MEMORY else 86


def _width(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128


def _tiles(rows: int, segments: int, block: int) -> int:
    return rows // block + segments


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Kernels take any stride of tokens and heads, but need stride 1 within a head."""
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _constants(rep: int, head_dim: int, tile: Tile) -> dict[str, object]:
    return {
        "REP": rep,
        "HEAD_DIM": head_dim,
        "WIDTH": _width(head_dim),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
    }


def shipped(arch: int) -> Iterator[Shipped]:
    """Four query heads a key head, as at 8B. Not listed, as of the same tiles and code: other ratios (another divisor),
    other head dims (as 64, 80 or 128), and float16 (as bfloat16).
    """
    chosen = [(torch.bfloat16, head_dim) for head_dim in (64, 80, 128)] + [(torch.float32, 128)]
    for dtype, head_dim in chosen:
        for kernel in ("forward", "dq", "dkv"):
            yield _shipped(kernel, arch, dtype, head_dim)
    for kernel in ("delta", "dq onto"):
        yield _shipped(kernel, arch, torch.bfloat16, 128)


def _shipped(kernel: str, arch: int, dtype: torch.dtype, head_dim: int) -> Shipped:
    function = {"forward": _forward, "delta": _delta, "dq": _dq, "dq onto": _dq, "dkv": _dkv}[kernel]
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    constants: dict[str, object]
    if kernel == "delta":
        warps, stages = DELTA_WARPS, 1
        constants = {"REP": 4, "HEAD_DIM": head_dim, "WIDTH": _width(head_dim), "ROWS": DELTA_ROWS}
    else:
        tile = tile_of(kernel, arch, dtype, head_dim)
        warps, stages, constants = tile.warps, tile.stages, _constants(4, head_dim, tile)
    if kernel == "dq onto":
        constants["LEVELS"] = 1
    if kernel == "dq":
        constants |= {"LEVELS": 0, "row_index": None, "first_columns": None, "by_head": None}
    kinds = (
        dict.fromkeys(("do", "q", "k", "v", "o", "dq", "dk", "dv"), element)
        | dict.fromkeys(("lse", "delta", "lse2", "by_head"), "*fp32")
        | dict.fromkeys(("offsets", "prefixes", "q_offsets", "row_index", "first_columns"), "*i32")
        | {"scale": "fp32"}
    )
    signature = {name: kinds.get(name, "i32") for name in function.arg_names if name not in constants}
    strides = tuple(name for name in signature if name.endswith(("_token", "_head")) and name != "by_head")
    label = f"{kernel} {element[1:]} {head_dim}"
    return Shipped(label, function, signature, constants, warps, stages, kernel != "delta", aligned=strides)


def cost(
    prefix: int, completions: int, length: int, heads: int, kv_heads: int, head_dim: int, backward: bool = False
) -> Cost:
    """One group of equal completions. A visible pair of tokens costs 2 matmuls of head_dim a head forward; backward 7,
    as S and dO V^T are computed by both kernels. Bytes: each tensor once (keys read again come from the L2).
    """
    tokens = prefix + completions * length
    pairs = prefix * (prefix + 1) // 2 + completions * (length * prefix + length * (length + 1) // 2)
    flops = 2 * pairs * heads * head_dim * (7 if backward else 2)
    rows, keys = 2 * tokens * heads * head_dim, 2 * tokens * kv_heads * head_dim
    if not backward:
        return Cost(flops, 2 * rows + 2 * keys + 4 * tokens * heads)  # q, o; k, v; lse
    delta = 2 * rows + 3 * 4 * tokens * heads  # do, o; lse, and both results
    dq = 3 * rows + 2 * keys + 2 * 4 * tokens * heads  # q, do, dq; k, v; delta and lse
    dkv = 2 * rows + 4 * keys + 2 * 4 * tokens * heads  # q, do; k, v, dk, dv; delta and lse
    return Cost(flops, delta + dq + dkv)
