"""`group_attention` at the 8B model's shapes: forward, backward, and backward with the anchor layer's attention.

Rivals: FlexAttention on the same mask (its block mask made beforehand); scaled_dot_product_attention on whole rollouts,
each with its own copy of the prefix; flash-attn on completions against a copy of their keys. The copies are made
beforehand, but their results must come back to the packed order (and gradients be summed over copies) in the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import Case, importable
from saga_kernels import AttentionOnto, GroupLayout, attention_onto
from saga_kernels.attention import group_attention_backward_reference, group_attention_reference
from saga_kernels.gpu.attention import cost
from saga_kernels.gpu.shipped import Cost

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PREFIX, COMPLETIONS, LENGTH = 850, 8, 700
IMAGE, IMAGES, DESCRIBED = 256, (20, 300), 36  # columns, where both images' begin, rows a rollout and image
TOLERANCE = 2e-2  # of bfloat16 probabilities and gradients

Run = Callable[[], "tuple[Tensor, ...] | Tensor"]


def cases() -> Iterator[Case]:
    for groups in (8, 1):
        yield from _cases(groups)


def _cases(groups: int) -> Iterator[Case]:
    layout = GroupLayout([PREFIX] * groups, [[LENGTH] * COMPLETIONS] * groups, device="cuda")
    q, k, v, do = (
        torch.randn(layout.tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    where, scale = layout.offsets, HEAD_DIM**-0.5
    ops = torch.ops.saga_kernels
    o, lse = ops.group_attention(q, k, v, *where, scale)
    wide = [x.float() for x in (q, k, v)]
    right = group_attention_reference(*wide, *where, scale)
    onto = _described(layout)
    right_attention = torch.zeros_like(onto.attention)
    chosen = onto.row_index, onto.first_columns
    right_gradients = group_attention_backward_reference(
        do.float(), *wide, *right, *where, scale, *chosen, right_attention
    )
    del wide
    shape = PREFIX, COMPLETIONS, LENGTH, HEADS, KV_HEADS, HEAD_DIM
    name = f"{groups} x ({PREFIX} + {COMPLETIONS} x {LENGTH})"
    rivals = _rivals(layout, groups, q, k, v, do)

    forward = {"ours": lambda: ops.group_attention(q, k, v, *where, scale)[0]}
    forward |= {rival: run for rival, (run, _) in rivals.items()}
    work = cost(*shape)
    yield Case(f"forward {name}", forward, lambda: right[0], Cost(groups * work.flops, groups * work.bytes), TOLERANCE)

    def ours() -> tuple[Tensor, ...]:
        return ops.group_attention_backward(do, q, k, v, o, lse, *where, scale, None, None, None)

    backward: dict[str, Run] = {"ours": ours} | {rival: run for rival, (_, run) in rivals.items()}
    # What must be done: five matmuls a pair of tokens, and every tensor once.
    must = Cost(groups * work.flops * 5 // 2, 2 * (4 * q.numel() + 4 * k.numel()) + 4 * lse.numel())
    yield Case(f"backward {name}", backward, lambda: right_gradients, must, TOLERANCE)

    def fused() -> tuple[Tensor, ...]:
        gradients = ops.group_attention_backward(do, q, k, v, o, lse, *where, scale, *chosen, onto.attention)
        return *gradients, onto.attention

    runs = _runs(layout)

    def gathered() -> tuple[Tensor, ...]:
        return *ours(), torch.cat([attention_onto(q, k, lse, rows, columns) for rows, columns in runs])

    both = {"ours": fused, "ours, then attention_onto": gathered}
    yield Case(f"backward and attention {name}", both, lambda: (*right_gradients, right_attention), must, TOLERANCE)


def _rows(layout: GroupLayout, group: int) -> list[int]:
    starts = [layout.completion_slice(group, g).start for g in range(COMPLETIONS)]
    return [start + LENGTH * i // DESCRIBED for start in starts for i in range(DESCRIBED)]


def _described(layout: GroupLayout) -> AttentionOnto:
    pairs = [
        (row, layout.prefix_slice(i).start + first)
        for i in range(layout.groups)
        for first in IMAGES
        for row in _rows(layout, i)
    ]
    return AttentionOnto(layout, *zip(*pairs), IMAGE)


def _runs(layout: GroupLayout) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of each call of `attention_onto`: one a group and image, as replay makes them."""
    return [
        (
            torch.tensor(_rows(layout, i), device="cuda"),
            torch.arange(first, first + IMAGE, device="cuda") + layout.prefix_slice(i).start,
        )
        for i in range(layout.groups)
        for first in IMAGES
    ]


def _rivals(
    layout: GroupLayout, groups: int, q: Tensor, k: Tensor, v: Tensor, do: Tensor
) -> dict[str, tuple[Run, Run]]:
    """By name, forward → o (tokens, heads, head_dim), and backward → dq, dk, dv, all packed."""
    rivals = {"FlexAttention": _flex(layout, q, k, v, do), "SDPA": _sdpa(groups, q, k, v, do)}
    if (flash := importable("flash_attn")) is not None:
        rivals["flash-attn varlen"] = _flash(flash.flash_attn_varlen_func, groups, q, k, v, do)
    return rivals


