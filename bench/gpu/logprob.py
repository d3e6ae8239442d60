"""`token_logprob` over the 8B model's head: dH of the sum of all tokens' log-probabilities, and these.

Rivals: cut-cross-entropy's exact kernel, Liger's fused linear cross-entropy (which weighs all tokens alike, so here
they are), PyTorch's linear_cross_entropy where it has one, and the same chunks in PyTorch, eager and compiled.
Compared by dH alone: some give no log-probability of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import Case, importable
from saga_kernels import token_logprob
from saga_kernels.gpu.shipped import Cost
from saga_kernels.logprob import CHUNK_ROWS, token_logprob_reference

WIDTH, VOCABULARY = 4096, 151_936
TEMPERATURE = 0.7
TOLERANCE = 3e-2  # of bfloat16 logits and gradients


def cases() -> Iterator[Case]:
    for n in (CHUNK_ROWS, 5600):  # one chunk, and a group: 8 completions of 700 tokens
        h = torch.randn(n, WIDTH, device="cuda", dtype=torch.bfloat16)
        head = torch.randn(VOCABULARY, WIDTH, device="cuda").mul_(3 * WIDTH**-0.5).bfloat16()
        targets = torch.randint(VOCABULARY, (n,), device="cuda")
        coeff = torch.full((n,), 1 / n, device="cuda")
        # What must be done: two matmuls, and every tensor once.
        must = Cost(4 * n * WIDTH * VOCABULARY, 2 * (2 * h.numel() + head.numel()))
        yield Case(
            f"{n} x {WIDTH} x {VOCABULARY}",
            _runs(h, head, targets, coeff),
            lambda: _reference(h, head, targets, coeff),  # noqa: B023
            must,
            TOLERANCE,
        )


def _reference(h: Tensor, head: Tensor, targets: Tensor, coeff: Tensor) -> Tensor:
    return token_logprob_reference(h.float(), head.float(), targets, coeff, TEMPERATURE, CHUNK_ROWS)[1]


def _runs(h: Tensor, head: Tensor, targets: Tensor, coeff: Tensor) -> dict[str, Callable[[], Tensor]]:
    compiled = torch.compile(_chunk)

    def by_autograd(mean_loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            leaf = h.detach().requires_grad_()
            return torch.autograd.grad(-mean_loss(leaf / TEMPERATURE), leaf)[0]

        return run

    runs = {
        "ours": lambda: token_logprob(h, head, targets, coeff, TEMPERATURE)[1],
        "PyTorch, chunked": lambda: _chunked(_chunk, h, head, targets, coeff),
        "PyTorch, chunked, compiled": lambda: _chunked(compiled, h, head, targets, coeff),
    }
    if hasattr(F, "linear_cross_entropy"):
        runs["F.linear_cross_entropy"] = by_autograd(lambda x: F.linear_cross_entropy(x, head, targets))
    if (cce := importable("cut_cross_entropy")) is not None:
        runs["cce_exact"] = by_autograd(lambda x: cce.linear_cross_entropy(x, head, targets, impl="cce_exact"))
    if (liger := importable("liger_kernel.transformers")) is not None:
        loss = liger.LigerFusedLinearCrossEntropyLoss()
        runs["Liger"] = by_autograd(lambda x: loss(head, x, targets))
    return runs


def _chunked(
    chunk: Callable[..., tuple[Tensor, Tensor]], h: Tensor, head: Tensor, targets: Tensor, coeff: Tensor
) -> Tensor:
    parts = [x.split(CHUNK_ROWS) for x in (h, targets, coeff)]
    _, dh = zip(*(chunk(x, head, target, scale) for x, target, scale in zip(*parts)))
    return torch.cat(dh)


def _chunk(h: Tensor, head: Tensor, target: Tensor, coeff: Tensor) -> tuple[Tensor, Tensor]:
    """Without a kernel: bfloat16 logits, everything between the GEMMs in float32."""
    logp = ((h @ head.T).float() / TEMPERATURE).log_softmax(-1)
    scale = coeff[:, None] / TEMPERATURE
    gradient = (-scale * logp.exp()).scatter_add(1, target[:, None], scale)
    return logp.gather(1, target[:, None])[:, 0], gradient.to(h.dtype) @ head
