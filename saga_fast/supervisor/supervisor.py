"""The frozen judge: a language model, its question, and the three things asked of it: roll out, judge, replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.agreement import AttributeValues
from saga_fast.supervisor.mllm import Mllm
from saga_fast.supervisor.pair import PairPrefix, PrefixCache
from saga_fast.supervisor.prompt import Order, Prefix, Prompt, build_prefix
from saga_fast.supervisor.replay import WHOLE, Group, Plan, ReplayResult, replay_groups
from saga_fast.supervisor.rollout import SYNC_EVERY, RolloutEngine, Sampling
from saga_fast.supervisor.verdict import attribute_values, parse, reward, tokens_by_attribute
from saga_fast.utils.errors import InputError

AttributePositions = tuple[dict[str, list[int]], dict[str, list[int]]]  # attribute → positions, of item 1 and of item 2
SLOTS = 16  # as many pairs as 8 contributing ones take, if every other pair contributes


def prompt_prefix(
    mllm: Mllm,
    prompt: Prompt,
    order: Order,
    grid: tuple[int, int],
    sampling: Sampling,
    device: torch.device | str = "cpu",
) -> tuple[Prefix, PairPrefix]:
    """The question about images of `grid` (rows, columns) tokens, placed on `device`.

    It needs no weights: what is wrong can be told before any is read, see `Pretrained`. Raises InputError as
    `build_prefix` does, for tokens or positions that the model does not have, where nothing ends an answer, and where
    a run could reach beyond a sliding window.
    """
    name = f"supervisor.model: {mllm.tokenizer.name_or_path or 'model'}"
    if not mllm.eos_token_ids:
        raise InputError(f"{name} names no token that ends a turn; add eos_token_id to its generation_config.json")
    count, vocabulary = grid[0] * grid[1], mllm.decoder.embedding.shape[0]
    newline = mllm.newline is not None
    prefix = build_prefix(
        mllm.tokenizer, prompt.instruction(), count, order, mllm.image_token, mllm.image_text, newline
    )
    if (largest := max(prefix.input_ids)) >= vocabulary:
        raise InputError(
            f"{name} has a tokenizer that writes the prompt with token {largest}, where its embedding has {vocabulary}; "
            "restore the tokenizer's files and config.json of one release"
        )
    prefix_on_device = PairPrefix.of(
        prefix, grid if mllm.decoder.mrope else None, device, mllm.newline, mllm.bidirectional_images
    )
    if reason := beyond_window(mllm.decoder.window, len(prefix_on_device), sampling.max_new_tokens):
        raise InputError(reason)
    # A rollout is looked at every SYNC_EVERY tokens, so it reaches a little beyond max_new_tokens.
    if mllm.max_positions is not None and prefix_on_device.next_position + sampling.capacity + 1 > mllm.max_positions:
        left = (mllm.max_positions - prefix_on_device.next_position - 1) // SYNC_EVERY * SYNC_EVERY + 1
        mend = f"give {left} or fewer" if left > 0 else "take smaller images, fewer attributes or another model"
        raise InputError(
            f"rollout.max-new-tokens: {sampling.max_new_tokens}; the question takes {prefix_on_device.next_position} positions, "
            f"and the model's rotary frequencies are fixed for {mllm.max_positions} in all: {mend}"
        )
    return prefix, prefix_on_device


def anchor_layer_index(requested: int | None, depth: int) -> int:
    """The layer of `depth` whose attention the pooler learns from; None is the paper's 26 of 36, scaled."""
    if requested is not None and not 0 <= requested < depth:
        raise InputError(f"supervisor.anchor-layer: {requested}; the model's layers are 0 to {depth - 1}")
    return round(26 / 36 * depth) if requested is None else requested


class Supervisor:
    """An MLLM's language model asked one question about pairs of images of `grid` (rows, columns) merged tokens.

    anchor_layer: zero-based decoder layer whose attention the pooler learns from; None is the paper's 26 of 36, scaled.
    plan: of replays. slots: pairs that roll out at once.
    Raises InputError as `prompt_prefix` does, and for an anchor layer the model does not have.
    """

    def __init__(
        self,
        mllm: Mllm,
        prompt: Prompt,
        order: Order,
        grid: tuple[int, int],
        sampling: Sampling,
        anchor_layer: int | None = None,
        plan: Plan = WHOLE,
        slots: int = SLOTS,
    ) -> None:
        self.decoder, self.tokenizer, self.eos_token_ids = mllm.decoder, mllm.tokenizer, mllm.eos_token_ids
        self.prompt, self.sampling = prompt, sampling
        prefix, self.prefix = prompt_prefix(mllm, prompt, order, grid, sampling, self.decoder.device)
        self.thinks = prefix.thinks
        self.prefix_cache = PrefixCache(self.decoder, self.prefix)
        self.anchor_layer = anchor_layer_index(anchor_layer, self.decoder.depth)
        self.plan, self.slots = plan, slots
        self._engine: RolloutEngine | None = None

    @property
    def engine(self) -> RolloutEngine:
        """What rolls out, with the memory for it, which stays as it is; where `slots` has changed, a new, empty one."""
        if self._engine is None or self._engine.slots != self.slots:
            self._engine = None  # its memory makes room
            self._engine = RolloutEngine(self.prefix_cache, self.sampling, self.eos_token_ids, self.slots)
        return self._engine

    def rollout(self, features: VisualFeatures, pair_ids: Tensor) -> list[list[list[int]]]:
        """Completions [pair][g] for n pairs; features: of 2n images; pair_ids: (n,) int64, unique in the run."""
        return self.engine.run(features, pair_ids)

    def text(self, completion: Sequence[int]) -> str:
        return self.tokenizer.decode(completion, skip_special_tokens=True)

    def judge(self, completions: Sequence[Sequence[Sequence[int]]], same: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """rewards (n, G) fp32, 1 where the verdict is right; well_formed (n, G) bool, for the log."""
        verdicts = [[parse(self.text(completion), self.prompt) for completion in group] for group in completions]
        rewards = [[reward(v, truth) for v in group] for group, truth in zip(verdicts, same)]
        well_formed = [[v is not None and v.well_formed for v in group] for group in verdicts]
        return torch.tensor(rewards), torch.tensor(well_formed)

    def attribute_values(self, completions: Sequence[Sequence[int]]) -> list[AttributeValues]:
        """What each completion says of each attribute of both images."""
        return [attribute_values(self.text(completion), self.prompt) for completion in completions]

    def attribute_positions(self, completions: Sequence[Sequence[int]]) -> list[AttributePositions]:
        """For each completion, where it writes each attribute's value."""
        return [tokens_by_attribute(completion, self.tokenizer, self.prompt) for completion in completions]

    def replay(
        self, features: VisualFeatures, groups: Sequence[Group], token_budget: int | None = None
    ) -> ReplayResult:
        """token_budget: other than the plan's."""
        return replay_groups(
            self.prefix_cache,
            features,
            groups,
            self.sampling.temperature,
            self.anchor_layer,
            replace(self.plan, token_budget=token_budget or self.plan.token_budget),
        )


def beyond_window(window: int | None, prefix: int, max_new_tokens: int) -> str | None:
    """Why prompt and answer do not fit into a sliding window, which nothing here masks; None where they do. The last
    token of an answer is never read."""
    if window is None or prefix + max_new_tokens - 1 <= window:
        return None
    return (
        f"rollout.max-new-tokens: {max_new_tokens} after a prompt of {prefix} tokens; layers of this model see no more "
        f"than {window}: give at most {max(0, window + 1 - prefix)}, or a smaller data.image-size"
    )
