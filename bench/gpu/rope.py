"""`rope`, with the norm of each head and without: 32 query heads of 128, in a decode step of 64 and a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu import Case, backward_of, importable, widened
from saga_kernels import rope
from saga_kernels.gpu.rope import cost
from saga_kernels.rope import rope_reference

HEADS, DIM, EPS, TOLERANCE = 32, 128, 1e-6, 5e-3


def cases() -> Iterator[Case]:
    plain, normed = _plain(), _normed()
    for tokens in (64, 51_600):
        x, dy = torch.randn(2, tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        weight = torch.rand(DIM, device="cuda", dtype=torch.bfloat16) + 0.5
        angles = (torch.rand(tokens, DIM // 2, device="cuda") * 6).repeat(1, 2)
        inputs = x, angles.cos().bfloat16(), angles.sin().bfloat16(), weight
        name, work, reference = f"rope of {tokens} tokens", cost(tokens, HEADS, DIM), widened(plain["torch, eager"])
        yield Case(name, plain, reference, work, TOLERANCE, inputs[:3], graph=True)
        name, reference = f"norm and {name}", widened(normed["torch, eager"])
        yield Case(name, normed, reference, cost(tokens, HEADS, DIM, norm=True), TOLERANCE, inputs, graph=True)
    backwards = {rival: backward_of(run, inputs, 1, dy) for rival, run in normed.items()}
    reference = backward_of(normed["torch, eager"], [t.double() for t in inputs], 1, dy.double())
    yield Case(f"{name}, backward", backwards, reference, cost(tokens, HEADS, DIM, norm=True, backward=True), TOLERANCE)


def _normed() -> dict[str, Callable[..., Tensor]]:
    def eager(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
        return rope_reference(x, cos, sin, weight, EPS)

    return {
        "ours": lambda x, cos, sin, weight: rope(x, cos, sin, weight, EPS),
        "torch, eager": eager,
        "torch, compiled": torch.compile(eager),
    }


def _plain() -> dict[str, Callable[..., Tensor]]:
    def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope_reference(x, cos, sin, None, 0.0)

    runs = {"ours": rope, "torch, eager": eager, "torch, compiled": torch.compile(eager)}
    if liger := importable("liger_kernel.transformers.functional"):

        def by_liger(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            """It rotates queries and keys together, in place: a copy of ours, and one head of it for keys."""
            q = x.clone().transpose(0, 1)[None]
            return liger.liger_rope(q, q[:, :1].clone(), cos[None], sin[None])[0][0].transpose(0, 1)

        runs["liger, on a copy"] = by_liger
    return runs
