"""Attribute credit: a reward per attribute value, beside that of the verdict, which is one bit for some hundred tokens.

Images of one class look alike in every attribute, so what a rollout says of one of them should be what rollouts say of
the others: of the other image of the pair, where it is of the same class, and of those that earlier steps rolled out.
So pairs of two classes are rewarded too. No label beyond the class is used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DECAY = 0.9  # of the weights of a class's readings, a pair
FORGOTTEN = 0.05  # weight at which a value is left out

AttributeValues = tuple[dict[str, str], dict[str, str]]  # attribute → value, of item 1 and of item 2


def agreement(a: str, b: str) -> float:
    """How far two values say the same: F1 of their words, in any letter case; 1 if all words are shared, 0 if
    none; so one without words agrees with nothing."""
    a_words, b_words = Counter(a.casefold().split()), Counter(b.casefold().split())
    shared = sum((a_words & b_words).values())
    return 2 * shared / max(1, a_words.total() + b_words.total())


class ClassReadings:
    """What rollouts have said of each attribute of each class, which is what they are asked to agree with.

    values: class → attribute → value → weight. A rollout adds 1 to the weight of what it says; `DECAY` is what is left
    of older weights, as the tokens that are read change with training.
    """

    def __init__(self) -> None:
        self.values: dict[int, dict[str, dict[str, float]]] = {}

    def rewards(self, group: Sequence[AttributeValues], classes: tuple[int, int], attributes: Sequence[str]) -> Tensor:
        """Rewards (2, M, G) float32 of the G rollouts of a pair: for item 1 and item 2 and each attribute, the mean
        agreement of what the rollout says of it with what is known of the item's class: that is the readings so far,
        and, in a pair of one class, what all G rollouts say of the *other* item.

        All G and not the same rollout alone: that has less variance, and a rollout cannot earn anything by repeating in
        item 2 what it has written in item 1. A value that is missing agrees with nothing, and where nothing is known,
        all earn 0.
        """
        rewards = torch.zeros(2, len(attributes), len(group))
        for item, label in enumerate(classes):
            for m, name in enumerate(attributes):
                known: Counter[str] = Counter()
                known.update(self.values.get(label, {}).get(name, {}))
                if classes[0] == classes[1]:
                    known.update(other[1 - item].get(name, "") for other in group)
                said = [described[item].get(name, "") for described in group]
                earned = {
                    value: sum(weight * agreement(value, other) for other, weight in known.items())
                    for value in set(said)
                }
                rewards[item, m] = torch.tensor([earned[value] for value in said]) / (known.total() or 1)
        return rewards

    def add(self, group: Sequence[AttributeValues], classes: tuple[int, int]) -> None:
        """Takes in what the rollouts of a pair say."""
        for label in set(classes):
            values = self.values.setdefault(label, {})
            for name, weights in values.items():
                values[name] = {value: DECAY * w for value, w in weights.items() if DECAY * w > FORGOTTEN}
            for described in group:
                for item, of in zip(described, classes):
                    if of == label:
                        for name, value in item.items():
                            weights = values.setdefault(name, {})
                            weights[value] = weights.get(value, 0.0) + 1

    def state_dict(self) -> list[tuple[int, dict[str, dict[str, float]]]]:
        """Plain values, for checkpoints."""
        return list(self.values.items())

    def load_state_dict(self, state: Any) -> None:
        """Raises ValueError if it is no such state."""
        try:
            self.values = {
                int(label): {
                    str(name): {str(value): float(weight) for value, weight in weights.items()}
                    for name, weights in values.items()
                }
                for label, values in state
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"readings: {error}; accepted are [class, attribute → value → weight]") from None


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
