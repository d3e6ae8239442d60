"""A run's warnings: each once, with its figures."""

from __future__ import annotations

import warnings

import pytest
import torch

from saga_fast.runtime.health import Health, embedding_spread

STEP = {"micro_batches": 2, "pairs_drawn": 8, "pairs_contributing": 0, "well_formed": 0.25, "loss_dml": 1.0}


def test_spread_is_that_of_all_pairs():
    z = torch.nn.functional.normalize(torch.randn(9, 5, dtype=torch.float64), dim=-1)
    cosines = [float(z[i] @ z[j]) for i in range(9) for j in range(9) if i != j]
    found = embedding_spread(z)
    assert found["pairwise_cosine"] == pytest.approx(sum(cosines) / 72)
    assert found["embedding_std"] == pytest.approx(float(z.std(0).mean()))
    assert embedding_spread(z[:1].expand(4, -1))["pairwise_cosine"] == pytest.approx(1)


@pytest.mark.parametrize(
    "same,different,why",
    [(1.0, 0.9, "right every time"), (0.0, 0.1, "25% of its answers"), (1.0, 0.0, "always gives the same verdict")],
)
def test_a_pass_without_a_contributing_pair_is_told_with_the_rewards(same, different, why):
    health = Health(pass_batches=5)
    log = {**STEP, "reward_same": same, "reward_different": different}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        health.check(0, log)
        health.check(1, {**log, "pairs_contributing": 1})  # the pass begins anew
        health.check(2, log)
        health.check(3, log)
    with pytest.warns(UserWarning) as caught:
        for step in range(4, 12):
            health.check(step, log)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("step 4: none of the 24 pairs drawn") and why in message
    assert f"mean reward {same:.2f} on same-class pairs, {different:.2f} on others" in message


@pytest.mark.parametrize(
    "found,message",
    [
        ({"pairwise_cosine": 0.995, "embedding_std": 0.001}, "step 3: the encoder collapses: .* 0.9950, .* 0.001;"),
        ({"pairs_broken": 2, "pairs_contributing": 1}, "step 3: 2 of 8 pairs dropped"),
        ({"skipped_now": 1, "loss_dml": float("nan"), "grad_norm": float("inf")}, "loss_dml nan, grad_norm inf; 1 in"),
    ],
)
def test_trouble_is_told_once(found, message):
    health = Health(pass_batches=100)
    with pytest.warns(UserWarning, match=message) as caught:
        for step in range(3, 6):
            health.check(step, {**STEP, "pairwise_cosine": 0.5, **found})
    assert len(caught) == 1


def test_a_supervisor_that_knows_nothing_and_a_policy_that_drifts_are_told_once():
    health = Health(4)
    with pytest.warns(UserWarning, match=r"informedness 0.05; 0 is chance\): its weights .* multiplied by 0.00"):
        health.check(3, {"voice": 0.0, "informedness": 0.05})
    with pytest.warns(UserWarning, match="0.31 nats from what it was when they were sampled"):
        health.check(4, {"log_prob_drift": 0.31})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        health.check(5, {"voice": 0.1, "informedness": 0.17, "log_prob_drift": 0.5})
        Health(4).check(0, {"voice": 1.0, "informedness": 0.6, "log_prob_drift": 0.01})
