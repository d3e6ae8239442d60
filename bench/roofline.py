"""Operations and bytes of each kernel at the shapes of Qwen3-VL-8B, and their roofline time on an H100.

    python -m bench.roofline [--json FILE]

Operations and bytes are each kernel's own `cost`, from the bytes it reads and writes. The floor is the larger of
bytes over bandwidth and operations over the rate of the unit that does them. Nothing here is measured: these are
the lower bounds for `python -m bench.gpu`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import write_json
from saga_kernels.gpu import attention, logprob, nf4, norm, rope, sampling, swiglu
from saga_kernels.gpu import decode as cached_attention
from saga_kernels.gpu.shipped import Cost
from saga_kernels.logprob import CHUNK_ROWS

# An H100 SXM. The tensor cores' figure is what a large matmul reaches, not the data sheet's 990.
BANDWIDTH, TENSOR_CORES, FP32 = 3.35e12, 800e12, 67e12

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 36, 4096, 32, 8, 128, 12_288, 151_936
GROUPS, PREFIX, COMPLETIONS, LENGTH = 8, 850, 8, 700
DECODE_ROWS = (8, 64)
# A step: pairs drawn (half of them contribute), and the tower, whose backward costs twice its forward.
DRAWN, IMAGES, PATCHES, TOWER = 2 * GROUPS, 64, 196, 0.55e9
# out, in features of what a layer multiplies by in one launch, or dequantises in one for a large matmul
LINEARS = {
    "q, k, v": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate, up": (2 * FFN, HIDDEN),
    "down": (HIDDEN, FFN),
}
LANGUAGE_MODEL = LAYERS * sum(out * width for out, width in LINEARS.values())  # weights


class Line(NamedTuple):
    """One kernel in one phase: the cost of a call, how many there are, and whether its arithmetic is matmuls."""

    phase: str
    kernel: str
    calls: int
    cost: Cost
    matmul: bool = False

    @property
    def bound(self) -> str:
        arithmetic = self.cost.flops / (TENSOR_CORES if self.matmul else FP32)
        return "arithmetic" if arithmetic > self.cost.bytes / BANDWIDTH else "bytes"

    @property
    def floor(self) -> float:
        """Seconds a call."""
        return max(self.cost.flops / (TENSOR_CORES if self.matmul else FP32), self.cost.bytes / BANDWIDTH)


def decode(rows: int) -> Iterator[Line]:
    """One token for each of `rows` rollouts, with half-grown caches."""
    phase = f"decode step, {rows} rows"
    yield from _layer(phase, rows, backward=False, adds=2)
    pairs = -(-rows // COMPLETIONS)
    cost = cached_attention.cost(rows, pairs, PREFIX, LENGTH // 2, HEADS, KV_HEADS, HEAD_DIM)
    yield Line(phase, "decode_attention", LAYERS, cost, matmul=True)
    for name, (out_features, in_features) in LINEARS.items():
        yield Line(phase, f"nf4_matmul {name}", LAYERS, nf4.cost(rows, out_features, in_features), matmul=True)
    yield Line(phase, "rms_norm", 1, norm.cost(rows, HIDDEN))
    yield Line(phase, "cuBLAS, the head", 1, Cost(2 * rows * HIDDEN * VOCABULARY, 2 * HIDDEN * VOCABULARY), matmul=True)
    yield Line(phase, "sample_top_p", 1, sampling.cost(rows, VOCABULARY))


def replay() -> Iterator[Line]:
    """Forward and backward of all groups in one go, everything kept that the backward needs."""
    phase, tokens = "replay", GROUPS * (PREFIX + COMPLETIONS * LENGTH)
    for backward in (False, True):
        way = " backward" * backward
        yield from _layer(phase, tokens, backward)
        one = attention.cost(PREFIX, COMPLETIONS, LENGTH, HEADS, KV_HEADS, HEAD_DIM, backward=backward)
        cost = Cost(GROUPS * one.flops, GROUPS * one.bytes)
        yield Line(phase, f"group_attention{way}", LAYERS, cost, matmul=True)
        yield Line(phase, f"rms_norm{way}", 1, norm.cost(tokens, HIDDEN, backward=backward))
    for name, (out_features, in_features) in LINEARS.items():  # once forward and once backward
        yield Line(phase, f"nf4_dequantize {name}", 2 * LAYERS, nf4.dequantize_cost(out_features, in_features))
    yield matmuls(phase, tokens, 2)
    rows = GROUPS * COMPLETIONS * LENGTH
    yield Line(phase, "token_logprob", 1, logprob.cost(rows, HIDDEN, VOCABULARY, CHUNK_ROWS), matmul=True)


def matmuls(phase: str, tokens: int, passes: int) -> Line:
    """The layers' own matmuls, which are cuBLAS's: forward, and the gradient of the input."""
    return Line(phase, "cuBLAS", passes, Cost(2 * tokens * LANGUAGE_MODEL, 2 * LANGUAGE_MODEL), matmul=True)


def step() -> dict[str, float]:
    """Seconds of a whole optimizer step at the floor, by phase; the host and the update are free."""
    tower = Line("tower", "cuBLAS", 3, Cost(int(2 * (IMAGES + 2 * GROUPS) * PATCHES * TOWER), 0), matmul=True)
    batches = DRAWN * COMPLETIONS / max(DECODE_ROWS)
    return {
        "tower": tower.calls * tower.floor,
        "prefill": (prefill := matmuls("prefill", DRAWN * PREFIX, 1)).calls * prefill.floor,
        "decode": batches * LENGTH * sum(line.calls * line.floor for line in decode(max(DECODE_ROWS))),
        "replay": sum(line.calls * line.floor for line in replay()),
    }


def _layer(phase: str, tokens: int, backward: bool, adds: int = 1) -> Iterator[Line]:
    """adds: of a layer's two norms, how many take the sum before them along."""
    way = " backward" * backward
    if adds < 2:
        yield Line(phase, f"rms_norm{way}", LAYERS, norm.cost(tokens, HIDDEN, backward=backward))
    yield Line(phase, f"add_rms_norm{way}", adds * LAYERS, norm.cost(tokens, HIDDEN, add=True, backward=backward))
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        cost = rope.cost(tokens, heads, HEAD_DIM, norm=True, backward=backward)
        yield Line(phase, f"{name}-norm and rope{way}", LAYERS, cost)
    yield Line(phase, f"swiglu{way}", LAYERS, swiglu.cost(tokens * FFN, backward=backward))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    print(f"{BANDWIDTH / 1e12} TB/s, {TENSOR_CORES / 1e12:.0f} TFLOP/s in bf16 matmuls, {FP32 / 1e12:.0f} in float32")
    form = "{:26} {:26} {:>5} {:>12} {:>10} {:>10} {:>10} {:>9}"
    print(form.format("phase", "kernel", "calls", "GFLOP/call", "MB/call", "us/call", "bound", "ms in all"))
    lines = [line for rows in DECODE_ROWS for line in decode(rows)] + list(replay())
    figures: list[dict[str, Any]] = []
    for line in lines:
        work, total = line.cost, line.calls * line.floor * 1e3
        amounts = (f"{work.flops / 1e9:.3f}", f"{work.bytes / 1e6:.2f}", f"{line.floor * 1e6:.1f}")
        print(form.format(line.phase, line.kernel, line.calls, *amounts, line.bound, f"{total:.3f}"))
        figures.append({**line._asdict(), "cost": work._asdict(), "floor_seconds": line.floor, "bound": line.bound})
    for phase in dict.fromkeys(line.phase for line in lines):
        total = sum(line.calls * line.floor for line in lines if line.phase == phase)
        print(f"{phase}: {total * 1e3:.2f} ms in these kernels")
    phases = step()
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
    print(f"an optimizer step at the floor: {sum(phases.values()):.2f} s ({parts})")
    write_json(arguments.json, {"lines": figures, "step": phases})


if __name__ == "__main__":
    main()
