"""Frozen 4-bit NF4 linear layers, read in bitsandbytes' own layout (QLoRA, arXiv 2305.14314), never repacked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, expect, expect_same_device, expect_tensor

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmaxes that share one absmax of their own
CHUNK = 1 << 18  # packed bytes looked up at a time: the reference's scratch stays at 4 MB

# The 16 quantiles of a standard normal that NF4 rounds to, as bitsandbytes has them.
CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class NF4Weight:
    """An (out, in) weight in NF4: blocks of 64 along the flat row-major matrix, the first of two in the high nibble.

    Attributes:
        packed: uint8 (out * in / 2,).
        absmax: (ceil(out * in / 64),), float32; nested (double quantisation): uint8 codes, each standing for
            code2[absmax] * absmax2[index // 256] + offset.
        code2, absmax2: float32 (256,) and (ceil(blocks / 256),); None when not nested.
        offset: float32 (), or like absmax2 one for each 256 blocks, as `concatenate` makes it; None when not nested.
        shape: (out, in). dtype: of the dequantised values.
    """

    packed: Tensor
    absmax: Tensor
    code2: Tensor | None
    absmax2: Tensor | None
    offset: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        elements = math.prod(self.shape)
        expect(len(self.shape) == 2 and elements % 2 == 0, "shape", self.shape, "(out, in) with an even product")
        blocks = -(-elements // BLOCK)
        expect_tensor("packed", self.packed, (elements // 2,), (torch.uint8,))
        nested = self.code2 is not None
        expect_tensor("absmax", self.absmax, (blocks,), (torch.uint8 if nested else torch.float32,))
        if nested:
            expect_tensor("code2", self.code2, (256,), (torch.float32,))
            groups = -(-blocks // NESTED_BLOCK)
            expect_tensor("absmax2", self.absmax2, (groups,), (torch.float32,))
            grouped = isinstance(self.offset, Tensor) and self.offset.dim() > 0
            expect_tensor("offset", self.offset, (groups,) if grouped else (), (torch.float32,))
        names = ("packed", "absmax", "code2", "absmax2", "offset")
        given = {name: tensor for name, tensor in zip(names, self.tensors()) if tensor is not None}
        for name, tensor in given.items():
            expect(tensor.is_contiguous(), name, f"strides {tensor.stride()}", "a contiguous tensor")
        expect_same_device(**given)

    @classmethod
    def from_bitsandbytes(cls, parameter: Tensor) -> NF4Weight:
        """Views of a quantised `bitsandbytes.nn.Params4bit`; nothing is copied.

        Raises:
            TypeError: the parameter has no quantisation state. ValueError: it is not NF4 in blocks of 64, or
                `Linear4bit` has repacked it for the CPU, which loses the nested statistics.
        """
        state = getattr(parameter, "quant_state", None)
        if state is None:
            raise TypeError(
                f"parameter: got a {type(parameter).__name__} without quant_state, accepted is a quantised Params4bit"
            )
        expect(
            not getattr(state, "packing_format_for_cpu", False),
            "parameter",
            "a weight that Linear4bit repacked for the CPU in an inference forward",
            "the canonical layout: build the NF4Weight before the layer's first call",
        )
        expect(state.quant_type == "nf4", "parameter", f"quant_type {state.quant_type}", "nf4")
        expect(state.blocksize == BLOCK, "parameter", f"blocksize {state.blocksize}", f"{BLOCK}")
        second = state.state2 if state.nested else None
        if second is not None:
            expect(
                second.blocksize == NESTED_BLOCK, "parameter", f"nested blocksize {second.blocksize}", f"{NESTED_BLOCK}"
            )
        return cls(
            packed=parameter.detach().as_subclass(Tensor).view(torch.uint8).view(-1),
            absmax=state.absmax.view(-1),
            code2=None if second is None else second.code,
            absmax2=None if second is None else second.absmax.view(-1),
            offset=None if second is None else state.offset,
            shape=tuple(state.shape),
            dtype=state.dtype,
        )

    @classmethod
    def concatenate(cls, weights: Sequence[NF4Weight]) -> NF4Weight:
        """`weights`, of the same `in`, one below the other in new storage: dequantised, each keeps its bits.

        Raises:
            ValueError: there are none; they differ in `in`, dtype, device, nesting or code2; or one before the last
                ends within a block of 64, or if nested within 256 of those, which share an absmax2 and an offset.
        """
        expect(len(weights) > 0, "weights", "none", "one or more")
        first, unit = weights[0], BLOCK if weights[0].code2 is None else BLOCK * NESTED_BLOCK
        for i, w in enumerate(weights):
            for name, value, expected in (
                ("in", w.shape[1], first.shape[1]),
                ("dtype", w.dtype, first.dtype),
                ("device", w.packed.device, first.packed.device),
                ("nesting", w.code2 is not None, first.code2 is not None),
            ):
                expect(value == expected, f"weights[{i}]", f"{name} {value}", f"weights[0]'s, {expected}")
            same = w.code2 is None or first.code2 is None or torch.equal(w.code2, first.code2)
            expect(same, f"weights[{i}]", "a code2 of its own", "weights[0]'s")
            whole = i == len(weights) - 1 or math.prod(w.shape) % unit == 0
            expect(whole, f"weights[{i}]", f"shape {w.shape}", f"a multiple of {unit} elements in all but the last")
        nested = [
            (w.absmax2, w.offset.expand_as(w.absmax2))
            for w in weights
            if w.absmax2 is not None and w.offset is not None
        ]
        absmax2, offset = map(torch.cat, zip(*nested)) if nested else (None, None)
        return cls(
            packed=torch.cat([w.packed for w in weights]),
            absmax=torch.cat([w.absmax for w in weights]),
            code2=first.code2,
            absmax2=absmax2,
            offset=offset,
            shape=(sum(w.shape[0] for w in weights), first.shape[1]),
            dtype=first.dtype,
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """packed, absmax, code2, absmax2, offset: as the ops take them."""
        return self.packed, self.absmax, self.code2, self.absmax2, self.offset


def nf4_dequantize(w: NF4Weight, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The (out, in) matrix, bit for bit what `bitsandbytes.functional.dequantize_4bit` gives.

    Args:
        out: contiguous buffer of w's shape to fill, possibly rows of a larger one; allocated if None.
        dtype: of an allocated result; w.dtype by default. float64 holds the float32 values.
    """
    _expect_weight(w)
    if out is None:
        out = torch.empty(w.shape, dtype=dtype or w.dtype, device=w.packed.device)
    expect_tensor("out", out, w.shape, FLOATS if dtype is None else (dtype,))
    expect(out.is_contiguous(), "out", f"strides {out.stride()}", "a contiguous tensor")
    expect_same_device(packed=w.packed, out=out)
    _nf4_dequantize(*w.tensors(), out)
    return out


def nf4_matmul(x: Tensor, w: NF4Weight) -> Tensor:
    """x (..., in) @ W.T -> (..., out), W dequantised to x's dtype. The gradient goes to x alone: W is frozen.

    On a GPU, products with 1 to 128 rows of bfloat16 or float16 decode W in registers, if in is a multiple of 64; all
    others, and the gradient, dequantise W into a buffer first, bit for bit as bitsandbytes does. Decoded weights have
    the same bits, or, in the compiled kernel (nested, in a multiple of 128), are nearer to NF4's own values: a code is
    rounded once and absmax is not.
    """
    _expect_weight(w)
    expect_tensor("x", x, (*x.shape[:-1], w.shape[1]), FLOATS)
    expect_same_device(x=x, packed=w.packed)
    return _nf4_matmul(x.reshape(-1, w.shape[1]), *w.tensors(), w.shape[0]).view(*x.shape[:-1], w.shape[0])


def _expect_weight(w: NF4Weight) -> None:
    if not isinstance(w, NF4Weight):
        raise TypeError(f"w: got {type(w).__name__}, accepted is NF4Weight (see NF4Weight.from_bitsandbytes)")


def nf4_dequantize_reference(
    packed: Tensor, absmax: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None, out: Tensor
) -> None:
    """`nf4_dequantize` in plain PyTorch: a byte indexes a table of the two float32 values it holds."""
    if code2 is not None and absmax2 is not None and offset is not None:
        scales, offsets = (
            x.expand_as(absmax2).repeat_interleave(NESTED_BLOCK)[: len(absmax)] for x in (absmax2, offset)
        )
        absmax = code2[absmax.int()].mul_(scales).add_(offsets)
    code = torch.tensor(CODE, device=packed.device)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), 1).view(torch.int64).view(-1)
    flat, half = out.view(-1), BLOCK // 2
    whole = len(packed) // half * half  # the last block may be short
    for first in range(0, len(packed), CHUNK):
        last = min(first + CHUNK, len(packed))
        values = pairs.gather(0, packed[first:last].long()).view(torch.float32)
        body, scale = 2 * (min(last, whole) - first), absmax[first // half : last // half, None]
        torch.mul(values[:body].view(-1, BLOCK), scale, out=flat[2 * first : 2 * first + body].view(-1, BLOCK))
        if last > whole:
            torch.mul(values[body:], absmax[-1], out=flat[2 * whole :])


def nf4_matmul_reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
) -> Tensor:
    """`nf4_matmul` in plain PyTorch: dequantise once, then one matmul."""
    w = x.new_empty(out_features, x.shape[1])
    nf4_dequantize_reference(packed, absmax, code2, absmax2, offset, w)
    return x @ w.T


