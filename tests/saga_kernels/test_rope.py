import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from saga_kernels import rms_norm, rope
from saga_kernels.rope import rope_backward_reference, rope_reference


def make(dtype=torch.float64):
    angles = torch.rand(5, 8, dtype=torch.float64) * 6  # halves that differ: more than any model asks
    return torch.randn(5, 3, 8, dtype=torch.float64).to(dtype).requires_grad_(), angles.cos(), angles.sin()


def test_equals_transformers_and_its_gradient():
    x, cos, sin = make()
    y = rope(x, cos, sin)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g))


def test_narrow_input_is_rounded_once():
    x, cos, sin = make(torch.bfloat16)
    expected, _ = apply_rotary_pos_emb(x.double(), x.double(), cos, sin)
    y = rope(x, cos, sin)
    assert torch.equal(y, expected.bfloat16())
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_with_a_weight_the_heads_are_normed_first(dtype):
    x, cos, sin = make(dtype)
    weight = torch.rand(8).to(dtype)
    y, expected = rope(x, cos, sin, weight, 1e-3), rope(rms_norm(x, weight, 1e-3), cos, sin)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    atol, rtol = (0.05, 0.02) if dtype == torch.bfloat16 else (1e-12, 1e-12)  # ours rounds once, not between the two
    torch.testing.assert_close(*(torch.autograd.grad(out, x, g) for out in (y, expected)), atol=atol, rtol=rtol)


@pytest.mark.parametrize("tokens", [0, 3, 200])
@pytest.mark.parametrize("dim", [2, 14, 64, 100, 128])
def test_compiled(check_compiled, tokens, dim):
    qkv, dqkv = torch.randn(2, tokens, 8, dim)
    cos, sin = torch.randn(2, tokens, dim + 1)[..., :dim]
    for heads in (slice(0, 5), slice(5, 6), slice(0, 8)):  # views of the one tensor, and the whole
        x, dy = qkv[:, heads], dqkv[:, heads]
        for weight in (None, torch.rand(dim) + 0.5):
            kept = None if weight is None else x
            check_compiled("rope", rope_reference, x, cos, sin, weight, 1e-3)
            inputs = dy, kept, cos, sin, weight, 1e-3
            check_compiled("rope_backward", rope_backward_reference, *inputs, atol=1e-4)  # times 1 / sqrt(eps)


def test_angles_in_float64_are_not_narrowed():
    x, cos, sin = make(torch.float32)
    assert torch.equal(rope(x, cos, sin), rope_reference(x, cos, sin, None, 0))


def test_opcheck():
    x, cos, sin = make()
    dy, weight = torch.ones(5, 3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    for more in ((None, 0.0), (weight, 1e-3)):
        kept = None if more[0] is None else x.detach()
        torch.library.opcheck(torch.ops.saga_kernels.rope.default, (x, cos, sin, *more))
        torch.library.opcheck(torch.ops.saga_kernels.rope_backward.default, (dy, kept, cos, sin, *more))


def test_wrong_arguments_are_named():
    x, cos, sin = make()
    with pytest.raises(ValueError, match="^x: got head_dim 7"):
        rope(x[..., 1:], cos, sin)
    with pytest.raises(ValueError, match="^cos: got shape"):
        rope(x, cos[1:], sin)
    with pytest.raises(TypeError, match="^sin: got dtype float32"):
        rope(x, cos, sin.float())
    with pytest.raises(ValueError, match=r"^weight: got shape \(6,\)"):
        rope(x, cos, sin, torch.rand(6).double())


def test_what_a_gpu_does_not_take_is_named_before_any_launch():
    with FakeTensorMode():
        x, angles = torch.empty(4, 8, 128, device="cuda"), torch.empty(4, 128, device="cuda")
        odd, odd_angles = torch.empty(4, 8, 72, device="cuda"), torch.empty(4, 72, device="cuda")
        with pytest.raises(ValueError, match="^x: got head_dim 72, accepted is a multiple of 16 up to 128 on a GPU"):
            rope(odd, odd_angles, odd_angles)
        wide, wide_angles = torch.empty(4, 8, 256, device="cuda"), torch.empty(4, 256, device="cuda")
        assert rope(wide, wide_angles, wide_angles).shape == wide.shape
        with pytest.raises(ValueError, match=r"^x: got strides \(1024, 1, 8\)"):
            rope(torch.empty_strided((4, 8, 128), (1024, 1, 8), device="cuda"), angles, angles)
        with pytest.raises(ValueError, match=r"^sin: got strides \(1, 4\)"):
            rope(x, angles, torch.empty_strided((4, 128), (1, 4), device="cuda"))
        with pytest.raises(ValueError, match="^cos: got device cpu"):
            rope(x, torch.empty(4, 128), angles)
