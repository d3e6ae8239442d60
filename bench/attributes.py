"""How well each block of an embedding represents its attribute, and how well its query attends to that attribute.

    python -m bench.attributes --encoder RUN/encoder [--paper RUN/encoder] [--json FILE]

Drawn birds come with attributes and masks. On test species, for each of the twelve attributes:

  precision@10   of the ten images nearest to a query, the share that have its value of the attribute: nearest by the
                 attribute's block alone, by the whole vector, and drawn at random. Every image queries all the others.
                 *Other species* leaves out those of the query's own, which agree in everything.
  β              the share of the attribute's attention that lies on the tokens its mask touches, in images where it is
                 visible; beside it that of the one β of `--paper`, an encoder with the paper's pooler, and of uniform
                 β.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import write_json
from saga_fast.config import PRESETS
from saga_fast.data import PixelLoader
from saga_fast.encoder import Encoder
from saga_fast.tiny.birds import ATTRIBUTES, DrawnBirds
from saga_fast.utils.errors import InputError, exit_on_input_error

K = 10
BATCH = 64  # images that go through the encoder at once
GOALS = {"block": 0.85, "beta": 0.80}  # means over attributes


@torch.no_grad()
def embed_with_attention(encoder: Encoder, birds: DrawnBirds) -> tuple[Tensor, np.ndarray]:
    """(z (n, D_e), β (n, M, rows, columns)) of all images; M = 1 in the paper's pooler."""
    grid, embeddings, attentions = encoder.tower.grid(encoder.image_size, encoder.image_size), [], []
    images = PixelLoader(birds, encoder.image_size, 0, name="drawn birds")
    for batch in images.stream([rows.tolist() for rows in torch.arange(len(birds)).split(BATCH)]):
        tokens = encoder.tower(batch.pixels.to(encoder.device)).tokens
        embeddings.append(encoder.pooler(tokens).cpu())
        attentions.append(encoder.pooler.attention(tokens).unflatten(2, grid).cpu())
    return torch.cat(embeddings), torch.cat(attentions).numpy()


def precision(z: Tensor, values: Tensor, left_out: Tensor | None = None) -> float:
    """Of the K images of largest inner product with each query, the share that have its value, the mean over queries.

    z: (n, d), any length; values: (n,); left_out: (n, n), pairs that are not looked at. An image never finds itself.
    """
    similarity = (z @ z.T).fill_diagonal_(-torch.inf)
    if left_out is not None:
        similarity.masked_fill_(left_out, -torch.inf)
    found = similarity.topk(K).indices
    return float((values[found] == values[:, None]).double().mean())


def chance(values: Tensor, left_out: Tensor) -> float:
    """The share of images, without those left out, that have a query's value; the mean over queries."""
    same = (values == values[:, None]) & ~left_out
    return float((same.sum(1) / (~left_out).sum(1)).mean())


def shares_in_masks(attentions: np.ndarray, queries: dict[str, int], birds: DrawnBirds) -> dict[str, list[float]]:
    """Attribute -> the mean share of its query's attention on the tokens its mask touches, and of uniform attention."""
    inside = defaultdict(list)
    for image, attention in enumerate(attentions):
        for name, cells in birds.touched(image, attention.shape[1:]).items():
            if name in queries:
                inside[name].append((attention[queries[name]][cells].sum(), cells.mean()))
    return {name: np.mean(shares, 0).tolist() for name, shares in inside.items()}


def measure(encoder: Encoder, birds: DrawnBirds, paper: Encoder | None = None) -> dict[str, dict[str, float]]:
    """Attribute -> its figures. Needs K + 1 images outside of each species."""
    z, attentions = embed_with_attention(encoder, birds)
    blocks, labels = encoder.blocks(z.to(encoder.device)).cpu(), torch.tensor(birds.labels)
    itself, own = torch.eye(len(z), dtype=torch.bool), labels == labels[:, None]
    beta = shares_in_masks(attentions, {name: m for m, name in enumerate(encoder.attributes)}, birds)
    single = {}
    if paper:
        single = shares_in_masks(embed_with_attention(paper, birds)[1], dict.fromkeys(encoder.attributes, 0), birds)
    figures = {}
    for m, name in enumerate(encoder.attributes):
        kinds = ATTRIBUTES[name]
        values = torch.tensor([kinds.index(combination[name]) for combination in birds.combinations])[labels]
        figures[name] = {
            "block": precision(blocks[:, m], values),
            "whole": precision(z, values),
            "chance": chance(values, itself),
            "block_other_species": precision(blocks[:, m], values, own),
            "whole_other_species": precision(z, values, own),
            "chance_other_species": chance(values, own),
            "beta": beta[name][0],
            **({"beta_paper": single[name][0]} if paper else {}),
            "beta_even": beta[name][1],
        }
    return figures


