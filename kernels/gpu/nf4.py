"""Triton for `nf4_dequantize` and `nf4_matmul`: NF4 weights decoded in registers, eight to a 32-bit word.

A block of 64 weights has only 16 distinct values, code[i] * absmax rounded to the wanted dtype, so those are computed
once a block and looked up. A byte permutation takes four bytes at once out of eight by four 3-bit indices: with the 16
values split into planes of low and high bytes, four weights cost eight permutations, where selecting by the bits of
the index would cost 15 selections a weight. Values are rounded exactly as bitsandbytes rounds them, in both ops.

csrc/nf4_cuda.cu has a faster `nf4_matmul` for few rows, whose products are nearer to NF4's own values, and
csrc/nf4_wgmma.cu another, of the same values, by Hopper's own instructions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .shipped import Cost, Shipped, launch_options

# `saga_kernels.nf4.CODE` as a compile-time constant.
CODE = tl.constexpr(
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no libdevice

MAX_ROWS = 128  # above, a dense matmul on dequantised weights is limited by arithmetic and wins
# Rows of x that csrc/nf4_wgmma.cu takes over on sm_90a: none, until a figure in bench/results says that it is faster.
WGMMA_ROWS = range(0)
DEQUANTIZE_WARPS = 4
REDUCE_BLOCK, REDUCE_WARPS = 1024, 4
MAX_SPLIT = 8


class Config(NamedTuple):
    """Blocks of `_matmul`: rows of x, rows of W, and how far along the inner dimension a step goes."""

    rows: int
    out: int
    inner: int
    warps: int
    stages: int


def config(rows: int, in_features: int, arch: int) -> Config:
    """The blocks for so many rows of x.

    Each block of W's rows reads all of x again, 4 * rows / out times as many bytes as of W: so more rows of x, more of
    W. A longer inner step takes a tenth fewer instructions, but twice the registers: too few warps to hide latency.
    """
    small = arch in (86, 120)  # 99 KiB of shared memory
    if rows <= 16:
        chosen = Config(16, 64, 128, 4, 4)
    elif rows <= 32:
        # 128 rows of W spill on sm_100: by a third stage, or by an offset for each 256 blocks.
        chosen = Config(32, 64, 128, 4, 3) if arch == 100 else Config(32, 128, 128, 8, 3)
    elif rows <= 64:
        chosen = Config(64, 128, 128, 8, 2 if small else 3)
    else:
        chosen = Config(128, 128, 64, 8, 2 if small else 3)
    return chosen if in_features % chosen.inner == 0 else chosen._replace(inner=64)


def split(rows: int, out_features: int, in_features: int, blocks: Config, multiprocessors: int) -> int:
    """Into how many parts to cut the inner dimension: as few as keep every multiprocessor busy.

    Compares estimates in bytes a multiprocessor moves: its steps, slower while fewer than 16 warps are there to hide
    latency, plus writing and rereading the parts (from L2, so at half price) and a second launch (about 1.5 us).
    """
    tiles, steps = triton.cdiv(out_features, blocks.out), in_features // blocks.inner
    step_bytes = blocks.out * blocks.inner // 2 + 2 * blocks.rows * blocks.inner // 2

    def estimate(parts: int) -> float:
        programs = tiles * parts
        busy = min(1.0, blocks.warps * programs / multiprocessors / 16)
        stream = triton.cdiv(programs, multiprocessors) * triton.cdiv(steps, parts) * step_bytes / busy
        return stream if parts == 1 else stream + 8 * rows * out_features * parts / 2 / multiprocessors + 40_000

    return min(range(1, min(MAX_SPLIT, steps) + 1), key=estimate)


def dequantize(
    packed: Tensor, absmax: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None, out: Tensor
) -> None:
    """Fill `out` (float32, bfloat16 or float16, contiguous) in one launch; any even number of elements."""
    size = out.numel()
    words = size % 8 == 0 and packed.data_ptr() % 4 == 0
    grid = (triton.cdiv(size, 32 * 32 * DEQUANTIZE_WARPS),)
    _dequantize[grid](
        packed.view(torch.int32) if words else packed,
        *_scales_or_any(absmax, code2, absmax2, offset),
        out,
        size,
        NESTED=code2 is not None,
        GROUPED=_grouped(offset),
        THREADS=32 * DEQUANTIZE_WARPS,
        **launch_options(DEQUANTIZE_WARPS, fp_fusion=False),
    )


def matmul(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    blocks: Config | None = None,
    parts: int | None = None,
) -> Tensor:
    """x (rows, in) @ W.T: fused for 1 to 128 rows of bfloat16 or float16, if in is a multiple of 64.

    Else W is dequantised once and multiplied densely. Of the fused ways the compiled one is the faster, where it is
    there and fits; in Triton's the shape chooses `blocks` and `parts` (of the inner dimension), if they are not given.
    """
    rows, in_features = x.shape
    if blocks is None and parts is None and _compiled_fits(x, packed, absmax, code2, out_features):
        compiled = torch.ops.saga_kernels.nf4_matmul_few
        if rows in WGMMA_ROWS and has_wgmma(x.device):
            compiled = torch.ops.saga_kernels.nf4_matmul_wgmma
        return compiled(x.contiguous(), packed, absmax, code2, absmax2, offset, out_features)
    if x.dtype == torch.float32 or not 0 < rows <= MAX_ROWS or in_features % 64 or not out_features:
        w = x.new_empty(out_features, in_features)
        dequantize(packed, absmax, code2, absmax2, offset, w)
        return x @ w.T
    arch, multiprocessors = _device(x.device)
    blocks = blocks or config(rows, in_features, arch)
    parts = parts or split(rows, out_features, in_features, blocks, multiprocessors)
    if packed.data_ptr() % 16:
        packed = packed.clone()
    y = x.new_empty(rows, out_features)
    target = y if parts == 1 else x.new_empty(parts, rows, out_features, dtype=torch.float32)
    _matmul[triton.cdiv(out_features, blocks.out), parts](
        x.contiguous(),
        packed.view(torch.int32),
        *_scales_or_any(absmax, code2, absmax2, offset),
        target,
        rows,
        out_features,
        in_features // 64,
        NESTED=code2 is not None,
        GROUPED=_grouped(offset),
        ROWS=blocks.rows,
        OUT=blocks.out,
        INNER=blocks.inner,
        **launch_options(blocks.warps, blocks.stages, fp_fusion=False),
    )
    if parts > 1:
        grid = (triton.cdiv(y.numel(), REDUCE_BLOCK),)
        _reduce[grid](target, y, y.numel(), PARTS=parts, BLOCK=REDUCE_BLOCK, **launch_options(REDUCE_WARPS))
    return y


def _compiled_fits(x: Tensor, packed: Tensor, absmax: Tensor, code2: Tensor | None, out_features: int) -> bool:
    """Whether csrc/nf4_cuda.cu takes it: nested, whole chunks of 2 blocks, everything where vectors can be loaded."""
    rows, in_features = x.shape
    if not (x.is_cuda and hasattr(torch.ops.saga_kernels, "nf4_matmul_few")):  # the extension may be in C++ alone
        return False
    small = _device(x.device)[0] in (86, 89, 120)  # 99 KiB of shared memory
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and code2 is not None
        and 0 < rows <= (96 if small else MAX_ROWS)
        and in_features % 128 == 0
        and out_features % 4 == 0
        and out_features > 0
        and x.data_ptr() % 16 == packed.data_ptr() % 16 == absmax.data_ptr() % 2 == 0
    )


def has_wgmma(device: torch.device) -> bool:
    """Whether csrc/nf4_wgmma.cu runs there: compiled, for sm_90a, and that is the device."""
    return _device(device)[0] == 90 and hasattr(torch.ops.saga_kernels, "nf4_matmul_wgmma")


def _scales_or_any(
    absmax: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """absmax, code2, absmax2, offset as a kernel takes them; without nesting the last three are placeholders."""
    if code2 is None or absmax2 is None or offset is None:
        return absmax, absmax, absmax, absmax
    return absmax, code2, absmax2, offset


def _grouped(offset: Tensor | None) -> bool:
    """Whether each 256 blocks have an offset of their own: weights that were concatenated."""
    return offset is not None and offset.ndim == 1


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Architecture, as in sm_90, and multiprocessors; those of an H100 for the interpreter."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


@triton.jit
def _permute(low, high, index):
    """The four bytes of (low, high) that the four low hexadecimal digits of `index` name, each modulo 8."""
    if INTERPRETED:
        both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        digits = both * 0 + index
        chosen = both * 0
        for i in tl.static_range(4):
            chosen |= ((both >> (8 * ((digits >> (4 * i)) & 7))) & 0xFF) << (8 * i)
        return chosen.to(tl.int32)
    else:
        return libdevice.byte_perm(low, high, index)


@triton.jit
def _entry(absmax, INDEX: tl.constexpr, dtype: tl.constexpr, UPPER: tl.constexpr):
    """The 16 bits of code[INDEX] * absmax rounded to dtype; the upper or lower 16 of a float32's."""
    value = absmax * CODE[INDEX]
    if dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
        return (bits >> 16 if UPPER else bits) & 0xFFFF
    else:
        return value.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _planes(absmax, INDEX: tl.constexpr, dtype: tl.constexpr, UPPER: tl.constexpr):
    """Low bytes and high bytes of entries INDEX to INDEX + 3."""
    a = _entry(absmax, INDEX, dtype, UPPER) | (_entry(absmax, INDEX + 1, dtype, UPPER) << 16)
    b = _entry(absmax, INDEX + 2, dtype, UPPER) | (_entry(absmax, INDEX + 3, dtype, UPPER) << 16)
    return _permute(a, b, 0x6420), _permute(a, b, 0x7531)


