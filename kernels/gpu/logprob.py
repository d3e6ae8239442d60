"""`token_logprob` on a GPU: two cuBLAS GEMMs a chunk of rows, and between them one Triton pass over its logits.

The logits are float32 (cuBLAS's accumulators as they are): rounded to bfloat16, a logit of 30 would be wrong by up to
0.06, and so would its log-probability. The gradient is of the head's dtype, since the second GEMM runs on tensor
cores, and takes the logits' own storage: one chunk stands, never two. Out of that GEMM comes float32 again, so partial
sums (split-K) are never rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shipped import Cost, Shipped, launch_options

BLOCK = 4096  # logits a step: 8 a thread, two loads of 16 bytes in flight
WARPS = 16
ALIGNED = 8  # rows of logits begin at multiples of 32 bytes, rows of a half-wide gradient of 16, as cuBLAS likes them
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
UNIT = tl.constexpr(2.0**15)  # of the stored gradient: p = 1 / 151,936 is subnormal in float16, p * 2^15 is not


def forward(
    h: Tensor, head: Tensor, targets: Tensor, coeff: Tensor, temperature: float, chunk: int, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """logp (N,) float32 and dh (N, D) like h, of h (N, D) and head (V, D) in float32, bfloat16 or float16."""
    n, vocabulary = len(h), head.shape[0]
    logp, dh = h.new_empty(n, dtype=torch.float32), torch.empty_like(h, memory_format=torch.contiguous_format)
    rows = min(chunk, n)
    buffer = h.new_empty(rows, triton.cdiv(vocabulary, ALIGNED) * ALIGNED, dtype=torch.float32)
    total = h.new_empty(rows, h.shape[1], dtype=torch.float32)
    scale = (coeff.float() / (temperature * UNIT.value))[:, None]
    for first in range(0, n, chunk):
        at = slice(first, min(first + chunk, n))
        used, product = buffer[: at.stop - first], total[: at.stop - first]
        _mm(h[at], head.T, used[:, :vocabulary])
        gradient = softmax_gradient(used, vocabulary, targets[at], temperature, logp[at], h.dtype, block)
        _mm(gradient, head, product)
        torch.mul(product, scale[at], out=dh[at])  # the coefficient comes last: a small one would underflow in float16
    return logp, dh


def softmax_gradient(
    buffer: Tensor,
    vocabulary: int,
    targets: Tensor,
    temperature: float,
    logp: Tensor,
    dtype: torch.dtype,
    block: int = BLOCK,
) -> Tensor:
    """Write logp (R,), and UNIT * (onehot - softmax) over the logits.

    buffer: (R, stride) float32, contiguous, the first `vocabulary` columns logits. Returns the gradient (R, V), of
    `dtype`, a view of the buffer's last bytes in each row. A target outside 0 to V - 1 gives nan in all its row.
    """
    rows, stride = buffer.shape
    wide = buffer.view(dtype)
    gradient = wide[:, wide.shape[1] - stride :][:, :vocabulary]
    _softmax_gradient[(rows,)](
        buffer,
        gradient,
        targets,
        logp,
        stride,
        wide.shape[1],
        vocabulary,
        1 / temperature,
        BLOCK=block,
        **launch_options(WARPS),
    )
    return gradient


@triton.jit
def _softmax_gradient(
    logits, gradient, targets, logp, stride, gradient_stride, vocabulary, inverse_temperature, BLOCK: tl.constexpr
):
    """One row. The second reading goes from the row's end, which is what the L2 still has of it.

    A gradient half as wide fills the second half of its row: element j covers logit (stride + j) / 2 >= j. So a block
    overwrites itself and blocks already done, and all threads must have loaded a block before any stores it.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    gradient += row * gradient_stride
    lane = tl.arange(0, BLOCK)

    # Online softmax lane by lane: nothing is reduced across threads until the end. The start is finite, for -inf - -inf
    # is nan.
    running_max = tl.full([BLOCK], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        x = tl.load(logits + first + lane, first + lane < vocabulary, float("-inf")) * inverse_temperature
        new = tl.maximum(running_max, x)
        running_sum = running_sum * tl.exp(running_max - new) + tl.exp(x - new)
        running_max = new
    peak = tl.max(running_max, 0)
    lse = peak + tl.log(tl.sum(running_sum * tl.exp(running_max - peak), 0))

    target = tl.load(targets + row)
    valid = (target >= 0) & (target < vocabulary)
    chosen = tl.load(logits + target, valid, 0.0) * inverse_temperature
    lse = tl.where(valid, lse, float("nan"))
    tl.store(logp + row, chosen - lse)

    last = tl.cdiv(vocabulary, BLOCK) - 1
    for i in range(0, last + 1):
        column = (last - i) * BLOCK + lane
        x = tl.load(logits + column, column < vocabulary, 0.0) * inverse_temperature
        p = tl.exp(x - lse)
        tl.debug_barrier()
        tl.store(gradient + column, tl.where(column == target, 1 - p, -p) * UNIT, column < vocabulary)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in out's dtype; float32 of narrower factors is what cuBLAS accumulates, and only a GPU's."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def shipped(arch: int) -> Iterator[Shipped]:
    """One configuration a dtype of the gradient, whatever the chip."""
    for dtype in ("bf16", "fp16"):
        integers = dict.fromkeys(("stride", "gradient_stride", "vocabulary"), "i32")
        signature = {
            "logits": "*fp32",
            "gradient": f"*{dtype}",
            "targets": "*i64",
            "logp": "*fp32",
            **integers,
            "inverse_temperature": "fp32",
        }
        yield Shipped(
            f"softmax_gradient {dtype}", _softmax_gradient, signature, {"BLOCK": BLOCK}, WARPS, aligned=tuple(integers)
        )


def cost(n: int, d: int, vocabulary: int, chunk: int, itemsize: int = 2) -> Cost:
    """Two GEMMs and some 20 operations a logit. The head is read twice a chunk; a logit is written, read twice, and its
    gradient written and read once; dh is written in float32 and read before it is written in h's dtype.
    """
    flops = 4 * n * d * vocabulary + 20 * n * vocabulary
    head = 2 * -(-n // chunk) * vocabulary * d * itemsize
    logits = n * vocabulary * (3 * 4 + 2 * itemsize)
    rows = n * d * (2 * itemsize + 2 * 4) + n * (8 + 4 + 4)
    return Cost(flops, head + logits + rows)
