"""Shared-prefix rollouts: greedy equals transformers' generate, samples fit the model's distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor import rollout as rollout_module
from saga_fast.supervisor.pair import PrefixCache
from saga_fast.supervisor.rollout import RolloutEngine, Sampling, rollout_pairs

from .tiny_models import EOS, decoder_of, oracle_inputs, pair_prefix, random_features, random_model

GREEDY = Sampling(group_size=2, temperature=0.0, top_p=1.0, max_new_tokens=24)


@pytest.fixture(scope="module")
def model():
    return random_model(torch.float32, seed=3)


def generate(model, features: VisualFeatures, **settings) -> list[int]:
    prefix = pair_prefix()
    model.generation_config.pad_token_id = 0
    with oracle_inputs(model, prefix, features, []) as inputs:
        out = model.generate(**inputs, eos_token_id=EOS, **settings)
    return out[0, len(prefix) :].tolist()


@pytest.mark.parametrize("slots", [1, 4, 6])
def test_greedy_equals_generate_token_for_token(model, slots):
    """Also where pairs wait for a slot, and come in beside others that are further on."""
    features = random_features(12, dtype=torch.float32)
    decoder, prefix = decoder_of(model), pair_prefix()
    ours = rollout_pairs(PrefixCache(decoder, prefix), features, torch.arange(6), GREEDY, (EOS,), slots)
    for i, group in enumerate(ours):
        pair = features.select(torch.tensor([2 * i, 2 * i + 1]))
        theirs = generate(model, pair, max_new_tokens=GREEDY.max_new_tokens, do_sample=False)
        assert group == [theirs, theirs]
    assert len({tuple(group[0]) for group in ours}) > 1, "equal completions for all images would hide a mixed-up cache"


def test_ends_at_the_end_token_and_drops_finished_pairs(model, monkeypatch):
    """Some pairs end early, leave the batch, and change nothing for those that stay."""
    monkeypatch.setattr(rollout_module, "SYNC_EVERY", 2)
    features = random_features(12, dtype=torch.float32)
    decoder, prefix, sampling = decoder_of(model), pair_prefix(), replace(GREEDY, max_new_tokens=20)
    whole = rollout_pairs(PrefixCache(decoder, prefix), features, torch.arange(6), sampling, (-1,))
    # Take for the end token one that comes soon in some completions, late or never in others.
    first = [tuple(group[0]) for group in whole]
    end = max(range(61), key=lambda t: len({(c.index(t) if t in c else 99) for c in first}))
    ended = rollout_pairs(PrefixCache(decoder, prefix), features, torch.arange(6), sampling, (end,))
    expected = [[c[: c.index(end) + 1] if end in c else c for c in group] for group in whole]
    assert ended == expected
    assert len({len(group[0]) for group in ended}) > 1


def test_a_rollout_does_not_depend_on_its_neighbours(model):
    prefix_cache, features = PrefixCache(decoder_of(model), pair_prefix()), random_features(6, dtype=torch.float32)
    sampling = Sampling(group_size=3, temperature=1.0, top_p=0.9, max_new_tokens=12, seed=7)
    together = rollout_pairs(prefix_cache, features, torch.tensor([5, 9, 11]), sampling, (EOS,))
    alone = rollout_pairs(prefix_cache, features.select(torch.tensor([2, 3])), torch.tensor([9]), sampling, (EOS,))
    assert alone[0] == together[1]
    assert len({tuple(c) for group in together for c in group}) > 1
    other_seed = rollout_pairs(prefix_cache, features, torch.tensor([5, 9, 11]), replace(sampling, seed=8), (EOS,))
    assert other_seed != together


def test_rollouts_that_stop_leave_the_others_as_they_are(model):
    """Pairs are dropped and break while others are at other lengths; what comes after them reads none of theirs."""
    features = random_features(10, dtype=torch.float32)
    sampling = Sampling(group_size=3, temperature=1.0, top_p=0.9, max_new_tokens=60, seed=7)
    prefix_cache = PrefixCache(decoder_of(model), pair_prefix())
    whole = rollout_pairs(prefix_cache, features, torch.arange(5), sampling, (EOS,))
    engine, done = RolloutEngine(prefix_cache, sampling, (EOS,), slots=3), {}

    def admit(*pairs: int) -> None:
        engine.admit(features.select(torch.tensor([2 * i + side for i in pairs for side in (0, 1)])), list(pairs))

    admit(0, 1)
    done |= {pair.pair_id: pair for pair in engine.advance()}
    admit(2)
    engine.own_v[1][engine.rows.index(next(row for row in engine.rows if row.pair.pair_id == 1))] = float("nan")
    done |= {pair.pair_id: pair for pair in engine.advance()}
    assert done[1].broken and engine.free_slots >= 1
    (dropped,) = engine.drop([0])
    assert [c == w[: len(c)] for c, w in zip(dropped.completions, whole[0])] == [True] * 3 and dropped.tokens > 40
    engine.own_v[2][len(engine.rows) :] = float("nan")  # as broken rows may leave it
    admit(3, 4)
    while engine.pairs:
        done |= {pair.pair_id: pair for pair in engine.advance()}
    assert [done[i].completions for i in (2, 3, 4)] == whole[2:] and engine.free_slots == 3
    with pytest.raises(ValueError, match=r"rollouts of pairs \[9\] met logits that are not finite"):
        engine.run(VisualFeatures(features.tokens[:2] * float("nan"), ()), torch.tensor([9]))


@pytest.mark.parametrize("limit", [1, 2, 16, 17, 18])
def test_the_limit_is_kept(model, limit):
    features, settings = random_features(2, dtype=torch.float32), replace(GREEDY, max_new_tokens=limit)
    prefix_cache = PrefixCache(decoder_of(model), pair_prefix())
    (long,) = rollout_pairs(prefix_cache, features, torch.arange(1), GREEDY, (-1,))
    assert rollout_pairs(prefix_cache, features, torch.arange(1), settings, (-1,)) == [[c[:limit] for c in long]]


def test_sampled_tokens_have_the_models_distribution(model):
    """First two tokens of 4,000 rollouts of one pair against the exact nucleus probabilities, by chi-square."""
    decoder, prefix, features = decoder_of(model), pair_prefix(), random_features(2, dtype=torch.float32)
    sampling = Sampling(group_size=4000, temperature=0.7, top_p=0.8, max_new_tokens=2)
    drawn = rollout_pairs(PrefixCache(decoder, prefix), features, torch.tensor([0]), sampling, (-1,))[0]

    def nucleus(completion: list[int]) -> torch.Tensor:
        with oracle_inputs(model, prefix, features, completion) as inputs:
            logits = model(**inputs).logits[0, -1].double()
        p = (logits / sampling.temperature).softmax(-1)
        order = p.argsort(descending=True)
        keep = order[: int((p[order].cumsum(0) < sampling.top_p).sum()) + 1]
        return torch.zeros_like(p).index_put((keep,), p[keep]) / p[keep].sum()

    def fits(tokens: list[int], p: torch.Tensor) -> float:
        seen = torch.tensor(tokens).bincount(minlength=len(p))
        assert seen[p == 0].sum() == 0, "a token outside the nucleus was drawn"
        expected = p[p > 0] * len(tokens)
        return chisquare(seen[p > 0].numpy(), expected.numpy() * seen.sum().item() / expected.sum().item()).pvalue

    assert fits([c[0] for c in drawn], nucleus([])) > 1e-3
    common = max({c[0] for c in drawn}, key=[c[0] for c in drawn].count)
    assert fits([c[1] for c in drawn if c[0] == common], nucleus([common])) > 1e-3