_nf4_dequantize = torch.library.custom_op(
    "saga_kernels::nf4_dequantize", nf4_dequantize_reference, mutates_args=("out",)
)
_nf4_matmul = torch.library.custom_op("saga_kernels::nf4_matmul", nf4_matmul_reference, mutates_args=())


@_nf4_dequantize.register_kernel("cuda")
def _(packed: Tensor, absmax: Tensor, code2: Tensor, absmax2: Tensor, offset: Tensor, out: Tensor) -> Any:
    if out.dtype == torch.float64:  # for checks, not for speed
        return nf4_dequantize_reference(packed, absmax, code2, absmax2, offset, out)
    from .gpu import nf4  # a GPU alone needs Triton

    return nf4.dequantize(packed, absmax, code2, absmax2, offset, out)


@_nf4_matmul.register_kernel("cuda")
def _(
    x: Tensor, packed: Tensor, absmax: Tensor, code2: Tensor, absmax2: Tensor, offset: Tensor, out_features: int
) -> Any:
    if x.dtype == torch.float64:
        return nf4_matmul_reference(x, packed, absmax, code2, absmax2, offset, out_features)
    from .gpu import nf4

    return nf4.matmul(x, packed, absmax, code2, absmax2, offset, out_features)


@_nf4_dequantize.register_fake
def _(packed: Tensor, absmax: Tensor, code2: Tensor, absmax2: Tensor, offset: Tensor, out: Tensor) -> Any:
    return None


@_nf4_matmul.register_fake
def _(
    x: Tensor, packed: Tensor, absmax: Tensor, code2: Tensor, absmax2: Tensor, offset: Tensor, out_features: int
) -> Any:
    return x.new_empty(x.shape[0], out_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, *weight, out_features = inputs
    ctx.shape, ctx.weight = (out_features, x.shape[1]), weight


def _backward(ctx: Any, dy: Tensor) -> Any:
    w = dy.new_empty(ctx.shape)
    _nf4_dequantize(*ctx.weight, w)
    return dy @ w, None, None, None, None, None, None


_nf4_matmul.register_autograd(_backward, setup_context=_setup_context)
