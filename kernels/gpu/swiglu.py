"""Triton for `swiglu`: one pass each way, bound by memory; the backward recomputes the sigmoid."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shipped import Cost, Shipped, launch_options

BLOCK = 4096  # elements a program, of one row: 16 a thread, two loads of 16 bytes in flight for each tensor
WARPS = 8


def forward(gate_up: Tensor, block: int = BLOCK) -> Tensor:
    """silu(gate) * up, of gate and up side by side (..., 2 F), contiguous."""
    out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    if out.numel():
        _forward[_grid(out, block)](gate_up, out, out.shape[-1], BLOCK=block, **launch_options(WARPS))
    return out


def backward(dy: Tensor, gate_up: Tensor, block: int = BLOCK) -> Tensor:
    """dgate and dup side by side; dy contiguous."""
    out = torch.empty_like(gate_up)
    if out.numel():
        _backward[_grid(dy, block)](dy, gate_up, out, dy.shape[-1], BLOCK=block, **launch_options(WARPS))
    return out


def _grid(half: Tensor, block: int) -> tuple[int, int]:
    return half.numel() // half.shape[-1], triton.cdiv(half.shape[-1], block)


@triton.jit
def _forward(gate_up, out, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_up += row * 2 * width
    inside = at < width
    g = tl.load(gate_up + at, inside, 0.0).to(tl.float32)
    u = tl.load(gate_up + width + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + at, g * tl.sigmoid(g) * u, inside)


@triton.jit
def _backward(dy, gate_up, out, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_up += row * 2 * width
    out += row * 2 * width
    inside = at < width
    d = tl.load(dy + row * width + at, inside, 0.0).to(tl.float32)
    g = tl.load(gate_up + at, inside, 0.0).to(tl.float32)
    u = tl.load(gate_up + width + at, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(out + at, d * u * s * (1 + g * (1 - s)), inside)
    tl.store(out + width + at, d * g * s, inside)


def shipped(arch: int) -> Iterator[Shipped]:
    """bf16 and fp16, whatever the chip and the width."""
    for dtype in ("bf16", "fp16"):
        for kernel, tensors in ((_forward, ("gate_up", "out")), (_backward, ("dy", "gate_up", "out"))):
            signature = {**dict.fromkeys(tensors, f"*{dtype}"), "width": "i32"}
            name = f"{kernel.fn.__name__.strip('_')} {dtype}"
            yield Shipped(name, kernel, signature, {"BLOCK": BLOCK}, WARPS, aligned=("width",))


def cost(elements: int, itemsize: int = 2, backward: bool = False) -> Cost:
    """Of F-wide `elements`: 6 operations forward, 13 backward; 3 numbers read or written forward, 5 backward."""
    return Cost(elements * (13 if backward else 6), elements * itemsize * (5 if backward else 3))
