"""The gate of a Llama-style MLP (arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, accumulator, expect_contiguous_on_gpu, expect_same_device, expect_tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, in float32. Differentiable in both; the backward recomputes the sigmoid.

    gate, up: alike in shape, dtype and device; contiguous on a GPU.
    """
    expect_tensor("gate", gate, tuple(gate.shape), FLOATS)
    expect_tensor("up", up, tuple(gate.shape), (gate.dtype,))
    expect_same_device(gate=gate, up=up)
    expect_contiguous_on_gpu(gate=gate, up=up)
    return _swiglu(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch, in float32 at least."""
    dtype = accumulator(gate.dtype)
    return torch.nn.functional.silu(gate.to(dtype)).mul_(up.to(dtype)).to(gate.dtype)


def swiglu_backward_reference(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate = dy * up * s * (1 + gate * (1 - s)) and dup = dy * gate * s, with s = sigmoid(gate)."""
    dtype = accumulator(gate.dtype)
    dy, wide = dy.to(dtype), gate.to(dtype)
    s = wide.sigmoid()
    return (dy * up * s * (1 + wide * (1 - s))).to(gate.dtype), (dy * wide * s).to(gate.dtype)


_swiglu = torch.library.custom_op("saga_kernels::swiglu", swiglu_reference, mutates_args=())
_swiglu_backward = torch.library.custom_op("saga_kernels::swiglu_backward", swiglu_backward_reference, mutates_args=())


@_swiglu.register_kernel("cuda")
def _(gate, up):
    if gate.dtype == torch.float64:
        return swiglu_reference(gate, up)
    from .gpu import swiglu  # Triton is needed on a GPU alone

    return swiglu.forward(gate, up)


@_swiglu_backward.register_kernel("cuda")
def _(dy, gate, up):
    if gate.dtype == torch.float64:
        return swiglu_backward_reference(dy, gate, up)
    from .gpu import swiglu

    return swiglu.backward(dy.contiguous(), gate, up)


@_swiglu.register_fake
def _(gate, up):
    return torch.empty_like(gate)


@_swiglu_backward.register_fake
def _(dy, gate, up):
    return torch.empty_like(gate), torch.empty_like(gate)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup_context)
