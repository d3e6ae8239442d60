"""Triton for `decode_attention`: flash decoding in two launches, the keys of a prefix read once for all of its rows.

Splits. The keys of a prefix, and those of each row's own tokens, are split, one program per split and key head, so that
8 rows fill a GPU as 128 do. Both kinds go in one launch: a split of a prefix serves the queries of all rows of its pair
at once (32 where G is 8 and there are four query heads per key head), a split of own tokens those of its row. Each
stores its weighted mean of the values and the logarithm of its sum of weights; the second launch merges the splits of
a row. The number of a row's tokens is known on the GPU alone: programs beyond it return at once.

The new token. A row's first split starts from it, as the caller gives it, and writes it to the cache, which no program
reads at that place in this launch: there is no race.

The kernel is bound by memory, so tiles have few queries, and unused tensor-core rows cost nothing. Keys of a prefix are
transposed, P side by side: with P or a row's stride odd, only single numbers can be loaded, so loads are as wide as all
strides allow (`_vector`). A stride that is a multiple of 16 bytes is best; P need not be one.
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
from .softmax import LOG2E, PRECISION, softmax_step

SEARCH = tl.constexpr(128)  # rows per step of a program's search for the rows of its prefix
MAX_QUERIES = 32  # of a tile; a prefix with more is read again for the rest of them
CHUNK, MERGE_WARPS = 8, 1  # splits per step of the merge


class Tile(NamedTuple):
    """Keys a step, and how they are worked on."""

    keys: int
    warps: int
    stages: int


class Splits(NamedTuple):
    """Number of splits of a prefix's keys and of own tokens, and tiles per split."""

    prefix: int
    prefix_tiles: int
    own: int
    own_tiles: int


def choose_splits(n: int, pairs: int, kv_heads: int, length: int, end: int, keys: int, multiprocessors: int) -> Splits:
    """Splits of 256 keys where these are several per multiprocessor, else shorter ones.

    A split writes 3% of what it reads at 256 keys of four query heads, so longer ones would gain little, and lose at
    the end of the launch, when the last ones run alone.
    """

    def splits(span: int) -> Splits:
        counts = [triton.cdiv(size, span) for size in (length, end)]
        tiles = [triton.cdiv(triton.cdiv(size, count), keys) for size, count in zip((length, end), counts)]
        counts = [triton.cdiv(size, keys * some) for size, some in zip((length, end), tiles)]
        return Splits(counts[0], tiles[0], counts[1], tiles[1])

    for span, enough in ((256, 4.0), (128, 1.5)):
        chosen = splits(span)
        if kv_heads * (pairs * chosen.prefix + n * chosen.own) >= enough * multiprocessors:
            return chosen
    return splits(64)


def accepts(q: Tensor, k: Tensor, prefix_k: Tensor, prefix_v: Tensor, own_k: Tensor, own_v: Tensor) -> bool:
    """Whether the kernels take these: head_dim at most 128, at most 32 query heads per key head, float32 or narrower,
    values and own keys dense in their last two axes, keys of a prefix in the last.
    """
    dim = q.shape[2]
    return (
        q.dtype != torch.float64
        and dim <= 128
        and q.shape[1] // k.shape[1] <= MAX_QUERIES
        and prefix_k.stride(3) == 1
        and all(x.stride()[-2:] == (dim, 1) for x in (prefix_v, own_k, own_v))
    )


