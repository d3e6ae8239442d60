"""A pretrained decoder in ours: SmolLM2-135M, 49,152 tokens, against transformers on the same weights."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch

from bench import smollm2
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.pair import PrefixCache
from saga_fast.supervisor.replay import Group, replay_groups
from saga_fast.supervisor.rollout import Sampling, rollout_pairs

pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.skipif(not smollm2.installed(), reason="needs the extra real-weights"),
]
QUESTIONS = ("What is the capital of France?", "Describe a robin: its bill, its breast and its legs.")


@pytest.fixture(scope="module")
def loaded():
    return smollm2.load()


def test_greedy_text_and_log_probs_equal_transformers(loaded):
    model, tokenizer = loaded
    decoder = FrozenDecoder(model.model, model.lm_head)
    sampling = Sampling(group_size=2, temperature=0.0, top_p=1.0, max_new_tokens=16)
    texts = []
    for question in QUESTIONS:
        prefix, features = smollm2.ask(decoder, tokenizer, question)
        (group,) = rollout_pairs(
            PrefixCache(decoder, prefix), features, torch.tensor([0]), sampling, (tokenizer.eos_token_id,)
        )
        whole = model.generate(prefix.input_ids[None], max_new_tokens=16, do_sample=False)
        theirs = whole[0, len(prefix) :]
        assert group == [theirs.tolist()] * 2

        groups = [Group(group, [torch.zeros(len(c)) for c in group], {})]
        found = replay_groups(PrefixCache(decoder, prefix), features, groups, 1.0, anchor_layer=0).log_probs[0]
        logits = model(whole).logits[0, len(prefix) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, theirs[:, None])[:, 0]
        for log_probs in found:
            torch.testing.assert_close(log_probs, expected, rtol=1e-3, atol=1e-5)
        texts.append(tokenizer.decode(group[0]))
    assert "Paris" in texts[0]


def test_gradient_at_the_visual_rows_equals_transformers(loaded):
    model, tokenizer = loaded
    decoder = FrozenDecoder(model.model, model.lm_head)
    prefix, features = smollm2.ask(decoder, tokenizer, QUESTIONS[1])
    completion = tokenizer.encode("A robin has a red breast.", add_special_tokens=False)
    leaf = features.tokens.clone().requires_grad_()
    group = Group([completion], [torch.ones(len(completion))], {})
    replay_groups(PrefixCache(decoder, prefix), features._replace(tokens=leaf), [group], 1.0, anchor_layer=0)

    ids = torch.cat([prefix.input_ids, torch.tensor(completion)])
    embedded = model.model.embed_tokens(ids).requires_grad_()
    logits = model(inputs_embeds=embedded[None]).logits[0, len(prefix) - 1 : -1]
    logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum().backward()
    expected = embedded.grad[prefix.images.flatten()].view_as(leaf)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_four_bits_drift_as_their_weights_do(loaded):
    """The drift is reported, and is that of the rounded weights: transformers with those, dense, says the same. Last of
    this file, as it changes the model."""
    model, tokenizer = loaded
    completion = tokenizer.encode("The capital of France is Paris, on the river Seine.", add_special_tokens=False)
    group = Group([completion], [torch.zeros(len(completion))], {})

    def log_probs(quantize_head: bool = False) -> torch.Tensor:
        decoder = FrozenDecoder(model.model, model.lm_head, quantize_head)
        prefix, features = smollm2.ask(decoder, tokenizer, QUESTIONS[0])
        return replay_groups(PrefixCache(decoder, prefix), features, [group], 1.0, 0).log_probs[0][0]

    dense, head = log_probs(), log_probs(quantize_head=True)
    smollm2.quantize_layers(model)
    layers = log_probs()
    for linear in model.model.layers.modules():
        if isinstance(linear, torch.nn.Linear):
            rounded = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            linear.weight = torch.nn.Parameter(rounded, requires_grad=False)
    ids = smollm2.ask(FrozenDecoder(model.model, model.lm_head), tokenizer, QUESTIONS[0])[0].input_ids.tolist()
    logits = model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    torch.testing.assert_close(layers, expected, rtol=1e-3, atol=1e-4)
    drift = {"NF4 layers": layers - dense, "NF4 embedding and head": head - dense}
    for name, difference in drift.items():
        print(f"mean |drift of log π|, {name}: {difference.abs().mean():.3f}")
        assert 1e-3 < difference.abs().mean() < 1
