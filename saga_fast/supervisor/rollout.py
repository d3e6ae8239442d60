"""Phase B's engine: sample G completions for each of many pairs, without gradient, by continuous batching.

A pair waits until one of the engine's slots is free. Its prefix is then prefilled once, and all its G rollouts read the
one copy of its keys and values. All rollouts of all pairs in slots decode in one batch; a finished rollout leaves it,
and a pair whose rollouts have all finished frees its slot. The host synchronises with the device once every
`SYNC_EVERY` tokens. Left out: speculative decoding, beam search, logits processors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.bidirectional_images import Attention, add_bidirectional
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.graphs import Graphs
from saga_fast.supervisor.pair import PrefixCache
from saga_kernels import GroupLayout, decode_attention, group_attention, sample_top_p

SYNC_EVERY = 16  # decode steps between two checks for finished rows: each check waits for the device
TRACKED_ROWS = 8  # rows whose log π is recorded at sampling, to compare with that of the replay
PREFILL_TOKENS = 4096  # tokens of prefixes prefilled in one pass; one prefix at least


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p keeps the smallest set of most likely tokens that reaches it."""

    group_size: int = 8
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 1024
    seed: int = 0

    @property
    def capacity(self) -> int:
        """Tokens of its own in a rollout's cache, a multiple of SYNC_EVERY; the prefill samples the first token."""
        return max(1, -(-(self.max_new_tokens - 1) // SYNC_EVERY)) * SYNC_EVERY


@dataclass
class PairRollouts:
    """The rollouts of a pair. completions [g]: token ids, the end token included unless `max_new_tokens` cut it off.

    broken: a rollout met logits that are not finite; the completions are incomplete then.
    log_probs: (g, position) → log π at sampling, of some tokens; at the sampling temperature, without the top-p cut.
    """

    pair_id: int
    completions: list[list[int]]
    broken: bool = False
    log_probs: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))


@dataclass(eq=False)
class _Row:
    """An unfinished rollout: all of its tokens but the last are in the cache."""

    pair: PairRollouts
    g: int

    @property
    def tokens(self) -> list[int]:
        return self.pair.completions[self.g]

    @property
    def cached(self) -> int:
        return max(0, len(self.tokens) - 1)


