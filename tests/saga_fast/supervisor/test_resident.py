"""NF4 layers whose values stand dense beside them: the same policy, to the bit where a CPU multiplies alike."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor import decoder as decoder_module
from saga_fast.supervisor.decoder import Projection
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.pair import PairPrefix, PrefixCache
from saga_fast.supervisor.prompt import PROMPTS, build_prefix
from saga_fast.supervisor.replay import Group, Plan, replay_groups
from saga_fast.supervisor.rollout import Sampling, rollout_pairs
from saga_fast.tiny import SUPERVISOR


@pytest.fixture(scope="module")
def loaded():
    mllm = load_mllm(SUPERVISOR)
    prefix = PairPrefix.of(build_prefix(mllm.tokenizer, PROMPTS["drawn-birds"].instruction(), 4), (2, 2))
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(4, 4, mllm.decoder.embedding.shape[1], generator=generator) for _ in range(4)]
    return mllm.decoder, prefix, VisualFeatures(levels[0], tuple(levels[1:])), mllm.eos_token_ids


def resident(decoder):
    decoder = copy.copy(decoder)
    decoder.reside()
    return decoder


def dense(decoder):
    """As a dense checkpoint of the values NF4 stands for would load."""
    decoder = copy.copy(decoder)

    def of(part):
        return Projection((part.dense(torch.empty(part.shape)),), part.bias)

    decoder.layers = [
        dataclasses.replace(
            layer, **{name: of(part) for name, part in vars(layer).items() if isinstance(part, Projection)}
        )
        for layer in decoder.layers
    ]
    return decoder


def test_rollouts_are_those_of_dequantised_weights_to_the_bit(loaded):
    decoder, prefix, features, ends = loaded
    sampling = Sampling(3, 0.7, 0.95, 24, seed=1)
    found = [
        rollout_pairs(PrefixCache(kind(decoder), prefix), features, torch.arange(2), sampling, ends)
        for kind in (resident, dense)
    ]
    assert found[0] == found[1] and len({tuple(c) for group in found[0] for c in group}) > 1
    # And log π is NF4's own, to the rounding of a product.
    x = torch.randn(9, decoder.embedding.shape[1])
    for mine, layer in zip(resident(decoder).layers, decoder.layers):
        torch.testing.assert_close(mine.gate_up(x), layer.gate_up(x), rtol=1e-5, atol=1e-5)


def test_replays_are_those_of_dequantised_weights_to_the_bit(loaded):
    """And of packed ones to rounding: what stands before the first image goes through the packed product there."""
    decoder, prefix, features, _ = loaded
    gradients = []
    for kind in (resident, dense, lambda same: same):
        leaves = features.map(lambda level: level.clone().requires_grad_())
        groups = [Group([[5, 6, 7], [8, 9]], [torch.tensor([0.1, -0.2, 0.3]), torch.tensor([-0.1, 0.2])], {})] * 2
        for plan in (Plan(), Plan(1)):
            replay_groups(PrefixCache(kind(decoder), prefix), leaves, groups, 0.7, -1, plan)
        gradients.append([leaf.grad for leaf in leaves.levels])
    mine, its, packed = gradients
    assert all(map(torch.equal, mine, its)) and mine[0].any()
    for a, b in zip(mine, packed):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_what_stands_beside_them_is_not_of_the_fingerprint(loaded):
    decoder = resident(loaded[0])
    assert decoder.layers[0].down.resident is not None and loaded[0].layers[0].down.resident is None
    assert decoder.fingerprint() == loaded[0].fingerprint()


def test_few_rows_go_through_the_packed_product(loaded, monkeypatch):
    """As on a GPU, where that is the faster one."""
    part = resident(loaded[0]).layers[0].down
    part = dataclasses.replace(part, resident=torch.zeros_like(part.resident))
    monkeypatch.setitem(decoder_module.FUSED_ROWS, "cpu", 4)
    x = torch.randn(5, part.shape[1])
    assert part(x[:4]).any() and not part(x).any()
