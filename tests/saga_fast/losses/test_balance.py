"""The two rules of the adaptive loss weights, on given numbers."""

from __future__ import annotations

import numpy as np
import pytest

from saga_fast.losses.balance import MIN_PAIRS, RATIO, ZERO_UP_TO, Balance


def test_the_policy_gradient_gets_the_metric_losss_norm():
    balance = Balance()
    assert balance.scale(0.5, 2.0) == pytest.approx(RATIO * 0.25), "one step is known, and it decides"
    for _ in range(200):
        scale = balance.scale(3.0, 1.0)
    assert scale == pytest.approx(RATIO * 3.0, rel=1e-3)
    assert balance.scale(3.0, 10.0) > RATIO * 0.3 + 0.1, "one step's outlier is averaged away"
    assert Balance().scale(0.0, 1.0) == 1 and Balance().scale(1.0, 0.0) == 1, "one term alone is left as it is"
    assert Balance().scale(float("nan"), 1.0) == 1


@pytest.mark.parametrize(
    "same,different,voice",
    [(0.65, 0.99, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.1, 0.97, 0.0), (0.3, 0.925, 0.5)],
)
def test_a_supervisor_whose_verdicts_say_nothing_falls_silent(same, different, voice):
    """Whatever it leans to: always `no`, always `yes`, a coin."""
    balance = Balance()
    assert balance.supervisor_weight == 0, "nothing is known yet"
    balance.update([True, False] * (MIN_PAIRS // 2 - 1), [same, different] * (MIN_PAIRS // 2 - 1))
    assert balance.supervisor_weight == 0 and balance.informedness is None
    balance.update([True, False] * 20, [same, different] * 20)
    assert balance.informedness == pytest.approx(same + different - 1)
    balance.pairs, balance.rewards = [1e9, 1e9], [1e9 * same, 1e9 * different]  # nothing is left to chance
    assert balance.supervisor_weight == pytest.approx(voice, abs=1e-3)


def test_few_verdicts_that_are_right_by_chance_weigh_nothing():
    """The standard error against the spread of what 20 + 20 pairs of a supervisor without skill say."""
    rng, observed, weights = np.random.default_rng(0), [], []
    for _ in range(2000):
        balance = Balance()
        balance.update([True] * 20 + [False] * 20, [float(r) for r in rng.random(40) < [0.3] * 20 + [0.7] * 20])
        observed.append(balance.informedness)
        weights.append(balance.supervisor_weight)
    assert balance.standard_error == pytest.approx(np.std(observed), rel=0.15)
    assert np.mean(np.array(weights) > 0) < 0.06 < np.mean(np.array(observed) > ZERO_UP_TO)


def test_what_it_hears_now_counts_more_than_what_it_heard_long_ago():
    balance = Balance()
    balance.update([True, False] * 400, [0.0, 1.0] * 400)
    balance.update([True, False] * 2000, [0.8, 1.0] * 2000)
    assert balance.informedness == pytest.approx(0.8, abs=0.02)


def test_state_goes_round():
    one, two = Balance(), Balance()
    one.update([True, False] * 50, [0.25, 1.0] * 50)
    one.scale(1.0, 3.0)
    two.load_state_dict(one.state_dict())
    one.update([True], [1.0])
    assert two.informedness == pytest.approx(0.25) and two.scale(2.0, 2.0) != 1
    assert one.state_dict() != two.state_dict()
