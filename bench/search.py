"""Speed and recall of the index that `saga_fast.embed` makes of a million images.

    python -m bench.search [--count 1000000] [--dimension 512] [--cache DIR] [--json FILE]

For three kinds of unit vectors: clustered, as embeddings are (20,000 means, each itself near one of 500; a class's
cosines are about 0.8), uniform on the sphere, the worst case, where neighbours are hardly nearer than anything else,
and attributes, as the pooler of that name makes them (16 blocks; each of 20,000 classes has one of 8 values of each).
Queries are new vectors of the same kind, asked for one at a time; the truth is faiss's exact search. faiss does the
search; ours is the choice of the index, and of how much of it is searched. For attributes, weighted queries are
measured too: those are re-ranked, see `saga_fast.retrieval.index.nearest`, and their recall is reported with and
without re-ranking. With `--cache` an index once built is used again.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth

from bench import write_json
from saga_fast.retrieval.blocks import Blocks
from saga_fast.retrieval.index import BLOCK, build, nearest

KINDS = ("clustered", "uniform", "attributes")
MEANS, GROUPS = 20_000, 500
ATTRIBUTES, VALUES = 16, 8
WEIGHTS = {  # what the first attributes count; the others count 1
    "one x 4": [4],
    "three x 4": [4, 4, 4],
    "four x 0": [0, 0, 0, 0],
    "only one": [1] + [0] * (ATTRIBUTES - 1),
}


def draw(kind: str, count: int, dimension: int, seed: int) -> np.ndarray:
    """float32 (count, dimension) unit vectors; but for `uniform`, every seed draws around the same means."""
    if kind == "attributes":
        return _draw_attributes(count, dimension, seed)
    means = np.random.default_rng(0).standard_normal((GROUPS, dimension), dtype=np.float32)
    means = means[np.arange(MEANS) % GROUPS]
    means += 0.7 * np.random.default_rng(1).standard_normal(means.shape, dtype=np.float32)
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, dimension), dtype=np.float32)
    for start in range(0, count, BLOCK):
        block = vectors[start : start + BLOCK]
        if kind == "clustered":
            block *= 0.6
            block += means[random.integers(0, MEANS, len(block))]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


def _draw_attributes(count: int, dimension: int, seed: int) -> np.ndarray:
    size = dimension // ATTRIBUTES
    fixed, random = np.random.default_rng(0), np.random.default_rng(seed)
    means = fixed.standard_normal((ATTRIBUTES, VALUES, size), dtype=np.float32)
    means /= np.linalg.norm(means, axis=2, keepdims=True)
    classes = fixed.integers(0, VALUES, (MEANS, ATTRIBUTES))
    vectors = random.standard_normal((count, ATTRIBUTES, size), dtype=np.float32)
    vectors *= 0.5 * size**-0.5  # so two of one value have a cosine of about 0.8
    for start in range(0, count, BLOCK):
        block = vectors[start : start + BLOCK]
        block += means[np.arange(ATTRIBUTES), classes[random.integers(0, MEANS, len(block))]]
        block /= np.linalg.norm(block, axis=2, keepdims=True) * ATTRIBUTES**0.5
    return vectors.reshape(count, -1)


def measure(kind: str, count: int, dimension: int, queries: int, cache: Path | None) -> list[dict[str, Any]]:
    vectors, asked = draw(kind, count, dimension, seed=2), draw(kind, queries, dimension, seed=3)
    exact = truth(vectors, asked)
    stored = cache / f"{kind}-{count}-{dimension}.faiss" if cache else None
    began = time.perf_counter()
    if stored and stored.exists():
        index, seconds = faiss.read_index(str(stored)), None
    else:
        _, explained, index = build(vectors)
        seconds = time.perf_counter() - began
        print(explained, flush=True)
        if stored:
            cache.mkdir(parents=True, exist_ok=True)
            faiss.write_index(index, str(stored))
    faiss.cvar.indexIVF_stats.reset()
    plain = answers(lambda query: index.search(query, 10)[1], asked, exact)
    ivf = faiss.try_extract_index_ivf(index)
    compared = faiss.cvar.indexIVF_stats.ndis / queries if ivf is not None else count
    found = {
        "vectors": kind,
        **plain,
        "compared": compared,
        "cells_searched": ivf.nprobe if ivf is not None else None,
        "cells": ivf.nlist if ivf is not None else None,
        "seconds_build": seconds,
    }
    rows = [found]
    for name, first in WEIGHTS.items() if kind == "attributes" else ():
        blocks = Blocks({str(m): dimension // ATTRIBUTES for m in range(ATTRIBUTES)})
        scaled = blocks.scaled(asked, blocks.weights({str(m): weight for m, weight in enumerate(first)}))
        exact = truth(vectors, scaled)
        ranked = answers(lambda query: nearest(index, vectors, query, 10)[1], scaled, exact)
        alone = answers(lambda query: index.search(query, 10)[1], scaled, exact)["recall_at_10"]
        rows.append({"vectors": kind, "weights": name, **ranked, "recall_at_10_of_the_index_alone": alone})
    return rows


def truth(vectors: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """int64 (queries, 10): the rows of largest inner product, every vector compared."""
    blocks = (vectors[start : start + BLOCK] for start in range(0, len(vectors), BLOCK))
    return knn_ground_truth(asked, blocks, 10, faiss.METRIC_INNER_PRODUCT)[1]


def answers(search: Callable[[np.ndarray], np.ndarray], asked: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """How much of `exact` it finds, and how long it takes, a query at a time."""
    shares, times = [], []
    for query, wanted in zip(asked, exact):
        began = time.perf_counter()
        (found,) = search(query[None])
        times.append(1000 * (time.perf_counter() - began))
        shares.append(len(set(wanted.tolist()) & set(found.tolist())) / len(wanted))
    return {
        "recall_at_10": float(np.mean(shares)),
        "ms_median": float(np.median(times)),
        "ms_p95": float(np.percentile(times, 95)),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    figures = f"{row['recall_at_10']:11.3f}{row['ms_median']:7.2f} ms{row['ms_p95']:7.2f} ms"
    if "weights" in row:
        return f"{row['weights']:>12}{figures}   the index alone {row['recall_at_10_of_the_index_alone']:.3f}"
    built = "cached" if row["seconds_build"] is None else f"{row['seconds_build']:.0f} s"
    cells = f"{row['cells_searched'] or '':>7}/{row['cells'] or '':<6}"
    return f"{row['vectors']:>12}{figures}{row['compared']:10,.0f}{cells}{built:>10}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    load, rows = os.getloadavg()[0], []
    print(f"{options.count:,} x {options.dimension}, load {load:.1f} before")
    print(f"{'vectors':>12}{'recall@10':>11}{'median':>10}{'95 %':>10}{'compared':>10}{'cells':>14}{'built in':>10}")
    for kind in options.kinds:
        measured = measure(kind, options.count, options.dimension, options.queries, options.cache)
        print("\n".join(map(line, measured)), flush=True)
        rows += measured
    figures = {"count": options.count, "dimension": options.dimension, "queries": options.queries}
    write_json(options.json, {**figures, "load_before": load, "rows": rows})


if __name__ == "__main__":
    main()
