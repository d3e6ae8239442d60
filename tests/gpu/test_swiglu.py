import pytest
import torch

from saga_kernels import swiglu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 3e-6}


def run(dtype, *shape):
    """Forward and backward in dtype and in float64."""
    made = torch.randn(3, *shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    for wide in (False, True):
        gate, up, dy = made.double() if wide else made
        y = swiglu(gate.requires_grad_(), up.requires_grad_())
        yield y, *torch.autograd.grad(y, (gate, up), dy)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [64, 6_450])
def test_against_float64(dtype, rows):
    compare(dtype, rows, 12_288)


@pytest.mark.parametrize("width", [1, 4096, 5001])
def test_small(width):
    compare(torch.bfloat16, 3, width)


def test_more_elements_than_32_bits_count():
    gate = torch.ones(1 << 31, device="cuda", dtype=torch.bfloat16)
    gate[-1] = 2
    up = torch.full_like(gate, 3)
    y = swiglu(gate, up)
    assert y[-2] == swiglu(gate[:1], up[:1]) and y[-1] == swiglu(gate[-1:].clone(), up[-1:].clone())


def compare(dtype, *shape):
    for result, reference in zip(*run(dtype, *shape)):
        assert (result.double() - reference).norm() / reference.norm() < TOLERANCE[dtype]


def test_the_same_bits_twenty_times():
    first, *others = (next(run(torch.bfloat16, 1000, 12_288)) for _ in range(20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_wrong_arguments_are_named():
    gate = torch.randn(8, 64, device="cuda")
    with pytest.raises(ValueError, match=r"^up: got strides \(1, 8\), accepted is contiguous on a GPU"):
        swiglu(square := gate[:, :8].contiguous(), square.T)
    with pytest.raises(ValueError, match="^up: got device cpu"):
        swiglu(gate, gate.cpu())