def forward(
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
    tile: Tile | None = None,
    splits: Splits | None = None,
) -> Tensor:
    """(n, heads, head_dim), contiguous, for arguments that `accepts` accepts. A row that is not read attends to its own
    tokens alone. `tile` and `splits` follow from the shape by default.
    """
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    (n, heads, dim), (pairs, kv_heads, _, length), end = q.shape, prefix_k.shape, own_k.shape[2]
    rep, out = heads // kv_heads, q.new_empty(q.shape)
    if n == 0:
        return out
    arch, multiprocessors = _device(q.device)
    tile = tile or tile_of(arch, q.dtype, dim)
    splits = splits or choose_splits(n, pairs, kv_heads, length, end, tile.keys, multiprocessors)
    partial = q.new_empty((n, heads, splits.prefix + splits.own, dim), dtype=torch.float32)
    lse = partial.new_empty(partial.shape[:3])
    vector, (queries, chunks) = _vector(prefix_k), _queries(group, rep)
    _attend[pairs * chunks * splits.prefix + n * splits.own, kv_heads](
        q, k, v, prefix_k, prefix_v, own_k, own_v, query_slot.contiguous(), cached.contiguous(), partial, lse,
        *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        *(stride // vector for stride in prefix_k.stride()[:3]),
        *(stride for x in (prefix_v, own_k, own_v) for stride in x.stride()[:2]),
        dim**-0.5, n, pairs, group, length, chunks, *splits,
        VECTOR=vector, **_constants(rep, dim, queries, tile), **launch_options(tile.warps, tile.stages),
    )  # fmt: skip
    _merge[heads, n](
        partial, lse, query_slot.contiguous(), cached.contiguous(), out, pairs * group, splits.prefix, splits.own,
        splits.own_tiles * tile.keys,
        HEAD_DIM=dim, WIDTH=_width(dim), CHUNK=CHUNK, **launch_options(MERGE_WARPS),
    )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=(
        *("pk_pair", "pk_head", "pk_dim", "n", "pairs", "group", "length", "chunks"),
        *("prefix_splits", "prefix_tiles", "own_splits", "own_tiles"),
    )
)
def _attend(
    q, k, v, prefix_k, prefix_v, own_k, own_v, query_slot, cached, partial, lse,
    q_row, q_head, k_row, k_head, v_row, v_head, pk_pair, pk_head, pk_dim, pv_pair, pv_head,
    ok_row, ok_head, ov_row, ov_head, scale, n, pairs, group, length, chunks,
    prefix_splits, prefix_tiles, own_splits, own_tiles,
    REP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, OWN_QUERIES: tl.constexpr,
    KEYS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One split of a prefix (these come first, as they take longer), or of a row's own tokens. Strides of prefix_k are
    given in units of VECTOR, which tells the compiler that they are multiples of it.
    """
    work, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    before = pairs * chunks * prefix_splits
    splits = prefix_splits + own_splits
    if work < before:
        at = work // prefix_splits
        pair = (at // chunks).to(tl.int64)
        _onto_prefix(
            q, prefix_k + (pair * pk_pair + kv_head * pk_head) * VECTOR, pk_dim * VECTOR,
            prefix_v + pair * pv_pair + kv_head * pv_head, query_slot, partial, lse, q_row, q_head,
            scale * LOG2E, n, pair * group, group * REP, length, at % chunks * QUERIES,
            work % prefix_splits, prefix_tiles, splits,
            REP, HEAD_DIM, WIDTH, QUERIES, KEYS, VECTOR,
        )  # fmt: skip
    else:
        row = ((work - before) % n).to(tl.int64)  # first splits first: each row has that one
        _onto_own(
            q + row * q_row, k + row * k_row + kv_head * k_head, v + row * v_row + kv_head * v_head,
            own_k + row * ok_row + kv_head * ok_head, own_v + row * ov_row + kv_head * ov_head,
            partial, lse, q_head, scale * LOG2E, row, tl.load(cached + row).to(tl.int32),
            (work - before) // n, own_tiles, prefix_splits, splits,
            REP, HEAD_DIM, WIDTH, OWN_QUERIES, KEYS,
        )  # fmt: skip


@triton.jit
def _onto_prefix(
    q, prefix_k, k_dim, prefix_v, query_slot, partial, lse, q_row, q_head, scale2,
    n, first_query_slot, query_count, length, first_query, split, tiles, splits,
    REP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Queries of a pair's rows, REP per query slot, onto a split of its prefix."""
    query = first_query + tl.arange(0, QUERIES)
    row = _rows_at(query_slot, first_query_slot + query // REP, query < query_count, n, QUERIES)
    valid, head = row >= 0, tl.program_id(1) * REP + query % REP
    if tl.max(row, 0) >= 0:  # a pair may have no row left
        queries = _load(q, row.to(tl.int64) * q_row + head * q_head, valid, HEAD_DIM, WIDTH)
        dims = tl.arange(0, WIDTH)
        keys_at = prefix_k + dims[:, None] * k_dim
        readable = (length + VECTOR - 1) // VECTOR * VECTOR
        row_max = tl.full((QUERIES,), float("-inf"), tl.float32)
        row_sum = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, WIDTH), tl.float32)
        first = split * tiles * KEYS
        for start in range(first, tl.minimum(first + tiles * KEYS, length), KEYS):
            column = start + tl.arange(0, KEYS)
            mask = (column < readable)[None, :]
            if HEAD_DIM < WIDTH:
                mask &= (dims < HEAD_DIM)[:, None]
            keys = tl.load(keys_at + column[None, :], mask, 0.0)
            values = _load(prefix_v, column * HEAD_DIM, column < length, HEAD_DIM, WIDTH)
            acc, row_max, row_sum = _step(acc, row_max, row_sum, queries, keys, values, column < length, scale2)
        _store_partial(
            partial, lse, row.to(tl.int64), head, valid, split, splits, acc, row_max, row_sum, REP, HEAD_DIM, WIDTH
        )


