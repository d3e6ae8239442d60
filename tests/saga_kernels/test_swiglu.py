import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from saga_kernels import swiglu
from saga_kernels.swiglu import swiglu_backward_reference, swiglu_reference


def make(dtype=torch.float64):
    return torch.randn(4, 12, dtype=torch.float64).mul(3).to(dtype).requires_grad_()


def test_equals_silu_times_up_and_its_gradients():
    gate_up = make()
    gate, up = gate_up[:, :6], gate_up[:, 6:]
    y, expected = swiglu(gate_up), gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, gate_up, g), torch.autograd.grad(expected, gate_up, g))


def test_narrow_input_is_rounded_once():
    gate_up = make(torch.bfloat16)
    wide = swiglu(gate_up.double())
    torch.testing.assert_close(swiglu(gate_up), wide.bfloat16(), rtol=2**-8, atol=0)
    (gradient,) = torch.autograd.grad(swiglu(gate_up).sum(), gate_up)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [0, 3, 200])
@pytest.mark.parametrize("width", [1, 7, 64, 100, 768])
def test_compiled(check_compiled, rows, width):
    for more in (0, 3):  # whole tensors, and rows that lie apart
        gate_up = torch.randn(rows, 2 * width + more).mul(3)[:, : 2 * width]
        dy = torch.randn(rows, width + more)[:, :width]
        check_compiled("swiglu", swiglu_reference, gate_up)
        check_compiled("swiglu_backward", swiglu_backward_reference, dy, gate_up)


def test_compiled_at_the_ends_of_the_sigmoid(check_compiled):
    gate = torch.cat([torch.linspace(-100, 100, 400), torch.tensor([-1e30, -0.0, 1e30])])
    gate_up = torch.cat([gate, torch.randn(403)])[None]
    check_compiled("swiglu", swiglu_reference, gate_up)
    check_compiled("swiglu_backward", swiglu_backward_reference, torch.randn(1, 403), gate_up, atol=1e-5)
    assert swiglu(torch.tensor([[float("nan"), 1.0]])).isnan().all()


def test_opcheck():
    gate_up = make()
    torch.library.opcheck(torch.ops.saga_kernels.swiglu.default, (gate_up,))
    gate_up = gate_up.detach()
    torch.library.opcheck(torch.ops.saga_kernels.swiglu_backward.default, (gate_up[:, 6:] + 1, gate_up))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="^gate_up: got width 11, accepted is an even width"):
        swiglu(make()[:, 1:])
    with pytest.raises(TypeError, match="^gate_up: got dtype int64"):
        swiglu(torch.ones(2, 2, dtype=torch.int64))


def test_what_a_gpu_does_not_take_is_named_before_any_launch():
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=r"^gate_up: got strides \(1, 8\), accepted is contiguous on a GPU"),
    ):
        swiglu(torch.empty(8, 8, device="cuda").T)
