"""RMSNorm of a frozen layer (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, accumulator, expect, expect_same_device, expect_tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)) over the last axis; computed in float32 and rounded before the weight.

    Args:
        x: (..., D). weight: (D,), of x's dtype. eps: added to the mean square.

    Returns:
        Like x. The gradient goes to x alone, recomputed from x: the weight is frozen.
    """
    expect(x.dim() > 0, "x", "a scalar", "shape (..., D)")
    expect_tensor("x", x, tuple(x.shape), FLOATS)
    expect_tensor("weight", weight, (x.shape[-1],), (x.dtype,))
    expect_same_device(x=x, weight=weight)
    return _rms_norm(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain PyTorch, with transformers' order of casts."""
    wide = x.to(accumulator(x.dtype))
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype) * weight


def rms_norm_backward_reference(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """dx = scale * (g - n * mean(g * n)), with n = x * scale and g = weight * dy."""
    wide, g = x.to(accumulator(x.dtype)), (dy * weight).to(accumulator(x.dtype))
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normal = wide * scale
    return ((g - normal * (g * normal).mean(-1, keepdim=True)) * scale).to(x.dtype)


_rms_norm = torch.library.custom_op("saga_kernels::rms_norm", rms_norm_reference, mutates_args=())
_rms_norm_backward = torch.library.custom_op(
    "saga_kernels::rms_norm_backward", rms_norm_backward_reference, mutates_args=()
)


@_rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x)


@_rms_norm_backward.register_fake
def _(dy, x, weight, eps):
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    return _rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)
