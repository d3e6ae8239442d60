"""Shared by the GPU modules: launch options, descriptions of shipped configurations, and costs of a call.

Each module has `shipped(arch) -> Iterator[Shipped]`: every configuration it can launch on that chip, read from the
same table as its launcher, so that what is compiled without a GPU is what runs on one; and `cost(...) -> Cost`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from triton import JITFunction

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a block may have


class Cost(NamedTuple):
    """What one call does: floating-point operations (a multiply-add counts as 2), and bytes read and written."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Shipped:
    """One configuration of a kernel, as a launch would specialise it.

    name: unique in its module. signature: Triton type of each run-time argument, as "*bf16", "i32", "fp32".
    constants: of each constexpr. aligned: run-time integers that a launch finds divisible by 16; pointers always are.
    tensor_cores: it must use them. spills_allowed: why it may spill registers; empty if it may not.
    """

    name: str
    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    warps: int
    stages: int = 1
    tensor_cores: bool = False
    fp_fusion: bool = True
    aligned: tuple[str, ...] = ()
    spills_allowed: str = ""


def launch_options(warps: int, stages: int = 1, fp_fusion: bool = True) -> dict[str, object]:
    """The options of every launch, as keywords. Fusion (a * b + c rounded once) is said outright, since Triton is about
    to change its default; False keeps two roundings, where bits must match.
    """
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fp_fusion}
