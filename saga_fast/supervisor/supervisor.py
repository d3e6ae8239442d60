"""The frozen judge: a language model, its question, and the three things asked of it: roll out, judge, replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.mllm import Mllm
from saga_fast.supervisor.pair import PairPrefix, Question
from saga_fast.supervisor.prompt import Order, Prompt, build_prefix
from saga_fast.supervisor.replay import WHOLE, Group, Plan, Replay, replay
from saga_fast.supervisor.rollout import Engine, Sampling
from saga_fast.supervisor.verdict import attribute_tokens, parse, reward
from saga_fast.utils.errors import InputError

SLOTS = 16  # as many pairs as 8 contributing ones take, if every other pair contributes


class Supervisor:
    """An MLLM's language model asked one question about pairs of images of `grid` (rows, columns) merged tokens.

    anchor_layer: zero-based decoder layer whose attention the pooler learns from; None is the paper's 26 of 36, scaled.
    plan: of replays. slots: pairs that roll out at once.
    Raises InputError for an anchor layer the model does not have, and where a run could reach beyond a sliding window.
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
        instruction, count = prompt.instruction(), grid[0] * grid[1]
        newline = mllm.newline is not None
        prefix = build_prefix(self.tokenizer, instruction, count, order, mllm.image_token, mllm.image_text, newline)
        self.prefix = PairPrefix.of(
            prefix, grid if self.decoder.mrope else None, self.decoder.device, mllm.newline, mllm.whole_images
        )
        if reason := beyond_window(self.decoder.window, len(self.prefix), sampling.max_new_tokens):
            raise InputError(reason)
        self.question = Question(self.decoder, self.prefix)
        depth = self.decoder.depth
        self.anchor_layer = round(26 / 36 * depth) if anchor_layer is None else anchor_layer
        if not 0 <= self.anchor_layer < depth:
            raise InputError(f"supervisor.anchor-layer: {anchor_layer}; the model's layers are 0 to {depth - 1}")
        self.plan, self.slots = plan, slots
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """What rolls out, with the memory for it, which stays as it is; where `slots` has changed, a new, empty one."""
        if self._engine is None or self._engine.slots != self.slots:
            self._engine = None  # its memory makes room
            self._engine = Engine(self.question, self.sampling, self.eos_token_ids, self.slots)
        return self._engine

    def roll_out(self, features: VisualFeatures, pair_ids: Tensor) -> list[list[list[int]]]:
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

    def described(
        self, completions: Sequence[Sequence[int]], rewards: Tensor
    ) -> dict[int, tuple[list[int], list[int]]]:
        """For one pair's rewarded rollouts that describe both images: g → positions of the describing tokens."""
        tokens = {
            g: attribute_tokens(completions[g], self.tokenizer, self.prompt)
            for g in rewards.nonzero().flatten().tolist()
        }
        return {g: spans for g, spans in tokens.items() if all(spans)}

    def replay(self, features: VisualFeatures, groups: Sequence[Group], token_budget: int | None = None) -> Replay:
        """token_budget: other than the plan's."""
        return replay(
            self.question,
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
