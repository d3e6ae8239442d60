import pytest
import torch

from saga_kernels import rope

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 3e-6}


def run(dtype, norm, tokens, heads, dim):
    """Forward and backward in dtype and in float64. Each token's heads stand before those of other projections."""
    generator = torch.Generator("cuda").manual_seed(0)
    packed, dy = torch.randn(2, tokens, heads + 8, dim, device="cuda", generator=generator).to(dtype)
    angles = torch.rand(tokens, dim, device="cuda", generator=generator) * 6
    weight = torch.rand(dim, device="cuda", generator=generator).add(0.5).to(dtype)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for wide in (False, True):
        x, d, c, s, w = (t.double() if wide else t for t in (packed, dy, cos, sin, weight))
        x.requires_grad_()
        y = rope(x[:, :heads], c, s, w if norm else None, 1e-6)
        yield y, torch.autograd.grad(y, x, d[:, :heads])[0]


@pytest.mark.parametrize("tokens, heads", [(51_600, 32), (64, 8)])
def test_8b_against_float64(tokens, heads):
    compare(torch.bfloat16, True, tokens, heads, 128)


@pytest.mark.parametrize("norm", [False, True])
def test_smallest_case_of_every_kernel(norm):
    compare(torch.bfloat16, norm, 3, 2, 128)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tokens, heads", [(6_450, 32), (64, 8)])
def test_against_float64(dtype, norm, tokens, heads):
    compare(dtype, norm, tokens, heads, 128)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_small(norm, dim):
    compare(torch.bfloat16, norm, 3, 9, dim)


def compare(dtype, *shape):
    for result, reference in zip(*run(dtype, *shape)):
        assert (result.double() - reference).norm() / reference.norm() < TOLERANCE[dtype]


def test_8b_the_same_bits_twenty_times():
    first, *others = (next(run(torch.bfloat16, True, 1000, 32, 128)) for _ in range(20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_wrong_arguments_are_named():
    x, angles = torch.randn(4, 8, 128, device="cuda"), torch.randn(4, 128, device="cuda")
    with pytest.raises(ValueError, match="^x: got head_dim 72, accepted is a multiple of 16 up to 128 on a GPU"):
        rope(x[..., :72], angles[:, :72], angles[:, :72])
    with pytest.raises(ValueError, match="^x: got strides"):
        rope(x.transpose(1, 2).contiguous().transpose(1, 2), angles, angles)
    with pytest.raises(ValueError, match="^cos: got device cpu"):
        rope(x, angles.cpu(), angles)
