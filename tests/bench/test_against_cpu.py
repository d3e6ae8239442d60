"""Without a GPU both sides are the CPU, and must agree; what differs is told."""

from __future__ import annotations

import copy

import pytest
import torch

from bench import against_cpu
from bench.against_cpu import difference, drawing, judged
from saga_fast.supervisor import rollout


@pytest.fixture(scope="module")
def step():
    return against_cpu.step(against_cpu.tiny())


def test_a_step_that_is_given_its_own_draws_is_itself(step):
    """So a GPU that is given the CPU's is held against the same step."""
    assert step["log"]["pairs_replayed"] == 2 and step["log"]["applied"]
    again = against_cpu.step(against_cpu.tiny(), step["drawn"])
    found = difference(again, step)
    assert found.keys() >= {"gradient_tower", "gradient_pooler", "loss_dml", "loss_lm", "loss_kl"}
    assert not judged(found, dict.fromkeys(found, 1e-6), again, step)["wrong"]


def test_it_is_the_given_draws_that_are_replayed(step):
    drawn = list(step["drawn"].values())
    token, places = max(set(drawn), key=drawn.count), max(place for _, place in step["drawn"])
    same = {(row, place): token for row in range(1024) for place in range(places + 1)}  # of all pairs that are drawn
    assert against_cpu.step(against_cpu.tiny(), same)["log"]["pairs_replayed"] == 0, "rollouts all alike teach nothing"


@pytest.mark.parametrize("part", ["tower", "pooler"])
def test_a_wrong_gradient_is_told(step, part):
    wrong = copy.deepcopy(step)
    name = next(name for name in wrong["gradients"] if name.startswith(part))
    wrong["gradients"][name] += wrong["gradients"][name].norm() + 1
    found = difference(wrong, step)
    told = judged(found, dict.fromkeys(found, 1e-2), wrong, step)["wrong"]
    assert len(told) == 1 and told[0].startswith(f"gradient_{part}: ")


def test_a_gradient_that_is_not_finite_and_a_step_without_replay_are_told(step):
    wrong = copy.deepcopy(step)
    wrong["gradients"][next(iter(wrong["gradients"]))][:] = torch.nan
    found = difference(wrong, step)
    assert judged(found, dict.fromkeys(found, 1e-2), wrong, step)["wrong"]
    wrong["log"]["pairs_replayed"] = 0
    assert judged({}, {}, step, wrong)["wrong"][-1] == "no pair contributed: nothing was replayed"


def test_what_is_not_in_the_draws_is_drawn():
    logits, rows = torch.eye(3)[:2] * 50, torch.arange(2)
    with drawing({(0, 0): 2}):
        assert rollout.sample_top_p(logits, 1.0, 0.9, 0, rows, torch.zeros(2, dtype=torch.int64)).tolist() == [2, 1]
    with drawing(None) as drawn:
        rollout.sample_top_p(logits, 1.0, 0.9, 0, rows, torch.tensor([4, 5]))
    assert drawn() == {(0, 4): 0, (1, 5): 1}


def test_rollouts_by_few_graphs_and_many_are_those_without():
    found = against_cpu.graphs()
    assert not found["wrong"] and found["cases"]["three graphs"]["captured"] > found["cases"]["graphs"]["captured"]


def test_the_small_model_takes_a_step_in_both_precisions(tmp_path):
    """Its rewards are given: random weights earn none."""
    wide = against_cpu.small_side(str(tmp_path), "fp32", None)
    narrow = against_cpu.small_side(str(tmp_path), "bf16", wide["drawn"])
    found = difference(narrow, wide)
    assert wide["log"]["pairs_replayed"] == 2 and 0 < found["gradient_tower"] < 0.5
