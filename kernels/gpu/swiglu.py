"""Triton for `swiglu`: one pass each way, bound by memory; the backward recomputes the sigmoid."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shipped import Cost, Shipped, launch_options

BLOCK = 4096  # elements a program: 16 a thread, two loads of 16 bytes in flight for each tensor
WARPS = 8


def forward(gate: Tensor, up: Tensor, block: int = BLOCK) -> Tensor:
    """silu(gate) * up, all contiguous and alike."""
    out = torch.empty_like(gate)
    grid = (triton.cdiv(out.numel(), block),)
    _forward[grid](gate, up, out, out.numel(), BLOCK=block, **launch_options(WARPS))
    return out


def backward(dy: Tensor, gate: Tensor, up: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """dgate, dup."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(dy.numel(), block),)
    _backward[grid](dy, gate, up, dgate, dup, dy.numel(), BLOCK=block, **launch_options(WARPS))
    return dgate, dup


@triton.jit
def _forward(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, g * tl.sigmoid(g) * u, inside)


@triton.jit
def _backward(dy, gate, up, dgate, dup, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    d = tl.load(dy + at, inside, 0.0).to(tl.float32)
    g = tl.load(gate + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + at, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate + at, d * u * s * (1 + g * (1 - s)), inside)
    tl.store(dup + at, d * g * s, inside)


def shipped(arch: int) -> Iterator[Shipped]:
    """bf16 and fp16, whatever the chip: nothing here depends on the shape."""
    for dtype in ("bf16", "fp16"):
        for kernel, tensors in ((_forward, ("gate", "up", "out")), (_backward, ("dy", "gate", "up", "dgate", "dup"))):
            signature = {**dict.fromkeys(tensors, f"*{dtype}"), "size": "i32"}
            name = f"{kernel.fn.__name__.strip('_')} {dtype}"
            yield Shipped(name, kernel, signature, {"BLOCK": BLOCK}, WARPS, aligned=("size",))


def cost(elements: int, itemsize: int = 2, backward: bool = False) -> Cost:
    """6 operations an element forward, 13 backward; 3 tensors read or written forward, 5 backward."""
    return Cost(elements * (13 if backward else 6), elements * itemsize * (5 if backward else 3))
