"""Packed replay against transformers, run rollout by rollout, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor import frozen_pass
from saga_fast.supervisor.pair import PrefixCache
from saga_fast.supervisor.replay import Group, Plan, replay_groups

from .tiny_models import (
    TOKENS,
    as_leaves,
    decoder_of,
    float64_transformers,
    oracle_inputs,
    pair_prefix,
    random_features,
    random_model,
)

TEMPERATURE = 0.7
ANCHOR = 2


@pytest.fixture(autouse=True)
def float64_norms(monkeypatch):
    float64_transformers(monkeypatch)


@pytest.fixture(scope="module")
def model():
    return random_model()


def make_groups(lengths: list[list[int]], seed: int = 0) -> list[Group]:
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for counts in lengths:
        completions = [torch.randint(10, 61, (n,), generator=generator).tolist() for n in counts]
        coefficients = [torch.randn((), generator=generator, dtype=torch.float64).expand(n) for n in counts]
        described = {g: ([n // 3], [0, n - 1]) for g, n in enumerate(counts) if g % 2 == 0}
        groups.append(Group(completions, coefficients, described))
    return groups


def oracle(model, prefix, features, groups, anchor):
    """Loss, log-probs [group][g], anchor attention by (group, rollout, image); gradients land in `features`."""
    loss, log_probs, attention = 0.0, [], {}
    for i, group in enumerate(groups):
        log_probs.append([])
        for g, completion in enumerate(group.completions):
            pair = VisualFeatures(
                features.tokens[2 * i : 2 * i + 2], tuple(d[2 * i : 2 * i + 2] for d in features.deepstack)
            )
            with oracle_inputs(model, prefix, pair, completion) as inputs:
                out = model(**inputs, output_attentions=True)
            predicted = (out.logits[0, len(prefix) - 1 : -1] / TEMPERATURE).log_softmax(-1)
            log_prob = predicted.gather(1, torch.tensor(completion)[:, None])[:, 0]
            loss = loss + (group.coefficients[g] * log_prob).sum()
            log_probs[-1].append(log_prob.detach())
            for image, positions in enumerate(group.attribute_token_positions.get(g, ())):
                rows = out.attentions[anchor][0].mean(0)[len(prefix) + torch.tensor(positions)]
                attention[i, g, image] = rows[:, prefix.images[image]].detach()
    loss.backward()
    return loss.detach(), log_probs, attention


def assert_equal_to_oracle(model, lengths, anchor=ANCHOR, **settings):
    prefix, groups = pair_prefix(), make_groups(lengths)
    ours, theirs = (as_leaves(random_features(2 * len(groups))) for _ in range(2))
    result = replay_groups(PrefixCache(decoder_of(model), prefix), ours, groups, TEMPERATURE, anchor, **settings)
    loss, log_probs, attention = oracle(model, prefix, theirs, groups, anchor)
    torch.testing.assert_close(result.loss, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.log_probs, log_probs, rtol=1e-9, atol=1e-9)
    for mine, other in zip((ours.tokens, *ours.deepstack), (theirs.tokens, *theirs.deepstack)):
        assert other.grad.norm() > 1e-3, "the oracle's gradient must not vanish, or equality says nothing"
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-10)
    assert {(a.group, a.rollout, a.image) for a in result.attention} == set(attention)
    for entry in result.attention:
        torch.testing.assert_close(
            entry.weights, attention[entry.group, entry.rollout, entry.image], rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize(
    "lengths",
    [[[5]], [[1, 1]], [[4, 9, 1, 6]], [[3, 5], [7, 2]], [[2, 8, 3], [1], [6, 6]]],
    ids=["one", "length-1", "ragged", "two-groups", "unequal-G"],
)
def test_equals_transformers_rollout_by_rollout(model, lengths):
    assert_equal_to_oracle(model, lengths)


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("token_budget", [1 << 16, 60, 9, 1], ids=["one-pack", "packs", "slices", "rollouts"])
def test_packing_slices_and_recompute_change_nothing(model, recompute, token_budget, monkeypatch):
    monkeypatch.setattr(frozen_pass, "MLP_ROWS", 5)
    prefix_recompute = {"none": "full", "mlp": "none", "full": "mlp"}[recompute]
    plan = Plan(token_budget, recompute, prefix_recompute)
    assert_equal_to_oracle(model, [[3, 5, 1], [7, 2, 4], [6]], plan=plan)


@pytest.mark.parametrize("token_budget", [1 << 16, 9])
def test_the_anchor_may_be_the_last_layer_where_fewer_rows_ask(model, token_budget):
    assert_equal_to_oracle(model, [[3, 5], [7, 2, 4]], anchor=3, plan=Plan(token_budget))


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3))
def test_equals_transformers_on_drawn_shapes(lengths):
    with pytest.MonkeyPatch.context() as patch:
        float64_transformers(patch)
        assert_equal_to_oracle(random_model(), lengths)


def test_without_gradient_it_only_reads(model):
    prefix, groups, features = pair_prefix(), make_groups([[4, 3]]), random_features(2)
    result = replay_groups(PrefixCache(decoder_of(model), prefix), features, groups, TEMPERATURE, ANCHOR)
    assert features.tokens.grad is None and not result.loss.requires_grad
    assert len(result.attention) == 2 and result.attention[0].weights.shape == (1, TOKENS)


def test_no_weight_gets_a_gradient(model):
    decoder = decoder_of(model)
    before = decoder.fingerprint()
    features = as_leaves(random_features(2))
    replay_groups(PrefixCache(decoder, pair_prefix()), features, make_groups([[4, 3]]), TEMPERATURE, ANCHOR)
    assert decoder.fingerprint() == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_in_bf16_many_slices_round_no_worse_than_one_pack():
    """The gradient of the prefix's keys and values is a sum over slices: in bf16 that of 400 alike stands still."""
    completion, coefficients = [17, 23], torch.ones(2, dtype=torch.float64)
    groups, prefix = [Group([completion] * 400, [coefficients] * 400, {})], pair_prefix()

    def gradient(dtype: torch.dtype, token_budget: int) -> torch.Tensor:
        features = as_leaves(random_features(2))
        prefix_cache = PrefixCache(decoder_of(random_model(layers=2).to(dtype)), prefix)
        replay_groups(prefix_cache, features, groups, TEMPERATURE, ANCHOR, Plan(token_budget))
        return torch.cat([level.grad.double().flatten() for level in features.levels])

    exact = gradient(torch.float64, 1 << 16)
    whole, sliced = ((gradient(torch.bfloat16, budget) - exact).norm() / exact.norm() for budget in (1 << 16, 1))
    assert 1e-4 < whole < 0.1 and sliced < 1.5 * whole, (whole, sliced)


