"""Queries of the test half with their five nearest neighbours, before and after training, for the report.

`RUN/gallery/before.npy` holds every image's neighbours before training, int32 (n, 5); the queries to show are chosen at
the end: those that became right, those still wrong, those that became wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from saga_fast.data import PixelLoader
from saga_fast.retrieval import metrics

NEIGHBOURS = 5
ROWS = {"fixed": 8, "still_wrong": 6, "spoilt": 4}  # queries shown of each kind, at most
THUMBNAIL = 96  # pixels a side
COLUMNS = 16  # thumbnails in a row of the sheet


def neighbours(embeddings: Tensor) -> Tensor:
    """int32 (n, 5): for each row the other rows with the largest inner products, best first; fewer columns where n <
    6."""
    found = metrics.neighbours(embeddings, min(NEIGHBOURS, len(embeddings) - 1))
    return torch.cat([near for _, near in found]).int().cpu()


def compare(labels: Tensor, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """Queries by whether their first neighbour is right before and after: kept (right both times), and those of `ROWS`.

    labels: (n,); before, after: as `neighbours` gives them. An image alone in its class is no query.
    """
    _, classes, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    findable = sizes[classes] > 1
    was_right, is_right = (labels[first[:, 0].long()] == labels for first in (before, after))
    kinds = {
        "kept": was_right & is_right,
        "fixed": ~was_right & is_right,
        "still_wrong": ~was_right & ~is_right,
        "spoilt": was_right & ~is_right,
    }
    return {kind: (rows & findable).nonzero().flatten() for kind, rows in kinds.items()}


def gallery(
    images: PixelLoader,
    before: Tensor,
    after: Tensor,
    agreement: Callable[[int, int], dict[str, float]] | None = None,
) -> tuple[dict[str, Any], Image.Image]:
    """(the content of gallery.json, the sheet of thumbnails).

    agreement: two images → the cosine of each attribute after training; None where the pooler has no attributes.

    counts: queries of each kind; classes: names; cells: (image, class) of each thumbnail, in reading order; rows: by
    kind {query, before, after} in cells, and for fixed ones `attributes`: by how much the cosine with the right
    neighbour after training exceeds that with the wrong one before; columns: thumbnails in a row of the sheet.
    """
    kinds = compare(images.labels, before, after)
    cells: dict[int, int] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind, count in ROWS.items():
        queries = kinds[kind]
        spread = torch.linspace(0, len(queries) - 1, min(count, len(queries))).round().long()  # evenly over the classes
        rows[kind] = [
            {
                "query": cells.setdefault(query, len(cells)),
                "before": [cells.setdefault(i, len(cells)) for i in before[query].tolist()],
                "after": [cells.setdefault(i, len(cells)) for i in after[query].tolist()],
            }
            for query in queries[spread].tolist()
        ]
        if kind == "fixed" and agreement:
            for row, query in zip(rows[kind], queries[spread].tolist()):
                right, wrong = (agreement(query, int(first[query, 0])) for first in (after, before))
                row["attributes"] = {name: round(right[name] - wrong[name], 4) for name in right}
    picture = Image.new("RGB", (COLUMNS * THUMBNAIL, max(1, -(-len(cells) // COLUMNS)) * THUMBNAIL))
    for index, cell in cells.items():
        whole = Image.fromarray(images.batch([index]).pixels[0].permute(1, 2, 0).contiguous().numpy())
        thumbnail = whole.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        picture.paste(thumbnail, (cell % COLUMNS * THUMBNAIL, cell // COLUMNS * THUMBNAIL))
    content = {
        "counts": {kind: len(queries) for kind, queries in kinds.items()},
        "classes": images.dataset.classes,
        "cells": [(index, int(images.labels[index])) for index in cells],
        "columns": COLUMNS,
        "rows": rows,
    }
    return content, picture


def as_rows(content: dict[str, Any], thumbnails: Image.Image) -> Image.Image:
    """`gallery`'s rows as one picture: query, neighbours before, neighbours after; right ones green, wrong ones red."""
    rows = [row for kind in content["rows"].values() for row in kind]
    cells, edge, side = content["cells"], 3, THUMBNAIL + 6
    picture = Image.new("RGB", ((2 * NEIGHBOURS + 2) * side, max(1, len(rows)) * side), "white")
    for y, row in enumerate(rows):
        for x, cell in enumerate([row["query"], *row["before"], None, *row["after"]]):
            if cell is None:  # a gap between before and after
                continue
            left, top = cell % COLUMNS * THUMBNAIL, cell // COLUMNS * THUMBNAIL
            right = cells[cell][1] == cells[row["query"]][1]
            color = "white" if x == 0 else "#1a7f37" if right else "#cf222e"
            framed = ImageOps.expand(
                thumbnails.crop((left, top, left + THUMBNAIL, top + THUMBNAIL)), border=edge, fill=color
            )
            picture.paste(framed, (x * side, y * side))
    return picture
