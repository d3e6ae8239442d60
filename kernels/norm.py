"""RMSNorm of a frozen layer (arXiv 1910.07467), alone or with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import pointwise_cpu
from .checks import FLOATS, accumulator, expect, expect_contiguous_on_gpu, expect_same_device, expect_tensor

WIDEST_ON_GPU = 8192


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)) over the last axis; computed in float32 and rounded before the weight.

    Args:
        x: (..., D); on a GPU contiguous, D at most 8192. weight: (D,), of x's dtype. eps: added to the mean square.

    Returns:
        Like x. The gradient goes to x alone, recomputed from x: the weight is frozen.
    """
    _check(x, weight)
    return _rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + residual and `rms_norm(s)` in one kernel: the forward does not read s back, and the backward does not add
    its two gradients in a separate pass.

    Args:
        x, weight, eps: as `rms_norm`. residual: like x.

    Returns:
        s, like x, rounded to its dtype before the norm. The normed s. Both give their gradient to x and residual.
    """
    _check(x, weight)
    expect_tensor("residual", residual, tuple(x.shape), (x.dtype,))
    expect_same_device(x=x, residual=residual)
    expect_contiguous_on_gpu(residual=residual)
    return _add_rms_norm(x, residual, weight, eps)


def _check(x: Tensor, weight: Tensor) -> None:
    expect(x.dim() > 0, "x", "a scalar", "shape (..., D)")
    expect_tensor("x", x, tuple(x.shape), FLOATS)
    expect_tensor("weight", weight, (x.shape[-1],), (x.dtype,))
    expect_same_device(x=x, weight=weight)
    expect_contiguous_on_gpu(x=x, weight=weight)
    if x.is_cuda and x.dtype != torch.float64:
        expect(x.shape[-1] <= WIDEST_ON_GPU, "x", f"D = {x.shape[-1]}", f"at most {WIDEST_ON_GPU} on a GPU")


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain PyTorch, with transformers' order of casts."""
    wide = x.to(accumulator(x.dtype))
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch."""
    total = x + residual
    return total, rms_norm_reference(total, weight, eps)


def rms_norm_backward_reference(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """dx = scale * (g - n * mean(g * n)) + dsum, with n = x * scale and g = weight * dy, in dy's dtype as given."""
    wide, g = x.to(accumulator(x.dtype)), (dy * weight).to(accumulator(x.dtype))
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normal = wide * scale
    dx = g.sub_(normal.mul_((g * normal).mean(-1, keepdim=True))).mul_(scale)
    return (dx if dsum is None else dx.add_(dsum)).to(x.dtype)


_rms_norm = torch.library.custom_op("saga_kernels::rms_norm", rms_norm_reference, mutates_args=())
_add_rms_norm = torch.library.custom_op("saga_kernels::add_rms_norm", add_rms_norm_reference, mutates_args=())
_rms_norm_backward = torch.library.custom_op(
    "saga_kernels::rms_norm_backward", rms_norm_backward_reference, mutates_args=()
)
pointwise_cpu.register(_rms_norm, rms_norm_reference)
pointwise_cpu.register(_add_rms_norm, add_rms_norm_reference)
pointwise_cpu.register(_rms_norm_backward, rms_norm_backward_reference)


@_rms_norm.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float) -> Any:
    if x.dtype == torch.float64:
        return rms_norm_reference(x, weight, eps)
    from .gpu import norm  # Triton is needed on a GPU alone

    return norm.forward(x, None, weight, eps)[1]


@_add_rms_norm.register_kernel("cuda")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    if x.dtype == torch.float64:
        return add_rms_norm_reference(x, residual, weight, eps)
    from .gpu import norm

    return norm.forward(x, residual, weight, eps)


@_rms_norm_backward.register_kernel("cuda")
def _(dy: Tensor, dsum: Tensor, x: Tensor, weight: Tensor, eps: float) -> Any:
    if x.dtype == torch.float64:
        return rms_norm_backward_reference(dy, dsum, x, weight, eps)
    from .gpu import norm

    return norm.backward(dy.contiguous(), None if dsum is None else dsum.contiguous(), x, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Any:
    return torch.empty_like(x)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    return torch.empty_like(x), torch.empty_like(x)


@_rms_norm_backward.register_fake
def _(dy: Tensor, dsum: Tensor, x: Tensor, weight: Tensor, eps: float) -> Any:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> Any:
    return _rms_norm_backward(dy, None, *ctx.saved_tensors, ctx.eps), None, None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[0], weight)


def _add_backward(ctx: Any, dsum: Tensor, dy: Tensor) -> Any:
    dx = _rms_norm_backward(dy, dsum, *ctx.saved_tensors, ctx.eps)
    return dx, dx, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)
_add_rms_norm.register_autograd(_add_backward, setup_context=_add_setup_context)