@triton.jit
def _four(index, fourth_bit, l0, l1, l2, l3, h0, h1, h2, h3):
    """Two pairs of 16-bit values: of the high and low nibble of each of two bytes."""
    low = _permute(_permute(l0, l1, index), _permute(l2, l3, index), fourth_bit)
    high = _permute(_permute(h0, h1, index), _permute(h2, h3, index), fourth_bit)
    return _permute(low, high, 0x4051), _permute(low, high, 0x6273)  # the high nibble is the first of the two


@triton.jit
def _look_up(word, absmax, dtype: tl.constexpr, UPPER: tl.constexpr):
    """The 16-bit entries of a word's eight weights, in order: shape (..., 2, 2, 2)."""
    l0, h0 = _planes(absmax, 0, dtype, UPPER)
    l1, h1 = _planes(absmax, 4, dtype, UPPER)
    l2, h2 = _planes(absmax, 8, dtype, UPPER)
    l3, h3 = _planes(absmax, 12, dtype, UPPER)
    # A digit's low three bits index either half of the table; its fourth picks byte i of the one result or the other's.
    index = word & 0x77777777
    fourth_bit = ((word >> 1) & 0x44444444) | 0x32103210
    p0, p1 = _four(index, fourth_bit, l0, l1, l2, l3, h0, h1, h2, h3)
    p2, p3 = _four(index >> 16, fourth_bit >> 16, l0, l1, l2, l3, h0, h1, h2, h3)
    pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3))
    return tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))


