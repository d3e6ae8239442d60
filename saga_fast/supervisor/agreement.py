"""Attribute credit: a reward per attribute value, beside that of the verdict, which is one bit for some hundred tokens.

Images of one class look alike in every attribute, so a rollout's value for one of them should agree with the values for
others of its class: for the other image of a same-class pair, and for images of earlier steps. The latter reward
different-class pairs too. No label beyond the class is used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DECAY = 0.9  # of the weights of a class's readings, per pair
FORGOTTEN = 0.05  # weight below which a value is dropped

AttributeValues = tuple[dict[str, str], dict[str, str]]  # attribute → value, of item 1 and of item 2


def agreement(a: str, b: str) -> float:
    """F1 of the words of two values, whatever their letter case: 1 if all words are shared, 0 if none. A value
    without words agrees with nothing."""
    a_words, b_words = Counter(a.casefold().split()), Counter(b.casefold().split())
    shared = sum((a_words & b_words).values())
    return 2 * shared / max(1, a_words.total() + b_words.total())


class ClassReadings:
    """The values that earlier rollouts gave each attribute of each class, with which later ones should agree.

    values: class → attribute → value → weight. A rollout adds 1 to the weight of its value; older weights are
    multiplied by `DECAY`, as the visual tokens change with training.
    """

    def __init__(self) -> None:
        self.values: dict[int, dict[str, dict[str, float]]] = {}

    def rewards(self, group: Sequence[AttributeValues], classes: tuple[int, int], attributes: Sequence[str]) -> Tensor:
        """Rewards (2, M, G) float32 of the G rollouts of a pair: for item 1 and item 2 and each attribute, the mean
        agreement of the rollout's value with the known values of the item's class: the readings so far, and, in a
        same-class pair, the values of all G rollouts for the *other* item.

        All G rollouts, not only the same one: that has less variance, and repeating the values of item 1 in item 2
        earns nothing. A missing value agrees with nothing. Where no values are known, all rewards are 0.
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
        """Adds the values of a pair's rollouts."""
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
        """Raises ValueError for a malformed state."""
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
    """Entropy, in nats, of the values that the rollouts of all pairs give an attribute, averaged over the attributes.
    It falls to zero where all images get the same values."""
    total = 0.0
    for name in attributes:
        values = (item[name] for group in groups for rollout in group for item in rollout if name in item)
        counts = Counter(value.casefold() for value in values)
        shares = [count / counts.total() for count in counts.values()]
        total -= sum(share * math.log(share) for share in shares)
    return total / max(1, len(attributes))