@triton.jit
def _onto_own(
    q, k, v, own_k, own_v, partial, lse, q_head, scale2, row, count, split, tiles, prefix_splits, splits,
    REP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A row's REP queries onto a split of its own tokens; the first split starts from the new token."""
    first = split * tiles * KEYS
    if (split == 0) | (first < count):
        query = tl.arange(0, QUERIES)
        valid, head = query < REP, tl.program_id(1) * REP + query
        queries = _load(q, head * q_head, valid, HEAD_DIM, WIDTH)
        row_max = tl.full((QUERIES,), float("-inf"), tl.float32)
        row_sum = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, WIDTH), tl.float32)
        if split == 0:
            dims = tl.arange(0, WIDTH)
            key, value = tl.load(k + dims, dims < HEAD_DIM, 0.0), tl.load(v + dims, dims < HEAD_DIM, 0.0)
            tl.store(own_k + count * HEAD_DIM + dims, key, dims < HEAD_DIM)
            tl.store(own_v + count * HEAD_DIM + dims, value, dims < HEAD_DIM)
            row_max = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale2
            row_sum += 1.0
            acc += value.to(tl.float32)[None, :]
        for start in range(first, tl.minimum(first + tiles * KEYS, count), KEYS):
            column = start + tl.arange(0, KEYS)
            keys = _load(own_k, column * HEAD_DIM, column < count, HEAD_DIM, WIDTH)
            values = _load(own_v, column * HEAD_DIM, column < count, HEAD_DIM, WIDTH)
            acc, row_max, row_sum = _step(
                acc, row_max, row_sum, queries, tl.trans(keys), values, column < count, scale2
            )
        split += prefix_splits
        _store_partial(partial, lse, row, head, valid, split, splits, acc, row_max, row_sum, REP, HEAD_DIM, WIDTH)


@triton.jit
def _rows_at(query_slot, query_slots, wanted, n, QUERIES: tl.constexpr):
    """(QUERIES,) the row of each of `query_slots`, -1 where there is none or it is not `wanted`."""
    found = tl.full((QUERIES,), -1, tl.int32)
    for first in range(0, n, SEARCH):
        row = first + tl.arange(0, SEARCH)
        slots = tl.load(query_slot + row, row < n, -1)
        matches = (slots[None, :] == query_slots[:, None]) & wanted[:, None]
        found = tl.maximum(found, tl.max(tl.where(matches, row[None, :], -1), 1))
    return found