@triton.jit
def _decode(word, absmax, dtype: tl.constexpr):
    """A word's eight weights, code * absmax rounded to dtype: shape (..., 2, 2, 2)."""
    if dtype == tl.float32:
        upper = _look_up(word, absmax, dtype, True).to(tl.int32)
        lower = _look_up(word, absmax, dtype, False).to(tl.int32)
        return ((upper << 16) | (lower & 0xFFFF)).to(tl.float32, bitcast=True)
    else:
        return _look_up(word, absmax, dtype, False).to(dtype, bitcast=True)


@triton.jit
def _shift(offset, NESTED: tl.constexpr, GROUPED: tl.constexpr):
    """The one offset, read once; the pointer to them where each 256 blocks have their own."""
    return offset if GROUPED else tl.load(offset) if NESTED else 0.0


@triton.jit
def _absmax(absmax, code2, absmax2, shift, block, inside, NESTED: tl.constexpr):
    """absmax of blocks: code2[absmax] * absmax2 + shift if nested, rounded twice (launch without FP fusion).

    shift: what `_shift` gave.
    """
    if NESTED:
        code = tl.load(absmax + block, inside).to(tl.int32)
        group = block >> 8  # a shift, as a signed division costs more instructions
        product = tl.load(code2 + code) * tl.load(absmax2 + group, inside)
        return product + (tl.load(shift + group, inside) if shift.dtype.is_ptr() else shift)
    else:
        return tl.load(absmax + block, inside)


