"""Third part of the recipe: the verdict, calibrated on the model's own readings.

The language model has learned to judge its own text: it takes every difference that it writes for real, or forgives it
by chance. Here it answers about pictures that hide some attributes, and only the verdict of each sampled answer is
replaced by the true one. So it learns how often two pictures with such descriptions show the same bird, and its
uncertainty comes from the pictures. The other tokens are its own samples at temperature 1: their expected gradient is
zero, so its descriptions do not change.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.mllm import Mllm, load_mllm
from saga_fast.supervisor.prompt import Order
from saga_fast.supervisor.rollout import Sampling
from saga_fast.tiny.birds import BENCHMARK, HARD, change
from saga_fast.tiny.card import answer_pairs, tower_features
from saga_fast.tiny.language import (
    ORDERS,
    PROMPT,
    FakeNF4,
    LanguageTrainer,
    TokenizedPrompt,
    quantized_linears,
    tokenized_prompts,
    unquantize,
)
from saga_fast.tiny.tower import Log, learning_rate, render, training_attributes
from saga_fast.towers import tower_of

SAMPLING = Sampling(group_size=2, temperature=1.0, top_p=1.0, max_new_tokens=220)
VERDICT = 3  # position of its token from an answer's end: yes or no, `"}`, end of turn
APART = {0: 0.5, 1: 0.15, 2: 0.15, None: 0.2}  # share of pairs by how many attributes differ; None: strangers


class Answers(NamedTuple):
    """The model's answers about n pairs with the same prompt. question: order, and whether the prompt is generic.
    features: bf16, of 2n pictures. texts: of each pair, with the true verdict."""

    question: tuple[Order, bool]
    features: VisualFeatures
    texts: list[list[str]]


def draw_pairs(count: int, rng: np.random.Generator) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Pairs of birds as a run draws them: half of one bird, the others siblings and strangers."""
    kinds = rng.choice(len(APART), count, p=list(APART.values()))
    pairs = []
    for kind in kinds:
        bird, apart = training_attributes(rng), list(APART)[kind]
        other = training_attributes(rng) if apart is None else change(bird, apart, rng)
        pairs.append((bird, other))
    return pairs


def with_verdict(text: str, key: str, same: bool) -> str | None:
    """The answer with this verdict in place of its own; None for an answer that is not JSON in the trained form."""
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    if not isinstance(answer, dict) or json.dumps(answer, ensure_ascii=False) != text:
        return None
    return json.dumps({**answer, key: "yes" if same else "no"}, ensure_ascii=False)


def answers(mllm: Mllm, seed: int, count: int) -> Iterator[Answers]:
    """The model's answers about `count` pairs per prompt, half of them in BENCHMARK pictures, half in HARD ones."""
    for (number, order), generic in itertools.product(enumerate(ORDERS), (False, True)):
        prompt = PROMPT.as_generic() if generic else PROMPT
        for part, nuisance in enumerate((BENCHMARK, HARD)):
            stream = (seed, 6, number, generic, part)
            pairs = draw_pairs(count // 2, np.random.default_rng(stream))
            birds = list(itertools.chain(*pairs))
            pixels = render(birds, nuisance, [(*stream, i) for i in range(len(birds))]).pixels
            same = [a == b for a, b in pairs]
            texts = [
                [text for text in (with_verdict(said, prompt.verdict_key, alike) for said in group) if text]
                for group, alike in zip(answer_pairs(mllm, pixels, order, generic, SAMPLING), same)
            ]
            features = tower_features(tower_of(mllm.visual), pixels)
            yield Answers((order, generic), features.map(Tensor.bfloat16), texts)


def loss(
    trainer: LanguageTrainer,
    question: TokenizedPrompt,
    tokenizer: PreTrainedTokenizerFast,
    given: Answers,
    pairs: Sequence[int],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy, in nats, of the verdicts, and of all tokens of the answers; one answer of each of `pairs`."""
    texts = [given.texts[pair][rng.integers(len(given.texts[pair]))] for pair in pairs]
    rows = [torch.tensor([*tokenizer.encode(t, add_special_tokens=False), tokenizer.eos_token_id]) for t in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    prefix = question.prefix.input_ids.expand(len(rows), -1)
    images = torch.tensor([[2 * pair, 2 * pair + 1] for pair in pairs]).flatten()
    features = given.features.select(images).map(Tensor.float)
    h = trainer.hidden(question, torch.cat([prefix, ids.clamp_min(0)], 1), features)
    logits = trainer.model.lm_head(h[:, prefix.shape[1] - 1 : -1]).float()
    nats = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=-100, reduction="none").view_as(ids)
    verdicts = torch.stack([row[len(written) - VERDICT] for row, written in zip(nats, rows)])
    return verdicts.mean(), nats.sum() / (ids >= 0).sum()


@dataclass(frozen=True)
class Calibration:
    """pairs: that the model answers about, per prompt. batch: answers per step."""

    pairs: int = 768
    steps: int = 300
    batch: int = 12
    peak_lr: float = 3e-4


def calibrate(
    folder: Path, out: Path, seed: int = 0, calibration: Calibration = Calibration()
) -> tuple[Qwen3VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """Train the language model of the model in `folder` through NF4, logging to OUT/calibration.jsonl."""
    torch.manual_seed(seed + 2)
    given = list(answers(load_mllm(folder), seed, calibration.pairs))
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for linear in quantized_linears(model):
        parametrize.register_parametrization(linear, "weight", FakeNF4())
    trainer, asked = LanguageTrainer(model), tokenized_prompts(tokenizer)
    trained = [*trainer.language.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=calibration.peak_lr, betas=(0.9, 0.98), weight_decay=0.0)
    log = Log(out / "calibration.jsonl")
    for step in range(calibration.steps):
        rng = np.random.default_rng((seed, step, 7))
        some = given[rng.choice(len(given), p=np.array([4, 4, 1, 1, 4, 4, 1, 1]) / 20)]
        readable = [pair for pair, texts in enumerate(some.texts) if texts]
        optimizer.param_groups[0]["lr"] = learning_rate(step, calibration.steps, calibration.peak_lr, 20)
        with torch.autocast("cpu", torch.bfloat16):
            chosen = rng.choice(readable, calibration.batch).tolist()
            verdict, tokens = loss(trainer, asked[some.question], tokenizer, some, chosen, rng)
        optimizer.zero_grad()
        (verdict + tokens).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 5 == 4:
            log(step=step + 1, question=some.question, verdict=verdict.item(), tokens=tokens.item())
    unquantize(model)
    return model, tokenizer
