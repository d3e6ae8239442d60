"""Credit assignment: shares of gradient and attention on the right attributes, measured by the drawn birds' masks.

    python -m bench.credit [--run runs/drawn-birds] [--pairs 32] [--json FILE]

On pairs of sibling species of the test half, before and after a run, from rollouts whose rewards differ:

  gradient   the share of the advantage-weighted log-prob gradient on value tokens of attributes in which the two birds
             differ, beside the share of value tokens that those are (an even spread). *At the token* it is |A (1 - π)|,
             the gradient of A log π in the token's own logit, summed over rollouts. *At the images* it is the norm of
             the gradient at visual tokens and DeepStack features, summed over rollouts.
  attention  the share, of the supervisor's attention target and of the pooler's β, on the tokens that the mask of the
             named attribute touches, beside the share of tokens it touches (uniform attention).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from bench import write_json
from saga_fast.config import TINY, Config
from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.supervisor.credit import attention_by_attribute, gradient_by_attribute
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.prompt_file import load_prompt
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.tiny import SUPERVISOR
from saga_fast.tiny.birds import DrawnBirds, differing
from saga_fast.utils.errors import InputError, exit_on_input_error
from saga_fast.utils.images import to_pixels
from saga_kernels import group_advantage

WAVE = 16  # pairs rolled out at a time


def sibling_pairs(birds: DrawnBirds, seed: int):
    """Endless pairs (i, j) of images of two species that differ in one or two attributes."""
    rng = np.random.default_rng(seed)
    while True:
        i, j = (int(k) for k in rng.integers(len(birds), size=2))
        if 1 <= len(differing(birds.attributes(i), birds.attributes(j))) <= 2:
            yield i, j


def measure(encoder: Encoder, supervisor: Supervisor, birds: DrawnBirds, wanted: int, seed: int) -> dict[str, float]:
    """Shares of gradient and attention over `wanted` contributing sibling pairs."""
    grid = encoder.tower.grid(encoder.image_size, encoder.image_size)
    share, found, drawn = defaultdict(list), 0, 0
    stream = sibling_pairs(birds, seed)
    while found < wanted and drawn < 40 * wanted:
        pairs = [next(stream) for _ in range(WAVE)]
        pixels = torch.stack([to_pixels(birds[i][0], encoder.image_size) for pair in pairs for i in pair])
        with torch.no_grad():
            features = encoder.tower(pixels)
            pooled = encoder.pooler.kind in ("attributes", "attention")
            beta = encoder.pooler.attention(features.tokens).unflatten(2, grid).numpy() if pooled else None
        completions = supervisor.rollout(features, drawn + torch.arange(WAVE))
        rewards, _ = supervisor.judge(completions, [False] * WAVE)
        advantages, contributes, _ = group_advantage(rewards)
        drawn += WAVE
        for p in contributes.nonzero().flatten().tolist()[: wanted - found]:
            found += 1
            pair = features.select(torch.tensor([2 * p, 2 * p + 1]))
            gradient_shares(
                supervisor, pair, completions[p], advantages[p], differing(*map(birds.attributes, pairs[p])), share
            )
            cells = [birds.touched(image, grid) for image in pairs[p]]
            attention_shares(supervisor, pair, completions[p], rewards[p], cells, share)
            for image in (0, 1):
                for name, cell in cells[image].items():
                    if beta is not None:
                        query = encoder.attributes.index(name) if encoder.attributes else 0
                        share["pooler, inside the mask"].append(float(beta[2 * p + image, query][cell].sum()))
                    share["even attention, inside the mask"].append(float(cell.mean()))
    figures = {name: float(np.mean(values)) for name, values in share.items()}
    return {"pairs drawn": drawn, "pairs contributing": found, **figures}


def gradient_shares(supervisor, pair: VisualFeatures, completions, advantages, differ: list[str], share) -> None:
    """Share on tokens of attributes that differ: of the tokens, of the gradient at the token, and at the images."""
    credit = gradient_by_attribute(supervisor, pair, completions, advantages)
    titles = {"tokens": "tokens", "at_token": "gradient at the token", "at_images": "gradient at the images"}
    for field, title in titles.items():
        if total := sum(getattr(of, field) for of in credit.values()):
            on = sum(getattr(of, field) for name, of in credit.items() if name in differ)
            share[f"{title}, on attributes that differ"].append(on / total)


def attention_shares(supervisor, pair: VisualFeatures, completions, rewards, cells, share) -> None:
    """Share of each value token's attention, renormalised over its image, that its attribute's mask touches."""
    for entry in attention_by_attribute(supervisor, pair, completions, rewards.nonzero().flatten().tolist()):
        if entry.attribute in cells[entry.image]:
            inside = entry.weights.numpy()[:, cells[entry.image][entry.attribute].flatten()].sum(1)
            share["attention target, inside the mask"] += inside.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/drawn-birds"))
    parser.add_argument("--pairs", type=int, default=32, help="contributing pairs to measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.run / "encoder").is_dir():
        raise InputError(f"--run: {options.run} holds no encoder/; train one with `python -m saga_fast.train`")
    config = Config.from_dict(json.loads((options.run / "config.json").read_text())["config"])
    if config.data.name != "drawn-birds":
        raise InputError(
            f"--run: {options.run} was trained on {config.data.name!r}; only drawn-birds knows its attributes"
        )

    mllm = load_mllm(
        SUPERVISOR if config.supervisor.model == TINY else config.supervisor.model, config.supervisor.quantize
    )
    prompt = load_prompt(config.supervisor.prompt)
    torch.manual_seed(config.seed)
    own = config.encoder
    encoders = {
        "before": Encoder.from_tower(
            mllm.visual, own.pooler, own.embedding_dim, config.data.image_size, prompt.attributes
        ),
        "after": Encoder.from_pretrained(options.run / "encoder"),
    }
    rollout = config.rollout
    supervisor = Supervisor(
        mllm,
        prompt,
        config.supervisor.order,
        encoders["before"].tower.grid(config.data.image_size, config.data.image_size),
        Sampling(rollout.group_size, rollout.temperature, rollout.top_p, rollout.max_new_tokens, options.seed),
        config.supervisor.anchor_layer,
    )
    data = config.data
    birds = DrawnBirds("test", data.species, data.images_per_species, data.seed, data.nuisance)
    figures = {
        when: measure(encoder.eval(), supervisor, birds, options.pairs, options.seed)
        for when, encoder in encoders.items()
    }
    names = list(dict.fromkeys(name for measured in figures.values() for name in measured))
    width = max(map(len, names))
    print(f"{'':{width}}  {'before':>8}  {'after':>8}")
    for name in names:
        cells = [figures[when].get(name, float("nan")) for when in figures]
        shown = [f"{cell:8d}" if isinstance(cell, int) else f"{100 * cell:7.1f}%" for cell in cells]
        print(f"{name:{width}}  {'  '.join(shown)}")
    write_json(options.json, {"run": str(options.run), "figures": figures})


if __name__ == "__main__":
    with exit_on_input_error():
        main()
