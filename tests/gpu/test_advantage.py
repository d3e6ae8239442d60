import pytest
import torch

from saga_kernels import group_advantage
from saga_kernels.advantage import group_advantage_reference


def rewards_of(pairs, group):
    """Rewards of three values, every third pair all alike."""
    rewards = torch.randint(0, 3, (pairs, group), device="cuda", generator=torch.Generator("cuda").manual_seed(0)) / 2
    rewards[::3] = rewards[::3, :1]
    return rewards


def test_8b_a_step_against_float64():
    compare(8, 8, False)


def test_smallest_case_of_every_kernel():
    compare(3, 8, False)


@pytest.mark.parametrize("population", [False, True])
@pytest.mark.parametrize("pairs, group", [(1, 1), (33, 31), (5, 1024), (4096, 16)])
def test_against_float64(pairs, group, population):
    compare(pairs, group, population)


def compare(pairs, group, population):
    rewards = rewards_of(pairs, group)
    advantages, contributes, count = group_advantage(rewards, population=population)
    expected, expected_contributes, expected_count = group_advantage_reference(rewards.double(), population=population)
    torch.testing.assert_close(advantages.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(contributes, expected_contributes) and torch.equal(count, expected_count)


def test_8b_the_same_bits_twenty_times():
    first, *others = (group_advantage(rewards_of(4096, 16)) for _ in range(20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