@triton.jit
def _load(base, rows, valid, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) from the offsets `rows`, zeros beyond HEAD_DIM and where not `valid`, where nan may lie."""
    dims = tl.arange(0, WIDTH)
    mask = valid[:, None]
    if HEAD_DIM < WIDTH:
        mask &= (dims < HEAD_DIM)[None, :]
    return tl.load(base + rows[:, None] + dims[None, :], mask, 0.0)


@triton.jit
def _step(acc, row_max, row_sum, queries, keys, values, visible, scale2):
    """`softmax_step` over keys (WIDTH, KEYS) and values (KEYS, WIDTH), one or more of them visible."""
    scores = tl.dot(queries, keys, input_precision=PRECISION)
    scores = tl.where(visible[None, :], scores, float("-inf"))
    return softmax_step(acc, row_max, row_sum, scores, values, scale2)


@triton.jit
def _store_partial(
    partial, lse, row, head, valid, split, splits, acc, row_max, row_sum,
    REP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Stores a split's result in (n, heads, splits): values (…, HEAD_DIM), and the base-2 logarithm of their weight."""
    dims = tl.arange(0, WIDTH)
    at = (row * (tl.num_programs(1) * REP) + head) * splits + split
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(partial + at[:, None] * HEAD_DIM + dims[None, :], acc / row_sum[:, None], mask)
    tl.store(lse + at, row_max + tl.log2(row_sum), valid)


