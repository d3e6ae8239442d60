"""The step of an online softmax (arXiv 1805.02867) over blocks of keys, as `attention` and `decode` take it."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PRECISION = tl.constexpr("tf32x3")  # of float32 matmuls, on tensor cores to float32's accuracy; no other dtype heeds it


@triton.jit
def softmax_step(acc, row_max, row_sum, scores, values, scale2):
    """Adds the block with `scores` (rows, keys) and `values` (keys, WIDTH), in base 2: scale2 is scale * LOG2E.

    Masked scores are -inf. After its first block every row has a visible key, so that `row_max` is finite. The maximum
    ignores a score that is nan, the sums do not.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale2)
    p = tl.exp2(scores * scale2 - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum
