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
        dy = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
        gate_up = torch.randn(rows, 2 * WIDTH, device="cuda", dtype=torch.bfloat16)
        name, reference = f"swiglu of {rows} rows", widened(eager, torch.float32)  # float64 would fill the card
        yield Case(name, runs, reference, cost(dy.numel()), TOLERANCE, (gate_up,), graph=True)
    backwards = {rival: backward_of(run, (gate_up,), 1, dy) for rival, run in runs.items()}
    reference = backward_of(eager, (gate_up.float(),), 1, dy.float())
    yield Case(f"{name}, backward", backwards, reference, cost(dy.numel(), backward=True), TOLERANCE)


def _gates() -> dict[str, Callable[[Tensor], Tensor]]:
    """Gate and up come side by side, as one matmul gives them."""

    def eager(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    runs = {"ours": swiglu, "torch, eager": eager, "torch, compiled": torch.compile(eager)}
    if liger := importable("liger_kernel.transformers.functional"):
        runs["liger"] = lambda gate_up: liger.liger_swiglu(*(half.contiguous() for half in gate_up.chunk(2, -1)))
    return runs
