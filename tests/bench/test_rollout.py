import pytest

from bench import rollout

from .tiny import SHAPE


def test_both_sides_say_the_same_where_nothing_is_drawn(folder):
    found = rollout.greedy(folder, "tiny", 20)()
    assert found["equal"] and found["tokens"] == 40 and found["different_pairs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("calls,cache", rollout.RIVALS.values())
def test_both_sides_make_rollouts_of_the_wanted_lengths(folder, calls, cache):
    """Each asserts its own lengths."""
    assert rollout.ours(folder, "tiny", SHAPE.short)()["tokens_per_second"] > 0
    assert rollout.theirs(folder, "tiny", SHAPE.short, calls, cache)()["tokens_per_second"] > 0
