"""How fast is the index that `saga_fast.embed` makes of a million images, and what does it miss?

    python -m bench.search [--count 1000000] [--dimension 512] [--cache DIR] [--json FILE]

For two kinds of unit vectors: clustered, as embeddings are (20,000 means, each itself near one of 500; a class's
cosines are about 0.8), and uniform on the sphere, the worst case, where neighbours are hardly nearer than anything
else. Queries are new vectors of the same kind, asked for one at a time; the truth is faiss's exact search. faiss does
the work; what is ours is which index, and how much of it is searched. With `--cache` an index once built is used again.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth

from bench import write_json
from saga_fast.retrieval.index import BLOCK, build

MEANS, GROUPS = 20_000, 500


def draw(kind: str, count: int, dimension: int, seed: int) -> np.ndarray:
    """float32 (count, dimension) unit vectors; of `clustered`, every seed draws around the same means."""
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


def measure(kind: str, count: int, dimension: int, queries: int, cache: Path | None) -> dict[str, Any]:
    vectors, asked = draw(kind, count, dimension, seed=2), draw(kind, queries, dimension, seed=3)
    blocks = (vectors[start : start + BLOCK] for start in range(0, count, BLOCK))
    _, exact = knn_ground_truth(asked, blocks, 10, faiss.METRIC_INNER_PRODUCT)
    stored = cache / f"{kind}-{count}-{dimension}.faiss" if cache else None
    began = time.perf_counter()
    if stored and stored.exists():
        index, seconds = faiss.read_index(str(stored)), None
    else:
        _, line, index = build(vectors)
        seconds = time.perf_counter() - began
        print(line, flush=True)
        if stored:
            cache.mkdir(parents=True, exist_ok=True)
            faiss.write_index(index, str(stored))
    del vectors
    found, times = [], []
    faiss.cvar.indexIVF_stats.reset()
    for query in asked:
        began = time.perf_counter()
        found.append(index.search(query[None], 10)[1][0])
        times.append(1000 * (time.perf_counter() - began))
    ivf = faiss.try_extract_index_ivf(index)
    compared = faiss.cvar.indexIVF_stats.ndis / queries if ivf is not None else count
    return {
        "vectors": kind,
        "recall_at_10": float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found)])),
        "ms_median": float(np.median(times)),
        "ms_p95": float(np.percentile(times, 95)),
        "compared": compared,
        "cells_searched": ivf.nprobe if ivf is not None else None,
        "cells": ivf.nlist if ivf is not None else None,
        "seconds_build": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--kinds", nargs="+", default=["clustered", "uniform"], choices=["clustered", "uniform"])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    load, rows = os.getloadavg()[0], []
    print(f"{options.count:,} x {options.dimension}, load {load:.1f} before")
    print(f"{'vectors':>10}{'recall@10':>11}{'median':>10}{'95 %':>10}{'compared':>10}{'cells':>14}{'built in':>10}")
    for kind in options.kinds:
        row = measure(kind, options.count, options.dimension, options.queries, options.cache)
        built = "cached" if row["seconds_build"] is None else f"{row['seconds_build']:.0f} s"
        print(
            f"{kind:>10}{row['recall_at_10']:11.3f}{row['ms_median']:7.2f} ms{row['ms_p95']:7.2f} ms"
            f"{row['compared']:10,.0f}{row['cells_searched'] or '':>7}/{row['cells'] or '':<6}{built:>10}",
            flush=True,
        )
        rows.append(row)
    figures = {"count": options.count, "dimension": options.dimension, "queries": options.queries}
    write_json(options.json, {**figures, "load_before": load, "rows": rows})


if __name__ == "__main__":
    main()
