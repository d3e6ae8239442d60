"""Samples of a step: the supervisor's completions and attention; sampling does not change the run."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from saga_fast.encoder import Encoder
from saga_fast.losses.alignment import attention_targets
from saga_fast.report.samples import describe, overlays, sheet
from saga_fast.supervisor.credit import gradient_at_tokens, gradient_by_attribute
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.prompt import PROMPTS
from saga_fast.supervisor.replay import Group
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.tiny import SUPERVISOR
from saga_fast.tiny.birds import DrawnBirds
from saga_fast.train import Pair
from saga_fast.utils.images import to_pixels

SIZE = 112


@pytest.fixture(scope="module")
def step():
    """An encoder, its supervisor, and two pairs of a bird with itself, whose answers are called right and wrong."""
    torch.manual_seed(0)
    mllm = load_mllm(SUPERVISOR)
    encoder = Encoder.from_tower(mllm.visual, "attention", 32, SIZE)
    sampling = Sampling(3, 0.7, 0.95, 192, 0)
    supervisor = Supervisor(mllm, PROMPTS["drawn-birds"], "images_first", encoder.tower.grid(SIZE, SIZE), sampling)
    birds = DrawnBirds("test", 4, 2)
    pixels = torch.stack([to_pixels(birds[i][0], SIZE) for i in (0, 0, 2, 2)])
    with torch.no_grad():
        features = encoder.tower(pixels)
    completions = supervisor.rollout(features, torch.arange(2))
    rewards, _ = supervisor.judge(completions, [True, True])
    assert rewards.any(1).all(), "no answer is right, so this tests little"
    advantages = torch.tensor([0.8, -0.5, -0.3])
    pairs = [
        Pair(two, pixels[two], features.select(two), completions[i], rewards[i], advantages)
        for i, two in enumerate(torch.arange(4).split(2))
    ]
    return encoder, supervisor, pairs


@pytest.fixture(scope="module")
def described(step):
    encoder, supervisor, pairs = step
    before = torch.get_rng_state()
    found = describe(supervisor, encoder, pairs, contextlib.nullcontext())
    assert torch.equal(torch.get_rng_state(), before), "looking drew random numbers"
    assert all(parameter.grad is None for parameter in encoder.parameters()), "looking left gradients"
    return found


def test_answers_and_verdicts_are_the_supervisor_s_own(step, described):
    _, supervisor, pairs = step
    for pair, shown in zip(pairs, described["pairs"]):
        assert shown["same"] is True
        for completion, reward, answer in zip(pair.completions, pair.rewards, shown["rollouts"]):
            assert "".join(answer["tokens"]) == supervisor.tokenizer.decode(completion)
            assert len(answer["tokens"]) == len(completion) == len(answer["gradient"])
            assert answer["verdict"] == ("yes" if reward else "no") and answer["reward"] == reward
            for item, name, at in answer["attributes"]:
                assert name in supervisor.prompt.attributes
                value = "".join(answer["tokens"][t] for t in at)
                assert f'"{name}": "{value.strip()}"' in "".join(answer["tokens"]).split('"bird_2"')[item]


def test_shares_of_the_gradient_add_up_to_the_pair_s(step, described):
    encoder, supervisor, pairs = step
    shown = described["pairs"][0]["rollouts"]
    assert sum(sum(answer["gradient"]) for answer in shown) == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        features = encoder.tower(pairs[0].pixels)
    credit = gradient_by_attribute(supervisor, features, pairs[0].completions, pairs[0].advantages)
    for name in ("crown color", "leg color"):
        share = sum(a["gradient"][t] for a in shown for _, of, at in a["attributes"] if of == name for t in at)
        total = sum(of.at_token for of in credit.values())
        everywhere = sum(a["gradient"][t] for a in shown for _, _, at in a["attributes"] for t in at)
        assert share / everywhere == pytest.approx(credit[name].at_token / total, rel=1e-2)


def test_the_gradient_at_a_token_is_autograd_s():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    chosen, weights = torch.tensor([0, 3, 3, 6, 1]), torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    log_probs = logits.log_softmax(1).gather(1, chosen[:, None]).squeeze(1)
    (weights * log_probs).sum().backward()
    expected = logits.grad.gather(1, chosen[:, None]).squeeze(1).abs()
    torch.testing.assert_close(gradient_at_tokens(weights, log_probs.detach()), expected)


def test_maps_of_attributes_make_the_target_that_the_pooler_learns(step, described):
    encoder, supervisor, pairs = step
    shown, pair = described["pairs"][0], pairs[0]
    g = shown["attention"]["rollout"]
    assert pair.rewards[g] == 1
    with torch.no_grad():
        features = encoder.tower(pair.pixels)
        beta = encoder.pooler.attention(features.tokens)
    none = [torch.zeros(len(completion)) for completion in pair.completions]
    spans = tuple(
        [at for tokens in item.values() for at in tokens]
        for item in supervisor.attribute_positions(pair.completions)[g]
    )
    entries = supervisor.replay(features, [Group(pair.completions, none, {g: spans})]).attention
    for entry in entries:
        maps = shown["attention"]["images"][entry.image]
        counts = {of: len(at) for item, of, at in shown["rollouts"][g]["attributes"] if item == entry.image}
        assert maps.keys() == counts.keys()
        mean = sum(counts[of] * torch.tensor(weights) for of, weights in maps.items()) / sum(counts.values())
        query = torch.zeros(len(entry.weights), dtype=torch.int64)
        torch.testing.assert_close(mean, attention_targets(entry.weights, query, 1)[0], rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(torch.tensor(shown["beta"][entry.image]), beta[entry.image, 0], rtol=1e-3, atol=1e-4)


def test_pictures_are_the_pairs_and_what_lies_over_them(step, described):
    *_, pairs = step
    rows = sheet(pairs)
    assert rows.shape == (2 * SIZE, 2 * SIZE, 3)
    assert torch.equal(rows[SIZE:, SIZE:], pairs[1].pixels[1].permute(1, 2, 0))
    picture = overlays(described, rows)
    assert picture.size == (3 * SIZE, 2 * SIZE)
    plain = torch.tensor(list(picture.crop((0, SIZE, SIZE, 2 * SIZE)).tobytes())).view(SIZE, SIZE, 3)
    assert torch.equal(plain, pairs[0].pixels[1].permute(1, 2, 0).long())
    assert overlays({"pairs": [{"attention": None, "beta": None}]}, rows) is None


def test_a_generic_prompt_and_a_pooler_without_attention_have_no_maps(step):
    encoder, supervisor, pairs = step
    pooled = Encoder(encoder.tower.model.config.to_diff_dict(), "mean", 32, SIZE)
    grid = encoder.tower.grid(SIZE, SIZE)
    generic = PROMPTS["drawn-birds"].as_generic()
    other = Supervisor(load_mllm(SUPERVISOR), generic, "images_first", grid, supervisor.sampling)
    found = describe(other, pooled, pairs, contextlib.nullcontext())
    for pair in found["pairs"]:
        assert pair["attention"] is None and pair["beta"] is None
        assert not any(answer["attributes"] for answer in pair["rollouts"])


def test_a_pooler_of_attributes_is_kept_attribute_by_attribute(step, described):
    _, supervisor, pairs = step
    names = supervisor.prompt.attributes
    torch.manual_seed(0)
    encoder = Encoder.from_tower(load_mllm(SUPERVISOR).visual, "attributes", 36, SIZE, names)
    torch.nn.init.normal_(encoder.pooler.query)
    found = describe(supervisor, encoder, pairs, contextlib.nullcontext())
    assert [{**pair, "beta": None} for pair in found["pairs"]] == [{**p, "beta": None} for p in described["pairs"]]
    for pair, shown in zip(pairs, found["pairs"]):
        with torch.no_grad():
            beta = encoder.pooler.attention(pair.features.tokens)
        for image in (0, 1):
            assert tuple(shown["beta"][image]) == names
            kept = torch.tensor([*shown["beta"][image].values()])
            torch.testing.assert_close(kept, beta[image], rtol=1e-3, atol=1e-4)
    rows = sheet(pairs)
    lit = np.asarray(overlays(found, rows))[:, -SIZE:]
    flat = [sum(column) / len(names) for column in zip(*found["pairs"][0]["beta"][0].values())]
    alone = {**found, "pairs": [{**found["pairs"][0], "beta": [flat, flat]}]}
    np.testing.assert_array_equal(lit[:SIZE], np.asarray(overlays(alone, rows))[:SIZE, -SIZE:])
