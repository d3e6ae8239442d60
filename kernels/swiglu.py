"""The gate of a Llama-style MLP (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, accumulator, expect, expect_contiguous_on_gpu, expect_tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, in float32: (..., 2 F), gate and up side by side as one matmul gives them → (..., F).

    Contiguous on a GPU. The backward recomputes the sigmoid, and gives the two gradients side by side again.
    """
    expect(gate_up.dim() > 0, "gate_up", "a scalar", "shape (..., 2 F)")
    expect_tensor("gate_up", gate_up, tuple(gate_up.shape), FLOATS)
    expect(gate_up.shape[-1] % 2 == 0, "gate_up", f"width {gate_up.shape[-1]}", "an even width")
    expect_contiguous_on_gpu(gate_up=gate_up)
    return _swiglu(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch, in float32 at least."""
    gate, up = gate_up.to(accumulator(gate_up.dtype)).chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up).to(gate_up.dtype)


def swiglu_backward_reference(dy: Tensor, gate_up: Tensor) -> Tensor:
    """dgate = dy * up * s * (1 + gate * (1 - s)) and dup = dy * gate * s, with s = sigmoid(gate), side by side."""
    wide = accumulator(gate_up.dtype)
    gate, up = gate_up.to(wide).chunk(2, -1)
    dy, out = dy.to(wide), torch.empty_like(gate_up, dtype=wide, memory_format=torch.contiguous_format)
    dgate, dup = out.chunk(2, -1)
    s = gate.sigmoid()
    torch.mul(dy, gate, out=dup).mul_(s)
    torch.mul(dy, up, out=dgate).mul_((1 - s).mul_(gate).add_(1).mul_(s))  # in place: they are large
    return out.to(gate_up.dtype)


_swiglu = torch.library.custom_op("saga_kernels::swiglu", swiglu_reference, mutates_args=())
_swiglu_backward = torch.library.custom_op("saga_kernels::swiglu_backward", swiglu_backward_reference, mutates_args=())


@_swiglu.register_kernel("cuda")
def _(gate_up: Tensor) -> Any:
    if gate_up.dtype == torch.float64:
        return swiglu_reference(gate_up)
    from .gpu import swiglu  # Triton is needed on a GPU alone

    return swiglu.forward(gate_up)


@_swiglu_backward.register_kernel("cuda")
def _(dy: Tensor, gate_up: Tensor) -> Any:
    if gate_up.dtype == torch.float64:
        return swiglu_backward_reference(dy, gate_up)
    from .gpu import swiglu

    return swiglu.backward(dy.contiguous(), gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Any:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@_swiglu_backward.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Any:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Any:
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup_context)
