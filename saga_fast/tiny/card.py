"""Measurements of the tiny supervisor, by the code that a run uses: NF4 weights, packed prefixes, rollouts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from saga_fast.encoder import VisionTower, VisualFeatures
from saga_fast.retrieval.metrics import retrieval_metrics
from saga_fast.supervisor.mllm import Mllm, load_mllm
from saga_fast.supervisor.pair import PairPrefix, PrefixCache
from saga_fast.supervisor.prompt import Order, build_prefix
from saga_fast.supervisor.rollout import Sampling, rollout_pairs
from saga_fast.supervisor.verdict import attribute_spans, parse
from saga_fast.tiny.birds import ATTRIBUTES, NUISANCES, DrawnBirds, Nuisance, change
from saga_fast.tiny.language import ORDERS, PROMPT, LanguageTrainer, answer, tokenized_prompts
from saga_fast.tiny.tower import GRID, render, training_attributes
from saga_fast.towers import tower_of

KINDS = {"same": 0, "sibling, 1 attribute": 1, "sibling, 2 attributes": 2, "stranger": None}
SAMPLING = Sampling(group_size=8, temperature=0.7, top_p=0.95, max_new_tokens=220)
HELD_OUT = 10**6  # seeds of pictures that no training stream reaches


@torch.no_grad()
def tower_features(tower: VisionTower, pixels: Tensor) -> VisualFeatures:
    """The tower over many pictures, 64 at a time."""
    parts = [tower(chunk) for chunk in pixels.split(64)]
    return VisualFeatures(
        torch.cat([p.tokens for p in parts]), tuple(map(torch.cat, zip(*(p.deepstack for p in parts))))
    )


def answer_pairs(
    mllm: Mllm, pixels: Tensor, order: Order = ORDERS[0], generic: bool = False, sampling: Sampling = SAMPLING
) -> list[list[str]]:
    """Answers [pair][g] about pixels (2n, 3, S, S): pictures a and b of pair 0, of pair 1, …"""
    prompt = PROMPT.as_generic() if generic else PROMPT
    prefix = PairPrefix.of(build_prefix(mllm.tokenizer, prompt.instruction(), GRID**2, order), (GRID, GRID))
    prefix_cache = PrefixCache(mllm.decoder, prefix)
    features = tower_features(tower_of(mllm.visual), pixels)
    texts = []
    for pairs in torch.arange(len(pixels) // 2).split(32):
        images = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
        groups = rollout_pairs(prefix_cache, features.select(images), pairs, sampling, mllm.eos_token_ids)
        texts += [[mllm.tokenizer.decode(ids, skip_special_tokens=True) for ids in group] for group in groups]
    return texts


def held_out_pairs(kind: str, count: int) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Pairs of birds of one of KINDS, from a seed that no training stream reaches."""
    rng, apart = np.random.default_rng((HELD_OUT, list(KINDS).index(kind))), KINDS[kind]
    pairs = []
    for _ in range(count):
        bird = training_attributes(rng)
        pairs.append((bird, training_attributes(rng) if apart is None else change(bird, apart, rng)))
    return pairs


def written_right(text: str, birds: tuple[dict[str, str], dict[str, str]]) -> np.ndarray | None:
    """Which values of an answer are right: bool (2, 12); None where it does not describe both birds."""
    spans = attribute_spans(text, PROMPT)
    if any(len(item) < len(ATTRIBUTES) for item in spans):
        return None
    return np.array(
        [[text[slice(*item[name])] == bird[name] for name in ATTRIBUTES] for item, bird in zip(spans, birds)]
    )