def _lazy(make: Callable[[], tuple[Callable[[], Tensor], list[Tensor], Tensor, Callable]]) -> tuple[Run, Run]:
    """Forward and backward of a rival, set up at the first call, so that its failure is its own figure.

    make() → (attend, its leaves, d of what attend returns, (result → packed o, gradients → packed dq, dk, dv)).
    """
    state: list = []

    def setup() -> list:
        if not state:
            attend, leaves, d_out, (packed_o, packed_gradients) = make()
            state.extend((attend, leaves, d_out, packed_o, packed_gradients, attend()))
        return state

    def forward() -> Tensor:
        attend, _, _, packed_o, *_ = setup()
        with torch.no_grad():
            return packed_o(attend())

    def backward() -> tuple[Tensor, ...]:
        _, leaves, d_out, _, packed_gradients, o = setup()
        return packed_gradients(*torch.autograd.grad(o, leaves, d_out, retain_graph=True))

    return forward, backward


def _flex(layout: GroupLayout, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Run, Run]:
    def make():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._functorch.config.donated_buffer = False  # the graph is kept, to time the backward alone
        lengths = layout.segment_offsets.diff()
        segment = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), lengths)
        home = layout.segment_prefix.long()[segment]

        def visible(batch, head, row, column):
            return (row >= column) & ((segment[row] == segment[column]) | (home[row] == segment[column]))

        mask = create_block_mask(visible, None, None, layout.tokens, layout.tokens, device="cuda", _compile=True)
        attend = torch.compile(flex_attention, dynamic=False)
        leaves = [_by_head(x)[None].requires_grad_() for x in (q, k, v)]

        def back(*gradients):
            return tuple(_by_head(x[0]) for x in gradients)

        return (
            lambda: attend(*leaves, block_mask=mask, enable_gqa=True),
            leaves,
            _by_head(do)[None],
            (lambda o: _by_head(o[0]), back),
        )

    return _lazy(make)


def _sdpa(groups: int, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Run, Run]:
    def whole(x: Tensor) -> Tensor:
        """Packed (tokens, heads, d) → (groups * G, heads, prefix + completion, d)."""
        prefix, own = _parts(x, groups)
        repeated = prefix[:, None].expand(-1, COMPLETIONS, -1, -1, -1)
        return torch.cat([repeated, own], 2).flatten(0, 1).transpose(1, 2).contiguous()

    def packed(x: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        x = x.transpose(1, 2).unflatten(0, (groups, COMPLETIONS))
        return torch.cat([combine(x[:, :, :PREFIX]), x[:, :, PREFIX:].flatten(1, 2)], 1).flatten(0, 1)

    def make():
        leaves = [whole(x).requires_grad_() for x in (q, k, v)]
        d_out = whole(do)
        d_out.unflatten(0, (groups, COMPLETIONS))[:, 1:, :, :PREFIX] = 0  # a prefix row's counts once
        return (
            lambda: F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True),
            leaves,
            d_out,
            (lambda o: packed(o, lambda p: p[:, 0]), lambda *g: tuple(packed(x, lambda p: p.sum(1)) for x in g)),
        )

    return _lazy(make)


def _flash(attend: Callable, groups: int, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Run, Run]:
    """Queries as they lie packed; the keys of a completion are a copy of its prefix's, then its own."""

    def keys(x: Tensor) -> Tensor:
        prefix, own = _parts(x, groups)
        rollouts = torch.cat([prefix[:, None].expand(-1, COMPLETIONS, -1, -1, -1), own], 2)
        return torch.cat([prefix, rollouts.flatten(1, 2)], 1).flatten(0, 1)

    def packed(x: Tensor) -> Tensor:
        x = x.unflatten(0, (groups, -1))
        rollouts = x[:, PREFIX:].unflatten(1, (COMPLETIONS, -1))
        prefix = x[:, :PREFIX] + rollouts[:, :, :PREFIX].sum(1)
        return torch.cat([prefix, rollouts[:, :, PREFIX:].flatten(1, 2)], 1).flatten(0, 1)

    def make():
        longest = PREFIX + LENGTH
        query_lengths = torch.tensor([0] + ([PREFIX] + [LENGTH] * COMPLETIONS) * groups, device="cuda")
        key_lengths = torch.tensor([0] + ([PREFIX] + [longest] * COMPLETIONS) * groups, device="cuda")
        bounds = [x.cumsum(0, dtype=torch.int32) for x in (query_lengths, key_lengths)]
        leaves = [q.clone().requires_grad_(), keys(k).requires_grad_(), keys(v).requires_grad_()]
        return (
            lambda: attend(*leaves, *bounds, PREFIX, longest, causal=True),
            leaves,
            do,
            (lambda o: o, lambda dq, dk, dv: (dq, packed(dk), packed(dv))),
        )

    return _lazy(make)


def _parts(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Packed (tokens, heads, d) → prefixes (groups, PREFIX, heads, d), completions (groups, G, LENGTH, heads, d)."""
    prefix, own = x.unflatten(0, (groups, -1)).split([PREFIX, COMPLETIONS * LENGTH], 1)
    return prefix, own.unflatten(1, (COMPLETIONS, LENGTH))


def _by_head(x: Tensor) -> Tensor:
    """(tokens, heads, d) as (heads, tokens, d), and back; no copy."""
    return x.detach().transpose(0, 1)
