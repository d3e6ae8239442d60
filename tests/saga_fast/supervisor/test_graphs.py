"""Graphs are kept for the latest shapes only, and a step replayed is the step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from saga_fast.supervisor.graphs import Graphs
from saga_fast.supervisor.pair import PrefixCache
from saga_fast.supervisor.rollout import RolloutEngine, Sampling

from .tiny_models import EOS, decoder_of, pair_prefix, random_features, random_model

made = Counter()


class Recorded:
    """A graph for want of a GPU: what it replays is what it was made of. It is counted while it lives."""

    def __init__(self, work, pool) -> None:
        self.replay, self.alive = work, pool if pool is not None else object()
        made["alive"] += 1
        made["pools"] += pool is None

    def pool(self):
        return self.alive

    def __del__(self) -> None:
        made["alive"] -= 1


@pytest.fixture(autouse=True)
def counted():
    made.clear()


def test_only_the_latest_shapes_are_kept_and_all_share_one_pool():
    ran = Counter()
    graphs = Graphs(3, Recorded)
    for shape in (1, 2, 3, 1, 4, 1, 2):

        def work(shape: int = shape) -> None:
            ran[shape] += 1

        graphs.run(shape, work, 16)
        assert len(graphs) == made["alive"] <= 3
    assert ran == {1: 48, 2: 32, 3: 16, 4: 16}
    assert graphs.captured == 5, "2 went for 4, as 1 had been replayed since; then it was captured again"
    assert made["pools"] == 1


def test_one_graph_at_a_time_shares_the_pool_too():
    graphs = Graphs(1, Recorded)
    for shape in range(3):
        graphs.run(shape, lambda: None, 2)
    assert made["pools"] == made["alive"] == 1


@pytest.mark.parametrize("most", [1, 2, 32])
def test_rollouts_by_graphs_are_those_without(most):
    """Rows and slots that run along unread in a larger graph change nothing."""
    question = PrefixCache(decoder_of(random_model(torch.float32, seed=3)), pair_prefix())
    features, sampling = random_features(10, dtype=torch.float32), Sampling(3, 1.0, 0.9, 70, seed=7)
    with_graphs, without = (RolloutEngine(question, sampling, (EOS,), 3) for _ in range(2))
    with_graphs.graphs = Graphs(most, Recorded)
    assert without.graphs is None
    ids = torch.arange(5)
    assert with_graphs.run(features, ids) == without.run(features, ids)
    assert with_graphs.graphs.captured > 4 and len(with_graphs.graphs) <= most
