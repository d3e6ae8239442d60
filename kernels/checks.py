"""Argument checks the ops share: `ValueError`/`TypeError` naming the argument, what was given, what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def expect(condition: bool, argument: str, given: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{argument}: got {given}, accepted is {accepted}")


def expect_tensor(
    argument: str, tensor: object, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Check a tensor's type, dtype and shape; `None` in `shape` accepts any size in that place."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: got {type(tensor).__name__}, accepted is a tensor")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{argument}: got dtype {str(tensor.dtype).removeprefix('torch.')}, accepted is {names}")
    fits = len(shape) == tensor.dim() and all(n is None or n == m for n, m in zip(shape, tensor.shape, strict=True))
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    expect(fits, argument, f"shape {tuple(tensor.shape)}", f"shape ({wanted})")


def expect_same_device(**tensors: Tensor) -> None:
    """Check that all tensors live where the first does."""
    (first, reference), *others = tensors.items()
    for argument, tensor in others:
        expect(tensor.device == reference.device, argument, f"device {tensor.device}", f"{first}'s, {reference.device}")


def expect_contiguous_on_gpu(**tensors: Tensor) -> None:
    """Check that what a kernel will read is dense; on CPU any strides do."""
    for argument, tensor in tensors.items():
        dense = tensor.is_contiguous() or not tensor.is_cuda
        expect(dense, argument, f"strides {tensor.stride()}", "contiguous on a GPU")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
