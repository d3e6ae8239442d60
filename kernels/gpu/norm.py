"""Triton for `rms_norm` and `add_rms_norm`: a row a program, held in registers between its sum of squares and its end.

So each tensor is read or written once. Forward, the residual sum is formed, rounded, stored and normed in one pass;
backward, the gradient that comes to the sum from elsewhere is added before the one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shipped import Cost, Shipped, launch_options

WARPS = {4096: 8, 8192: 16}  # by block: 16 elements a thread in both, so that nothing spills
WIDEST = max(WARPS)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """(..., D) contiguous → the sum x + residual (x itself without a residual), and the sum normed."""
    width = x.shape[-1]
    block = block or _block(width)
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    _forward[(x.numel() // width,)](
        x, residual, weight, out, total, width, eps, ADD=residual is not None, BLOCK=block, **_options(block)
    )
    return total, out


def backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, block: int | None = None
) -> Tensor:
    """The gradient of the rows x that were normed, plus dsum where they went elsewhere too."""
    width = x.shape[-1]
    block = block or _block(width)
    dx = torch.empty_like(x)
    _backward[(x.numel() // width,)](
        dy, dsum, x, weight, dx, width, eps, ADD=dsum is not None, BLOCK=block, **_options(block)
    )
    return dx


def _block(width: int) -> int:
    return min(block for block in WARPS if block >= width)


def _options(block: int) -> dict[str, object]:
    return launch_options(WARPS.get(block, 4))


@triton.jit
def _forward(x, residual, weight, out, total, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    row = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADD:
        row += tl.load(residual + at, inside, 0.0).to(tl.float32)
        rounded = row.to(total.dtype.element_ty)
        tl.store(total + at, rounded, inside)
        row = rounded.to(tl.float32)  # the norm of the sum as the next layer will read it
    scale = tl.rsqrt(tl.sum(row * row) / width + eps)
    normal = (row * scale).to(out.dtype.element_ty).to(tl.float32)  # transformers rounds before the weight
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    tl.store(out + at, normal * w, inside)


@triton.jit
def _backward(dy, dsum, x, weight, dx, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    row = tl.load(x + at, inside, 0.0).to(tl.float32)
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    g = (tl.load(dy + at, inside, 0.0).to(tl.float32) * w).to(dx.dtype.element_ty).to(tl.float32)  # as autograd would
    scale = tl.rsqrt(tl.sum(row * row) / width + eps)
    normal = row * scale
    d = (g - normal * (tl.sum(g * normal) / width)) * scale
    if ADD:
        d += tl.load(dsum + at, inside, 0.0).to(tl.float32)
    tl.store(dx + at, d, inside)


def shipped(arch: int) -> Iterator[Shipped]:
    """Every block in bf16 and fp16, with and without the addition; alike on every chip."""
    for dtype in ("bf16", "fp16"):
        for kernel, tensors in (
            (_forward, ("x", "residual", "weight", "out", "total")),
            (_backward, ("dy", "dsum", "x", "weight", "dx")),
        ):
            added = tensors[1]
            for add in (False, True):
                signature = {**dict.fromkeys(tensors, f"*{dtype}"), "width": "i32", "eps": "fp32"}
                absent = {} if add else {added: None}
                for block, warps in WARPS.items():
                    name = f"{kernel.fn.__name__.strip('_')}{' add' * add} {dtype} {block}"
                    constants = {"ADD": add, "BLOCK": block, **absent}
                    yield Shipped(name, kernel, signature, constants, warps, aligned=("width",))


def cost(rows: int, width: int, itemsize: int = 2, add: bool = False, backward: bool = False) -> Cost:
    """Forward 2 tensors read or written and 5 operations an element, backward 3 and 9; adding costs 2 (forward: the
    residual and the sum) or 1 (backward: the sum's gradient) more, and 1 operation. The weight is read once.
    """
    tensors = (3 + add) if backward else (2 + 2 * add)
    operations = (9 if backward else 5) + add
    return Cost(rows * width * operations, (rows * tensors + 1) * width * itemsize)
