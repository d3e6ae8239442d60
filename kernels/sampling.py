"""Nucleus sampling (arXiv 1904.09751) whose every draw can be repeated: random numbers by (seed, row, step)."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, accumulator, expect, expect_contiguous_on_gpu, expect_same_device, expect_tensor

SHORTLIST = 64  # most nuclei hold fewer tokens than this, so few rows need a full sort


def sample_top_p(
    logits: Tensor, temperature: float, top_p: float, seed: int, rows: Tensor, step: Tensor | int
) -> Tensor:
    """Draw one token a row from the exact nucleus: the smallest set of most likely tokens that reaches top_p.

    The token that crosses top_p is in; of equally likely tokens the lower ids go first. The draw inverts the
    cumulative distribution of the nucleus in token order at a uniform from Philox4x32-10, key = seed, counter =
    (row, step): it depends on nothing else in the batch.

    Args:
        logits: (N, V); -inf bars a token. temperature: divides the logits; 0 takes the argmax.
        top_p: above 0, at most 1. seed: 64 bits.
        rows: (N,) int64, each row's lasting id. step: (N,) int64 or one int for all rows, the place in the sequence.

    Returns:
        (N,) int64 token ids. On a GPU, which is not waited for, -1 for a row without a finite distribution.

    Raises:
        ValueError, TypeError: as the argument named says; on CPU also for a row without a finite distribution.
    """
    expect_tensor("logits", logits, (None, None), FLOATS)
    expect(logits.shape[1] > 0, "logits", f"shape {tuple(logits.shape)}", "one token or more")
    expect(temperature >= 0, "temperature", temperature, "0 or more")
    expect(0 < top_p <= 1, "top_p", top_p, "above 0, at most 1")
    expect(0 <= seed < 1 << 63, "seed", seed, "0 to 2**63 - 1")
    expect_tensor("rows", rows, (logits.shape[0],), (torch.int64,))
    if isinstance(step, int):
        step = torch.full_like(rows, step)
    expect_tensor("step", step, (logits.shape[0],), (torch.int64,))
    expect_same_device(logits=logits, rows=rows, step=step)
    expect_contiguous_on_gpu(logits=logits, rows=rows, step=step)
    return _sample_top_p(logits.detach(), temperature, top_p, seed, rows, step)


def sample_top_p_reference(
    logits: Tensor, temperature: float, top_p: float, seed: int, rows: Tensor, step: Tensor
) -> Tensor:
    """`sample_top_p` in plain PyTorch: sorts to find the nucleus, sums in float64."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.to(accumulator(logits.dtype)) / temperature).softmax(-1)
    if logits.device.type == "cpu" and len(logits):
        broken = probabilities.isnan().any(-1)
        expect(not broken.any(), "logits", f"row {broken.int().argmax()} with nan, +inf or only -inf", "finite or -inf")
    kept = torch.where(nucleus_reference(probabilities, top_p), probabilities, 0)
    cumulative = kept.double().cumsum(-1)
    point = philox_uniform(seed, rows, step)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True)[:, 0]
    # A product that rounds up to the total would fall off the end: the last kept token is meant.
    last = logits.shape[1] - 1 - kept.flip(-1).ne(0).int().argmax(-1)
    return token.minimum(last)


def nucleus_reference(probabilities: Tensor, top_p: float) -> Tensor:
    """(N, V) bool: the smallest set of most likely tokens whose sum reaches top_p, lower ids first among equals."""
    keep = torch.empty_like(probabilities, dtype=torch.bool)
    pending, size = torch.arange(len(probabilities), device=probabilities.device), SHORTLIST
    while len(pending):
        size = min(size, probabilities.shape[1])
        p = probabilities[pending]
        likely = p.topk(size, -1).values
        before = likely.double().cumsum(-1) - likely
        count = (before < top_p).sum(-1, keepdim=True)
        least = likely.gather(-1, count - 1)
        above, equal = p > least, p == least
        keep[pending] = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
        # The shortlist may have been too short.
        pending = pending[(count[:, 0] == size) & (size < probabilities.shape[1])]
        size = probabilities.shape[1]
    return keep


def philox_uniform(seed: int, rows: Tensor, step: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) of 53 bits, one for each (seed, row, step)."""
    low, high = rows & 0xFFFFFFFF, rows >> 32 & 0xFFFFFFFF
    counter = (low, high, step & 0xFFFFFFFF, step >> 32 & 0xFFFFFFFF)
    first, second, _, _ = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return ((first >> 5 << 26) + (second >> 6)).double() * 2.0**-53


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on 32-bit words in int64.

    The 64-bit products wrap, which leaves both their 32-bit halves right once masked.
    """
    mask = 0xFFFFFFFF
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        ac, cc = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (cc >> 32 & mask) ^ b ^ k0, cc & mask, (ac >> 32 & mask) ^ d ^ k1, ac & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return a, b, c, d


_sample_top_p = torch.library.custom_op("saga_kernels::sample_top_p", sample_top_p_reference, mutates_args=())


@_sample_top_p.register_kernel("cuda")
def _(logits, temperature, top_p, seed, rows, step):
    if logits.dtype == torch.float64:
        return sample_top_p_reference(logits, temperature, top_p, seed, rows, step)
    from .gpu import sampling  # Triton is needed on a GPU alone

    return sampling.forward(logits, temperature, top_p, seed, rows, step)


@_sample_top_p.register_fake
def _(logits, temperature, top_p, seed, rows, step):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
