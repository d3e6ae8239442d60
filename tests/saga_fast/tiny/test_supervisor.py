from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.verdict import parse
from saga_fast.tiny import SUPERVISOR
from saga_fast.tiny.birds import ATTRIBUTES, EASY, change, differing, species
from saga_fast.tiny.calibration import APART, VERDICT, Calibration, answers, calibrate, loss, with_verdict
from saga_fast.tiny.calibration import draw_pairs as calibration_pairs
from saga_fast.tiny.card import SAMPLING, answer_pairs, held_out_pairs, written_right
from saga_fast.tiny.language import (
    ORDERS,
    PROMPT,
    FakeNF4,
    FamilyPool,
    LanguageTrainer,
    answer,
    attention_of_rows,
    build_model,
    build_tokenizer,
    make_examples,
    make_text_examples,
    quantized_linears,
    tokenized_prompts,
)
from saga_fast.tiny.recipe import main
from saga_fast.tiny.tower import Pool, TowerTrainer, held_out, learning_rate, render, training_attributes
from saga_fast.utils.errors import InputError

ONCE = replace(SAMPLING, group_size=1)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SUPERVISOR)


@pytest.fixture(scope="module")
def mllm():
    return load_mllm(SUPERVISOR)


def pairs_and_pixels(count: int):
    pairs = [*held_out_pairs("same", count // 2), *held_out_pairs("stranger", count - count // 2)]
    birds = list(itertools.chain(*pairs))
    return pairs, render(birds, EASY, [(10**6, 77, i) for i in range(len(birds))]).pixels


@pytest.mark.parametrize("order", ORDERS)
def test_answers_are_well_formed_and_right_on_easy_pictures(mllm, order):
    pairs, pixels = pairs_and_pixels(32)
    texts = [group[0] for group in answer_pairs(mllm, pixels, order, sampling=ONCE)]
    verdicts = [parse(text, PROMPT) for text in texts]
    assert sum(verdict is not None and verdict.well_formed for verdict in verdicts) >= 31
    assert sum(v is not None and v.same == (a == b) for v, (a, b) in zip(verdicts, pairs)) >= 24
    right = [found for text, birds in zip(texts, pairs) if (found := written_right(text, birds)) is not None]
    assert np.mean(right) > 0.9


def test_generic_prompt_is_answered(mllm):
    _, pixels = pairs_and_pixels(8)
    verdicts = [
        parse(group[0], PROMPT.as_generic()) for group in answer_pairs(mllm, pixels, generic=True, sampling=ONCE)
    ]
    assert sum(verdict is not None and verdict.well_formed for verdict in verdicts) >= 7


def test_differences_follow_what_is_written(mllm):
    _, pixels = pairs_and_pixels(16)
    for group in answer_pairs(mllm, pixels, sampling=ONCE):
        said = json.loads(group[0])
        names = [name for name in ATTRIBUTES if said["bird_1"][name] != said["bird_2"][name]]
        if not names:
            assert said["same_species"] == "yes"
        elif len(names) > 4:
            assert said["same_species"] == "no"


def test_weights_fit_the_limits_and_the_card_is_there():
    assert sum(path.stat().st_size for path in SUPERVISOR.iterdir()) < 20e6
    model = Qwen3VLForConditionalGeneration.from_pretrained(SUPERVISOR)
    assert sum(parameter.numel() for parameter in model.parameters()) < 10e6
    card = json.loads((SUPERVISOR / "card.json").read_text())
    assert all(setting["well_formed"] >= 0.98 for setting in card["reading"].values())
    assert all(0.25 <= start["contributing"] <= 0.75 for start in card["contribution"].values())
    assert "## Recipe" in (SUPERVISOR / "README.md").read_text()


def test_tokenizer_writes_a_value_as_one_token_and_spells_anything(tokenizer):
    rng = np.random.default_rng(0)
    ids = tokenizer.encode(answer(PROMPT, *(2 * [training_attributes(rng)])), add_special_tokens=False)
    assert len(ids) < 130
    for text in ("héllo wörld 🐦", '{"bird_1": [1e5]}', "a  b\n\tc"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    values = {value for values in ATTRIBUTES.values() for value in values}
    assert all(len(tokenizer.encode(value, add_special_tokens=False)) == 1 for value in values)
    for tokenized in tokenized_prompts(tokenizer).values():
        assert tokenized.prompt.generic or tokenized.values.shape == (2, len(ATTRIBUTES))


def test_committed_tokenizer_is_the_recipes(tokenizer):
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_no_stream_draws_a_test_species():
    barred = held_out()
    assert {tuple(bird.values()) for bird in species(100, 0)[50:]} <= barred
    founder = species(100, 0)[50]

    class Rigged:
        """Draws a test species first, then whatever `rng` says."""

        def __init__(self, rng):
            self.rng = rng
            self.script = [ATTRIBUTES[name].index(founder[name]) for name in ATTRIBUTES]

        def integers(self, *bounds):
            return self.script.pop(0) if self.script else self.rng.integers(*bounds)

    assert training_attributes(Rigged(np.random.default_rng(0))) != founder
    pool = FamilyPool(TowerTrainer(), 0, 4)
    assert not {tuple(bird.values()) for n in range(200) for bird in pool._family(n)} & barred


def test_answer_names_the_differences_before_the_verdict():
    bird = training_attributes(np.random.default_rng(1))
    other = change(bird, 2, np.random.default_rng(2))
    said = json.loads(answer(PROMPT, bird, other))
    assert said["differences"] == ", ".join(differing(bird, other)) and said["same_species"] == "no"
    assert parse(answer(PROMPT, bird, bird), PROMPT).same


def test_miswritten_values_are_read_but_not_learned_from(tokenizer):
    torch.manual_seed(0)
    pool = FamilyPool(TowerTrainer(), 0, 4)
    pool.grow_to(4)
    tokenized = tokenized_prompts(tokenizer)[ORDERS[0], False]
    rng = np.random.default_rng(0)
    example = make_examples(tokenized, tokenizer, pool, 40, rng)
    at = len(tokenized.prefix) + tokenized.values.flatten()
    hidden = example.labels[:, at] == -100
    assert 0 < hidden.sum() <= 40 * 4
    assert (example.labels[:, : len(tokenized.prefix)] == -100).all()
    learned = example.labels != -100
    assert (example.labels[learned] == example.input_ids[learned]).all()
    assert example.features.tokens.shape == (80, 49, 192) and example.head_attention.shape == (40, 2, 12, 49)


def test_text_only_loss_teaches_the_language_model_alone(tokenizer):
    torch.manual_seed(0)
    model = build_model(tokenizer)
    trainer, tokenized = LanguageTrainer(model), tokenized_prompts(tokenizer)[ORDERS[1], False]
    written = make_text_examples(tokenizer, 6, np.random.default_rng(0))
    assert written.differ.any() and not written.differ.all(1).all()
    assert (written.answer[~written.real] == tokenizer.pad_token_id).all()
    trainer.compare(tokenized, written).backward()
    assert all(parameter.grad is None for parameter in model.model.visual.parameters())
    assert all(parameter.grad is not None for parameter in trainer.probes.parameters())


def test_pool_resumes_where_it_was():
    whole, resumed = Pool(3, 8), Pool(3, 8)
    whole.grow_to(5)
    whole.grow_to(13)
    resumed.grow_to(13)
    assert all((a == b).all() for a, b in zip(whole.batch, resumed.batch))
    batch = whole.sample(6, np.random.default_rng(0))
    assert batch.pixels.shape == (6, 3, 112, 112) and batch.areas.shape == (6, 12, 49)


def test_fake_nf4_is_what_bitsandbytes_stores(mllm):
    model = Qwen3VLForConditionalGeneration.from_pretrained(SUPERVISOR, dtype=torch.float32)
    weight = quantized_linears(model)[0].weight.detach().requires_grad_()
    faked = FakeNF4()(weight)
    stored = mllm.decoder.layers[0].qkv(torch.eye(weight.shape[1]))[:, : weight.shape[0]].T
    torch.testing.assert_close(faked.detach(), stored, rtol=0, atol=1e-6)
    faked.sum().backward()
    assert (weight.grad == 1).all()


def test_attention_of_rows_is_transformers():
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        SUPERVISOR, dtype=torch.float32, attn_implementation="eager"
    ).model.language_model
    kept = {}
    model.layers[-1].register_forward_pre_hook(
        lambda _, args, kwargs: kept.update(h=args[0], rotation=kwargs["position_embeddings"]), with_kwargs=True
    )
    out = model(input_ids=torch.randint(0, 500, (2, 9)), output_attentions=True)
    rows = torch.tensor([3, 8])
    ours = attention_of_rows(model.layers[-1], kept["h"], *kept["rotation"], rows)
    torch.testing.assert_close(ours, out.attentions[-1].mean(1)[:, rows], rtol=0, atol=1e-6)


def test_calibration_replaces_the_verdict_alone(tokenizer):
    bird = training_attributes(np.random.default_rng(0))
    for prompt, same in itertools.product((PROMPT, PROMPT.as_generic()), (True, False)):
        text = answer(prompt, bird, change(bird, 1, np.random.default_rng(1)))
        found = with_verdict(text, prompt.verdict_key, same)
        assert parse(found, prompt).same is same and parse(found, prompt).well_formed
        word = "yes" if same else "no"
        ids = [*tokenizer.encode(found, add_special_tokens=False), tokenizer.eos_token_id]
        assert found == text[: text.rindex(":")] + f': "{word}"}}' and tokenizer.decode(ids[-VERDICT]) == word
        assert with_verdict(text[:-1], prompt.verdict_key, same) is None
        assert with_verdict(text.replace(": ", ":"), prompt.verdict_key, same) is None
    assert with_verdict("[]", PROMPT.verdict_key, True) is None


def test_calibration_draws_pairs_as_a_run_does():
    pairs = calibration_pairs(4000, np.random.default_rng(0))
    counts = Counter(len(differing(a, b)) for a, b in pairs)
    assert all(abs(counts[apart] / 4000 - share) < 0.03 for apart, share in APART.items() if apart is not None)
    assert held_out().isdisjoint(tuple(bird.values()) for bird, _ in pairs)


def test_calibration_teaches_the_language_model_its_verdict(mllm, tmp_path):
    """Its loss is that of the answer alone, and its steps change the language model; the tower stays as it was."""
    given = next(iter(answers(mllm, 0, 8)))
    assert {parse(text, PROMPT).same for group in given.texts for text in group} <= {True, False}
    model = Qwen3VLForConditionalGeneration.from_pretrained(SUPERVISOR, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SUPERVISOR)
    tokenized, trainer = tokenized_prompts(tokenizer)[ORDERS[0], False], LanguageTrainer(model)
    with torch.no_grad():
        verdict, tokens = loss(trainer, tokenized, tokenizer, given, [2], np.random.default_rng(0))
        text = given.texts[2][np.random.default_rng(0).integers(len(given.texts[2]))]
        ids = torch.tensor([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])
        whole = torch.cat([tokenized.prefix.input_ids.flatten(), ids])[None]
        features = given.features.select(torch.tensor([4, 5])).map(Tensor.float)
        expected = trainer.hidden(tokenized, whole, features)[0, -len(ids) - 1 : -1] @ model.lm_head.weight.T
        nats = -expected.log_softmax(-1)[torch.arange(len(ids)), ids]
    assert verdict.item() == pytest.approx(nats[-VERDICT].item(), abs=1e-5)
    assert tokens.item() == pytest.approx(nats.mean().item(), abs=1e-5)

    tower = {name: p.clone() for name, p in model.model.visual.state_dict().items()}
    trained, _ = calibrate(SUPERVISOR, tmp_path, calibration=Calibration(pairs=8, steps=5, batch=2))
    assert all((p == tower[name]).all() for name, p in trained.model.visual.state_dict().items())
    assert any((p != q).any() for p, q in zip(trained.lm_head.parameters(), model.lm_head.parameters()))
    (line,) = map(json.loads, (tmp_path / "calibration.jsonl").read_text().splitlines())
    assert line["step"] == 5 and line["verdict"] > 0 and line["tokens"] > 0


def test_learning_rate_warms_up_holds_and_falls():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[60] == 1.0 and rates[-1] < 0.05
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_evaluating_a_folder_without_a_model_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--evaluate", str(tmp_path)])
    assert stop.value.code == 2 and "config.json" in capsys.readouterr().err
    assert issubclass(InputError, ValueError)
