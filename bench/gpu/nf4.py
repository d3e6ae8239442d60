"""`nf4_matmul` and `nf4_dequantize` at the shapes of Qwen3-VL-8B, beside bitsandbytes and dense weights in bfloat16.

The weights are quantised here, in bitsandbytes' layout, so that it need not be there. Where we concatenate several,
it runs as its users have it: a call for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import Case, importable
from saga_kernels import NF4Weight, nf4_dequantize, nf4_matmul
from saga_kernels.gpu.nf4 import cost, dequantize_cost, has_wgmma
from saga_kernels.nf4 import BLOCK, CODE, NESTED_BLOCK

ROWS = (1, 8, 16, 32, 48, 64, 96, 128)
LINEARS = {"q, k, v": (6144, 4096), "gate, up": (24_576, 4096), "o": (4096, 4096), "down": (4096, 12_288)}
PARTS = {"q, k, v": (4096, 1024, 1024), "gate, up": (12_288, 12_288)}  # rows of what is concatenated
TOLERANCE = 1e-2


def quantise(weight: Tensor, nested: bool = True) -> NF4Weight:
    """(out, in) to NF4, each weight to the nearest code; nested: absmaxes to the nearest of 256 even steps."""
    blocks = F.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    code = torch.tensor(CODE, device=weight.device)
    nibbles = torch.bucketize(blocks / absmax.clamp_min(1e-30)[:, None], (code[1:] + code[:-1]) / 2)
    nibbles = nibbles.flatten()[: weight.numel()].view(-1, 2).to(torch.uint8)
    packed = nibbles[:, 0] << 4 | nibbles[:, 1]
    if not nested:
        return NF4Weight(packed, absmax, None, None, None, tuple(weight.shape), weight.dtype)
    offset = absmax.mean()
    rest = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax2 = rest.abs().amax(1)
    code2 = torch.linspace(-1, 1, 256, device=weight.device)
    codes = torch.bucketize(rest / absmax2.clamp_min(1e-30)[:, None], (code2[1:] + code2[:-1]) / 2)
    codes = codes.flatten()[: len(absmax)].to(torch.uint8)
    return NF4Weight(packed, codes, code2, absmax2, offset, tuple(weight.shape), weight.dtype)


def cases() -> Iterator[Case]:
    for name, (out_features, in_features) in LINEARS.items():
        random = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) * in_features**-0.5
        parts = [quantise(part) for part in random.split(PARTS.get(name, (out_features,)))]
        w = parts[0] if len(parts) == 1 else NF4Weight.concatenate(parts)
        dense, wide = nf4_dequantize(w), nf4_dequantize(w, dtype=torch.float32)
        runs = {"ours": lambda x, w=w: nf4_matmul(x, w), **_bitsandbytes(parts)}
        if has_wgmma(dense.device):
            runs["ours, by wgmma"] = lambda x, w=w: torch.ops.saga_kernels.nf4_matmul_wgmma(x, *w.tensors(), w.shape[0])
        runs["cuBLAS, dense bfloat16"] = lambda x, dense=dense: x @ dense.T
        for rows in ROWS:
            x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
            work = cost(rows, out_features, in_features)
            reference = lambda x, dense=dense: x.float() @ dense.float().T  # noqa: E731
            yield Case(f"nf4_matmul {name}, {rows} rows", runs, reference, work, TOLERANCE, (x,), graph=True)
        buffer = torch.empty_like(dense)
        runs = {"ours": lambda w=w, buffer=buffer: nf4_dequantize(w, out=buffer)}
        if functional := importable("bitsandbytes.functional"):
            runs["bitsandbytes"] = _bitsandbytes_dequantize(functional, parts, torch.empty_like(dense))
        reference = lambda wide=wide: wide.to(torch.bfloat16)  # noqa: E731
        work = dequantize_cost(out_features, in_features)
        yield Case(f"nf4_dequantize {name}", runs, reference, work, tolerance=0.0, graph=True)


def _state(functional: ModuleType, w: NF4Weight) -> object:
    """bitsandbytes' own description of a nested weight, its `QuantState`."""
    nested = functional.QuantState(absmax=w.absmax2, blocksize=NESTED_BLOCK, code=w.code2, dtype=torch.float32)
    code = torch.tensor(CODE, device=w.packed.device)
    return functional.QuantState(
        absmax=w.absmax,
        shape=torch.Size(w.shape),
        dtype=w.dtype,
        blocksize=BLOCK,
        code=code,
        quant_type="nf4",
        offset=w.offset,
        state2=nested,
    )


def _bitsandbytes(parts: Sequence[NF4Weight]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Its default way (`gemm_4bit`, fused or not as it judges the shape), and dequantise + matmul."""
    bnb = importable("bitsandbytes")
    if bnb is None:
        return {}
    weights = [(w.packed.view(-1, 1), _state(bnb.functional, w)) for w in parts]

    def side_by_side(run: Callable[[Tensor, Tensor, object], Tensor], x: Tensor) -> Tensor:
        ys = [run(x, *weight) for weight in weights]
        return ys[0] if len(ys) == 1 else torch.cat(ys, -1)

    def default(x: Tensor, packed: Tensor, state: object) -> Tensor:
        return bnb.matmul_4bit(x, packed.t(), state)

    def dequantised(x: Tensor, packed: Tensor, state: object) -> Tensor:
        return x @ bnb.functional.dequantize_4bit(packed, state).T

    return {
        "bitsandbytes, default": lambda x: side_by_side(default, x),
        "bitsandbytes, dequantised": lambda x: side_by_side(dequantised, x),
    }


def _bitsandbytes_dequantize(
    functional: ModuleType, parts: Sequence[NF4Weight], buffer: Tensor
) -> Callable[[], Tensor]:
    """Each part into its rows of `buffer`."""
    weights = [(w.packed.view(-1, 1), _state(functional, w)) for w in parts]
    rows = buffer.split([w.shape[0] for w in parts])

    def run() -> Tensor:
        for weight, out in zip(weights, rows):
            functional.dequantize_4bit(*weight, out=out)
        return buffer

    return run