@triton.jit(do_not_specialize=("query_slots", "prefix_splits", "own_splits", "span"))
def _merge(
    partial, lse, query_slot, cached, out, query_slots, prefix_splits, own_splits, span,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Merges a head of a row from its splits: those of its prefix, if it has one, and those of its own tokens."""
    head, row = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, WIDTH)
    start = tl.where(tl.load(query_slot + row) < query_slots, 0, prefix_splits)
    count = tl.load(cached + row).to(tl.int32)
    stop = prefix_splits + tl.maximum(tl.cdiv(count, span), 1)
    line = row.to(tl.int64) * tl.num_programs(0) + head
    at = line * (prefix_splits + own_splits)
    row_max = float("-inf")
    row_sum = 0.0
    acc = tl.zeros((WIDTH,), tl.float32)
    for first in range(start, stop, CHUNK):
        split = first + tl.arange(0, CHUNK)
        weight = tl.load(lse + at + split, split < stop, float("-inf"))
        mask = (split < stop)[:, None] & (dims < HEAD_DIM)[None, :]
        part = tl.load(partial + (at + split)[:, None] * HEAD_DIM + dims[None, :], mask, 0.0)
        new_max = tl.maximum(row_max, tl.max(weight, 0))
        weight = tl.exp2(weight - new_max)
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weight, 0)
        acc = acc * rescale + tl.sum(part * weight[:, None], 0)
        row_max = new_max
    tl.store(out + line * HEAD_DIM + dims, acc / row_sum, dims < HEAD_DIM)


def tile_of(arch: int, dtype: torch.dtype, head_dim: int) -> Tile:
    """The one table of the launcher and `shipped`: buffers of several programs fit a multiprocessor's shared memory,
    and no register is spilled.
    """
    if dtype == torch.float32:
        return Tile(16, 8, 2)
    if arch < 90 and head_dim < _width(head_dim):
        return Tile(64, 4, 2)  # with more stages the compiler stops at 128 registers a thread, and spills
    return Tile(32, 4, 3 if SHARED_MEMORY[arch] < 128 << 10 else 4)


def _vector(prefix_k: Tensor) -> int:
    """Numbers per load, 16, 4 or fewer bytes of them, from the start of any row of keys. The last ones may be beyond P
    if the row's stride leaves room and the memory does not end before.
    """
    *strides, _ = prefix_k.stride()
    sizes, size = prefix_k.shape, prefix_k.element_size()
    length = sizes[-1]
    room = prefix_k.untyped_storage().nbytes() // size - prefix_k.storage_offset()
    room -= sum((many - 1) * stride for many, stride in zip(sizes, prefix_k.stride())) + 1
    for bytes_at_once in (16, 4):
        vector = bytes_at_once // size
        aligned = all(stride % vector == 0 for stride in strides) and prefix_k.data_ptr() % bytes_at_once == 0
        if aligned and -length % vector <= room:
            return vector
    return 1


def _queries(group: int, rep: int) -> tuple[int, int]:
    """Queries of a prefix in a tile, and how many tiles they take."""
    queries = max(16, min(MAX_QUERIES, triton.next_power_of_2(group * rep)))
    return queries, triton.cdiv(group * rep, queries)


@lru_cache
def _device(device: torch.device) -> tuple[int, int]:
    """The architecture to look up in the table (of the same family, else the most frugal), and the multiprocessors;
    those of an H100 for the interpreter."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + min(properties.minor, 6 if properties.major == 8 else 0)
    return arch if arch in SHARED_MEMORY else 86, properties.multi_processor_count


def _width(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128


def _constants(rep: int, head_dim: int, queries: int, tile: Tile) -> dict[str, object]:
    return {
        "REP": rep,
        "HEAD_DIM": head_dim,
        "WIDTH": _width(head_dim),
        "QUERIES": queries,
        "OWN_QUERIES": max(16, triton.next_power_of_2(rep)),
        "KEYS": tile.keys,
    }


def shipped(arch: int) -> Iterator[Shipped]:
    """Groups of eight with four query heads a key head, as at 8B; keys of a prefix in vectors of 16 bytes, of 4, and
    one by one. Not listed: other ratios and groups, of the same tiles or smaller, other head dims (as 64, 80 or 128),
    and float16 in full (as bfloat16).
    """
    chosen = [(torch.bfloat16, dim, 8) for dim in (64, 80, 128)] + [(torch.bfloat16, 128, 2), (torch.bfloat16, 128, 1)]
    chosen += [(torch.float16, 128, 8), (torch.float32, 128, 4), (torch.float32, 128, 1)]
    for dtype, dim, vector in chosen:
        element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        tile, (queries, _) = tile_of(arch, dtype, dim), _queries(8, 4)
        constants = {**_constants(4, dim, queries, tile), "VECTOR": vector}
        kinds = dict.fromkeys(("q", "k", "v", "prefix_k", "prefix_v", "own_k", "own_v", "out"), f"*{element}")
        kinds |= {"partial": "*fp32", "lse": "*fp32", "query_slot": "*i64", "cached": "*i64", "scale": "fp32"}
        signature = {name: kinds.get(name, "i32") for name in _attend.arg_names if name not in constants}
        aligned = tuple(
            name for name in signature if name.endswith(("_row", "_head", "_pair")) and not name.startswith("pk_")
        )
        label = f"attend {element} {dim} {queries}x{tile.keys} by {vector}"
        yield Shipped(label, _attend, signature, constants, tile.warps, tile.stages, True, aligned=aligned)
        if vector >= 4:
            constants = {"HEAD_DIM": dim, "WIDTH": _width(dim), "CHUNK": CHUNK}
            signature = {name: kinds.get(name, "i32") for name in _merge.arg_names if name not in constants}
            yield Shipped(f"merge {element} {dim}", _merge, signature, constants, MERGE_WARPS)


def cost(
    n: int, pairs: int, prefix: int, own: int, heads: int, kv_heads: int, head_dim: int, itemsize: int = 2
) -> Cost:
    """n rows that have `own` tokens each, the new one apart, in a call. Bytes: keys and values of a prefix once a pair
    and those of own tokens once a row; q, k, v and the result; and k, v put into the cache. What pieces leave for the
    merge stays in the L2.
    """
    flops = 4 * n * (prefix + own + 1) * heads * head_dim
    tokens = 2 * kv_heads * (pairs * prefix + n * own + 2 * n)
    return Cost(flops, (tokens + 2 * n * heads) * head_dim * itemsize)
