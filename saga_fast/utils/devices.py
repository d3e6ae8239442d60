"""A check that a device can compute at all, so that its own faults are not blamed on a model."""

from __future__ import annotations

import functools

import torch

from saga_fast.utils.errors import InputError, first_line


@functools.cache
def expect_device(device: str) -> None:
    """Raises InputError where PyTorch cannot run `device`: it is not there, or was built for other chips."""
    try:
        (torch.ones(1, device=device) + 1).item()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device: {device} does not run with PyTorch {torch.__version__} ({first_line(error)}); "
            "install the build of PyTorch for this GPU and its driver, or hide the GPU by CUDA_VISIBLE_DEVICES="
        ) from error
