"""The pointwise ops between a decoder layer's matmuls, compiled for CPUs (csrc/pointwise.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from . import _C  # type: ignore[attr-defined]  # noqa: F401  registers the compiled kernels


def register(op: CustomOpDef, reference: Callable[..., Any]) -> None:
    """Have `op` run the compiled kernel of its name on CPUs where that takes the inputs, and `reference` elsewhere."""
    if not torch.ops.saga_kernels.has_avx2():
        return
    name = reference.__name__.removesuffix("_reference")
    compiled = getattr(torch.ops.saga_kernels, f"{name}_cpu").default

    @op.register_kernel("cpu")
    def _(*inputs: Any) -> Any:
        taken = all(_takes(x) for x in inputs if isinstance(x, Tensor))
        return (compiled if taken else reference)(*inputs)


def _takes(x: Tensor) -> bool:
    """float32, its axes in memory in their own order: a permuted tensor's output is permuted too, a row's is not."""
    stride = x.stride()
    return x.dtype == torch.float32 and sorted(stride, reverse=True) == list(stride)
