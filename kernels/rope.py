"""Rotary position embedding in the rotate-half convention (arXiv 2104.09864); M-RoPE differs in cos and sin alone.

For models that norm each query and key head first (Qwen3), the norm is part of the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import pointwise_cpu
from .checks import FLOATS, accumulator, expect, expect_contiguous_on_gpu, expect_same_device, expect_tensor
from .norm import rms_norm_backward_reference, rms_norm_reference

WIDEST_ON_GPU, STEP_ON_GPU = 128, 16  # head_dim


def rope(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """x * cos + rotate_half(x) * sin, each token by its own angles; with a weight, x is `rms_norm(x, weight, eps)`
    first.

    Args:
        x: (tokens, heads, head_dim), head_dim even; on a GPU a multiple of 16 up to 128, each token's heads contiguous,
            or wider, which goes through the reference.
        cos, sin: (tokens, head_dim), of any floating dtype; contiguous on a GPU.
        weight: (head_dim,), of x's dtype, or None for no norm. eps: added to the mean square.

    Returns:
        Like x, contiguous; rotated in float32 or the angles' wider dtype. The gradient goes to x alone, the norm
        recomputed from x.
    """
    expect_tensor("x", x, (None, None, None), FLOATS)
    heads, dim = x.shape[1:]
    expect(dim % 2 == 0, "x", f"head_dim {dim}", "an even head_dim")
    expect_tensor("cos", cos, (x.shape[0], dim), FLOATS)
    expect_tensor("sin", sin, tuple(cos.shape), (cos.dtype,))
    expect_same_device(x=x, cos=cos, sin=sin)
    if weight is not None:
        expect_tensor("weight", weight, (dim,), (x.dtype,))
        expect_same_device(x=x, weight=weight)
    if _on_gpu(x, cos):
        expect(
            dim % STEP_ON_GPU == 0,
            "x",
            f"head_dim {dim}",
            f"a multiple of {STEP_ON_GPU} up to {WIDEST_ON_GPU} on a GPU",
        )
        dense = x.stride(2) == 1 and (x.stride(1) == dim or heads == 1)
        expect(dense, "x", f"strides {x.stride()}", "each token's heads contiguous on a GPU")
        expect_contiguous_on_gpu(cos=cos, sin=sin, **({} if weight is None else {"weight": weight}))
    return _rope(x, cos, sin, weight, eps)


def _on_gpu(x: Tensor, cos: Tensor) -> bool:
    """Whether the Triton kernel takes it: on a GPU, not in float64, and heads that fit."""
    return x.is_cuda and torch.float64 not in (x.dtype, cos.dtype) and x.shape[2] <= WIDEST_ON_GPU


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`rope` in plain PyTorch."""
    wide = (x if weight is None else rms_norm_reference(x, weight, eps)).to(accumulator(x.dtype))
    return (wide * cos[:, None] + _rotate_half(wide) * sin[:, None]).to(x.dtype)


def rope_backward_reference(
    dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """The transpose (rotating by a half is skew-symmetric), then the norm's backward, which alone needs x."""
    wide = dy.to(accumulator(dy.dtype))
    d = wide * cos[:, None] - _rotate_half(wide * sin[:, None])
    if weight is None or x is None:
        return d.to(dy.dtype)
    return rms_norm_backward_reference(d, None, x, weight, eps)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


_rope = torch.library.custom_op("saga_kernels::rope", rope_reference, mutates_args=())
_rope_backward = torch.library.custom_op("saga_kernels::rope_backward", rope_backward_reference, mutates_args=())
pointwise_cpu.register(_rope, rope_reference)
pointwise_cpu.register(_rope_backward, rope_backward_reference)


@_rope.register_kernel("cuda")
def _(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Any:
    if not _on_gpu(x, cos):
        return rope_reference(x, cos, sin, weight, eps)
    from .gpu import rope  # Triton is needed on a GPU alone

    return rope.forward(x, cos, sin, weight, eps)


@_rope_backward.register_kernel("cuda")
def _(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Any:
    if not _on_gpu(dy, cos):
        return rope_backward_reference(dy, x, cos, sin, weight, eps)
    from .gpu import rope

    return rope.backward(dy.contiguous(), x, cos, sin, weight, eps)


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Any:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_rope_backward.register_fake
def _(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Any:
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, cos, sin, weight, ctx.eps = inputs
    ctx.save_for_backward(None if weight is None else x, cos, sin, weight)


def _backward(ctx: Any, dy: Tensor) -> Any:
    return _rope_backward(dy, *ctx.saved_tensors, ctx.eps), None, None, None, None


_rope.register_autograd(_backward, setup_context=_setup_context)
