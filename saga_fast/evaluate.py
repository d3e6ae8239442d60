"""Evaluates an encoder by retrieval: every image of the test half queries all the others.

    python -m saga_fast.evaluate --encoder DIR [--data.name NAME --data.root DIR] [--json FILE]

Prints Recall@K, MAP@R, R-precision and NMI, the worst classes, and the worst confusions. The file holds all classes and
confusions. Of equally near images, the one that comes first in the data set ranks first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from saga_fast.config import DataConfig
from saga_fast.data import PixelLoader, checksum, cores, first_classes, load_dataset
from saga_fast.encoder import Encoder, expect_finite
from saga_fast.retrieval.metrics import Scores, nmi, retrieval_metrics, retrieve, summary
from saga_fast.runtime import distributed
from saga_fast.utils.errors import InputError, exit_on_input_error, printable
from saga_fast.utils.flags import parse_flags

COLUMNS = {
    "recall_at_1": "R@1",
    "recall_at_2": "R@2",
    "recall_at_4": "R@4",
    "recall_at_8": "R@8",
    "map_at_r": "MAP@R",
    "nmi": "NMI",
}
SHOWN = 10  # classes and confusions in the terminal


@torch.no_grad()
def embed_images(encoder: Encoder, images: PixelLoader, batch: int = 256) -> Tensor:
    """(n, D_e) float32 unit vectors of all images, in order. Ranks embed a share each.

    Raises InputError, on every rank, if one is not finite.
    """
    batches = distributed.shard_rows(len(images)).split(batch)
    stream = images.stream([rows.tolist() for rows in batches])
    shown = tqdm(stream, "embedding", len(batches), leave=False, delay=2, disable=distributed.rank() > 0)
    return expect_finite(distributed.all_gather_rows(torch.cat([encoder(part.pixels) for part in shown]), len(images)))


def score(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """`retrieval_metrics`, computed by the first rank, on all ranks."""
    return distributed.all_gather_object({} if distributed.rank() else retrieval_metrics(embeddings, labels))[0]


def load_images(data: DataConfig, image_size: int) -> tuple[PixelLoader, PixelLoader]:
    """(train, test) as `data` describes them, at `image_size` pixels a side.

    Raises InputError, on every rank, if the ranks do not hold the same images: each reads its
    own copy, and a rank that skips an image, because its disk fails for a moment, would train on other batches.
    """
    settings = {}
    if data.name == "drawn-birds":
        settings = {key: getattr(data, key) for key in ("species", "images_per_species", "seed", "nuisance")}
    train, test = load_dataset(data.name, data.root, **settings)
    if data.train_classes is not None:
        train = first_classes(train, data.train_classes)
    workers = data.workers
    if workers is None:
        workers = 0 if data.name == "drawn-birds" else min(8, cores())
    train_images, test_images = (
        PixelLoader(part, image_size, workers, skip_unreadable=data.skip_unreadable, name=f"{data.name} {half}")
        for part, half in ((train, "train"), (test, "test"))
    )
    _check_ranks(train_images, "training")
    _check_ranks(test_images, "test")
    return train_images, test_images


def _check_ranks(images: PixelLoader, what: str) -> None:
    found = distributed.all_gather_object((checksum(images.dataset), len(images), images.skipped))
    ranks_by_checksum: dict[str, list[int]] = {}
    ranks_by_fault: dict[str, list[int]] = {}
    for rank, (checksum_of_rank, _, skipped) in enumerate(found):
        ranks_by_checksum.setdefault(checksum_of_rank, []).append(rank)
        for fault in skipped:
            ranks_by_fault.setdefault(fault, []).append(rank)
    if len(ranks_by_checksum) > 1:
        counts = ", ".join(f"{found[same[0]][1]:,} on {_ranks(same)}" for same in ranks_by_checksum.values())
        odd = next(
            (f" (on {_ranks(some)}: {fault})" for fault, some in ranks_by_fault.items() if len(some) < len(found)), ""
        )
        raise InputError(
            f"data: the ranks hold different {what} images, {counts}{odd}; start again when every host reads the same"
        )


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def table(rows: dict[str, dict[str, float]]) -> str:
    """A row per name, its metrics in per cent (NMI too), for the terminal."""
    width = max(map(len, rows))
    lines = [f"{'':{width}}  " + "  ".join(f"{title:>6}" for title in COLUMNS.values())]
    for name, metrics in rows.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{100 * metrics[key]:6.2f}" for key in COLUMNS))
    return "\n".join(lines)


def by_class(scores: Scores, labels: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each class its name, images, and its queries' mean Recall@1, R-precision and MAP@R; worst Recall@1 first."""
    rows = []
    for label, name in enumerate(names):
        own = labels[scores.queries] == label
        if own.any():
            part = summary(Scores(*(column[own] for column in scores)))
            figures = {key: part[key] for key in ("recall_at_1", "r_precision", "map_at_r")}
            rows.append({"class": name, "images": int((labels == label).sum()), **figures})
    return sorted(rows, key=lambda row: row["recall_at_1"])


