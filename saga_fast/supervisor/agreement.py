"""Attribute credit: a reward per attribute value, beside that of the verdict, which is one bit for some hundred tokens.

Two images of one class look alike in every attribute, so the values that rollouts give for one image should agree with
those for the other. No label beyond the class is used. Pairs of two classes, which may differ in any attribute, earn
nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

AttributeValues = tuple[dict[str, str], dict[str, str]]  # attribute → value, of item 1 and of item 2


def agreement(a: str, b: str) -> float:
    """F1 of the words of two values, whatever their letter case: 1 if all words are shared, 0 if none."""
    a_words, b_words = Counter(a.casefold().split()), Counter(b.casefold().split())
    shared = sum((a_words & b_words).values())
    return 2 * shared / max(1, a_words.total() + b_words.total())


def attribute_agreement(group: Sequence[AttributeValues], attributes: Sequence[str]) -> Tensor:
    """Rewards (2, M, G) float32 of the G rollouts of one pair of one class: for item 1 and item 2 and each attribute,
    the mean agreement of the rollout's value with the values of all G rollouts for the *other* item.

    All G and not the same rollout alone: that has less variance, and repeating the values of item 1 in item 2 earns
    nothing. A missing value agrees with nothing.
    """
    rewards = torch.zeros(2, len(attributes), len(group))
    for m, name in enumerate(attributes):
        values = [[rollout[item].get(name) for rollout in group] for item in (0, 1)]
        agreements = {(a, b): agreement(a, b) for a in set(values[0]) - {None} for b in set(values[1]) - {None}}
        table = torch.tensor([[agreements.get((a, b), 0.0) for b in values[1]] for a in values[0]])
        rewards[0, m], rewards[1, m] = table.mean(1), table.mean(0)
    return rewards


def value_entropy(groups: Sequence[Sequence[AttributeValues]], attributes: Sequence[str]) -> float:
    """Entropy, in nats, of the values that the rollouts of all pairs give an attribute, in the mean of the attributes.
    It falls to zero where tokens come to read alike everywhere."""
    total = 0.0
    for name in attributes:
        values = (item[name] for group in groups for rollout in group for item in rollout if name in item)
        counts = Counter(value.casefold() for value in values)
        shares = [count / counts.total() for count in counts.values()]
        total -= sum(share * math.log(share) for share in shares)
    return total / max(1, len(attributes))
