"""`group_advantage`: 8 and 4,096 groups of 8. Bound by its one launch; plain PyTorch takes a dozen."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.gpu import Case, widened
from saga_kernels import group_advantage
from saga_kernels.advantage import group_advantage_reference
from saga_kernels.gpu.shipped import Cost

GROUP = 8


def cases() -> Iterator[Case]:
    runs = {
        "ours": group_advantage,
        "torch, eager": group_advantage_reference,
        "torch, compiled": torch.compile(group_advantage_reference),
    }
    for pairs in (8, 4096):
        rewards = torch.randint(0, 3, (pairs, GROUP), device="cuda") / 2
        work = Cost(6 * rewards.numel(), 8 * rewards.numel() + pairs + 8)  # rewards and advantages; mask and count
        yield Case(f"{pairs} groups of {GROUP}", runs, widened(group_advantage_reference), work, 1e-5, (rewards,))