def reading(mllm: Mllm, nuisance: Nuisance, order: Order, count: int) -> dict[str, Any]:
    """Accuracy by attribute, well-formed rate; by kind of pair the verdict's accuracy and the share of groups whose
    verdicts disagree."""
    right, formed, kinds = [], [], {}
    for kind in KINDS:
        pairs = held_out_pairs(kind, count)
        seeds = [(HELD_OUT, list(KINDS).index(kind), i) for i in range(2 * count)]
        texts = answer_pairs(mllm, render(list(itertools.chain(*pairs)), nuisance, seeds).pixels, order)
        judged = []
        for birds, group in zip(pairs, texts):
            verdicts = [parse(text, PROMPT) for text in group]
            formed += [verdict is not None and verdict.well_formed for verdict in verdicts]
            judged.append([verdict is not None and verdict.same == (birds[0] == birds[1]) for verdict in verdicts])
            right += [found for text in group if (found := written_right(text, birds)) is not None]
        rewards = np.array(judged)
        kinds[kind] = {"verdict": rewards.mean(), "contributing": (rewards.min(1) != rewards.max(1)).mean()}
    accuracy = np.concatenate(right).mean(0)
    return {
        "attributes": dict(zip(ATTRIBUTES, accuracy.tolist())),
        "mean": float(accuracy.mean()),
        "well_formed": float(np.mean(formed)),
        "pairs": {kind: {name: float(x) for name, x in found.items()} for kind, found in kinds.items()},
    }


def contribution(mllm: Mllm, nuisance: str, batches: int = 6, pairs_per_batch: int = 16) -> dict[str, Any]:
    """Rewards, and the share of contributing pairs, at the start of a run: balanced pairs from class-balanced
    micro-batches (16 classes x 4) of the training species."""
    birds = DrawnBirds("train", nuisance=nuisance)
    labels = np.array(birds.labels)
    rng = np.random.default_rng(HELD_OUT)
    pairs = []
    for _ in range(batches):
        classes = rng.choice(len(birds.classes), 16, replace=False)
        rows = np.stack([rng.choice(np.flatnonzero(labels == c), 4, replace=False) for c in classes])
        for i in range(pairs_per_batch):
            first, second = rng.choice(16, 2, replace=False)
            same = rng.choice(4, 2, replace=False)
            pairs.append(rows[first, same] if i % 2 else np.array([rows[first, same[0]], rows[second, same[1]]]))
    pixels = torch.stack([_pixels(birds[i][0]) for i in np.concatenate(pairs)])
    same = np.array([labels[a] == labels[b] for a, b in pairs])
    texts = answer_pairs(mllm, pixels)
    rewards = np.array(
        [[(v := parse(t, PROMPT)) is not None and v.same == s for t in group] for group, s in zip(texts, same)]
    )
    spread = rewards.min(1) != rewards.max(1)
    return {
        "pairs": len(pairs),
        "contributing": float(spread.mean()),
        "contributing, same": float(spread[same].mean()),
        "contributing, different": float(spread[~same].mean()),
        "reward, same": float(rewards[same].mean()),
        "reward, different": float(rewards[~same].mean()),
    }


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


@torch.no_grad()
def attention_shares(folder: Path, nuisance: Nuisance, count: int = 64) -> dict[str, Any]:
    """Share of the last layer's attention, renormalised over the image, inside the described attribute's mask.

    `value`: rows of the value tokens; `before`: rows whose output is the value; `uniform`: the mask's area.
    Teacher-forced on true answers about siblings, unquantised weights.
    """
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer, tokenized = LanguageTrainer(model), tokenized_prompts(tokenizer)[ORDERS[0], False]
    pairs = held_out_pairs("sibling, 1 attribute", count)
    batch = render(list(itertools.chain(*pairs)), nuisance, [(HELD_OUT, 9, i) for i in range(2 * count)])
    answers = [torch.tensor(tokenizer.encode(answer(PROMPT, *birds), add_special_tokens=False)) for birds in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=tokenizer.pad_token_id)
    trainer.hidden(
        tokenized,
        torch.cat([tokenized.prefix.input_ids.expand(count, -1), ids], 1),
        tower_features(tower_of(model.model.visual), batch.pixels),
    )
    areas = batch.areas.unflatten(0, (count, 2))
    seen = areas.sum(-1) > 0
    shares = {"uniform": areas.mean(-1)}
    for name, ahead in (("value", 0), ("before", 1)):
        shares[name] = (trainer.value_attention(tokenized, ahead) * areas).sum(-1)
    return {
        "mean": {name: share[seen].mean().item() for name, share in shares.items()},
        "attributes": {
            attribute: {name: share[:, :, i][seen[:, :, i]].mean().item() for name, share in shares.items()}
            for i, attribute in enumerate(ATTRIBUTES)
        },
    }


