"""Rotary position embedding in the rotate-half convention (arXiv 2104.09864); M-RoPE is a matter of cos and sin."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, expect, expect_same_device, expect_tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, each token by its own angles.

    Args:
        x: (tokens, heads, head_dim), head_dim even. cos, sin: (tokens, head_dim), of any floating dtype.

    Returns:
        Like x, computed in the widest of the dtypes given. The gradient goes to x alone.
    """
    expect_tensor("x", x, (None, None, None), FLOATS)
    expect(x.shape[2] % 2 == 0, "x", f"head_dim {x.shape[2]}", "an even head_dim")
    expect_tensor("cos", cos, (x.shape[0], x.shape[2]), FLOATS)
    expect_tensor("sin", sin, tuple(cos.shape), (cos.dtype,))
    expect_same_device(x=x, cos=cos, sin=sin)
    return _rope(x, cos, sin)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` in plain PyTorch."""
    return (x * cos[:, None] + _rotate_half(x) * sin[:, None]).to(x.dtype)


def rope_backward_reference(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose: rotating by a half is skew-symmetric."""
    return (dy * cos[:, None] - _rotate_half(dy * sin[:, None])).to(dy.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


_rope = torch.library.custom_op("saga_kernels::rope", rope_reference, mutates_args=())
_rope_backward = torch.library.custom_op("saga_kernels::rope_backward", rope_backward_reference, mutates_args=())


@_rope.register_fake
def _(x, cos, sin):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_rope_backward.register_fake
def _(dy, cos, sin):
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, dy):
    return _rope_backward(dy, *ctx.saved_tensors), None, None


_rope.register_autograd(_backward, setup_context=_setup_context)
