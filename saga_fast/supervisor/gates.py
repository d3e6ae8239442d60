"""The gates of decoders' MLPs: (rows, 2 F), gate and up side by side, → (rows, F); and their explicit backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saga_kernels import swiglu


class Gate(NamedTuple):
    """forward(gate_up). backward(d, gate_up): from the gradient (rows, F) to that of gate and up, side by side."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, with the GELU's tanh approximation."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def geglu_backward(d: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    d_gate = torch.ops.aten.gelu_backward(d * up, gate, approximate="tanh")
    return torch.cat((d_gate, F.gelu(gate, approximate="tanh").mul_(d)), -1)


# By the name of the activation in a configuration.
GATES = {
    "silu": Gate(swiglu, torch.ops.saga_kernels.swiglu_backward),
    "gelu_pytorch_tanh": Gate(geglu, geglu_backward),
}
