"""Queries unlike the vectors: re-ranking in indices that are not exact, against comparing every vector."""

from __future__ import annotations

import numpy as np
import pytest

from saga_fast.retrieval.blocks import Blocks
from saga_fast.retrieval.index import build, exact_vectors, nearest

SIZES = {"crown": 9, "wing": 8, "tail": 8, "legs": 8}  # D_e = 33
STARTS = np.cumsum([0, *SIZES.values()])


def draw(count: int, seed: int) -> np.ndarray:
    """float32 (count, 33): four unit blocks over √4, each around one of six means, in 300 combinations."""
    fixed, random = np.random.default_rng(0), np.random.default_rng(seed)
    combinations, parts = fixed.integers(0, 6, (300, 4)), []
    chosen = combinations[random.integers(0, 300, count)]
    for m, size in enumerate(SIZES.values()):
        block = fixed.standard_normal((6, size))[chosen[:, m]] + 0.7 * random.standard_normal((count, size))
        parts.append(block / np.linalg.norm(block, axis=1, keepdims=True) / 2)
    return np.concatenate(parts, 1).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return draw(20_000, 1)


def weighed(vectors: np.ndarray, queries: np.ndarray, weights: list[float]) -> np.ndarray:
    """float64 (Q, n): Σ w cos / Σ w, block by block."""
    cosines = [
        4 * queries[:, a:b].astype(np.float64) @ vectors[:, a:b].T.astype(np.float64)
        for a, b in zip(STARTS, STARTS[1:])
    ]
    return sum(w * c for w, c in zip(weights, cosines)) / sum(weights)


def recall(found: np.ndarray, similarity: np.ndarray, k: int) -> float:
    wanted = np.argsort(-similarity, 1)[:, :k]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), wanted.tolist())]))


WEIGHTS = {"one of four": [0, 0, 0, 1], "uneven": [5, 1, 0.2, 0]}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("kind", ["Flat", "IVF256,Flat", "HNSW32", "IVF256,SQ8", "OPQ3_15,IVF128,Flat", "PQ11x4"])
def test_weighed_queries_are_re_ranked_until_the_nearest_stand(vectors, kind, weights):
    _, _, index = build(vectors, kind)
    queries, blocks = draw(50, 2), Blocks(SIZES)
    scaled = blocks.scaled(queries, blocks.weights(dict(zip(SIZES, weights))))
    products, rows = nearest(index, vectors, scaled, 10)
    exact = weighed(vectors, queries, weights)
    found = recall(rows, exact, 10)
    assert found >= (1 if kind == "Flat" else 0.97)
    np.testing.assert_allclose(products, np.take_along_axis(exact, rows, 1), atol=1e-6)
    assert (np.diff(products, axis=1) <= 0).all()
    if kind != "Flat":
        assert recall(index.search(scaled, 10)[1], exact, 10) < found - 0.02, "the index alone would do"


def test_a_small_index_is_compared_whole(vectors):
    few, queries = vectors[:30], draw(5, 2)
    for kind in ("HNSW8", "IVF2,Flat"):
        _, rows = nearest(build(few, kind)[2], few, queries, 30)
        assert (np.sort(rows, 1) == np.arange(30)).all()


def test_only_an_exact_index_holds_the_vectors(vectors):
    exact = build(vectors[:100], "Flat")[2]
    np.testing.assert_array_equal(exact_vectors(exact), vectors[:100])
    assert exact_vectors(build(vectors[:100], "HNSW8")[2]) is None
