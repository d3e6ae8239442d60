"""The gate of a Llama-style MLP (arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import pointwise_cpu
from .checks import FLOATS, accumulator, expect, expect_contiguous_on_gpu, expect_tensor

TILE = 1 << 19  # numbers of gate_up that are worked on at a time on a CPU


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
    wide, rows = accumulator(gate_up.dtype), gate_up.flatten(0, -2)
    out = gate_up.new_empty(len(rows), rows.shape[1] // 2)
    for tile in _tiles(rows):
        gate, up = rows[tile].to(wide).chunk(2, -1)
        out[tile] = torch.nn.functional.silu(gate).mul_(up)
    return out.view(*gate_up.shape[:-1], out.shape[1])


def swiglu_backward_reference(dy: Tensor, gate_up: Tensor) -> Tensor:
    """dgate = dy * up * s * (1 + gate * (1 - s)) and dup = dy * gate * s, with s = sigmoid(gate), side by side."""
    wide, rows, dy = accumulator(gate_up.dtype), gate_up.flatten(0, -2), dy.flatten(0, -2)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    scratch = torch.empty(3, min(len(rows), _height(rows)), dy.shape[1], dtype=wide, device=dy.device)
    for tile in _tiles(rows):
        gate, up = rows[tile].to(wide).chunk(2, -1)
        dgate, dup = out[tile].chunk(2, -1)
        s, dys, du = scratch[:, : len(gate)]
        torch.sigmoid(gate, out=s)
        torch.mul(dy[tile], s, out=dys)
        torch.mul(dys, gate, out=du)
        dup.copy_(du)
        dgate.copy_(torch.sub(1, s, out=s).mul_(du).add_(dys).mul_(up))
    return out.view(gate_up.shape)


def _height(rows: Tensor) -> int:
    return max(1, TILE // max(1, rows.shape[1]))


def _tiles(rows: Tensor) -> Iterator[slice]:
    """Of rows whose temporaries stay in a core's cache, and are small beside the rows."""
    return (slice(first, first + _height(rows)) for first in range(0, len(rows), _height(rows)))


_swiglu = torch.library.custom_op("saga_kernels::swiglu", swiglu_reference, mutates_args=())
_swiglu_backward = torch.library.custom_op("saga_kernels::swiglu_backward", swiglu_backward_reference, mutates_args=())
pointwise_cpu.register(_swiglu, swiglu_reference)
pointwise_cpu.register(_swiglu_backward, swiglu_backward_reference)


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
