"""The trainer with a perfect supervisor: an upper bound for GRPO.

    python -m bench.oracle [PRESET] [the flags of saga_fast.train …]

Nothing is sampled. For each pair the correct answer, from the drawn birds' own attributes, is replayed once with
advantage 1, so that the policy gradient is that of its likelihood. Everything else is `saga_fast.train`. Works for
drawn birds alone, which come with attributes. `bench.ablation` runs it as the row "oracle".
"""

from __future__ import annotations

import torch
from torch import Tensor

from saga_fast import train
from saga_fast.data import Batch
from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.draw import Draw, JudgedPair, draw_pairs
from saga_fast.tiny.birds import DrawnBirds, differing
from saga_fast.utils.errors import InputError, exit_on_input_error


def right_answer(t: train.Training, birds: DrawnBirds, a: int, b: int) -> list[int]:
    """Token ids, end token included, of the correct answer about images a and b."""
    seen_a, seen_b = birds.attributes(a), birds.attributes(b)
    names = differing(seen_a, seen_b)
    confidence, reasoning = {
        0: ("high", "no attribute differs"),
        1: ("low", "one attribute differs"),
        2: ("medium", "two attributes differ"),
    }.get(len(names), ("high", "many attributes differ"))
    text = t.supervisor.prompt.answer(
        seen_a, seen_b, ", ".join(names) or "none", confidence, reasoning, birds.labels[a] == birds.labels[b]
    )
    tokenizer = t.supervisor.tokenizer
    return [*tokenizer.encode(text, add_special_tokens=False), min(t.supervisor.eos_token_ids)]


def rollout_batch(
    t: train.Training, batch: Batch, features: VisualFeatures, first_id: int, wanted: int, contribution_rate: float
) -> tuple[Tensor, Draw]:
    """As `train.rollout_batch`, but the first `wanted` pairs have the correct answer, and all contribute."""
    data = t.config.data
    if data.name != "drawn-birds":
        raise InputError(f"data.name: {data.name!r}; only drawn-birds knows the right answer")
    birds = DrawnBirds("train", data.species, data.images_per_species, data.seed, data.nuisance)
    rows = draw_pairs(batch.labels, t.config.rollout.pairs_per_batch, t.config.seed, first_id)[:wanted]
    one: Tensor = torch.ones(1)
    judged = []
    for a, b in rows.tolist():
        completions = [right_answer(t, birds, batch.indices[a], batch.indices[b])]
        attribute_values = t.supervisor.attribute_values(completions)
        judged.append(JudgedPair(completions, one, one.bool(), one, attribute_values, None, True, False, {}))
    classes = [(a, b) for a, b in batch.labels[rows].tolist()]
    return rows, Draw(judged, classes)


def main() -> None:
    train.rollout_batch = rollout_batch
    train.main()


if __name__ == "__main__":
    with exit_on_input_error():
        main()
