"""The bench of searches, in small: recall of weighed queries is against comparing every vector."""

from __future__ import annotations

import numpy as np

from bench import search as bench


def test_vectors_of_attributes_are_unit_blocks_around_shared_means():
    a, b = bench.draw("attributes", 3000, 64, seed=2), bench.draw("attributes", 3000, 64, seed=3)
    blocks = np.stack([a, b]).reshape(2, 3000, 16, 4) * 4
    np.testing.assert_allclose(np.linalg.norm(blocks, axis=3), 1, atol=1e-5)
    cosines = np.einsum("nd,md->nm", blocks[0][:, 0], blocks[1][:, 0])
    assert cosines.max(1).mean() > 0.7 and cosines.mean() < 0.5, "both seeds draw around the same eight means"


def test_recall_of_weighed_queries_is_measured_beside_the_index_alone(tmp_path):
    # 8 numbers an attribute: of 2, the nearest of a single one are equal in float32, and any ten of them would do.
    rows = bench.measure("attributes", 101_000, 8 * bench.ATTRIBUTES, 8, None)
    assert [row.get("weights") for row in rows] == [None, *bench.WEIGHTS]
    for row in rows[1:]:
        assert row["recall_at_10"] >= 0.9 and row["recall_at_10"] >= row["recall_at_10_of_the_index_alone"]
        assert row["weights"] in bench.line(row)