def frozen_retrieval(mllm: Mllm) -> dict[str, float]:
    """Retrieval on the benchmark's test species by the mean of the frozen tower's tokens."""
    birds = DrawnBirds("test")
    features = tower_features(tower_of(mllm.visual), torch.stack([_pixels(birds[i][0]) for i in range(len(birds))]))
    embeddings = torch.nn.functional.normalize(features.tokens.mean(1), dim=-1)
    return retrieval_metrics(embeddings, torch.tensor(birds.labels))


def measure(folder: Path, pairs: int = 32) -> dict[str, Any]:
    """Everything the card states, from the weights in `folder`; `pairs` of each kind, 8 rollouts each."""
    mllm = load_mllm(folder)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in Qwen3VLForConditionalGeneration.from_pretrained(folder).parameters())
    }
    found["reading"] = {
        f"{name}, {order}": reading(mllm, NUISANCES[name], order, pairs)
        for name, order in itertools.product(("easy", "benchmark", "hard"), ORDERS)
    }
    found["contribution"] = {name: contribution(mllm, name) for name in ("benchmark", "hard")}
    found["attention"] = {name: attention_shares(folder, NUISANCES[name]) for name in ("easy", "benchmark")}
    found["frozen_retrieval"] = frozen_retrieval(mllm)
    return found


def _svg_line(points: list[tuple[float, float]], color: str, box: tuple[float, float, float, float], top: float) -> str:
    """A polyline of (x, y) with y in 0..top, in box (left, top, width, height)."""
    left, above, width, height = box
    last = max(x for x, _ in points)
    path = " ".join(f"{left + width * x / last:.1f},{above + height * (1 - min(y, top) / top):.1f}" for x, y in points)
    return f'<polyline fill="none" stroke="{color}" points="{path}"/>'


def curves_svg(curves: dict[str, list[dict[str, Any]]]) -> str:
    """The parts' curves by step, side by side."""
    panels = (
        ("tower", "tower: loss / 3 (grey), accuracy (blue)", (("loss", "#999", 3.0), ("accuracy", "#06c", 1.0))),
        (
            "language",
            "language model: loss / 0.5 (grey), pointing / 4 (blue)",
            (("loss", "#999", 0.5), ("point", "#06c", 4.0)),
        ),
        (
            "calibration",
            "calibration: verdict (grey), own answers / 0.2 (blue), nats",
            (("verdict", "#999", 1.0), ("tokens", "#06c", 0.2)),
        ),
    )
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="1080" height="240" font-family="sans-serif" font-size="11">'
    ]
    for i, (half, title, lines) in enumerate(panels):
        box = (20 + 360 * i, 30, 320, 180)
        parts.append('<rect x="{}" y="{}" width="{}" height="{}" fill="none" stroke="#ccc"/>'.format(*box))
        parts.append(
            f'<text x="{box[0]}" y="20">{title}</text>'
            f'<text x="{box[0]}" y="228">steps 0 to {curves[half][-1]["step"]}</text>'
        )
        parts += [
            _svg_line([(p["step"], p[name]) for p in curves[half]], color, box, top) for name, color, top in lines
        ]
    return "\n".join([*parts, "</svg>\n"])


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


