"""The Triton kernels in the interpreter."""

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saga_kernels.gpu import rope
from saga_kernels.rope import STEP_ON_GPU, WIDEST_ON_GPU, rope_backward_reference, rope_reference

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


@settings(max_examples=12, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    tokens=st.integers(1, 3),
    heads=st.sampled_from([1, 7, 8, 9]),
    dim=st.sampled_from([16, 64, 80, 96, 128]),
    norm=st.booleans(),
    wide_angles=st.booleans(),
    seed=st.integers(0, 9),
)
def test_both_ways(assert_agrees, dtype, tokens, heads, dim, norm, wide_angles, seed):
    generator = torch.Generator().manual_seed(seed)
    packed, dy = torch.randn(2, tokens, heads + 2, dim, generator=generator).to(dtype)
    x, dy = packed[:, :heads], dy[:, :heads].contiguous()  # heads of other projections may stand between tokens
    angles = torch.rand(tokens, dim, generator=generator) * 6  # halves that differ: more than any model asks
    cos, sin = (t if wide_angles else t.to(dtype) for t in (angles.cos(), angles.sin()))
    weight = torch.rand(dim, generator=generator).add(0.5).to(dtype) if norm else None
    y = rope.forward(x, cos, sin, weight, 1e-2)
    dx = rope.backward(dy, x if norm else None, cos, sin, weight, 1e-2)

    wide = [None if t is None else t.double() for t in (x, cos, sin, weight)]
    assert y.is_contiguous() and dx.is_contiguous()
    assert_agrees([y], [rope_reference(*wide, 1e-2)], TOLERANCE[dtype])
    assert_agrees([dx], [rope_backward_reference(dy.double(), *wide, 1e-2)], TOLERANCE[dtype])


def test_the_tile_is_as_wide_as_the_op_accepts():
    assert (rope.WIDEST, rope.STEP) == (WIDEST_ON_GPU, STEP_ON_GPU)
