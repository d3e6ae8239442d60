import pytest
import torch
import torch.nn.functional as F

from saga_kernels import linear
from saga_kernels.linear import FEW_ROWS


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 16, 41, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(("out", "width"), [(1, 1), (13, 5), (24, 768), (100, 1600)])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_float64(rows, out, width, biased):
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out) if biased else None
    y, wide = linear(x, weight, bias), (None if z is None else z.double() for z in (x, weight, bias))
    assert y.dtype == torch.float32 and y.is_contiguous()
    torch.testing.assert_close(y.double(), F.linear(*wide), rtol=1e-5, atol=1e-5 * width**0.5)


def test_a_row_is_the_same_bytes_whatever_the_others_and_the_threads():
    if not torch.ops.saga_kernels.has_avx2():
        pytest.skip("this processor runs the references")
    x, weight, threads = torch.randn(100, 900), torch.randn(2000, 900), torch.get_num_threads()
    whole = linear(x, weight)
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            for rows in (slice(0, 1), slice(3, 12), slice(50, 100)):
                assert torch.equal(linear(x[rows], weight), whole[rows])
    finally:
        torch.set_num_threads(threads)


def test_strides_do_not_matter():
    x, weight = torch.randn(60, 10).T, torch.randn(60, 33).T
    torch.testing.assert_close(linear(x, weight), x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs(dtype):
    x, weight, bias = torch.randn(5, 12, dtype=dtype), torch.randn(7, 12, dtype=dtype), torch.randn(7, dtype=dtype)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_gradients_flow_where_they_are_asked_for():
    x, weight = torch.randn(5, 12, requires_grad=True), torch.randn(7, 12)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 12))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.ones(3)}, "x"),
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, "x"),
        ({"weight": torch.ones(5, 3)}, "weight"),
        ({"weight": torch.ones(5, 4).double()}, "weight"),
        ({"bias": torch.ones(4)}, "bias"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(5, 4), "bias": torch.ones(5), **change}
    with pytest.raises((ValueError, TypeError), match=named):
        linear(**arguments)
