"""Group-relative advantages (GRPO, arXiv 2402.03300) with the mask of groups that teach anything (DAPO, 2503.14476)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]  # noqa: F401  registers the schema and the compiled kernels
from .checks import expect, expect_tensor


def group_advantage(rewards: Tensor, eps: float = 1e-4, population: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A = (r - mean r) / (std r + eps) in each group; a group whose rewards are all equal contributes nothing.

    Args:
        rewards: (..., G) float32, finite (checked on CPU; a GPU is not waited for, and gives that group nan). Several
            rewards of a pair, as (pairs, 1 + C, G), are normalised in the one launch.
        eps: added to the standard deviation. population: divide by G instead of G - 1.

    Returns:
        advantages: (..., G) float32, zeros in groups that do not contribute. contributes: (...) bool, min != max.
        count: () int64, how many groups contribute.
    """
    expect(rewards.ndim >= 2, "rewards", f"shape {tuple(rewards.shape)}", "two dimensions or more")
    groups = rewards.detach().flatten(0, -2)
    expect_tensor("rewards", groups, (None, None), (torch.float32,))
    expect(groups.shape[1] > 0, "rewards", f"shape {tuple(rewards.shape)}", "one reward a group or more")
    advantages, contributes, count = torch.ops.saga_kernels.group_advantage(groups, eps, population)
    return advantages.view(rewards.shape), contributes.view(rewards.shape[:-1]), count


def group_advantage_reference(
    rewards: Tensor, eps: float = 1e-4, population: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`group_advantage` in plain PyTorch, in the dtype given."""
    contributes = rewards.amin(-1) != rewards.amax(-1)
    centred = rewards - rewards.mean(-1, keepdim=True)
    degrees = max(1, rewards.shape[-1] - (not population))
    std = (centred.square().sum(-1, keepdim=True) / degrees).sqrt()
    return torch.where(contributes[..., None], centred / (std + eps), 0), contributes, contributes.sum()


@torch.library.register_fake("saga_kernels::group_advantage")  # type: ignore[untyped-decorator]
def _(rewards: Tensor, eps: float, population: bool) -> Any:
    pairs = rewards.shape[0]
    return (
        torch.empty_like(rewards, memory_format=torch.contiguous_format),
        rewards.new_empty(pairs, dtype=torch.bool),
        rewards.new_empty((), dtype=torch.int64),
    )
