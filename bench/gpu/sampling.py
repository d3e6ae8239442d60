"""`sample_top_p` over 151,936 tokens: 8 to 256 rows with a language model's few likely tokens, and flat ones.

Rivals: the usual sort, softmax and cumulative sum in PyTorch, and flashinfer's rejection sampling; each with its own
random numbers, so a result's error is the share of its tokens outside the float64 nucleus. The goal is 5% of a decode
step of 1.5 to 3 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu import Case, importable
from saga_kernels import sample_top_p
from saga_kernels.gpu.shipped import Cost
from saga_kernels.sampling import nucleus_reference

VOCABULARY = 151_936
TEMPERATURE, TOP_P = 0.7, 0.95
TOLERANCE = 0.02  # the share may differ where float32 sums do


def cases() -> Iterator[Case]:
    for n, kind in ((8, "peaked"), (64, "peaked"), (256, "peaked"), (8, "flat"), (64, "flat")):
        logits = torch.randn(n, VOCABULARY, device="cuda")
        if kind == "peaked":
            logits = 25 - 1.5 * (1 + logits.argsort(-1)).log()
        logits = logits.bfloat16()
        yield Case(
            f"{n} rows, {kind}",
            _runs(logits),
            lambda: nucleus_reference((logits.double() / TEMPERATURE).softmax(-1), TOP_P),  # noqa: B023
            Cost(0, logits.nbytes),
            TOLERANCE,
            error=_outside,
            graph=True,
        )


def _runs(logits: Tensor) -> dict[str, Callable[[], Tensor]]:
    rows = torch.arange(len(logits), device="cuda")
    step = torch.zeros_like(rows)
    runs = {
        "ours": lambda: sample_top_p(logits, TEMPERATURE, TOP_P, 0, rows, step),
        "PyTorch, sorted": lambda: _sorted(logits),
    }
    if (flashinfer := importable("flashinfer")) is not None:
        runs["flashinfer"] = lambda: flashinfer.sampling.top_p_sampling_from_probs(
            (logits.float() / TEMPERATURE).softmax(-1), TOP_P
        ).long()
    return runs


def _sorted(logits: Tensor) -> Tensor:
    p, ids = (logits.float() / TEMPERATURE).softmax(-1).sort(-1, descending=True)
    kept = torch.where(p.cumsum(-1) - p < TOP_P, p, 0)
    return ids.gather(1, kept.multinomial(1))[:, 0]


def _outside(tokens: Tensor, nucleus: Tensor) -> float:
    return 1 - nucleus.gather(1, tokens[:, None]).double().mean().item()
