"""`swiglu` at a width of 12,288: 64 rows of a decode step, the 51,600 of a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import Case, backward_of, importable, widened
from saga_kernels import swiglu
from saga_kernels.gpu.swiglu import cost

WIDTH, TOLERANCE = 12_288, 5e-3


def cases() -> Iterator[Case]:
    runs = _gates()
    eager = runs["torch, eager"]
    for rows in (64, 51_600):
        gate, up, dy = torch.randn(3, rows, WIDTH, device="cuda", dtype=torch.bfloat16)
        name, reference = f"swiglu of {rows} rows", widened(eager, torch.float32)  # float64 would fill the card
        yield Case(name, runs, reference, cost(gate.numel()), TOLERANCE, (gate, up))
    backwards = {rival: backward_of(run, (gate, up), 2, dy) for rival, run in runs.items()}
    reference = backward_of(eager, (gate.float(), up.float()), 2, dy.float())
    yield Case(f"{name}, backward", backwards, reference, cost(gate.numel(), backward=True), TOLERANCE)


def _gates() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    runs = {"ours": swiglu, "torch, eager": eager, "torch, compiled": torch.compile(eager)}
    if liger := importable("liger_kernel.transformers.functional"):
        runs["liger"] = liger.liger_swiglu
    return runs
