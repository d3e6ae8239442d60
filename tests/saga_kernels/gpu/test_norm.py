"""The Triton kernels in the interpreter."""

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saga_kernels.gpu import norm
from saga_kernels.norm import add_rms_norm_reference, rms_norm_backward_reference, rms_norm_reference

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


@settings(max_examples=12, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    rows=st.integers(1, 5),
    width=st.sampled_from([1, 8, 63, 64, 100, 1000]),
    add=st.booleans(),
    seed=st.integers(0, 9),
)
def test_both_ways(assert_agrees, dtype, rows, width, add, seed):
    generator = torch.Generator().manual_seed(seed)
    x, residual, dy, dsum = torch.randn(4, rows, width, generator=generator).to(dtype)
    weight = torch.rand(width, generator=generator).add(0.5).to(dtype)
    block = max(64, 1 << (width - 1).bit_length())
    total, y = norm.forward(x, residual if add else None, weight, 1e-2, block)
    dx = norm.backward(dy, dsum if add else None, total, weight, 1e-2, block)

    if add:
        assert torch.equal(total, x + residual)
        _, expected = add_rms_norm_reference(x.double(), residual.double(), weight.double(), 1e-2)
    else:
        assert total is x
        expected = rms_norm_reference(x.double(), weight.double(), 1e-2)
    d_expected = rms_norm_backward_reference(
        dy.double(), dsum.double() if add else None, total.double(), weight.double(), 1e-2
    )
    assert_agrees([y], [expected], TOLERANCE[dtype])
    if width > 1 or add:  # one column's norm is its sign, its gradient all but nothing
        assert_agrees([dx], [d_expected], TOLERANCE[dtype])


def test_rounds_where_the_reference_does():
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 4, 96, generator=generator).half()
    weight = torch.rand(96, generator=generator).half()
    total, y = norm.forward(x, residual, weight, 1e-6, 128)
    assert torch.equal(y, rms_norm_reference(total, weight, 1e-6))
    # Not the norm of the sum before it was rounded, nor a product with the weight of unrounded numbers.
    unrounded_sum = rms_norm_reference(x.float() + residual.float(), torch.ones(96), 1e-6).half() * weight
    unrounded_norm = rms_norm_reference(total.float(), weight.float(), 1e-6).half()
    assert not torch.equal(y, unrounded_sum) and not torch.equal(y, unrounded_norm)


def test_blocks_hold_every_width_the_op_accepts():
    from saga_kernels.norm import WIDEST_ON_GPU

    assert norm.WIDEST == WIDEST_ON_GPU
    assert [norm._block(width) for width in (1, 4096, 4097, 8192)] == [4096, 4096, 8192, 8192]
