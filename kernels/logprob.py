"""Log-probability of chosen tokens and its gradient in one pass, in chunks of logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, accumulator, expect, expect_contiguous_on_gpu, expect_same_device, expect_tensor

CHUNK_LOGITS = 1 << 25  # on a CPU 128 MB of float32 logits at a time unless the caller says otherwise
# On a GPU a chunk has enough rows for its GEMMs, which read the head each time, to be bound by arithmetic: 512 FLOPs a
# byte at 512 rows. dH of width 4096 is then 128 tiles of 128 x 128, for an H100's 132 multiprocessors. The logits take
# 311 MB at 151,936 tokens.
CHUNK_ROWS = 512
TILE_ROWS = 1 << 14  # rows of a narrow head widened at a time


def token_logprob(
    h: Tensor, head: Tensor, targets: Tensor, coeff: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """log softmax(h @ head.T / temperature) at the targets, and the gradient of sum(coeff * logp) in h.

    The coefficients are known before the backward (advantages are), so each chunk of logits is used for both at once.
    No graph is built: h is read detached, and the caller runs `h.backward(dh)`.

    Args:
        h: (N, D). head: (V, D), of h's dtype. targets: (N,) int64, 0 <= target < V (checked on CPU).
        coeff: (N,) floating. temperature: of the softmax, above 0.
        chunk: rows whose logits are in memory at a time; by default as many as 128 MB of float32 hold, on a GPU 512.

    Returns:
        logp: (N,) float32 (float64 for float64). dh: like h. On a GPU, which is not waited for, a target out of range
        gives nan in its row of both (in float64, PyTorch's own error).
    """
    expect_tensor("h", h, (None, None), FLOATS)
    expect_tensor("head", head, (None, h.shape[1]), (h.dtype,))
    expect(head.shape[0] > 0, "head", f"shape {tuple(head.shape)}", "one token or more")
    expect_tensor("targets", targets, (h.shape[0],), (torch.int64,))
    expect_tensor("coeff", coeff, (h.shape[0],), FLOATS)
    expect(temperature > 0, "temperature", temperature, "a number above 0")
    expect(chunk is None or chunk > 0, "chunk", chunk, "1 row or more")
    expect_same_device(h=h, head=head, targets=targets, coeff=coeff)
    expect_contiguous_on_gpu(h=h, head=head, targets=targets)
    if chunk is None:
        chunk = CHUNK_ROWS if h.device.type == "cuda" else max(1, CHUNK_LOGITS // head.shape[0])
    return _token_logprob(h.detach(), head.detach(), targets, coeff.detach(), temperature, chunk)


def token_logprob_reference(
    h: Tensor, head: Tensor, targets: Tensor, coeff: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """`token_logprob` in plain PyTorch, by chunks: dh = coeff / temperature * (onehot - softmax) @ head."""
    dtype, vocabulary = accumulator(h.dtype), head.shape[0]
    if targets.device.type == "cpu" and len(targets):
        low, high = targets.aminmax()
        expect(bool(low >= 0 and high < vocabulary), "targets", f"{low} to {high}", f"0 to {vocabulary - 1}")
    logp, dh = h.new_empty(len(h), dtype=dtype), torch.empty_like(h, memory_format=torch.contiguous_format)
    logits = h.new_empty(min(chunk, len(h)), vocabulary, dtype=dtype)
    for first in range(0, len(h), chunk):
        rows = slice(first, min(first + chunk, len(h)))
        x, target = h[rows].to(dtype), targets[rows, None]
        scores = logits[: len(x)]
        for tile, weight in _tiles(head, dtype):
            torch.mm(x, weight.T, out=scores[:, tile])
        scores /= temperature
        scores -= scores.amax(-1, keepdim=True)
        chosen = scores.gather(1, target)
        mass = scores.exp_().sum(-1, keepdim=True)  # one exponential for the probability and its gradient, in place
        logp[rows] = chosen.sub_(mass.log())[:, 0]
        scale = coeff[rows, None].to(dtype) / temperature
        gradient = scores.mul_(-scale / mass).scatter_add_(1, target, scale)
        total = torch.zeros_like(x)
        for tile, weight in _tiles(head, dtype):
            total.addmm_(gradient[:, tile], weight)
        dh[rows] = total
    return logp, dh


def _tiles(head: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Runs of the head's rows in `dtype`: the head itself if it is of that dtype, else widened tile by tile."""
    size = head.shape[0] if head.dtype == dtype else TILE_ROWS
    for first in range(0, head.shape[0], size):
        tile = slice(first, min(first + size, head.shape[0]))
        yield tile, head[tile].to(dtype)


_token_logprob = torch.library.custom_op("saga_kernels::token_logprob", token_logprob_reference, mutates_args=())


@_token_logprob.register_kernel("cuda")
def _(h: Tensor, head: Tensor, targets: Tensor, coeff: Tensor, temperature: float, chunk: int) -> Any:
    if h.dtype == torch.float64:
        return token_logprob_reference(h, head, targets, coeff, temperature, chunk)
    from .gpu import logprob  # Triton is needed on a GPU alone

    return logprob.forward(h, head, targets, coeff, temperature, chunk)


@_token_logprob.register_fake
def _(h: Tensor, head: Tensor, targets: Tensor, coeff: Tensor, temperature: float, chunk: int) -> Any:
    return h.new_empty(h.shape[0], dtype=accumulator(h.dtype)), torch.empty_like(
        h, memory_format=torch.contiguous_format
    )
