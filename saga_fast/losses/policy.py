"""L_GRPO with token-level normalisation. On policy and one update per buffer: the ratio is 1, so there is no clip, no
reference model, and the loss is linear in the log-probabilities. All it needs is one coefficient per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_coefficients(advantages: Tensor, completion_lengths: Sequence[int], total_tokens: int) -> Tensor:
    """c with L_GRPO = Σ c·log π over completion tokens, that is c = -A / |T|.

    advantages: (R,), one per completion. completion_lengths: R lengths in tokens. total_tokens: |T|, the generated
    tokens of the whole buffer, which may hold more than these R completions. Returns (sum of lengths,), completion by
    completion: the `coeff` of `saga_kernels.token_logprob`, whose dh is then the gradient of L_GRPO itself, to be
    descended.
    """
    lengths = torch.tensor(completion_lengths, device=advantages.device)
    return (-advantages / total_tokens).repeat_interleave(lengths, output_size=sum(completion_lengths))


def add_attribute_credit(
    coefficients: Sequence[Tensor],
    credit: Tensor,
    attribute_positions: Sequence[tuple[dict[str, list[int]], dict[str, list[int]]]],
    attributes: Sequence[str],
    scale: float,
) -> None:
    """Adds, in place, -`scale`·A to the coefficients of the tokens that write an attribute's value.

    coefficients: G tensors (T_g,), as `token_coefficients` gives them. credit: (2, M, G), the advantage of each
    completion's value of each of the `attributes`, for item 1 and item 2. attribute_positions: per completion, for item
    1 and item 2, attribute → positions of its value's tokens. scale: the credit's weight over |T|.
    """
    of = credit.tolist()
    for g, items in enumerate(attribute_positions):
        for item, positions in enumerate(items):
            for m, name in enumerate(attributes):
                if of[item][m][g] and name in positions:
                    coefficients[g][positions[name]] -= scale * of[item][m][g]
