"""Phase C: the policy gradient of buffered groups, from the completions' log-probabilities back into the visual tokens.

Groups (one prefix, then its G completions) are packed end to end in one sequence, so a prefix is computed once, not G
times. A group longer than the token budget is split into slices: first its prefix, then a few completions at a time
against the prefix's keys and values, whose gradients are summed, and the prefix's backward pass last. Results are the
same. The head is applied only to rows that predict a generated token; their gradient comes out of the same pass as the
log-probabilities, as every token's coefficient is known. Left out: importance ratio, clip, reference model and KL to
it, which one on-policy update does not need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.bidirectional_images import ImageRows
from saga_fast.supervisor.frozen_pass import (
    FrozenPass,
    KeysValues,
    Observe,
    PassRows,
    PastKV,
    Recompute,
    WeightBuffers,
)
from saga_fast.supervisor.pair import PrefixCache
from saga_kernels import GroupLayout, attention_onto, token_logprob


@dataclass(frozen=True)
class Group:
    """One pair's buffered rollouts.

    completions: G lists of token ids. coefficients: G tensors (T_g,), the weight of each token's log π in the loss:
    -A_g / |T| for L_GRPO. attribute_token_positions: for rollouts whose attention is returned, g → positions in the
    completion of the tokens that describe image a, and image b.
    """

    completions: Sequence[Sequence[int]]
    coefficients: Sequence[Tensor]
    attribute_token_positions: Mapping[int, tuple[Sequence[int], Sequence[int]]]


class AnchorAttention(NamedTuple):
    """weights: (attribute tokens, N), head-averaged attention at the anchor layer onto one image's tokens; rows sum to
    less than 1. group, rollout, image: indices of these."""

    group: int
    rollout: int
    image: int
    weights: Tensor


class ReplayResult(NamedTuple):
    """loss: () Σ coefficient · log π. log_probs [group][g]: (T_g,) fp32. attention: one entry per image described.
    gradients: the `.grad` of each level of the features; none where they require none."""

    loss: Tensor
    log_probs: list[list[Tensor]]
    attention: list[AnchorAttention]
    gradients: list[Tensor]


@dataclass(frozen=True)
class Plan:
    """How a replay trades memory for time; results do not depend on it.

    token_budget: packed tokens per pass; a longer group is split into slices of completions. recompute: policy of whole
    groups and of slices. prefix_recompute: policy of a prefix whose activations are kept while its slices are replayed.
    resident: whether the decoder keeps dense layers, see `FrozenDecoder.reside`.
    """

    token_budget: int = 1 << 16
    recompute: Recompute = "none"
    prefix_recompute: Recompute = "none"
    resident: bool = False

    def __str__(self) -> str:
        """The trainer's flags for this plan."""
        resident = "on" if self.resident else "off"
        return (
            f"--rollout.token-budget {self.token_budget} --rollout.recompute {self.recompute} "
            f"--rollout.prefix-recompute {self.prefix_recompute} --supervisor.resident {resident}"
        )


WHOLE = Plan()


def replay_groups(
    prefix_cache: PrefixCache,
    features: VisualFeatures,
    groups: Sequence[Group],
    temperature: float,
    anchor_layer: int,
    plan: Plan = WHOLE,
) -> ReplayResult:
    """Teacher-forces `groups` and adds d loss / d features to the `.grad` of `features`, where they require it.

    features: leaves, of 2n images: a and b of group 0, of group 1, …
    """
    run = _ReplayPass(prefix_cache, features, groups, temperature, anchor_layer, plan)
    sizes = [
        len(prefix_cache.prefix) - prefix_cache.prefix.static_length + sum(map(len, group.completions))
        for group in groups
    ]
    for pack in _largest_first(sizes, plan.token_budget):
        if sum(sizes[i] for i in pack) <= plan.token_budget:
            run.whole(pack)
        else:
            run.sliced(pack[0])
    log_probs = [[run.log_probs[i, g] for g in range(len(group.completions))] for i, group in enumerate(groups)]
    loss = torch.zeros((), device=prefix_cache.decoder.device)
    for group, found in zip(groups, log_probs):
        for coefficients, log_prob in zip(group.coefficients, found):
            loss = loss + coefficients.to(log_prob) @ log_prob
    return ReplayResult(loss, log_probs, sorted(run.attention, key=lambda entry: entry[:3]), run.gradients)


