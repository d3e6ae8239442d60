"""How well an encoder retrieves: every image of the test half queries all the others.

python -m saga_fast.evaluate --encoder DIR [--data.name NAME --data.root DIR] [--json FILE]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from saga_fast import distributed
from saga_fast.config import DataConfig, parse_flags
from saga_fast.data import PixelLoader, cores, first_classes, load_dataset
from saga_fast.encoder import Encoder
from saga_fast.errors import exit_on_input_error
from saga_fast.metrics import retrieval_metrics

COLUMNS = {
    "recall_at_1": "R@1",
    "recall_at_2": "R@2",
    "recall_at_4": "R@4",
    "recall_at_8": "R@8",
    "map_at_r": "MAP@R",
    "nmi": "NMI",
}


@torch.no_grad()
def embed_all(encoder: Encoder, images: PixelLoader, batch: int = 256) -> Tensor:
    """(n, D_e) float32 unit vectors of all images, in order. Ranks embed a share each."""
    batches = distributed.rows(len(images)).split(batch)
    stream = images.stream([rows.tolist() for rows in batches])
    shown = tqdm(stream, "embedding", len(batches), leave=False, delay=2, disable=distributed.rank() > 0)
    return distributed.gather(torch.cat([encoder(part.pixels) for part in shown]), len(images))


def evaluate(encoder: Encoder, images: PixelLoader) -> dict[str, float]:
    """`retrieval_metrics` of all images, each a query against all others."""
    return score(embed_all(encoder, images), images.labels)


def score(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """`retrieval_metrics`, computed by the first rank and told to all."""
    return distributed.everyone({} if distributed.rank() else retrieval_metrics(embeddings, labels))[0]


def load_images(data: DataConfig, image_size: int) -> tuple[PixelLoader, PixelLoader]:
    """(train, test) as `data` describes them, at `image_size` pixels a side."""
    settings = {}
    if data.name == "drawn-birds":
        settings = {"species": data.species, "images_per_species": data.images_per_species, "seed": data.seed}
    train, test = load_dataset(data.name, data.root, **settings)
    if data.train_classes is not None:
        train = first_classes(train, data.train_classes)
    workers = data.workers
    if workers is None:
        workers = 0 if data.name == "drawn-birds" else min(8, cores())
    return tuple(
        PixelLoader(part, image_size, workers, skip_unreadable=data.skip_unreadable, name=f"{data.name} {half}")
        for part, half in ((train, "train"), (test, "test"))
    )


def table(rows: dict[str, dict[str, float]]) -> str:
    """A row per name, its metrics in per cent (NMI too), for the terminal."""
    width = max(map(len, rows))
    lines = [f"{'':{width}}  " + "  ".join(f"{title:>6}" for title in COLUMNS.values())]
    for name, metrics in rows.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{100 * metrics[key]:6.2f}" for key in COLUMNS))
    return "\n".join(lines)


@dataclass(frozen=True)
class EvaluateArguments:
    encoder: str = ""
    """Folder that holds the encoder, as a run writes it, or hub id."""
    data: DataConfig = field(default_factory=lambda: DataConfig(name="drawn-birds"))
    json: Path | None = None
    """File to write the metrics to."""


def main(arguments: Sequence[str]) -> None:
    parsed = parse_flags(EvaluateArguments(), arguments, "python -m saga_fast.evaluate", "Evaluate an encoder.")
    encoder = Encoder.from_pretrained(parsed.encoder)
    _, test = load_images(parsed.data, encoder.image_size)
    metrics = evaluate(encoder, test)
    print(table({parsed.data.name: metrics}))
    if parsed.json:
        parsed.json.write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    with exit_on_input_error():
        main(sys.argv[1:])
