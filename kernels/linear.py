"""Products of few rows with a dense frozen matrix: most of a decode step where nothing is quantised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C  # type: ignore[attr-defined]  # noqa: F401  registers the compiled kernel
from .checks import FLOATS, expect_tensor

FEW_ROWS = 128  # of x; with more, packing the matrix is a small part of the BLAS's time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (rows, in), weight (out, in), bias (out,) → (rows, out).

    Without gradient, up to FEW_ROWS rows in float32 on a CPU go through a kernel that reads the weight once, without
    packing it. The result of a row does not depend on the other rows.
    """
    expect_tensor("x", x, (None, None), FLOATS)
    expect_tensor("weight", weight, (None, x.shape[1]), (x.dtype,))
    if bias is not None:
        expect_tensor("bias", bias, weight.shape[:1], (x.dtype,))
    few = x.device.type == "cpu" and x.dtype == torch.float32 and len(x) <= FEW_ROWS
    tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not few or tracked or not torch.ops.saga_kernels.has_avx2():
        return F.linear(x, weight, bias)
    y = torch.ops.saga_kernels.linear_cpu(x.contiguous(), weight.contiguous())
    return y if bias is None else y + bias