class RolloutEngine:
    """Rolls out up to `slots` pairs at a time: `admit` them, `advance` by SYNC_EVERY tokens, `drop` those not needed.

    A rollout is a function of (sampling.seed, pair id, g) and the weights alone, up to the rounding of matrix products:
    not of its neighbours, the number of slots or the order of admission.

    Keys and values are in blocks that are allocated once: one prefix per slot, (slots, kv_heads, head_dim, P) with the
    keys transposed for the score GEMM; and each rollout's own, (slots·G, kv_heads, capacity, head_dim). Pairs and
    rollouts fill them from the front, so that a batch is a view: when one leaves, the last one takes its place.
    """

    def __init__(
        self, prefix_cache: PrefixCache, sampling: Sampling, eos_token_ids: Collection[int], slots: int
    ) -> None:
        self.prefix_cache, self.sampling, self.slots = prefix_cache, sampling, slots
        self.eos = frozenset(eos_token_ids)
        decoder, max_rows = prefix_cache.decoder, slots * sampling.group_size
        kv, dim, length = decoder.kv_heads, decoder.head_dim, len(prefix_cache.prefix)

        def blocks(*shape: int) -> list[Tensor]:
            return [torch.empty(*shape, dtype=decoder.dtype, device=decoder.device) for _ in decoder.layers]

        self.prefix_k = [block[..., :length] for block in blocks(slots, kv, dim, _pitch(decoder, length))]
        self.prefix_v = blocks(slots, kv, length, dim)
        self.own_k, self.own_v = (blocks(max_rows, kv, sampling.capacity, dim) for _ in range(2))
        self.pairs: list[PairRollouts] = []
        self.rows: list[_Row] = []
        # What a decode step reads and writes, per row: the input token, the query slot (slot·G + g), the row's id,
        # which is unique in the run, and the number of cached tokens.
        self.token, self.query_slot, self.row_id, self.cached = torch.zeros(
            4, max_rows, dtype=torch.int64, device=decoder.device
        )
        self.sampled = torch.zeros(max_rows, SYNC_EVERY + 1, dtype=torch.int64, device=decoder.device)
        self.tracked_log_probs = torch.zeros(min(TRACKED_ROWS, max_rows), SYNC_EVERY + 1, device=decoder.device)
        self.column = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        self.graphs = Graphs() if decoder.device.type == "cuda" else None

    @staticmethod
    def slot_bytes(decoder: FrozenDecoder, prefix: int, sampling: Sampling) -> int:
        """Bytes of a slot: keys and values of a prefix and of G rollouts, in all layers."""
        tokens = _pitch(decoder, prefix) + prefix + 2 * sampling.group_size * sampling.capacity
        return decoder.depth * decoder.kv_heads * decoder.head_dim * tokens * decoder.dtype.itemsize

    @property
    def free_slots(self) -> int:
        """Number of slots without a pair."""
        return self.slots - len(self.pairs)

    @property
    def pair_ids(self) -> set[int]:
        """Ids of the pairs in slots."""
        return {pair.pair_id for pair in self.pairs}

    @torch.no_grad()
    def admit(self, features: VisualFeatures, pair_ids: Sequence[int]) -> None:
        """Takes in n pairs, at most `free_slots`: prefills their prefixes and samples the first token of each rollout.

        features: of 2n images, a and b of pair 0, of pair 1, …; pair_ids: n, unique in the run.
        """
        at_once = max(1, PREFILL_TOKENS // len(self.prefix_cache.prefix))
        for first in range(0, len(pair_ids), at_once):
            ids = pair_ids[first : first + at_once]
            self._admit(features.map(itemgetter(slice(2 * first, 2 * (first + len(ids))))), ids)

    def _admit(self, features: VisualFeatures, pair_ids: Sequence[int]) -> None:
        group, device = self.sampling.group_size, self.prefix_cache.decoder.device
        hidden = self._prefill(features, slice(len(self.pairs), len(self.pairs) + len(pair_ids)))
        row_id = torch.tensor([i * group + g for i in pair_ids for g in range(group)], device=device)
        new_rows = slice(len(self.rows), len(self.rows) + len(row_id))
        logits = self.prefix_cache.decoder.logits(hidden).repeat_interleave(group, 0)
        self.token[new_rows] = self._sample(logits, row_id, torch.zeros_like(row_id))
        for block in self.own_v:  # a leftover nan times a weight of zero would be nan
            block[new_rows] = 0
        for i in pair_ids:
            self.pairs.append(pair := PairRollouts(i, [[] for _ in range(group)]))
            self.rows += [_Row(pair, g) for g in range(group)]

    def _prefill(self, features: VisualFeatures, slots: slice) -> Tensor:
        """Prefills prefixes into `slots`; returns the hidden states (pairs, D) that predict the first tokens."""
        decoder, prefix = self.prefix_cache.decoder, self.prefix_cache.prefix
        pairs, start = slots.stop - slots.start, prefix.static_length
        length = len(prefix) - start
        layout, last = (
            GroupLayout([len(prefix)] * pairs, [[] for _ in range(pairs)], [rows] * pairs, device=decoder.device)
            for rows in (length, 1)
        )
        visual = prefix.visual_rows(torch.arange(pairs, device=decoder.device) * length)
        h = prefix.input_embeddings(decoder, prefix.input_ids[start:].repeat(pairs), visual, features.tokens)
        images = prefix.images_of(pairs, start)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = self.prefix_cache.with_static_prefix(layer, k, v, pairs)
            self.prefix_k[layer][slots] = k.unflatten(0, (pairs, -1)).permute(0, 2, 3, 1)
            self.prefix_v[layer][slots] = v.unflatten(0, (pairs, -1)).transpose(1, 2)
            if layer == decoder.depth - 1:
                return group_attention(q, k, v, last)[0]
            o, lse = group_attention(q, k, v, layout)
            if images is not None:
                add_bidirectional(Attention(q, k, v, o, lse), images)
            return o

        deepstack = [level.flatten(0, 1).to(h.dtype) for level in features.deepstack]
        output_rows = torch.arange(1, pairs + 1, device=decoder.device) * length - 1
        return decoder.forward(h, prefix.positions[:, start:].repeat(1, pairs), attend, deepstack, visual, output_rows)

    @torch.no_grad()
    def advance(self) -> list[PairRollouts]:
        """Decodes SYNC_EVERY tokens of every row. Returns the finished pairs, in order of id, which leave their
        slots."""
        if not self.rows:
            return []
        group, rows, device = self.sampling.group_size, len(self.rows), self.token.device
        slot = {pair.pair_id: i for i, pair in enumerate(self.pairs)}
        state = [
            (slot[row.pair.pair_id] * group + row.g, row.pair.pair_id * group + row.g, row.cached) for row in self.rows
        ]
        n, pairs, end = rows, len(self.pairs), max(cached for _, _, cached in state) + SYNC_EVERY
        if self.graphs is not None:  # few shapes of graphs: surplus rows and slots are computed and ignored
            n, pairs = _bucket(n, len(self.token)), _bucket(pairs, self.slots)
            end = _bucket(end, self.sampling.capacity)
        state += [(len(self.token), 0, 0)] * (n - rows)  # a query slot that no row reads
        for values, buffer in zip(torch.tensor(state).T, (self.query_slot, self.row_id, self.cached)):
            buffer[:n] = values.to(device, non_blocking=True)
        self.sampled[:n, 0] = self.token[:n]
        self.column.fill_(1)
        self._decode_steps(n, pairs, end)
        counts_before = [len(row.tokens) for row in self.rows]
        for row, tokens in zip(self.rows, self.sampled[:rows].tolist()):  # waits for the device
            self._append(row, tokens if not row.tokens else tokens[1:])
        for row, count_before, values in zip(self.rows, counts_before, self.tracked_log_probs.tolist()):
            positions = range(max(1, count_before), len(row.tokens))
            row.pair.log_probs |= {(row.g, position): value for position, value in zip(positions, values[1:])}
        return self._remove({row for row in self.rows if self._ended(row)})

    def _append(self, row: _Row, tokens: list[int]) -> None:
        """Appends sampled tokens up to the end token, the limit, or a -1, which stands for logits that are not
        finite."""
        for token in tokens:
            if self._ended(row):
                return
            if token < 0:
                row.pair.broken = True
                return
            row.tokens.append(token)

    def _ended(self, row: _Row) -> bool:
        """Whether a rollout is finished; those of a broken pair are."""
        limit = self.sampling.max_new_tokens
        return row.pair.broken or len(row.tokens) >= limit or bool(row.tokens) and row.tokens[-1] in self.eos

    def run(self, features: VisualFeatures, pair_ids: Tensor) -> list[list[list[int]]]:
        """Completions [pair][g] of n pairs, however few the slots; features: of 2n images; pair_ids: (n,) int64.

        Raises ValueError where logits are not finite.
        """
        ids: list[int] = pair_ids.tolist()
        done: dict[int, PairRollouts] = {}
        while len(done) < len(ids):
            admitted = len(done) + len(self.pairs)
            taken = range(admitted, min(admitted + self.free_slots, len(ids)))
            images = torch.arange(2 * taken.start, 2 * taken.stop, device=features.tokens.device)
            self.admit(features.select(images), [ids[i] for i in taken])
            done |= {pair.pair_id: pair for pair in self.advance()}
        if broken := [i for i in ids if done[i].broken]:
            raise ValueError(f"rollouts of pairs {broken} met logits that are not finite")
        return [done[i].completions for i in ids]

    def drop(self, pair_ids: Collection[int]) -> list[PairRollouts]:
        """Stops the rollouts of those of these pairs that are in a slot; returns them, unfinished."""
        return self._remove({row for row in self.rows if row.pair.pair_id in pair_ids})

    def _remove(self, leaving: set[_Row]) -> list[PairRollouts]:
        """Removes rows, and pairs without rows, moving the last ones into their places. Returns the removed pairs."""
        for place in reversed(range(len(self.rows))):
            if self.rows[place] in leaving:
                last = self.rows.pop()
                if place < len(self.rows):
                    self.rows[place] = last
                    self.token[place] = self.token[len(self.rows)]
                    for block in (*self.own_k, *self.own_v):
                        block[place] = block[len(self.rows)]
        staying, done = {row.pair.pair_id for row in self.rows}, []
        for slot in reversed(range(len(self.pairs))):
            if self.pairs[slot].pair_id not in staying:
                done.append(self.pairs[slot])
                last_pair = self.pairs.pop()
                if slot < len(self.pairs):
                    self.pairs[slot] = last_pair
                    for block in (*self.prefix_k, *self.prefix_v):
                        block[slot] = block[len(self.pairs)]
        return sorted(done, key=lambda pair: pair.pair_id)

    def _decode_steps(self, n: int, pairs: int, end: int) -> None:
        """SYNC_EVERY decode steps; on a GPU by a CUDA graph per shape."""
        step = partial(self._decode_step, n, pairs, end)
        if self.graphs is not None:
            self.graphs.run((n, pairs, end), step, SYNC_EVERY)
        else:
            for _ in range(SYNC_EVERY):
                step()

    def _decode_step(self, n: int, pairs: int, end: int) -> None:
        """One token of the first n rows, of the first `pairs` slots; every row has fewer than `end` cached tokens.

        All that changes from step to step is in the engine's tensors, and nothing waits for the device.
        """
        decoder, prefix = self.prefix_cache.decoder, self.prefix_cache.prefix
        query_slot, cached = self.query_slot[:n], self.cached[:n]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prefixes = self.prefix_k[layer][:pairs], self.prefix_v[layer][:pairs]
            own = self.own_k[layer][:n, :, :end], self.own_v[layer][:n, :, :end]
            return decode_attention(q, k, v, *prefixes, *own, query_slot, cached, self.sampling.group_size)

        embedded = decoder.embed_tokens(self.token[:n].clamp_min(0))  # -1 has no embedding
        h = decoder.forward(embedded, (prefix.next_position + cached).expand(3, -1), attend)
        cached += 1
        logits = decoder.logits(h)
        token = self._sample(logits, self.row_id[:n], cached)
        if self.sampling.temperature > 0:
            tracked = slice(min(n, len(self.tracked_log_probs)))
            log_probs = (logits[tracked].float() / self.sampling.temperature).log_softmax(-1)
            chosen = log_probs.gather(1, token[tracked, None].clamp_min(0))
            self.tracked_log_probs[tracked].index_copy_(1, self.column, chosen)
        self.sampled[:n].index_copy_(1, self.column, token[:, None])
        self.column += 1
        self.token[:n] = token

    def _sample(self, logits: Tensor, row_id: Tensor, step: Tensor) -> Tensor:
        sampling = self.sampling
        return sample_top_p(logits, sampling.temperature, sampling.top_p, sampling.seed, row_id, step)


def _pitch(decoder: FrozenDecoder, length: int) -> int:
    """Stride between rows of `length` transposed keys: a multiple of 16 on a GPU, for vector loads; dense on a CPU."""
    return -(-length // 16) * 16 if decoder.device.type == "cuda" else length


def _bucket(size: int, limit: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, …, and no more than `limit`."""
    power = 1 << max(0, size - 1).bit_length()
    return min(limit, power * 3 // 4 if size <= power * 3 // 4 else power)


def rollout_pairs(
    prefix_cache: PrefixCache,
    features: VisualFeatures,
    pair_ids: Tensor,
    sampling: Sampling,
    eos_token_ids: Collection[int],
    slots: int = 16,
) -> list[list[list[int]]]:
    """Completions [pair][g] by an engine of up to `slots` slots, see `RolloutEngine.run`."""
    return RolloutEngine(prefix_cache, sampling, eos_token_ids, min(slots, len(pair_ids))).run(features, pair_ids)