CARD = """---
license: apache-2.0
tags: [image-text-to-text, synthetic]
---
# Tiny supervisor: a Qwen3-VL of {parameters:.1f} M parameters that describes drawn birds

Random weights trained from nothing by `python -m saga_fast.tiny.recipe --out DIR` (seed {seed}, two CPU cores). It
answers the `drawn-birds` prompt of `saga_fast.supervisor.prompt`, structured and generic, in both prompt orders, and
knows nothing else. The numbers below are printed by `python -m saga_fast.tiny.recipe --evaluate` and stand, with the
curves, in `card.json`.

## Recipe
1. **Tower** (4 blocks, 128 wide, patch 8, three DeepStack levels): {tower[step]} steps of 48 pictures of random
   combinations in the EASY nuisance, bf16 autocast. Each of the four outputs has one attention-pooled classifier per
   attribute, thrown away later. A term of weight 0.15 asks that pooling to rest on the attribute's mask, as grounding
   data teaches large models. Last logged: loss {tower[loss]:.3f}, {tower[accuracy]:.1%} of the batch's values right.
2. **Language model** (4 layers, 192 wide, 6 heads on 3 key-value heads): {language[step]} steps of 8 pairs (40% same
   bird, 40% siblings one or two attributes apart, 20% strangers) in MODERATE pictures, on the frozen tower's tokens
   with noise added, loss on the answer only. In 15% of descriptions one or two values are written wrong and not learned
   from; differences and verdict follow the writing, except that one difference (35%) or two (15%) are forgiven: a
   description may be misread, so the verdict keeps some doubt where a word or two decide. A term of weight 0.1 draws
   the last layer's head-averaged attention, at a value and at the token before it, to where the tower's own classifier
   looked for that attribute: the language model sees no mask. Each step also reads 48 random descriptions without
   pictures and learns what follows them. Two probes, thrown away, ask after layer 1 at each value of item 2 whether
   item 1's differs, and after layer 2 which attributes differ. The last 150 steps train through NF4 with nested absmax,
   straight-through. Last logged: cross-entropy {language[loss]:.4f} a token, on noisy features.
3. **Calibration**: {calibration[step]} steps of 12 answers that the model itself samples at temperature 1 about
   BENCHMARK and HARD pictures of pairs (50% same bird, 30% siblings, 20% strangers), with the true verdict in place of
   its own, through NF4: how often two pictures that it reads so show one bird. Last logged: cross-entropy of a verdict
   {calibration[verdict]:.3f}, of its own answers {calibration[tokens]:.3f} a token.

The weights are those of one run of this recipe, from nothing to the end; the third part began with the bfloat16 weights
of the second.

No stream draws a test species of the benchmark (seeds 0 to 9, 100 species). Pictures measured below are of seeds that
no stream reaches.

![curves](curves.svg)

## Reading, on held-out pictures
NF4 weights, temperature 0.7, top-p 0.95, 8 rollouts a pair. Percent of written values that are right:

{accuracy}

Verdicts right / groups of 8 whose rewards are not all equal, percent:

{verdicts}

## At the start of a run
Balanced pairs from micro-batches of 16 training species x 4 pictures, percent:

{start}

The mean of the frozen tower's tokens retrieves the benchmark's test species with Recall@1 {retrieval[recall_at_1]:.3f},
MAP@R {retrieval[map_at_r]:.3f}, NMI {retrieval[nmi]:.3f}: there is something left to learn.

## Where it looks
Share of decoder layer 3's head-averaged attention, renormalised over the image's 49 tokens, that falls inside the mask
of the attribute (area of the mask in each token's cell), percent: rows of the value's token, rows before it (whose
output is the value), and what uniform attention would give.

{attention_rows}
"""


def write_card(found: dict[str, Any], curves: dict[str, list[dict[str, Any]]], seed: int) -> str:
    """The model card, in Markdown, from what `measure` found."""
    settings, reading = list(found["reading"]), found["reading"].values()
    accuracy = [[name, *(_percent(s["attributes"][name]) for s in reading)] for name in ATTRIBUTES]
    accuracy.append(["**mean**", *(_percent(s["mean"]) for s in reading)])
    accuracy.append(["well-formed answers", *(_percent(s["well_formed"]) for s in reading)])
    verdicts = [[kind, *(" / ".join(map(_percent, s["pairs"][kind].values())) for s in reading)] for kind in KINDS]
    rows, attention = ("value", "before", "uniform"), found["attention"]
    attention_rows = [
        [name, *(_percent(shares["attributes"][name][row]) for shares in attention.values() for row in rows)]
        for name in ATTRIBUTES
    ]
    attention_rows.append(
        ["**mean**", *(_percent(shares["mean"][row]) for shares in attention.values() for row in rows)]
    )
    shares = [key for key in next(iter(found["contribution"].values())) if key != "pairs"]
    start = [[key, *(_percent(of[key]) for of in found["contribution"].values())] for key in shares]
    return CARD.format(
        parameters=found["parameters"] / 1e6,
        seed=seed,
        tower=curves["tower"][-1],
        language=curves["language"][-1],
        accuracy=_table(["attribute", *settings], accuracy),
        verdicts=_table(["pair", *settings], verdicts),
        calibration=curves["calibration"][-1],
        start=_table(["", *found["contribution"]], start),
        retrieval=found["frozen_retrieval"],
        attention_rows=_table(["attribute", *(f"{row}, {name}" for name in attention for row in rows)], attention_rows),
    )
