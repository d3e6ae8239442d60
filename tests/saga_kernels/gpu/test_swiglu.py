"""The Triton kernels in the interpreter."""

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saga_kernels.gpu import swiglu
from saga_kernels.swiglu import swiglu_backward_reference, swiglu_reference

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4}


@settings(max_examples=10, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    rows=st.integers(1, 5),
    width=st.sampled_from([1, 64, 100]),  # within a block, whole blocks, part of one
    seed=st.integers(0, 9),
)
def test_both_ways(assert_agrees, dtype, rows, width, seed):
    made = torch.randn(rows, 3 * width, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype)
    dy, gate_up = (x.contiguous() for x in made.split([width, 2 * width], -1))
    assert_agrees([swiglu.forward(gate_up, block=64)], [swiglu_reference(gate_up.double())], TOLERANCE[dtype])
    right = swiglu_backward_reference(dy.double(), gate_up.double())
    assert_agrees([swiglu.backward(dy, gate_up, block=64)], [right], TOLERANCE[dtype])


def test_far_from_zero():
    gate_up = torch.tensor([-200.0, -90, 90, 200, 1, 1, 1, 1])
    assert torch.equal(swiglu.forward(gate_up, block=4), torch.tensor([0.0, 0, 90, 200]))
