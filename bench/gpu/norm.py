"""`rms_norm` and `add_rms_norm` at a hidden size of 4096: 64 rows of a decode step, the 51,600 of a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import Case, backward_of, importable, widened
from saga_kernels import add_rms_norm, rms_norm
from saga_kernels.gpu.norm import cost
from saga_kernels.norm import add_rms_norm_reference, rms_norm_reference

WIDTH, EPS, TOLERANCE = 4096, 1e-6, 5e-3


def cases() -> Iterator[Case]:
    norms, add_norms = _norms(), _add_norms()
    for rows in (64, 51_600):
        x, residual, dsum, dy = torch.randn(4, rows, WIDTH, device="cuda", dtype=torch.bfloat16)
        weight = torch.rand(WIDTH, device="cuda", dtype=torch.bfloat16) + 0.5
        name, work, reference = f"rms_norm of {rows} rows", cost(rows, WIDTH), widened(norms["torch, eager"])
        yield Case(name, norms, reference, work, TOLERANCE, (x, weight), graph=True)
        name, work, reference = f"add_{name}", cost(rows, WIDTH, add=True), widened(add_norms["torch, eager"])
        yield Case(name, add_norms, reference, work, TOLERANCE, (x, residual, weight), graph=True)
    inputs = x, residual, weight
    backwards = {rival: backward_of(run, inputs, 2, (dsum, dy)) for rival, run in add_norms.items()}
    wide, gradients = [t.double() for t in inputs], (dsum.double(), dy.double())
    reference = backward_of(add_norms["torch, eager"], wide, 2, gradients)
    yield Case(f"{name}, backward", backwards, reference, cost(rows, WIDTH, add=True, backward=True), TOLERANCE)


def _norms() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(x, weight, EPS)

    runs = {
        "ours": lambda x, weight: rms_norm(x, weight, EPS),
        "torch, eager": eager,
        "torch, F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
        "torch, compiled": torch.compile(eager),
    }
    if liger := importable("liger_kernel.transformers.functional"):
        runs["liger"] = lambda x, weight: liger.liger_rms_norm(x, weight, EPS, in_place=False)
    return runs


def _add_norms() -> dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm_reference(x, residual, weight, EPS)

    runs = {
        "ours": lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS),
        "torch, eager": eager,
        "torch, compiled": torch.compile(eager),
    }
    liger = importable("liger_kernel.transformers.functional")
    if hasattr(liger, "liger_fused_add_rms_norm"):
        runs["liger"] = lambda x, residual, weight: liger.liger_fused_add_rms_norm(x, residual, weight, EPS)[::-1]
    return runs