def test_the_largest_go_first_and_each_is_as_if_alone(model, monkeypatch):
    """What the first leaves to a caching allocator has room for all that follow: whole groups, and a group's slices."""
    lengths = [[3, 4], [9, 5], [2, 1], [6, 6]]
    prefix, groups, features = pair_prefix(), make_groups(lengths), random_features(8)
    prefix_cache, first = PrefixCache(decoder_of(model), prefix), []
    forward = frozen_pass.FrozenPass.forward
    monkeypatch.setattr(
        frozen_pass.FrozenPass,
        "forward",
        lambda run, h, *args, **kw: first.append(len(h)) or forward(run, h, *args, **kw),
    )

    def run(features, groups, budget):
        leaves = features.map(lambda level: level.clone().requires_grad_())
        return replay_groups(prefix_cache, leaves, groups, 0.7, 1, Plan(budget)), [leaf.grad for leaf in leaves.levels]

    rest = len(prefix) - prefix.static_length
    found, gradients = run(features, groups, rest + 14)
    assert first == [rest + n for n in (14, 12, 7, 3)]
    for i, group in enumerate(groups):
        alone, its = run(features.select(torch.tensor([2 * i, 2 * i + 1])), [group], rest + 14)
        assert all(map(torch.equal, found.log_probs[i], alone.log_probs[0]))
        assert all(torch.equal(level[2 * i : 2 * i + 2], own) for level, own in zip(gradients, its))
    first.clear()
    run(features.select(torch.arange(2)), make_groups([[2, 7, 4]]), 5)
    assert first == [rest, 7, 4, 2]
