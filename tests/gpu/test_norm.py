import pytest
import torch

from saga_kernels import add_rms_norm, rms_norm

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 3e-6}


def run(dtype, *shape):
    """Both ops, forward and backward, in dtype and in float64: all results of each."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = torch.randn(5, *shape, device="cuda", generator=generator).to(dtype)
    weight = torch.rand(shape[-1], device="cuda", generator=generator).add(0.5).to(dtype)
    for wide in (False, True):
        x, residual, *gradients = made.double() if wide else made
        w = weight.double() if wide else weight
        x.requires_grad_(), residual.requires_grad_()
        outputs = rms_norm(x, w, 1e-6), *add_rms_norm(x, residual, w, 1e-6)
        yield *outputs, *torch.autograd.grad(outputs, (x, residual), gradients)


@pytest.mark.parametrize("rows", [51_600, 64])
def test_8b_against_float64(rows):
    compare(torch.bfloat16, rows, 4096)


def test_smallest_case_of_every_kernel():
    compare(torch.bfloat16, 3, 128)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(6_450, 4096), (8, 5120)])
def test_against_float64(dtype, shape):
    compare(dtype, *shape)


@pytest.mark.parametrize("width", [1000, 4096, 4097])
def test_small(width):
    compare(torch.bfloat16, 3, width)


def compare(dtype, *shape):
    for result, reference in zip(*run(dtype, *shape)):
        assert (result.double() - reference).norm() / reference.norm() < TOLERANCE[dtype]


def test_8b_the_same_bits_twenty_times():
    first, *others = (next(run(torch.bfloat16, 1000, 4096)) for _ in range(20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_compiled():
    x, residual, weight = (torch.randn(*shape, device="cuda").bfloat16() for shape in [(64, 4096), (64, 4096), (4096,)])
    compiled = torch.compile(lambda *inputs: add_rms_norm(*inputs, 1e-6), fullgraph=True)
    for result, expected in zip(compiled(x, residual, weight), add_rms_norm(x, residual, weight, 1e-6)):
        assert torch.equal(result, expected)


def test_wrong_arguments_are_named():
    x, weight = torch.randn(8, 64, device="cuda"), torch.rand(8, device="cuda")
    with pytest.raises(ValueError, match=r"^x: got strides \(1, 64\), accepted is contiguous on a GPU"):
        rms_norm(x.T, weight, 1e-6)
    with pytest.raises(ValueError, match="^weight: got device cpu, accepted is x's, cuda"):
        rms_norm(x, torch.rand(64), 1e-6)
    with pytest.raises(ValueError, match="^x: got D = 9000, accepted is at most 8192"):
        rms_norm(torch.randn(2, 9000, device="cuda"), torch.rand(9000, device="cuda"), 1e-6)
