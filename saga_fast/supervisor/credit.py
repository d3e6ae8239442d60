"""Policy gradient and attention of one pair's rollouts, by attribute, for the report.

The gradient is measured in two places. *At the token* it is |A (1 - π)| summed over rollouts: the gradient of A log π
in the token's own logit. *At the images* it is the norm of the gradient in visual tokens and DeepStack features, summed
over rollouts before the norm is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saga_fast.encoder import VisualFeatures
from saga_fast.losses.policy import token_coefficients
from saga_fast.supervisor.replay import Group
from saga_fast.supervisor.supervisor import Supervisor, flat_positions
from saga_fast.supervisor.verdict import tokens_by_attribute


class Credit(NamedTuple):
    """Of one attribute in one pair. tokens: number of tokens of its values, over all rollouts and both items. at_token,
    at_images: see above."""

    tokens: int
    at_token: float
    at_images: float


class AttributeAttention(NamedTuple):
    """weights: (tokens, N), attention of the tokens of an attribute's value onto the image they describe, averaged over
    heads at the anchor layer, each row renormalised to sum 1 over the image."""

    rollout: int
    image: int
    attribute: str
    weights: Tensor


def gradient_at_tokens(coefficients: Tensor, log_probs: Tensor) -> Tensor:
    """|c (1 - π)| of each token of a completion, (T,), where the loss is Σ c log π."""
    return coefficients.abs() * -torch.expm1(log_probs.to(coefficients))


def gradient_by_attribute(
    supervisor: Supervisor, features: VisualFeatures, completions: Sequence[Sequence[int]], advantages: Tensor
) -> dict[str, Credit]:
    """The gradient of L_GRPO on the pair alone. features: of its two images. Replays once more for each attribute."""
    lengths = [len(completion) for completion in completions]
    coefficients = token_coefficients(advantages, lengths, sum(lengths)).split(lengths)
    positions = [tokens_by_attribute(completion, supervisor.tokenizer, supervisor.prompt) for completion in completions]
    log_probs = supervisor.replay(features.detach(), [Group(completions, coefficients, {})]).log_probs[0]

    credit = {}
    for name in supervisor.prompt.attributes:
        only, tokens, at_token = [torch.zeros_like(c) for c in coefficients], 0, 0.0
        for g, items in enumerate(positions):
            at = [t for item in items for t in item.get(name, [])]
            only[g][at] = coefficients[g][at]
            tokens += len(at)
            at_token += float(gradient_at_tokens(only[g], log_probs[g]).sum())
        leaves = features.detach()
        for leaf in leaves.levels:
            leaf.requires_grad_()
        gradients = supervisor.replay(leaves, [Group(completions, only, {})]).gradients
        squared = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        credit[name] = Credit(tokens, at_token, float(squared.sqrt()))
    return credit


def attention_by_attribute(
    supervisor: Supervisor, features: VisualFeatures, completions: Sequence[Sequence[int]], rollouts: Sequence[int]
) -> Iterator[AttributeAttention]:
    """Attention of those `rollouts` of one pair that describe both images. features: of its two images."""
    attribute_token_positions, names = {}, {}
    for g in rollouts:
        items = tokens_by_attribute(completions[g], supervisor.tokenizer, supervisor.prompt)
        if all(any(item.values()) for item in items):
            attribute_token_positions[g] = flat_positions(items)
            names[g] = [[(name, len(tokens)) for name, tokens in item.items()] for item in items]
    none = [torch.zeros(len(completion)) for completion in completions]
    for entry in supervisor.replay(features.detach(), [Group(completions, none, attribute_token_positions)]).attention:
        weights = entry.weights / entry.weights.sum(1, keepdim=True)
        counts = names[entry.rollout][entry.image]
        for (name, _), rows in zip(counts, weights.split([count for _, count in counts])):
            if len(rows):
                yield AttributeAttention(entry.rollout, entry.image, name, rows)
