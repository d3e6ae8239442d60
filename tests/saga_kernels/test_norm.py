import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from saga_kernels import add_rms_norm, rms_norm
from saga_kernels.norm import add_rms_norm_reference, rms_norm_backward_reference, rms_norm_reference


@pytest.mark.parametrize("shape", [(4, 16), (3, 2, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers(shape, dtype):
    module = Qwen3VLTextRMSNorm(shape[-1], eps=1e-3).to(dtype).requires_grad_(False)
    module.weight.uniform_(0.5, 2)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y, expected = rms_norm(x, module.weight, 1e-3), module(x)
    torch.testing.assert_close(y, expected)
    g = torch.randn(shape).to(dtype)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g))


def test_gradient_in_float64_and_none_for_the_weight():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight.detach(), 1e-3), x)
    rms_norm(x, weight, 1e-3).sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_residual_goes_in_before_and_its_gradients_meet(dtype):
    make = [torch.randn(5, 8).to(dtype).requires_grad_() for _ in range(2)]
    weight = torch.rand(8).to(dtype)
    total, y = add_rms_norm(*make, weight, 1e-3)
    expected = make[0] + make[1]
    assert torch.equal(total, expected) and torch.equal(y, rms_norm(expected, weight, 1e-3))
    d_total, dy = torch.randn(2, 5, 8).to(dtype)
    ours = torch.autograd.grad((total, y), make, (d_total, dy))
    theirs = torch.autograd.grad((expected, rms_norm(expected, weight, 1e-3)), make, (d_total, dy))
    atol, rtol = (0.05, 0.02) if dtype == torch.bfloat16 else (1e-12, 1e-12)  # ours adds before it rounds
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


def test_the_sum_alone_carries_its_gradient():
    x, residual = torch.randn(2, 5, 8, requires_grad=True)
    total, _ = add_rms_norm(x, residual, torch.rand(8), 1e-3)
    assert torch.equal(torch.autograd.grad(total.sum(), x)[0], torch.ones(5, 8))


@pytest.mark.parametrize("rows", [0, 3, 200])
@pytest.mark.parametrize("width", [1, 7, 64, 100, 768])
def test_compiled(check_compiled, rows, width):
    weight = torch.rand(width) + 0.5
    for columns in (width, width + 3):  # whole tensors, and rows that lie apart
        x, residual, dy, dsum = torch.randn(4, rows, columns)[..., :width]
        for given in (x, x * 1e15, x * 1e-15):
            check_compiled("rms_norm", rms_norm_reference, given, weight, 1e-3)
        check_compiled("add_rms_norm", add_rms_norm_reference, x, residual, weight, 1e-3)
        for more in (None, dsum):
            inputs = dy, more, x, weight, 1e-3
            check_compiled("rms_norm_backward", rms_norm_backward_reference, *inputs, atol=1e-4)  # times 1 / sqrt(eps)


def test_compiled_of_a_gradient_that_is_one_number(check_compiled):
    x, dy = torch.randn(5, 12), torch.ones(()).expand(5, 12)
    check_compiled("rms_norm_backward", rms_norm_backward_reference, dy, dy, x, torch.rand(12), 1e-3)


def test_opcheck():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.rand(8)
    residual, dy = torch.randn(3, 8, requires_grad=True), torch.ones(3, 8)
    torch.library.opcheck(torch.ops.saga_kernels.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.saga_kernels.rms_norm.default, (x.detach().T, torch.rand(3), 1e-6))
    torch.library.opcheck(torch.ops.saga_kernels.add_rms_norm.default, (x, residual, weight, 1e-6))
    for dsum in (None, dy):
        backward = torch.ops.saga_kernels.rms_norm_backward.default
        torch.library.opcheck(backward, (dy, dsum, x.detach(), weight, 1e-6))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"^weight: got shape \(7,\), accepted is shape \(8\)"):
        rms_norm(torch.randn(3, 8), torch.rand(7), 1e-6)
    with pytest.raises(TypeError, match="^weight: got dtype float64"):
        rms_norm(torch.randn(3, 8), torch.rand(8).double(), 1e-6)
    with pytest.raises(ValueError, match=r"^residual: got shape \(2, 8\), accepted is shape \(3, 8\)"):
        add_rms_norm(torch.randn(3, 8), torch.randn(2, 8), torch.rand(8), 1e-6)


def test_what_a_gpu_does_not_take_is_named_before_any_launch():
    with FakeTensorMode():
        x, weight = torch.empty(8, 64, device="cuda"), torch.empty(8, device="cuda")
        with pytest.raises(ValueError, match=r"^x: got strides \(1, 64\), accepted is contiguous on a GPU"):
            rms_norm(x.T, weight, 1e-6)
        with pytest.raises(ValueError, match="^weight: got device cpu, accepted is x's, cuda"):
            rms_norm(x, torch.empty(64), 1e-6)
        with pytest.raises(ValueError, match=r"^residual: got strides \(1, 8\)"):
            add_rms_norm(x, torch.empty(64, 8, device="cuda").T, torch.empty(64, device="cuda"), 1e-6)
        with pytest.raises(ValueError, match="^x: got D = 9000, accepted is at most 8192"):
            rms_norm(torch.empty(2, 9000, device="cuda"), torch.empty(9000, device="cuda"), 1e-6)
