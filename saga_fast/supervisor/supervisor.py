"""The frozen supervisor: a language model and its prompt, with the three calls that training makes: rollout, judge,
replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.agreement import AttributeValues
from saga_fast.supervisor.mllm import Mllm
from saga_fast.supervisor.pair import PairPrefix, PrefixCache
from saga_fast.supervisor.prompt import ImageMarkup, Order, Prefix, Prompt, build_prefix
from saga_fast.supervisor.replay import WHOLE, Group, ReplayResult, replay_groups
from saga_fast.supervisor.rollout import SYNC_EVERY, RolloutEngine, Sampling
from saga_fast.supervisor.verdict import attribute_values, parse, reward, tokens_by_attribute
from saga_fast.utils.errors import InputError

AttributePositions = tuple[dict[str, list[int]], dict[str, list[int]]]  # attribute → positions, of item 1 and of item 2


def flat_positions(by_attribute: AttributePositions) -> tuple[list[int], list[int]]:
    """The positions of all attributes of item 1, and of item 2, in the order of the attributes."""
    first, second = ([position for tokens in item.values() for position in tokens] for item in by_attribute)
    return first, second


SLOTS = 16  # as many pairs as 8 contributing ones take, if every other pair contributes


def prompt_prefix(
    mllm: Mllm,
    prompt: Prompt,
    order: Order,
    grid: tuple[int, int],
    sampling: Sampling,
    device: torch.device | str = "cpu",
) -> tuple[Prefix, PairPrefix]:
    """The prefix of a pair of images of `grid` (rows, columns) tokens, as ids and as tensors on `device`.

    It needs no weights, so that errors are found before any weight is read, see `Pretrained`. Raises InputError as
    `build_prefix` does, for tokens or positions that the model does not have, for a model without an end token, and
    where prompt and answer exceed a sliding window.
    """
    name = f"supervisor.model: {mllm.tokenizer.name_or_path or 'model'}"
    if not mllm.eos_token_ids:
        raise InputError(f"{name} names no token that ends a turn; add eos_token_id to its generation_config.json")
    image = ImageMarkup(mllm.image_token, mllm.image_text, newline=mllm.newline is not None)
    prefix = build_prefix(mllm.tokenizer, prompt.instruction(), grid[0] * grid[1], order, image)
    vocabulary = mllm.decoder.embedding.shape[0]
    if (largest := max(prefix.input_ids)) >= vocabulary:
        raise InputError(
            f"{name} has a tokenizer that writes the prompt with token {largest}, where its embedding has {vocabulary}"
            "; restore the tokenizer's files and config.json of one release"
        )
    prefix_on_device = PairPrefix.of(
        prefix, grid if mllm.decoder.mrope else None, device, mllm.newline, mllm.bidirectional_images
    )
    if reason := beyond_window(mllm.decoder.window, len(prefix_on_device), sampling.max_new_tokens):
        raise InputError(reason)
    # Finished rollouts are noticed every SYNC_EVERY tokens, so positions reach a little beyond max_new_tokens.
    if mllm.max_positions is not None and prefix_on_device.next_position + sampling.capacity + 1 > mllm.max_positions:
        left = (mllm.max_positions - prefix_on_device.next_position - 1) // SYNC_EVERY * SYNC_EVERY + 1
        mend = f"give {left} or fewer" if left > 0 else "take smaller images, fewer attributes or another model"
        raise InputError(
            f"rollout.max-new-tokens: {sampling.max_new_tokens}; the question takes {prefix_on_device.next_position} "
            f"positions, and the model's rotary frequencies are fixed for {mllm.max_positions} in all: {mend}"
        )
    return prefix, prefix_on_device


def anchor_layer_index(requested: int | None, depth: int) -> int:
    """The zero-based layer whose attention the pooler learns from: `requested`, by default the paper's 26 of 36, scaled
    to `depth`. Raises InputError for a layer that is not there."""
    if requested is not None and not 0 <= requested < depth:
        raise InputError(f"supervisor.anchor-layer: {requested}; the model's layers are 0 to {depth - 1}")
    return round(26 / 36 * depth) if requested is None else requested


class Supervisor:
    """An MLLM's language model with one prompt about pairs of images of `grid` (rows, columns) merged tokens.

    anchor_layer: zero-based decoder layer whose attention the pooler learns from; None is the paper's 26 of 36, scaled.
    The memory plan may set two attributes at any time: `plan`, how replays trade memory for time, and `slots`, the
    pairs that roll out at once. Raises InputError as `prompt_prefix` does, and for an anchor layer the model does not
    have.
    """

    def __init__(
        self,
        mllm: Mllm,
        prompt: Prompt,
        order: Order,
        grid: tuple[int, int],
        sampling: Sampling,
        anchor_layer: int | None = None,
    ) -> None:
        self.decoder, self.tokenizer, self.eos_token_ids = mllm.decoder, mllm.tokenizer, mllm.eos_token_ids
        self.prompt, self.sampling = prompt, sampling
        prefix, self.prefix = prompt_prefix(mllm, prompt, order, grid, sampling, self.decoder.device)
        self.thinks = prefix.thinks
        self.prefix_cache = PrefixCache(self.decoder, self.prefix)
        self.anchor_layer = anchor_layer_index(anchor_layer, self.decoder.depth)
        self.plan, self.slots = WHOLE, SLOTS
        self._engine: RolloutEngine | None = None

    @property
    def engine(self) -> RolloutEngine:
        """The rollout engine, with its cache; a new, empty one where `slots` has changed."""
        if self._engine is None or self._engine.slots != self.slots:
            self._engine = None  # frees its cache before the new one is allocated
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
        """Of each completion: attribute → value, for image a and for image b."""
        return [attribute_values(self.text(completion), self.prompt) for completion in completions]

    def attribute_positions(self, completions: Sequence[Sequence[int]]) -> list[AttributePositions]:
        """Of each completion: attribute → positions of the tokens of its value, for image a and for image b."""
        return [tokens_by_attribute(completion, self.tokenizer, self.prompt) for completion in completions]

    def replay(
        self, features: VisualFeatures, groups: Sequence[Group], token_budget: int | None = None
    ) -> ReplayResult:
        """See `replay_groups`. token_budget: in place of the plan's."""
        return replay_groups(
            self.prefix_cache,
            features,
            groups,
            self.sampling.temperature,
            self.anchor_layer,
            replace(self.plan, token_budget=token_budget or self.plan.token_budget),
        )


def beyond_window(window: int | None, prefix: int, max_new_tokens: int) -> str | None:
    """The message where prompt and answer exceed a sliding window, which nothing masks; None where they fit. The last
    token of an answer is not fed to the model."""
    if window is None or prefix + max_new_tokens - 1 <= window:
        return None
    return (
        f"rollout.max-new-tokens: {max_new_tokens} after a prompt of {prefix} tokens; layers of this model see no more "
        f"than {window}: give at most {max(0, window + 1 - prefix)}, or a smaller data.image-size"
    )
