"""Phase C: the policy gradient of buffered groups, from the completions' log-probabilities back into the visual tokens.

Whole groups (one prefix, then its G completions) lie end to end in one packed sequence, so a prefix is computed once,
not G times. Only rows that predict a generated token meet the head; the gradient into them comes out of the same pass
as the log-probabilities, as every token's coefficient is known by then. Left out: importance ratio, clip, reference
model, KL to it: one on-policy update needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.pair import PairPrefix, Question
from saga_kernels import GroupLayout, attention_onto, group_attention, token_logprob


@dataclass(frozen=True)
class Group:
    """One pair's buffered rollouts.

    completions: G lists of token ids. coefficients: G tensors (T_g,), the weight of each token's log π in the loss:
    -A_g / |T| for L_GRPO. described: for rollouts whose attention is wanted, g → positions in the completion of the
    tokens that describe image a, and image b.
    """

    completions: Sequence[Sequence[int]]
    coefficients: Sequence[Tensor]
    described: dict[int, tuple[Sequence[int], Sequence[int]]]


class AnchorAttention(NamedTuple):
    """Head-averaged attention (described tokens, N) at the anchor layer, onto one image's tokens; not renormalised."""

    group: int
    rollout: int
    image: int
    weights: Tensor


class Replay(NamedTuple):
    """loss: () Σ coefficient · log π. log_probs [group][g]: (T_g,) fp32. attention: one entry a described image."""

    loss: Tensor
    log_probs: list[list[Tensor]]
    attention: list[AnchorAttention]


def replay(
    question: Question,
    features: VisualFeatures,
    groups: Sequence[Group],
    temperature: float,
    anchor_layer: int,
    token_budget: int = 1 << 16,
    recompute: bool = False,
) -> Replay:
    """Teacher-forces `groups` and adds d loss / d features to the `.grad` of `features`, where they require it.

    features: of 2n images, a and b of group 0, of group 1, …; leaves, so that each pack's backward ends there.
    token_budget: packed tokens that stand in memory at once (no group is split). recompute: keep only layer inputs.
    """
    decoder, prefix = question.decoder, question.prefix
    loss, log_probs, attention = torch.zeros((), device=decoder.device), [], []
    for first, last in _packs(groups, len(prefix), token_budget):
        pack = VisualFeatures(*_slice(features, 2 * first, 2 * last))
        part = _replay_pack(decoder, prefix, pack, groups[first:last], temperature, anchor_layer, recompute)
        loss = loss + part.loss
        log_probs += part.log_probs
        attention += [entry._replace(group=entry.group + first) for entry in part.attention]
    return Replay(loss, log_probs, attention)


def _slice(features: VisualFeatures, start: int, end: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    return features.tokens[start:end], tuple(level[start:end] for level in features.deepstack)


def _packs(groups: Sequence[Group], prefix: int, token_budget: int) -> Iterator[tuple[int, int]]:
    first, packed = 0, 0
    for i, group in enumerate(groups):
        size = prefix + sum(map(len, group.completions))
        if i > first and packed + size > token_budget:
            yield first, i
            first, packed = i, 0
        packed += size
    if first < len(groups):
        yield first, len(groups)


def _replay_pack(
    decoder: FrozenDecoder,
    prefix: PairPrefix,
    features: VisualFeatures,
    groups: Sequence[Group],
    temperature: float,
    anchor_layer: int,
    recompute: bool,
) -> Replay:
    device = decoder.device
    lengths = [[len(completion) for completion in group.completions] for group in groups]
    layout = GroupLayout([len(prefix)] * len(groups), lengths, device=device)
    input_ids, positions, rows = _pack(prefix, groups, layout)
    starts = torch.tensor([layout.prefix_slice(i).start for i in range(len(groups))], device=device)
    visual = prefix.visual_rows(starts + prefix.preamble)
    attention: list[AnchorAttention] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = group_attention(q, k, v, layout)
        if layer == anchor_layer and not attention:
            attention.extend(_anchor_attention(prefix, groups, layout, q.detach(), k.detach(), lse.detach()))
        return o

    with torch.set_grad_enabled(features.tokens.requires_grad):
        h = prefix.embed(decoder, input_ids, visual, features.tokens)
        deepstack = [level.flatten(0, 1).to(h.dtype) for level in features.deepstack]
        h = decoder.forward(h, positions, attend, deepstack, visual, recompute)[rows]
    targets = torch.tensor([token for group in groups for c in group.completions for token in c], device=device)
    coefficients = torch.cat([c for group in groups for c in group.coefficients]).to(device)
    log_probs, dh = token_logprob(h.detach(), decoder.dense_head(), targets, coefficients, temperature)
    if h.requires_grad:
        h.backward(dh)
    counts = [count for group in lengths for count in group]
    each = iter(log_probs.split(counts))
    return Replay(coefficients @ log_probs, [[next(each) for _ in group] for group in lengths], attention)


def _pack(prefix: PairPrefix, groups: Sequence[Group], layout: GroupLayout) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids (tokens,), positions (3, tokens), and the rows (generated,) that predict each generated token."""
    device = prefix.input_ids.device
    input_ids, positions, rows = [], [], []
    for i, group in enumerate(groups):
        input_ids.append(prefix.input_ids)
        positions.append(prefix.positions)
        last = torch.tensor([layout.prefix_slice(i).stop - 1], device=device)
        for g, completion in enumerate(group.completions):
            at = layout.completion_slice(i, g)
            input_ids.append(torch.tensor(completion, device=device))
            positions.append(torch.arange(len(completion), device=device).expand(3, -1) + prefix.next_position)
            rows += [last, torch.arange(at.start, at.stop - 1, device=device)]
    return torch.cat(input_ids), torch.cat(positions, 1), torch.cat(rows)


def _anchor_attention(
    prefix: PairPrefix, groups: Sequence[Group], layout: GroupLayout, q: Tensor, k: Tensor, lse: Tensor
) -> Iterator[AnchorAttention]:
    """Per group and image one op over the rows of all its rollouts, split by rollout."""
    for i, group in enumerate(groups):
        for image in (0, 1):
            columns = prefix.images[image] + layout.prefix_slice(i).start
            rows = [
                torch.tensor(spans[image], dtype=torch.int64, device=q.device) + layout.completion_slice(i, g).start
                for g, spans in group.described.items()
            ]
            if rows:
                weights = attention_onto(q, k, lse, torch.cat(rows), columns).split([len(row) for row in rows])
                yield from (AnchorAttention(i, g, image, part) for g, part in zip(group.described, weights))
