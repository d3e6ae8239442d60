"""The Triton pass in the interpreter, with GEMMs on a CPU."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saga_kernels.gpu import logprob
from saga_kernels.logprob import token_logprob_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}
few = settings(max_examples=8, derandomize=True, deadline=None, phases=[Phase.generate])


@pytest.fixture(autouse=True)
def cpu_gemm(monkeypatch):
    """A CPU has no GEMM of float16 into float32: the factors are widened, which changes no product."""
    monkeypatch.setattr(logprob, "_mm", lambda a, b, out: torch.mm(a.to(out.dtype), b.to(out.dtype), out=out))


def make(n, d, vocabulary, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    h, head = torch.randn(n, d, generator=g).to(dtype), torch.randn(vocabulary, d, generator=g).to(dtype)
    return h, head, torch.randint(vocabulary, (n,), generator=g), torch.randn(n, generator=g)


@few
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    n=st.integers(1, 5),
    vocabulary=st.sampled_from([1, 2, 15, 16, 17, 40, 71]),  # with blocks of 16: whole, cut short, one over
    chunk=st.integers(1, 6),
    temperature=st.sampled_from([1.0, 0.6]),
)
def test_equals_the_reference_in_float64(assert_agrees, dtype, n, vocabulary, chunk, temperature):
    h, head, targets, coeff = make(n, 6, vocabulary, dtype)
    logp, dh = logprob.forward(h, head, targets, coeff, temperature, chunk, block=16)
    assert logp.dtype == torch.float32 and dh.dtype == dtype
    wide = h.double(), head.double(), targets, coeff.double()
    expected, d_expected = token_logprob_reference(*wide, temperature, chunk)
    if vocabulary == 1:
        assert not logp.any() and not dh.any()  # the one token there is, and zeros are right
    else:
        assert_agrees([logp], [expected], 1e-5)
        assert_agrees([dh], [d_expected], TOLERANCE[dtype])


@few
@given(dtype=st.sampled_from(list(TOLERANCE)), vocabulary=st.sampled_from([7, 16, 50]), rows=st.integers(1, 3))
def test_the_gradient_lies_in_the_logits(assert_agrees, dtype, vocabulary, rows):
    buffer = torch.randn(rows, -(-vocabulary // 8) * 8).mul_(5)
    targets, logp = torch.randint(vocabulary, (rows,)), torch.empty(rows)
    scores = buffer[:, :vocabulary].double() / 0.8
    gradient = logprob.softmax_gradient(buffer, vocabulary, targets, 0.8, logp, dtype, block=16)
    assert gradient.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    expected = torch.nn.functional.one_hot(targets, vocabulary) - scores.softmax(-1)
    assert_agrees([gradient / logprob.UNIT.value], [expected], TOLERANCE[dtype])
    assert_agrees([logp], [scores.log_softmax(-1)[range(rows), targets]], 1e-5)


def test_small_coefficients_survive_float16(assert_agrees):
    """Flat logits, and a coefficient of a long batch: their product is below what float16 holds."""
    h, head, targets, coeff = make(3, 6, 500, torch.float16)
    h, coeff = h * 0.1, coeff * 1e-5
    _, dh = logprob.forward(h, head, targets, coeff, 1.0, 3, block=64)
    h, coeff = h.double(), coeff.double()
    assert_agrees([dh], [token_logprob_reference(h, head.double(), targets, coeff, 1.0, 3)[1]], 1e-2)


def test_targets_out_of_range_give_nan_in_their_rows_alone():
    h, head, _, coeff = make(4, 6, 20, torch.float32)
    targets = torch.tensor([3, -1, 20, 19])
    logp, dh = logprob.forward(h, head, targets, coeff, 1.0, 4, block=16)
    assert logp.isnan().tolist() == [False, True, True, False]
    assert dh.isnan().all(1).tolist() == dh.isnan().any(1).tolist() == [False, True, True, False]


def test_no_rows():
    h, head, targets, coeff = make(0, 6, 20, torch.float32)
    logp, dh = logprob.forward(h, head, targets, coeff, 1.0, 4)
    assert logp.shape == (0,) and dh.shape == (0, 6)