@triton.jit
def _load_word(packed, at, size):
    if packed.dtype.element_ty == tl.int32:
        return tl.load(packed + at, 8 * at < size, 0)
    else:  # the last word is short, or words do not lie on multiples of four bytes
        word = (at * 0).to(tl.int32)
        for i in tl.static_range(4):
            word |= tl.load(packed + 4 * at + i, 8 * at + 2 * i < size, 0).to(tl.int32) << (8 * i)
        return word


@triton.jit
def _store_weights(out, word, scale, at, size, THREADS: tl.constexpr):
    element = 8 * at[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out + element, _decode(word, scale, out.dtype.element_ty).reshape(THREADS, 8), element < size)


@triton.jit
def _dequantize(
    packed, absmax, code2, absmax2, offset, out, size,
    NESTED: tl.constexpr, GROUPED: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Four words a thread, every other one of a block: they share its table, and stores fill whole sectors."""
    shift = _shift(offset, NESTED, GROUPED)
    half = tl.program_id(0).to(tl.int64) * THREADS + tl.arange(0, THREADS)
    block = half // 2
    at = 8 * block + half % 2
    first = _load_word(packed, at, size)  # all loads come before a store: the compiler must think they may overlap
    second = _load_word(packed, at + 2, size)
    third = _load_word(packed, at + 4, size)
    fourth = _load_word(packed, at + 6, size)
    scale = _absmax(absmax, code2, absmax2, shift, block, 64 * block < size, NESTED)
    _store_weights(out, first, scale, at, size, THREADS)
    _store_weights(out, second, scale, at + 2, size, THREADS)
    _store_weights(out, third, scale, at + 4, size, THREADS)
    _store_weights(out, fourth, scale, at + 6, size, THREADS)


@triton.jit(do_not_specialize=("rows", "blocks"))
def _matmul(
    x, packed, absmax, code2, absmax2, offset, out, rows, out_features, blocks,
    NESTED: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One part of the inner dimension of x @ W.T for OUT rows of W: out (PARTS, rows, out_features).

    W is the left operand, since few rows of x fit the narrow side of a tensor-core tile, and x.T the right one. Rows
    past an end are the last one again, computed and not stored, so that no load needs a mask. blocks: a row of W.
    """
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part, parts = tl.program_id(1), tl.num_programs(1)
    m = tl.arange(0, ROWS)
    row = tl.minimum(n, out_features - 1)[:, None] * blocks
    words = packed + row * 8 + tl.arange(0, INNER // 8)[None, :]
    block = row + tl.arange(0, INNER // 64)[None, :]
    columns = x + tl.minimum(m, rows - 1)[:, None] * (blocks * 64) + tl.arange(0, INNER)[None, :]
    shift = _shift(offset, NESTED, GROUPED)
    steps = blocks // (INNER // 64)
    sums = tl.zeros((OUT, ROWS), tl.float32)
    for step in range(steps * part // parts, steps * (part + 1) // parts):
        word = tl.load(words + step * (INNER // 8))
        xs = tl.load(columns + step * INNER)
        scale = _absmax(absmax, code2, absmax2, shift, block + step * (INNER // 64), None, NESTED)
        scale = tl.broadcast_to(scale[:, :, None], (OUT, INNER // 64, 8)).reshape(OUT, INNER // 8)
        w = _decode(word, scale, x.dtype.element_ty).reshape(OUT, INNER)
        sums = tl.dot(w, tl.trans(xs), sums)
    at = (part * rows + m)[None, :] * out_features + n[:, None]
    tl.store(out + at, sums, (n < out_features)[:, None] & (m < rows)[None, :])


@triton.jit
def _reduce(parts, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the parts, first to last."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + at, at < size, 0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * size + at, at < size, 0.0)
    tl.store(out + at, total, at < size)


def shipped(arch: int) -> Iterator[Shipped]:
    """Every kernel, block size and dtype, but not each with each: bare absmax and the odd inner step with one."""
    bare = dict.fromkeys(("absmax", "code2", "absmax2", "offset"), "*fp32")
    scales = {  # types, NESTED and GROUPED
        "nested": (bare | {"absmax": "*u8"}, True, False),
        "grouped": (bare | {"absmax": "*u8"}, True, True),
        "plain": (bare, False, False),
    }
    for dtype in ("bf16", "fp16", "fp32"):
        for kind, (pointers, nested, grouped) in scales.items():
            yield Shipped(
                f"dequantize {dtype} {kind}",
                _dequantize,
                {"packed": "*i32", **pointers, "out": f"*{dtype}", "size": "i32"},
                {"NESTED": nested, "GROUPED": grouped, "THREADS": 32 * DEQUANTIZE_WARPS},
                DEQUANTIZE_WARPS,
                fp_fusion=False,
                aligned=("size",),
            )
    shape = {"rows": "i32", "out_features": "i32", "blocks": "i32"}
    for rows in (16, 32, 64, 128):
        # x, result, absmax, in_features
        variants = [("bf16", result, kind, 4096) for result in ("fp32", "bf16") for kind in ("nested", "grouped")]
        variants += [("fp16", "fp32", "nested", 4096)]
        if rows == 64:
            variants += [("bf16", "fp32", "plain", 4096), ("bf16", "fp32", "nested", 64)]
        for dtype, result, kind, in_features in variants:
            blocks = config(rows, in_features, arch)
            pointers, nested, grouped = scales[kind]
            yield Shipped(
                f"matmul {dtype} to {result} {kind} {blocks.rows}x{blocks.out}x{blocks.inner}",
                _matmul,
                {"x": f"*{dtype}", "packed": "*i32", **pointers, "out": f"*{result}", **shape},
                {
                    **{"NESTED": nested, "GROUPED": grouped},
                    **{"ROWS": blocks.rows, "OUT": blocks.out, "INNER": blocks.inner},
                },
                blocks.warps,
                blocks.stages,
                tensor_cores=True,
                fp_fusion=False,
                aligned=("out_features",),
            )
    for dtype in ("bf16", "fp16"):
        signature = {"parts": "*fp32", "out": f"*{dtype}", "size": "i32"}
        constants = {"PARTS": MAX_SPLIT, "BLOCK": REDUCE_BLOCK}
        yield Shipped(f"reduce {dtype}", _reduce, signature, constants, REDUCE_WARPS, aligned=("size",))


def weight_bytes(out_features: int, in_features: int) -> int:
    """Of a nested NF4 weight: half a byte a weight, a byte a block of 64, four bytes 256 blocks, and a table."""
    blocks = triton.cdiv(out_features * in_features, 64)
    return out_features * in_features // 2 + blocks + 4 * triton.cdiv(blocks, 256) + 4 * 257


def dequantize_cost(out_features: int, in_features: int, itemsize: int = 2) -> Cost:
    """A product a weight."""
    size = out_features * in_features
    return Cost(size, weight_bytes(out_features, in_features) + size * itemsize)


def cost(rows: int, out_features: int, in_features: int) -> Cost:
    """Of `matmul`, fused: W, x and y once. Reading x again for each block of W and the parts hit L2."""
    moved = weight_bytes(out_features, in_features) + 2 * rows * (in_features + out_features)
    return Cost(2 * rows * out_features * in_features, moved)
