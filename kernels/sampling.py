"""Nucleus sampling (arXiv 1904.09751), reproducible: random numbers are a function of (seed, row, step)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]  # noqa: F401  registers the compiled kernel
from .checks import FLOATS, accumulator, expect, expect_contiguous_on_gpu, expect_same_device, expect_tensor

SHORTLIST, GROWTH = 64, 4  # most nuclei hold fewer tokens than this; for other rows it grows by this factor
CACHED = 1 << 20  # probabilities per block


def sample_top_p(
    logits: Tensor, temperature: float, top_p: float, seed: int, rows: Tensor, step: Tensor | int
) -> Tensor:
    """Draw one token a row from the exact nucleus: the smallest set of most likely tokens that reaches top_p.

    The token that crosses top_p is in; of equally likely tokens the lower ids go first. The draw inverts the
    cumulative distribution of the nucleus in token order at a uniform from Philox4x32-10, key = seed, counter =
    (row, step): it depends on nothing else in the batch.

    Args:
        logits: (N, V); -inf bars a token. temperature: divides the logits; 0 takes the argmax, of whatever is there.
        top_p: above 0, at most 1. seed: 64 bits.
        rows: (N,) int64, ids of the rows. step: (N,) int64 or one int for all rows, the position in the sequence.

    Returns:
        (N,) int64 token ids; -1 where a temperature above 0 makes no finite distribution (nan, +inf or only -inf).

    Raises:
        ValueError, TypeError: as the argument named says.
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
    """`sample_top_p` in plain PyTorch; it sorts, and sums in float64, a shortlist and not the vocabulary."""
    if temperature == 0:
        return logits.argmax(-1)
    uniform, dtype = philox_uniform(seed, rows, step), accumulator(logits.dtype)
    token = torch.empty_like(rows)
    for first in range(0, len(logits), at_once := max(1, CACHED // logits.shape[1])):
        block = slice(first, first + at_once)
        p = torch.div(logits[block].to(dtype), temperature)
        token[block] = _draw(torch.softmax(p, -1, out=p), top_p, uniform[block])
    return token


def _draw(probabilities: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """(N,) tokens of probabilities (N, V) at `uniform` (N,)."""
    token = torch.empty_like(uniform, dtype=torch.int64)
    for row, ids, p, keep in _nuclei(probabilities, top_p):
        cumulative = torch.where(keep, p, 0).double().cumsum(-1)
        place = torch.searchsorted(cumulative, uniform[row, None] * cumulative[:, -1:], right=True)
        # A product that rounds up to the total would fall off the end: the last kept token is meant.
        last = ids.shape[1] - 1 - keep.flip(-1).int().argmax(-1, keepdim=True)
        token[row] = ids.gather(-1, place.minimum(last))[:, 0]
    # One nan, one +inf or nothing but -inf makes a whole row nan.
    return torch.where(probabilities[:, 0].isnan(), -1, token)


def nucleus_reference(probabilities: Tensor, top_p: float) -> Tensor:
    """(N, V) bool: the smallest set of most likely tokens whose sum reaches top_p, lower ids first among equals."""
    nucleus = torch.zeros_like(probabilities, dtype=torch.bool)
    for row, ids, _, keep in _nuclei(probabilities, top_p):
        nucleus[row[:, None], ids] = keep
    return nucleus


def _nuclei(probabilities: Tensor, top_p: float) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """All rows of probabilities (N, V), those with a small nucleus first: rows (n,), and of each its likely tokens' ids
    in ascending order, their probabilities, and which of them the nucleus keeps, each (n, tokens)."""
    vocabulary = probabilities.shape[1]
    pending, size = torch.arange(len(probabilities), device=probabilities.device), min(SHORTLIST, vocabulary)
    while len(pending):
        p, ids = (probabilities if len(pending) == len(probabilities) else probabilities[pending]).topk(size, -1)
        before = torch.nn.functional.pad(p[:, :-1].double().cumsum(-1), (1, 0))  # a sum less its last is not as exact
        count = (before < top_p).sum(-1, keepdim=True)
        least = p.gather(-1, (count - 1).clamp_min(0))
        # Tokens beyond the shortlist may belong to the nucleus too, if they can be as likely as its last.
        short = (p[:, -1] == least[:, 0]) & (size < vocabulary)
        ids, order = ids[~short].sort(-1)
        p, count, least = p[~short].gather(-1, order), count[~short], least[~short]
        above, equal = p > least, p == least
        yield pending[~short], ids, p, above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
        pending, size = pending[short], min(GROWTH * size, vocabulary)


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


@_sample_top_p.register_kernel("cpu")
def _(logits: Tensor, *rest: Any) -> Any:
    compiled = logits.dtype == torch.float32
    return (torch.ops.saga_kernels.sample_top_p_cpu if compiled else sample_top_p_reference)(logits, *rest)


@_sample_top_p.register_kernel("cuda")
def _(logits: Tensor, temperature: float, top_p: float, seed: int, rows: Tensor, step: Tensor) -> Any:
    if logits.dtype == torch.float64:
        return sample_top_p_reference(logits, temperature, top_p, seed, rows, step)
    from .gpu import sampling  # Triton is needed on a GPU alone

    return sampling.forward(logits, temperature, top_p, seed, rows, step)


@_sample_top_p.register_fake
def _(logits: Tensor, temperature: float, top_p: float, seed: int, rows: Tensor, step: Tensor) -> Any:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