def confusions(scores: Scores, labels: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each class and the wrong class found first: its count, and the number of queries; the largest share
    first, of equal shares the more frequent one."""
    query_labels, first_labels = labels[scores.queries], labels[scores.first]
    queries = torch.bincount(query_labels, minlength=len(names))
    pairs, counts = torch.stack([query_labels, first_labels], 1)[query_labels != first_labels].unique(
        dim=0, return_counts=True
    )
    rows = [
        {"class": names[a], "taken_for": names[b], "count": count, "queries": int(queries[a])}
        for (a, b), count in zip(pairs.tolist(), counts.tolist())
    ]
    return sorted(rows, key=lambda row: (-row["count"] / row["queries"], -row["count"]))


@dataclass(frozen=True)
class EvaluateArguments:
    encoder: str = ""
    """Folder that holds the encoder, as a run writes it, or hub id."""
    data: DataConfig = field(default_factory=lambda: DataConfig(name="drawn-birds"))
    json: Path | None = None
    """File to write the metrics to."""


def main(arguments: Sequence[str]) -> None:
    parsed = parse_flags(EvaluateArguments(), arguments, "python -m saga_fast.evaluate", "Evaluate an encoder.")
    if parsed.json and not parsed.json.absolute().parent.is_dir():
        raise InputError(f"--json: the folder of {str(parsed.json)!r} is not there; make it, or name another file")
    if parsed.json and parsed.json.is_dir():
        raise InputError(f"--json: {str(parsed.json)!r} is a folder; name a file")
    encoder = Encoder.from_pretrained(parsed.encoder, map_location=distributed.device())
    if parsed.data.image_size not in (DataConfig().image_size, encoder.image_size):
        raise InputError(
            f"--data.image-size: {parsed.data.image_size}; this encoder reads {encoder.image_size} pixels a side, and "
            "no other: leave it out"
        )
    _, test = load_images(parsed.data, encoder.image_size)
    embeddings, labels, names = embed_images(encoder, test), test.labels, test.dataset.classes
    scores = retrieve(embeddings, labels)
    metrics = summary(scores) | {"nmi": nmi(embeddings, labels)}
    classes, mistakes = by_class(scores, labels, names), confusions(scores, labels, names)
    print(table({parsed.data.name: metrics}))
    print(f"R-precision {100 * metrics['r_precision']:.2f}, {len(scores.queries):,} queries")
    print(f"\n{'worst classes':40}{'images':>7}{'R@1':>8}{'MAP@R':>8}")
    for row in classes[:SHOWN]:
        figures = f"{row['images']:7}{100 * row['recall_at_1']:8.2f}{100 * row['map_at_r']:8.2f}"
        print(f"{printable(row['class']):40}{figures}")
    print("\nworst confusions")
    for row in mistakes[:SHOWN]:
        asked, found = printable(row["class"]), printable(row["taken_for"])
        print(f"{row['count']} of {row['queries']} queries of {asked}: {found} comes first")
    if parsed.json:
        written = {**metrics, "queries": len(scores.queries), "classes": classes, "confusions": mistakes}
        try:
            parsed.json.write_text(json.dumps(written, indent=2) + "\n")
        except OSError as error:
            cause = f"cannot be written ({error.strerror})"
            raise InputError(f"--json: {str(parsed.json)!r} {cause}; name another") from error


if __name__ == "__main__":
    with exit_on_input_error():
        main(sys.argv[1:])
