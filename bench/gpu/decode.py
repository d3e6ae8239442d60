"""`decode_attention` at the shapes of Qwen3-VL-8B: 8, 64 and 128 rows, eight to a prefix of 850, one layer of a step.

Rivals: the reference in PyTorch; and scaled_dot_product_attention over one static cache a row that holds its prefix
again and its own tokens behind it, masked beyond them, as a careful user would write it: with enable_gqa, or with the
query heads of a key head as queries. That reads the prefix eight times as often; building those caches costs nothing
here. Every call writes the same token to the same place, so it can be called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import Case, widened
from saga_kernels import decode_attention
from saga_kernels.decode import decode_attention_reference
from saga_kernels.gpu.decode import cost

HEADS, KV_HEADS, DIM, GROUP, PREFIX, CAPACITY = 32, 8, 128, 8, 850, 1024
ALIGNED = -(-PREFIX // 16) * 16  # as the engine lays out keys of a prefix
TOLERANCE = 1e-2


def cases() -> Iterator[Case]:
    for rows in (8, 64, 128):
        for own, end in ((350, 384), (700, 768)):
            pairs = rows // GROUP

            def draw(*shape: int) -> Tensor:
                return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

            qkv = draw(rows, HEADS + 2 * KV_HEADS, DIM)
            prefix_k = draw(pairs, KV_HEADS, DIM, ALIGNED)[..., :PREFIX]
            prefix_v = draw(pairs, KV_HEADS, PREFIX, DIM)
            caches = (draw(rows, KV_HEADS, CAPACITY, DIM)[:, :, :end] for _ in range(2))
            inputs = *qkv.split((HEADS, KV_HEADS, KV_HEADS), 1), prefix_k, prefix_v, *caches
            query_slot = torch.randperm(rows, device="cuda")
            cached = torch.full((rows,), own, device="cuda")
            work = cost(rows, pairs, PREFIX, own, HEADS, KV_HEADS, DIM)
            name = f"{rows} rows, {own} tokens each"
            runs, reference = _runs(*inputs, query_slot, cached), widened(_reference(query_slot, cached))
            yield Case(name, runs, reference, work, TOLERANCE, inputs, graph=True)


def _reference(query_slot: Tensor, cached: Tensor) -> Callable[..., Tensor]:
    return lambda *inputs: decode_attention_reference(*inputs, query_slot, cached, GROUP)


def _runs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    query_slot: Tensor,
    cached: Tensor,
) -> dict[str, Callable[..., Tensor]]:
    pair, row = query_slot // GROUP, torch.arange(len(query_slot), device=query_slot.device)
    spare = -(PREFIX + own_k.shape[2]) % 16  # masks should be of an even length
    keys = F.pad(torch.cat([prefix_k[pair].transpose(2, 3), own_k], 2), (0, 0, 0, spare))
    values = F.pad(torch.cat([prefix_v[pair], own_v], 2), (0, 0, 0, spare))
    place = PREFIX + cached
    seen = (torch.arange(keys.shape[2], device=query_slot.device) <= place[:, None])[:, None, None]

    def grouped(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        keys[row, :, place], values[row, :, place] = k, v
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, seen, enable_gqa=True)[:, :, 0]

    def folded(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        keys[row, :, place], values[row, :, place] = k, v
        mask = seen.expand(-1, KV_HEADS, HEADS // KV_HEADS, -1)
        return F.scaled_dot_product_attention(q.unflatten(1, (KV_HEADS, -1)), keys, values, mask).flatten(1, 2)

    return {
        "ours": lambda *inputs: decode_attention(*inputs, query_slot, cached, GROUP),
        "PyTorch": _reference(query_slot, cached),
        "SDPA, enable_gqa": grouped,
        "SDPA, heads as queries": folded,
    }
