"""Triton for `rope`, with the RMSNorm of each head before it where the model has one: one pass each way.

A program has one token and a few of its heads, as two tiles: the first halves of the heads and the second. So rotating
is arithmetic between two registers, the norm is one sum over both, and cos and sin are read once for all those heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shipped import Cost, Shipped, launch_options

HEADS = 8  # a program: 1024 elements, 8 (16 bytes of bf16) a thread
HALF = 64  # columns of a tile
WARPS = 4
WIDEST = 2 * HALF  # head_dim
STEP = 16  # head_dim is a multiple of this, so that the kernel can load 8 elements at once from either half


def forward(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (tokens, heads, head_dim), any stride between tokens; cos, sin contiguous → contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _forward[_grid(x)](
        x, cos, sin, weight, out, x.shape[1], x.shape[2] // STEP, x.stride(0), eps, **_constants(weight), **_options()
    )
    return out


def backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """dy contiguous → dx. x, as given forward, is needed with a weight only."""
    dx = torch.empty_like(dy)
    steps, stride = dy.shape[2] // STEP, 0 if x is None else x.stride(0)
    _backward[_grid(dy)](
        dy, x, cos, sin, weight, dx, dy.shape[1], steps, stride, eps, **_constants(weight), **_options()
    )
    return dx


def _grid(x: Tensor) -> tuple[int]:
    return (x.shape[0] * triton.cdiv(x.shape[1], HEADS),)


def _constants(weight: Tensor | None) -> dict[str, object]:
    return {"NORM": weight is not None, "HEADS": HEADS, "HALF": HALF, "STEP": STEP}


def _options() -> dict[str, object]:
    return launch_options(WARPS)


@triton.jit
def _tile(heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """This program's token, its heads (HEADS, 1), columns (1, HALF) of a half, and which of both exist."""
    blocks = tl.cdiv(heads, HEADS)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    head = (tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    return token, head, column, (head < heads) & (column < half)


@triton.jit
def _forward(
    x,
    cos,
    sin,
    weight,
    out,
    heads,
    steps,
    stride,
    eps,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    STEP: tl.constexpr,
):
    half = steps * (STEP // 2)
    token, head, column, inside = _tile(heads, half, HEADS, HALF)
    at = head * (2 * half) + column
    first = tl.load(x + token * stride + at, inside, 0.0).to(tl.float32)
    second = tl.load(x + token * stride + at + half, inside, 0.0).to(tl.float32)
    if NORM:
        square = tl.sum(first * first, 1, keep_dims=True) + tl.sum(second * second, 1, keep_dims=True)
        scale = tl.rsqrt(square / (2 * half) + eps)
        # Rounded before the weight and after it, as by rms_norm.
        dtype: tl.constexpr = out.dtype.element_ty
        w_first = tl.load(weight + column, column < half, 0.0).to(tl.float32)
        w_second = tl.load(weight + half + column, column < half, 0.0).to(tl.float32)
        first = ((first * scale).to(dtype).to(tl.float32) * w_first).to(dtype).to(tl.float32)
        second = ((second * scale).to(dtype).to(tl.float32) * w_second).to(dtype).to(tl.float32)
    angle = token * (2 * half) + column
    cos_first = tl.load(cos + angle, column < half, 0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, column < half, 0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + half, column < half, 0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + half, column < half, 0.0).to(tl.float32)
    to = out + token * heads * (2 * half) + at
    tl.store(to, first * cos_first - second * sin_first, inside)
    tl.store(to + half, second * cos_second + first * sin_second, inside)


@triton.jit
def _backward(
    dy,
    x,
    cos,
    sin,
    weight,
    dx,
    heads,
    steps,
    stride,
    eps,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    STEP: tl.constexpr,
):
    half = steps * (STEP // 2)
    token, head, column, inside = _tile(heads, half, HEADS, HALF)
    at = head * (2 * half) + column
    packed = token * heads * (2 * half) + at
    d_first = tl.load(dy + packed, inside, 0.0).to(tl.float32)
    d_second = tl.load(dy + packed + half, inside, 0.0).to(tl.float32)
    angle = token * (2 * half) + column
    cos_first = tl.load(cos + angle, column < half, 0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, column < half, 0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + half, column < half, 0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + half, column < half, 0.0).to(tl.float32)
    g_first = d_first * cos_first + d_second * sin_second
    g_second = d_second * cos_second - d_first * sin_first
    if NORM:
        first = tl.load(x + token * stride + at, inside, 0.0).to(tl.float32)
        second = tl.load(x + token * stride + at + half, inside, 0.0).to(tl.float32)
        square = tl.sum(first * first, 1, keep_dims=True) + tl.sum(second * second, 1, keep_dims=True)
        scale = tl.rsqrt(square / (2 * half) + eps)
        first *= scale
        second *= scale
        g_first *= tl.load(weight + column, column < half, 0.0).to(tl.float32)
        g_second *= tl.load(weight + half + column, column < half, 0.0).to(tl.float32)
        dot = tl.sum(g_first * first, 1, keep_dims=True) + tl.sum(g_second * second, 1, keep_dims=True)
        mean = dot / (2 * half)
        g_first = (g_first - first * mean) * scale
        g_second = (g_second - second * mean) * scale
    tl.store(dx + packed, g_first, inside)
    tl.store(dx + packed + half, g_second, inside)


def shipped(arch: int) -> Iterator[Shipped]:
    """bf16 and fp16, with and without the norm, for every head_dim; alike on every chip. cos and sin of x's dtype."""
    for dtype in ("bf16", "fp16"):
        for kernel, tensors, for_norm in (
            (_forward, ("x", "cos", "sin", "weight", "out"), ("weight",)),
            (_backward, ("dy", "x", "cos", "sin", "weight", "dx"), ("x", "weight")),
        ):
            integers = dict.fromkeys(("heads", "steps", "stride"), "i32")
            signature = {**dict.fromkeys(tensors, f"*{dtype}"), **integers, "eps": "fp32"}
            for norm in (False, True):
                absent = {} if norm else dict.fromkeys(for_norm)
                constants = {"NORM": norm, "HEADS": HEADS, "HALF": HALF, "STEP": STEP, **absent}
                name = f"{kernel.fn.__name__.strip('_')}{' norm' * norm} {dtype}"
                yield Shipped(name, kernel, signature, constants, WARPS, aligned=("stride",))


def cost(tokens: int, heads: int, head_dim: int, itemsize: int = 2, norm: bool = False, backward: bool = False) -> Cost:
    """x once in and once out, in the backward of the norm twice in; cos and sin once. 3 operations an element to
    rotate, 5 to norm and 9 in its backward.
    """
    elements = tokens * heads * head_dim
    operations = 3 + (9 if backward else 5) * norm
    tensors = 2 + (norm and backward)
    return Cost(elements * operations, (elements * tensors + 2 * tokens * head_dim + norm * head_dim) * itemsize)
