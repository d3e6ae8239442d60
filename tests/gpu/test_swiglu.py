import pytest
import torch

from saga_kernels import swiglu

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 3e-6}


def run(dtype, *shape):
    """Forward and backward in dtype and in float64."""
    rows, width = shape
    made = torch.randn(rows, 3 * width, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    for wide in (False, True):
        dy, gate_up = (made.double() if wide else made).split([width, 2 * width], -1)
        gate_up = gate_up.contiguous().requires_grad_()
        y = swiglu(gate_up)
        yield y, *torch.autograd.grad(y, gate_up, dy)


@pytest.mark.parametrize("rows", [64, 6_450])
def test_8b_against_float64(rows):
    compare(torch.bfloat16, rows, 12_288)


def test_smallest_case_of_every_kernel():
    compare(torch.bfloat16, 3, 256)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [64, 6_450])
def test_against_float64(dtype, rows):
    compare(dtype, rows, 12_288)


@pytest.mark.parametrize("width", [1, 4096, 5001])
def test_small(width):
    compare(torch.bfloat16, 3, width)


def test_more_elements_than_32_bits_count():
    gate_up = torch.ones(1 << 17, 1 << 15, device="cuda", dtype=torch.bfloat16)
    gate_up[-1, 0] = 2
    y = swiglu(gate_up)
    assert y[0, 0] == y[-2, 0] == y[-1, 1] and y[-1, 0] == swiglu(gate_up[-1:].clone())[0, 0] != y[0, 0]


def compare(dtype, *shape):
    for result, reference in zip(*run(dtype, *shape)):
        assert (result.double() - reference).norm() / reference.norm() < TOLERANCE[dtype]


def test_8b_the_same_bits_twenty_times():
    first, *others = (next(run(torch.bfloat16, 1000, 12_288)) for _ in range(20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"^gate_up: got strides \(1, 8\), accepted is contiguous on a GPU"):
        swiglu(torch.randn(8, 8, device="cuda").T)
