import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from saga_kernels import swiglu


def make(dtype=torch.float64):
    return [torch.randn(4, 6, dtype=torch.float64).mul(3).to(dtype).requires_grad_() for _ in range(2)]


def test_equals_silu_times_up_and_its_gradients():
    gate, up = make()
    y, expected = swiglu(gate, up), gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, (gate, up), g), torch.autograd.grad(expected, (gate, up), g))


def test_narrow_input_is_rounded_once():
    gate, up = make(torch.bfloat16)
    wide = swiglu(gate.double(), up.double())
    torch.testing.assert_close(swiglu(gate, up), wide.bfloat16(), rtol=2**-8, atol=0)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(swiglu(gate, up).sum(), (gate, up)))


def test_opcheck():
    gate, up = make()
    torch.library.opcheck(torch.ops.saga_kernels.swiglu.default, (gate, up))
    torch.library.opcheck(
        torch.ops.saga_kernels.swiglu_backward.default, (gate.detach() + 1, gate.detach(), up.detach())
    )


def test_wrong_arguments_are_named():
    gate, up = make()
    with pytest.raises(ValueError, match="^up: got shape"):
        swiglu(gate, up[1:])
    with pytest.raises(TypeError, match="^up: got dtype float32"):
        swiglu(gate, up.float())


def test_what_a_gpu_does_not_take_is_named_before_any_launch():
    with FakeTensorMode():
        gate = torch.empty(8, 8, device="cuda")
        with pytest.raises(ValueError, match=r"^up: got strides \(1, 8\), accepted is contiguous on a GPU"):
            swiglu(gate, gate.T)
        with pytest.raises(ValueError, match="^up: got device cpu"):
            swiglu(gate, torch.empty(8, 8))
