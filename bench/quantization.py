"""The error of 4-bit weights: differences of log-probabilities with layers, or embedding and head, in NF4.

    python -m bench.quantization [--rollouts 4] [--json FILE]

The dense model samples completions as a run does (temperature 0.7, top-p 0.95); each quantised variant is then
teacher-forced on them, and log π of every token, at that temperature, is compared. `tiny` is the embedded supervisor on
pairs of drawn birds (it was trained through NF4), `smollm2` a pretrained 135M decoder with 49,152 tokens, if it
is installed (see bench/smollm2.py; its dense weights come from a 4-bit release).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench import smollm2, write_json
from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.pair import PairPrefix, PrefixCache
from saga_fast.supervisor.prompt import PROMPTS, build_prefix
from saga_fast.supervisor.replay import Group, Plan, replay_groups
from saga_fast.supervisor.rollout import Sampling, rollout_pairs
from saga_fast.tiny import SUPERVISOR
from saga_fast.tiny.birds import DrawnBirds
from saga_fast.towers import tower_of
from saga_fast.utils.errors import exit_on_input_error
from saga_fast.utils.images import to_pixels

VARIANTS = ("NF4 layers", "NF4 embedding and head", "both")
QUESTIONS = (
    "Describe a robin: its bill, its breast, its back and its legs.",
    "How do a hawk and an owl differ, and how can one tell them apart from far away?",
    "Write a JSON object with the colors of five common birds.",
)
# A question: its prefix, what stands for its images by decoder, and the tokens to sample.
Asked = tuple[PairPrefix, dict[str, VisualFeatures], int]


def tiny() -> tuple[dict[str, FrozenDecoder], list[Asked], tuple[int, ...]]:
    settings = {"dense": (False, False), "NF4 layers": (True, False), "NF4 embedding and head": (False, True)}
    loaded = {
        name: load_mllm(SUPERVISOR, quantize=layers, quantize_head=head)
        for name, (layers, head) in {**settings, "both": (True, True)}.items()
    }
    mllm = loaded["dense"]
    decoders = {name: variant.decoder for name, variant in loaded.items()}
    prefix = build_prefix(mllm.tokenizer, PROMPTS["drawn-birds"].instruction(), 49)
    prefix = PairPrefix.of(prefix, (7, 7))
    birds = DrawnBirds("test", 100, 4)
    pairs = [(i, i + 1 if i % 8 else i + 8) for i in range(0, 64, 4)]  # of one species and of two, in turn
    pixels = torch.stack([to_pixels(birds[i][0], 112) for pair in pairs for i in pair])
    with torch.no_grad():
        features = tower_of(mllm.visual)(pixels)
    return decoders, [(prefix, dict.fromkeys(decoders, features), 192)], mllm.eos_token_ids


def pretrained() -> tuple[dict[str, FrozenDecoder], list[Asked], tuple[int, ...]]:
    model, tokenizer = smollm2.load()
    parts = model.model, model.lm_head
    decoders = {"dense": FrozenDecoder(*parts), "NF4 embedding and head": FrozenDecoder(*parts, quantize_head=True)}
    smollm2.quantize_layers(model)
    decoders |= {"NF4 layers": FrozenDecoder(*parts), "both": FrozenDecoder(*parts, quantize_head=True)}
    asked = []
    for question in QUESTIONS:
        each = {name: smollm2.ask(decoder, tokenizer, question) for name, decoder in decoders.items()}
        asked.append((each["dense"][0], {name: features for name, (_, features) in each.items()}, 48))
    return decoders, asked, (tokenizer.eos_token_id,)


def drift(log_probs: Tensor, dense: Tensor) -> dict[str, float]:
    """log_probs, dense: (tokens,) of the same tokens."""
    difference = log_probs - dense
    return {
        "tokens": len(dense),
        "mean": difference.mean().item(),
        "mean_absolute": difference.abs().mean().item(),
        "root_mean_square": difference.square().mean().sqrt().item(),
        "quantile_95": difference.abs().quantile(0.95).item(),
    }


def measure(decoders: dict[str, FrozenDecoder], asked: list[Asked], eos: tuple[int, ...], rollouts: int) -> dict:
    log_probs: dict[str, list[Tensor]] = {name: [] for name in decoders}
    for prefix, features, tokens in asked:
        pairs = torch.arange(len(features["dense"].tokens) // 2)
        sampling = Sampling(rollouts, max_new_tokens=tokens)
        drawn = rollout_pairs(PrefixCache(decoders["dense"], prefix), features["dense"], pairs, sampling, eos)
        groups = [Group(group, [torch.zeros(len(c)) for c in group], {}) for group in drawn]
        for name, decoder in decoders.items():
            prefix_cache = PrefixCache(decoder, prefix)
            found = replay_groups(prefix_cache, features[name], groups, sampling.temperature, 0, Plan(4096))
            log_probs[name] += [each for group in found.log_probs for each in group]
    dense = torch.cat(log_probs.pop("dense"))
    return {name: drift(torch.cat(log_probs[name]), dense) for name in VARIANTS}


def models() -> Iterator[tuple[str, tuple]]:
    yield "tiny", tiny()
    if smollm2.installed():
        yield "smollm2", pretrained()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=4, help="completions sampled per question")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = {}
    print(f"{'drift of log π, in nats':34}{'tokens':>8}{'mean':>10}{'mean |.|':>10}{'rms':>10}{'95 %':>10}")
    for model, parts in models():
        figures[model] = measure(*parts, options.rollouts)
        for name, found in figures[model].items():
            tokens, *values = found.values()
            print(f"{model + ', ' + name:34}{tokens:8d}" + "".join(f"{value:10.4f}" for value in values))
    write_json(options.json, figures)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
