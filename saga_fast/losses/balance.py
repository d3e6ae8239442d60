"""Weights of the supervisor's loss terms beside the metric loss, adapted during a run, so that λ = 1 needs no tuning.

Two rules. The policy gradient in the tower may be a fraction of the metric loss's or twenty times as large, so it is
scaled to a fixed multiple of that norm. And a supervisor whose verdicts do not depend on the truth teaches noise, so
the weights of both its terms follow the informedness of its verdicts down to zero, one standard error below what was
observed. They start at zero: AdamW's second moment would remember noise of a run's first steps for the rest of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

DECAY = 0.9  # of the running norms, per step
RATIO = 3.0  # of the norm of the policy gradient to that of the metric loss; chosen on drawn birds of another seed
MIN_PAIRS = 32  # pairs before informedness is known, half of them of one class
DECAY_PAIRS = 512  # pairs after which a verdict counts 1/e
ZERO_UP_TO, FULL_FROM = 0.15, 0.3  # informedness at which the supervisor's weight is 0, and 1


class Balance:
    """State of both rules; `state_dict` and `load_state_dict` for checkpoints."""

    def __init__(self) -> None:
        self.norm_dml = self.norm_lm = 0.0
        # Of pairs of one class and of two: decayed count, and decayed sum of mean rewards.
        self.pairs, self.rewards = [0.0, 0.0], [0.0, 0.0]

    def scale(self, norm_dml: float, norm_lm: float) -> float:
        """The factor that makes the policy gradient's norm `RATIO` times the metric loss's, by running means that
        include this step. 1 where either term has no gradient."""
        if not (0 < norm_dml < float("inf") and 0 < norm_lm < float("inf")):
            return 1.0
        self.norm_dml = DECAY * self.norm_dml + (1 - DECAY) * norm_dml
        self.norm_lm = DECAY * self.norm_lm + (1 - DECAY) * norm_lm
        return RATIO * self.norm_dml / self.norm_lm

    def update(self, same: Sequence[bool], rewards: Sequence[float]) -> None:
        """Adds a step's pairs. same: whether each is of one class. rewards: the mean reward of each pair's rollouts."""
        for alike, reward in zip(same, rewards):
            kind = 0 if alike else 1
            decay = 1 - 1 / DECAY_PAIRS
            self.rewards[kind] = decay * self.rewards[kind] + reward
            self.pairs[kind] = decay * self.pairs[kind] + 1

    @property
    def informedness(self) -> float | None:
        """Youden's J of the verdicts: P(right | one class) + P(right | two) - 1. 0 if they do not depend on the truth,
        1 if all are right; None until enough pairs of both kinds are known."""
        if min(self.pairs) < MIN_PAIRS / 2:
            return None
        return sum(reward / count for reward, count in zip(self.rewards, self.pairs)) - 1

    @property
    def standard_error(self) -> float:
        """Of `informedness`. Each pair counts as one draw, as the rewards of its rollouts are anything but
        independent."""
        rates = [reward / count for reward, count in zip(self.rewards, self.pairs)]
        return math.sqrt(sum(rate * (1 - rate) / count for rate, count in zip(rates, self.pairs)))

    @property
    def supervisor_weight(self) -> float:
        """The factor of λ_lm and λ_kl, in 0..1, by the informedness less its standard error; 0 until it is known."""
        if self.informedness is None:
            return 0.0
        low = self.informedness - self.standard_error
        return min(1.0, max(0.0, (low - ZERO_UP_TO) / (FULL_FROM - ZERO_UP_TO)))

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "pairs": list(self.pairs), "rewards": list(self.rewards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if it is no such state."""
        match state:
            case {"norm_dml": float(), "norm_lm": float(), "pairs": [float(), float()], "rewards": [float(), float()]}:
                vars(self).update(state)
            case _:
                raise ValueError(f"balance is {state!r}; accepted are four entries as in {self.state_dict()}")