def _packs(sizes: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices of consecutive items of `sizes`, packed up to the budget; a larger item is alone in its pack."""
    pack: list[int] = []
    for i, size in enumerate(sizes):
        if pack and sum(sizes[j] for j in pack) + size > token_budget:
            yield pack
            pack = []
        pack.append(i)
    if pack:
        yield pack


def _largest_first(sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """`_packs`, largest first, so that the memory which the allocator keeps of the first suffices for the others."""
    return sorted(_packs(sizes, token_budget), key=lambda pack: -sum(sizes[i] for i in pack))


class _ReplayPass:
    """State of one call of `replay_groups`: its arguments, and log-probabilities and attention so far."""

    def __init__(
        self,
        prefix_cache: PrefixCache,
        features: VisualFeatures,
        groups: Sequence[Group],
        temperature: float,
        anchor_layer: int,
        plan: Plan,
    ) -> None:
        self.prefix_cache, self.features, self.groups, self.plan = prefix_cache, features, groups, plan
        self.temperature, self.anchor_layer = temperature, anchor_layer
        self.decoder, self.prefix, self.device = prefix_cache.decoder, prefix_cache.prefix, prefix_cache.decoder.device
        self.weight_buffers, self.head = WeightBuffers(self.decoder), self.decoder.dense_head()
        self.needs_gradient = features.tokens.requires_grad
        self.log_probs: dict[tuple[int, int], Tensor] = {}
        self.attention: list[AnchorAttention] = []
        self.gradients: list[Tensor] = []
        for leaf in features.levels if self.needs_gradient else ():
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            self.gradients.append(leaf.grad)

    @torch.no_grad()
    def whole(self, pack: Sequence[int]) -> None:
        """Neighbouring groups in one packed sequence."""
        groups, prefix, count = [self.groups[i] for i in pack], self.prefix, len(pack)
        lengths, length = [[len(c) for c in group.completions] for group in groups], [len(prefix)] * count
        rest = len(prefix) - prefix.static_length
        layout = GroupLayout(length, lengths, [rest] * count, self.device)
        last = GroupLayout(length, lengths, [1] * count, self.device)
        # The last layer computes a prefix's last row and the completions after it.
        ends = [layout.completion_queries(j, len(lengths[j]) - 1).stop for j in range(count)]
        output_rows = torch.cat([torch.arange(layout.prefix_queries(j).stop - 1, end) for j, end in enumerate(ends)])
        ids, positions = [], []
        for group in groups:
            ids += [prefix.input_ids[prefix.static_length :], *map(self._ids, group.completions)]
            positions += [prefix.positions[:, prefix.static_length :], *map(self._positions, group.completions)]
        visual = prefix.visual_rows(
            torch.tensor([layout.prefix_queries(j).start for j in range(count)], device=self.device)
        )
        images = slice(2 * pack[0], 2 * pack[-1] + 2)
        h = prefix.input_embeddings(self.decoder, torch.cat(ids), visual, self.features.tokens[images])
        pass_rows = PassRows(
            layout, torch.cat(positions, 1), output_rows.to(self.device), last, self._bidirectional(visual, layout)
        )
        run = self._pass(pass_rows, self._static_prefix_kv(count), self.plan.recompute)
        members = [(i, g, j, g) for j, i in enumerate(pack) for g in range(len(lengths[j]))]
        hidden = run.forward(h, self._levels(images), visual, self._observer(members), self.needs_gradient)
        rows, targets = [], []
        for i, g, j, _ in members:
            at = last.completion_queries(j, g)
            rows += [last.prefix_queries(j).start, *range(at.start, at.stop - 1)]
            targets.append(((i, g), slice(None)))
        d = self._log_probs_and_gradient(hidden, rows, targets)
        if self.needs_gradient:
            self._add_gradients(images, *run.backward(d, visual))

    @torch.no_grad()
    def sliced(self, i: int) -> None:
        """One group: its prefix, then slices of its completions against the prefix's keys and values.

        A completion is never split, so the longest one is a lower bound of the memory.
        """
        prefix, completions = self.prefix, self.groups[i].completions
        rest = len(prefix) - prefix.static_length
        visual = prefix.visual_rows(torch.zeros(1, dtype=torch.int64, device=self.device))
        images = slice(2 * i, 2 * i + 2)
        h = prefix.input_embeddings(
            self.decoder, prefix.input_ids[prefix.static_length :], visual, self.features.tokens[images]
        )
        layout, last = (GroupLayout([len(prefix)], [[]], [queries], self.device) for queries in (rest, 1))
        last_row, positions = torch.tensor([rest - 1], device=self.device), prefix.positions[:, prefix.static_length :]
        prefix_rows = PassRows(layout, positions, last_row, last, self._bidirectional(visual, layout))
        prefix_pass = self._pass(prefix_rows, self._static_prefix_kv(1), self.plan.prefix_recompute, save_kv=True)
        hidden = prefix_pass.forward(h, self._levels(images), visual, save_for_backward=self.needs_gradient)
        members = range(len(completions))
        d = self._log_probs_and_gradient(hidden, [0] * len(completions), [((i, g), slice(0, 1)) for g in members])
        # In float32, whatever the decoder's dtype: a sum over many slices would lose precision in bf16.
        wide = torch.promote_types(self.decoder.dtype, torch.float32)
        gradient: KeysValues = []
        if self.needs_gradient:
            gradient = [
                (torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)) for k, v in prefix_pass.saved_kv
            ]
        for part in _largest_first([len(c) for c in completions], self.plan.token_budget):
            chosen = [completions[g] for g in part]
            layout = GroupLayout([len(prefix)], [[len(c) for c in chosen]], [0], self.device)
            past_kv = PastKV(prefix_pass.saved_kv.__getitem__, gradient if self.needs_gradient else None)
            positions = torch.cat([self._positions(completion) for completion in chosen], 1)
            run = self._pass(PassRows(layout, positions), past_kv, self.plan.recompute)
            h = self.decoder.embed_tokens(torch.cat([self._ids(c) for c in chosen]))
            observe = self._observer([(i, g, 0, k) for k, g in enumerate(part)])
            hidden = run.forward(h, observe=observe, save_for_backward=self.needs_gradient)
            spans = [layout.completion_queries(0, k) for k in range(len(part))]
            rows = [row for span in spans for row in range(span.start, span.stop - 1)]
            d_slice = self._log_probs_and_gradient(hidden, rows, [((i, g), slice(1, None)) for g in part])
            if self.needs_gradient:
                run.backward(d_slice, visual[:0])
        if self.needs_gradient:
            prefix_pass.saved_kv_gradient = gradient
            self._add_gradients(images, *prefix_pass.backward(d, visual))

    def _pass(self, rows: PassRows, past_kv: PastKV, recompute: Recompute, save_kv: bool = False) -> FrozenPass:
        return FrozenPass(self.decoder, self.weight_buffers, rows, past_kv, recompute, save_kv)

    def _bidirectional(self, visual: Tensor, layout: GroupLayout) -> ImageRows | None:
        """The images at the rows `visual` of the layout's queries; None where attention is causal throughout."""
        if not self.prefix.bidirectional_images:
            return None
        rows = visual.view(-1, self.prefix.images.shape[1])
        return ImageRows(rows, layout.key_rows()[0][rows])

    def _log_probs_and_gradient(
        self, hidden: Tensor, rows: Sequence[int], tokens: Sequence[tuple[tuple[int, int], slice]]
    ) -> Tensor:
        """d loss / d hidden (rows of hidden, D); records log π of the tokens that `rows` of hidden predict.

        tokens: ((group, g), slice of the completion) of each run of rows, in order.
        """
        which = [(self.groups[i].completions[g][part], self.groups[i].coefficients[g][part]) for (i, g), part in tokens]
        targets = torch.tensor([token for ids, _ in which for token in ids], dtype=torch.int64, device=self.device)
        coefficients = torch.cat([c for _, c in which]).to(self.device)
        at = torch.tensor(rows, dtype=torch.int64, device=self.device)
        found, dh = token_logprob(hidden[at], self.head, targets, coefficients, self.temperature)
        for (place, _), part in zip(tokens, found.split([len(ids) for ids, _ in which])):
            known = self.log_probs.get(place)
            self.log_probs[place] = part if known is None else torch.cat((known, part))
        return torch.zeros_like(hidden).index_add_(0, at, dh)

    def _observer(self, members: Sequence[tuple[int, int, int, int]]) -> Observe:
        """Records the anchor layer's attention of members: (group, completion, group and completion within the
        layout)."""

        def observe(layer: int, layout: GroupLayout, q: Tensor, keys: Tensor, lse: Tensor) -> None:
            if layer != self.anchor_layer:
                return
            for i, g, j, k in members:
                for image, positions in enumerate(self.groups[i].attribute_token_positions.get(g, ())):
                    rows = torch.tensor(positions, dtype=torch.int64, device=self.device)
                    rows += layout.completion_queries(j, k).start
                    columns = self.prefix.images[image] + layout.prefix_slice(j).start
                    weights = attention_onto(q, keys, lse, rows, columns)
                    self.attention.append(AnchorAttention(i, g, image, weights))

        return observe

    def _static_prefix_kv(self, groups: int) -> PastKV:
        prefix_cache = self.prefix_cache

        def read(layer: int) -> tuple[Tensor, Tensor]:
            cached = prefix_cache.keys[layer], prefix_cache.values[layer]
            keys, values = (x.expand(groups, *x.shape).flatten(0, 1) for x in cached)
            return keys, values

        return PastKV(read)

    def _ids(self, completion: Sequence[int]) -> Tensor:
        return torch.tensor(completion, device=self.device)

    def _positions(self, completion: Sequence[int]) -> Tensor:
        return torch.arange(len(completion), device=self.device).expand(3, -1) + self.prefix.next_position

    def _levels(self, images: slice) -> list[Tensor]:
        return [level[images].flatten(0, 1).to(self.decoder.dtype) for level in self.features.deepstack]

    def _add_gradients(self, images: slice, d: Tensor, levels: Sequence[Tensor]) -> None:
        for total, gradient in zip(self.gradients, (d, *levels)):
            total[images] += gradient.view_as(total[images])