def goals(figures: dict[str, dict[str, float]]) -> list[tuple[str, bool]]:
    """(text with goal and result, whether the goal is reached)."""
    block, beta = (float(np.mean([row[key] for row in figures.values()])) for key in ("block", "beta"))
    behind = [name for name, row in figures.items() if row["block"] <= row["whole"]]
    return [
        (f"precision@{K} by block alone {block:.3f} in the mean, goal {GOALS['block']:.2f}", block >= GOALS["block"]),
        (
            f"block alone above the whole vector for {len(figures) - len(behind)} of {len(figures)}, goal all"
            + (f"; not for {', '.join(behind)}" if behind else ""),
            not behind,
        ),
        (
            f"β on its mask's tokens {100 * beta:.1f} % in the mean, goal {100 * GOALS['beta']:.0f} %",
            beta >= GOALS["beta"],
        ),
    ]


def table(figures: dict[str, dict[str, float]]) -> str:
    """Table: one row per attribute, and their mean."""
    columns = {
        "block": "block", "whole": "whole", "chance": "chance",
        "block_other_species": "block", "whole_other_species": "whole", "chance_other_species": "chance",
        "beta": "β", "beta_paper": "paper's", "beta_even": "even",
    }  # fmt: skip
    columns = {key: title for key, title in columns.items() if all(key in row for row in figures.values())}
    rows = {**figures, "mean": {key: float(np.mean([row[key] for row in figures.values()])) for key in columns}}
    width = max(map(len, rows))
    head = f"{'':{width}}  {f'precision@{K}':<24}{'the same, other species':<24}  share of β on the mask"
    lines = [head, f"{'':{width}}" + "".join(f"{title:>8}" for title in columns.values())]
    for name, row in rows.items():
        cells = (f"{100 * row[key]:7.1f}%" if key.startswith("beta") else f"{row[key]:8.3f}" for key in columns)
        lines.append(f"{name:{width}}" + "".join(cells))
    return "\n".join(lines)


def load(folder: Path, flag: str, pooler: str) -> Encoder:
    """Raises InputError for an encoder of another pooler, or with attributes that drawn birds do not have."""
    encoder = Encoder.from_pretrained(folder)
    if encoder.pooler.kind != pooler:
        raise InputError(f"{flag}: {str(folder)!r} pools by {encoder.pooler.kind!r}; give one trained with {pooler!r}")
    if strange := [name for name in encoder.attributes if name not in ATTRIBUTES]:
        raise InputError(
            f"{flag}: {str(folder)!r} has the attribute {strange[0]!r}, of which drawings know no truth; give an "
            "encoder trained with --supervisor.prompt drawn-birds"
        )
    return encoder


def birds_of(encoder: Path) -> DrawnBirds:
    """The test half that the run of this encoder was measured on; the preset's, where the encoder is not in a run's
    folder."""
    described, data = encoder.parent / "config.json", dataclasses.asdict(PRESETS["drawn-birds"].data)
    if described.is_file():
        data |= json.loads(described.read_text())["config"]["data"]
    if data["name"] != "drawn-birds":
        raise InputError(f"--encoder: its run was on {data['name']!r}; only drawn-birds knows its attributes")
    return DrawnBirds("test", data["species"], data["images_per_species"], data["seed"], data["nuisance"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--paper", type=Path, help="an encoder with the pooler 'attention', for its one β")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    encoder = load(options.encoder, "--encoder", "attributes")
    paper = load(options.paper, "--paper", "attention") if options.paper else None
    birds = birds_of(options.encoder)
    figures = measure(encoder, birds, paper)
    print(f"{len(birds):,} images of {len(birds.classes)} test species\n{table(figures)}")
    reached = goals(figures)
    for words, well in reached:
        print(f"{'reached' if well else 'missed'}: {words}")
    described: dict[str, Any] = {"encoder": str(options.encoder), "images": len(birds), "figures": figures}
    write_json(options.json, {**described, "goals": [{"goal": words, "reached": well} for words, well in reached]})


if __name__ == "__main__":
    with exit_on_input_error():
        main()
