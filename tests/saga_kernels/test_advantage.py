import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from saga_kernels import group_advantage
from saga_kernels.advantage import group_advantage_reference

REWARDS = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("population", [False, True])
def test_equals_the_definition(population):
    advantages, contributes, count = group_advantage(REWARDS, 1e-4, population)
    assert contributes.tolist() == [True, False, False, True]
    assert count.item() == 2 and count.dtype == torch.int64
    for row, got in zip(REWARDS.tolist(), advantages.tolist(), strict=True):
        std = statistics.pstdev(row) if population else statistics.stdev(row)
        mean = statistics.fmean(row)
        assert got == pytest.approx([(r - mean) / (std + 1e-4) for r in row], abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(1, 1024), st.integers(0, 2**31), st.booleans(), st.sampled_from([1e-4, 0.1]))
def test_equals_the_reference_in_float64(pairs, size, seed, population, eps):
    rewards = torch.randn(pairs, size, generator=torch.Generator().manual_seed(seed))
    advantages, contributes, count = group_advantage(rewards, eps, population)
    expected, mask, number = group_advantage_reference(rewards.double(), eps, population)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(contributes, mask) and count == number


def test_several_rewards_of_a_pair_are_normalised_each_by_itself():
    rewards = torch.randint(0, 3, (5, 4, 6), generator=torch.Generator().manual_seed(0)).float()
    rewards[2, 1] = 1.0
    advantages, contributes, count = group_advantage(rewards)
    assert advantages.shape == (5, 4, 6) and contributes.shape == (5, 4)
    for pair in range(5):
        for reward in range(4):
            one, differs, _ = group_advantage(rewards[pair, reward][None])
            assert torch.equal(advantages[pair, reward], one[0]) and contributes[pair, reward] == differs[0]
    assert not contributes[2, 1] and count == contributes.sum()
    reference = group_advantage_reference(rewards.double())
    torch.testing.assert_close(advantages.double(), reference[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(contributes, reference[1])


def test_equal_rewards_never_contribute_whatever_rounding_makes_of_their_std():
    rewards = torch.full((3, 7), 0.1)  # the mean of seven 0.1 need not be 0.1
    advantages, contributes, count = group_advantage(rewards, 0.0)
    assert (advantages == 0).all() and not contributes.any() and count == 0


def test_a_group_of_one_contributes_nothing_and_gives_no_nan():
    advantages, contributes, count = group_advantage(torch.tensor([[1.0], [0.0]]), 0.0)
    assert advantages.tolist() == [[0.0], [0.0]] and not contributes.any() and count == 0


def test_many_groups_and_strided_rewards_give_the_same_bytes():
    rewards = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0)).T
    runs = [group_advantage(rewards), group_advantage(rewards.contiguous())]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    torch.testing.assert_close(runs[0][0], group_advantage_reference(rewards)[0])


def test_opcheck_and_fake():
    torch.library.opcheck(torch.ops.saga_kernels.group_advantage.default, (REWARDS, 1e-4, False))
    with FakeTensorMode():
        shapes = [tuple(t.shape) for t in group_advantage(torch.empty(4, 8))]
    assert shapes == [(4, 8), (4,), ()]


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="^rewards: got dtype float64, accepted is float32"):
        group_advantage(REWARDS.double())
    with pytest.raises(ValueError, match=r"^rewards: got shape \(4,\)"):
        group_advantage(REWARDS[0])
    with pytest.raises(ValueError, match=r"^rewards: got shape \(3, 0\)"):
        group_advantage(torch.empty(3, 0))
    with pytest.raises(ValueError, match=r"^rewards: got nan at \(0, 1\), accepted"):
        group_advantage(torch.tensor([[0.0, float("nan")]]))
