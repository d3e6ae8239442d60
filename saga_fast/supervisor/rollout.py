"""Phase B: sample G completions for each of many pairs, without gradient.

The prefix of a pair is prefilled once and its keys and values are stored once, read by all G rollouts. All rows of all
pairs decode in one batch. Left out: speculative decoding, beam search, logits processors: rollouts are plain samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.pair import Question
from saga_kernels import GroupLayout, group_attention, sample_top_p

LOOK_EVERY = 16  # tokens between two looks for finished rows: each look waits for the device


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p keeps the smallest set of most likely tokens that reaches it."""

    group_size: int = 8
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 1024
    seed: int = 0


@torch.no_grad()
def rollout(
    question: Question,
    features: VisualFeatures,
    pair_ids: Tensor,
    sampling: Sampling,
    eos_token_ids: tuple[int, ...],
) -> list[list[list[int]]]:
    """Completions [pair][g] as token ids, the end token included unless `max_new_tokens` cut the answer off.

    features: of 2n images, a and b of pair 0, of pair 1, …; pair_ids: (n,) int64, unique in the run. A rollout is a
    function of (sampling.seed, pair id, g) and the weights alone: not of the batch it was drawn in.
    """
    decoder, prefix = question.decoder, question.prefix
    device, pairs, group = decoder.device, len(pair_ids), sampling.group_size
    eos = torch.tensor(eos_token_ids, device=device)
    cache = SharedPrefixCache(decoder, pairs, group, len(prefix), sampling.max_new_tokens)
    hidden = _prefill(question, features, cache)
    hidden = hidden.repeat_interleave(group, 0)
    row_ids = (pair_ids.to(device)[:, None] * group + torch.arange(group, device=device)).flatten()

    tokens = torch.zeros(pairs, group, sampling.max_new_tokens, dtype=torch.int64, device=device)
    ended = torch.zeros(pairs, group, dtype=torch.bool, device=device)
    lengths = torch.full((pairs, group), sampling.max_new_tokens, dtype=torch.int64, device=device)
    live = torch.arange(pairs, device=device)
    for step in range(sampling.max_new_tokens):
        token = sample_top_p(decoder.logits(hidden), sampling.temperature, sampling.top_p, sampling.seed, row_ids, step)
        tokens[live, :, step] = token.unflatten(0, (-1, group))
        newly = torch.isin(token, eos).unflatten(0, (-1, group)) & ~ended[live]
        lengths[live] = torch.where(newly, step + 1, lengths[live])
        ended[live] |= newly
        if step % LOOK_EVERY == LOOK_EVERY - 1:
            going = (~ended[live]).any(1).nonzero().flatten()
            if len(going) == 0:
                break
            # Dropping a pair copies the others' cache: worth it once a quarter has left.
            if len(going) <= 0.75 * len(live):
                live, token = live[going], token.unflatten(0, (-1, group))[going].flatten()
                row_ids = row_ids.unflatten(0, (-1, group))[going].flatten()
                cache.keep(going)
        if step + 1 == sampling.max_new_tokens:
            break
        positions = torch.full((3, len(token)), prefix.next_position + step, device=device)
        cache.length = step
        hidden = decoder.forward(decoder.embed(token), positions, cache.decode)
    counts = lengths.tolist()
    return [[row[:n] for row, n in zip(rows, count)] for rows, count in zip(tokens.tolist(), counts)]


def _prefill(question: Question, features: VisualFeatures, cache: SharedPrefixCache) -> Tensor:
    """Runs every pair's prefix once, fills the cache, and returns the hidden state (pairs, D) that predicts token 0."""
    decoder, prefix = question.decoder, question.prefix
    pairs, start = features.tokens.shape[0] // 2, prefix.preamble
    length = len(prefix) - start
    layout = GroupLayout([len(prefix)] * pairs, [[] for _ in range(pairs)], [length] * pairs, device=decoder.device)
    rows = prefix.visual_rows(torch.arange(pairs, device=decoder.device) * length)
    h = prefix.embed(decoder, prefix.input_ids[start:].repeat(pairs), rows, features.tokens)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = question.with_preamble(layer, k, v, pairs)
        cache.store_prefix(layer, k, v)
        return group_attention(q, k, v, layout)[0]

    deepstack = [level.flatten(0, 1).to(h.dtype) for level in features.deepstack]
    h = decoder.forward(h, prefix.positions[:, start:].repeat(1, pairs), attend, deepstack, rows)
    return h.unflatten(0, (pairs, length))[:, -1]


class SharedPrefixCache:
    """Keys and values of a decode batch: per layer one prefix a pair, read by its G rollouts, and each rollout's own.

    Prefix keys (pairs, kv_heads, head_dim, P) stand transposed for the score GEMM; own ones are
    (pairs, kv_heads, G, T, head_dim).
    """

    def __init__(self, decoder: FrozenDecoder, pairs: int, group: int, prefix: int, max_new_tokens: int) -> None:
        kv, dim = decoder.kv_heads, decoder.head_dim
        like = torch.empty(0, dtype=decoder.dtype, device=decoder.device)
        self.group, self.length = group, 0
        self.prefix_k = [like.new_empty(pairs, kv, dim, prefix) for _ in decoder.layers]
        self.prefix_v = [like.new_empty(pairs, kv, prefix, dim) for _ in decoder.layers]
        self.own_k = [like.new_empty(pairs, kv, group, max_new_tokens, dim) for _ in decoder.layers]
        self.own_v = [like.new_empty(pairs, kv, group, max_new_tokens, dim) for _ in decoder.layers]

    def store_prefix(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: (pairs·P, kv_heads, head_dim), prefixes end to end."""
        pairs = len(self.prefix_k[layer])
        self.prefix_k[layer].copy_(k.unflatten(0, (pairs, -1)).permute(0, 2, 3, 1))
        self.prefix_v[layer].copy_(v.unflatten(0, (pairs, -1)).transpose(1, 2))

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token a row: stores its k, v (rows, kv_heads, head_dim) at `length`, attends to prefix and own tokens."""
        end = self.length + 1
        own_k, own_v = self.own_k[layer], self.own_v[layer]
        own_k[:, :, :, self.length] = k.unflatten(0, (-1, self.group)).transpose(1, 2)
        own_v[:, :, :, self.length] = v.unflatten(0, (-1, self.group)).transpose(1, 2)
        kv_heads, dim = k.shape[1:]
        # (pairs, kv_heads, G, heads per kv head, head_dim)
        q = q.reshape(-1, self.group, kv_heads, q.shape[1] // kv_heads, dim).transpose(1, 2) * dim**-0.5
        onto_prefix = (q.flatten(2, 3) @ self.prefix_k[layer]).unflatten(2, q.shape[2:4])
        onto_own = q @ own_k[:, :, :, :end].transpose(-1, -2)
        p = torch.cat([onto_prefix, onto_own], -1).softmax(-1, dtype=torch.float32).to(v.dtype)
        p_prefix, p_own = p.split([onto_prefix.shape[-1], end], -1)
        o = (p_prefix.flatten(2, 3) @ self.prefix_v[layer]).unflatten(2, q.shape[2:4]) + p_own @ own_v[:, :, :, :end]
        return o.transpose(1, 2).reshape(len(k), -1, dim)

    def keep(self, pairs: Tensor) -> None:
        """Forget all pairs but these (n,) int64."""
        for tensors in (self.prefix_k, self.prefix_v, self.own_k, self.own_v):
            tensors[:] = [tensor[pairs] for tensor in tensors]
