"""GPU-only checks of the NF4 ops: 8B shapes in bfloat16, equal bits, determinism, no waiting for the GPU."""

import pytest
import torch

from bench.gpu.nf4 import LINEARS, PARTS, quantise
from saga_kernels import NF4Weight, nf4_dequantize, nf4_matmul
from saga_kernels.gpu import nf4
from saga_kernels.nf4 import nf4_dequantize_reference

TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # half a unit in the last place, relative
SHAPES = [(1000, 512), (37, 192), (130, 320), (3, 64)]


def normal(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def dequantized_by_reference(w, dtype):
    out = torch.empty(w.shape, dtype=dtype, device="cuda")
    nf4_dequantize_reference(*w.tensors(), out)
    return out


def assert_agrees(y, oracle, tolerance):
    assert oracle.norm() > 0
    error = ((y.double() - oracle).norm() / oracle.norm()).item()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("shape", LINEARS.values())
def test_8b_dequantized_bits_are_the_references(shape):
    assert_dequantizes(shape, torch.bfloat16, True)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [*SHAPES, (7, 6), (5, 322), (4096, 4096)])
def test_dequantized_bits_are_the_references(shape, dtype, nested):
    assert_dequantizes(shape, dtype, nested)


def assert_dequantizes(shape, dtype, nested):
    w = quantise(normal(*shape), nested)
    buffer = torch.full((shape[0] + 2, shape[1]), 7, dtype=dtype, device="cuda")
    nf4_dequantize(w, out=buffer[1:-1])
    assert torch.equal(buffer[1:-1], dequantized_by_reference(w, dtype))
    assert (buffer[[0, -1]] == 7).all()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantized_bits_are_bitsandbytes_own(dtype, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.nn import Params4bit

    parameter = Params4bit(
        normal(1024, 4096, dtype=dtype), requires_grad=False, quant_type="nf4", compress_statistics=nested
    ).to("cuda")
    expected = functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert torch.equal(nf4_dequantize(NF4Weight.from_bitsandbytes(parameter)), expected)


@pytest.mark.parametrize("shape", LINEARS.values())
def test_8b_products_equal_float64_by_the_compiled_kernel_and_beyond_it(shape):
    assert hasattr(torch.ops.saga_kernels, "nf4_matmul_few"), "the extension was built in C++ alone"
    for rows in (1, 8, 16, 32, 64, 96, 128, 129):
        assert_multiplies(shape, rows, torch.bfloat16)


def by_wgmma(x, w):
    """csrc/nf4_wgmma.cu, whatever `WGMMA_ROWS` says."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    assert nf4.has_wgmma(x.device), "the extension was not built for sm_90a"
    return torch.ops.saga_kernels.nf4_matmul_wgmma(x, *w.tensors(), w.shape[0])


@pytest.mark.parametrize("name", LINEARS)
def test_8b_products_by_wgmma_are_as_near_to_float64_and_the_same_bytes_every_time(name):
    """Of concatenated weights, which have several offsets, where the 8B's are."""
    width = LINEARS[name][1]
    outs = PARTS.get(name, LINEARS[name][:1])
    w = NF4Weight.concatenate([quantise((i + 1) * normal(out, width, seed=i)) for i, out in enumerate(outs)])
    values = dequantized_by_reference(w, torch.float64)
    for rows in (1, 17, 32, 33, 64, 65, 96, 97, 128):
        x = normal(rows, width, seed=9)
        y = by_wgmma(x, w)
        assert_agrees(y, x.double() @ values.T, 2.2e-3)
        assert_agrees(y, nf4_matmul(x, w).double(), 3e-3)  # both round the same sums
        assert all(torch.equal(by_wgmma(x, w), y) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 32, 33, 64, 65, 96, 97, 128])
@pytest.mark.parametrize("shape", [(4, 128), (76, 768), (1000, 512), (260, 2944), (4096, 4096)])
def test_products_by_wgmma_equal_float64(shape, rows, dtype):
    w, x = quantise(normal(*shape, dtype=dtype)), normal(rows, shape[1], dtype=dtype, seed=1)
    oracle = x.double() @ dequantized_by_reference(w, torch.float64).T
    assert_agrees(by_wgmma(x, w), oracle, 2.2e-3 if dtype == torch.bfloat16 else 4e-4)


def test_smallest_case_of_every_kernel():
    """The compiled ones of each number of rows that they are compiled for, once with parts to add up; and Triton's."""
    for rows, width in ((1, 256), (9, 256), (17, 2048), (33, 256), (49, 256), (65, 256), (97, 256)):
        w, x = quantise(normal(76, width)), normal(rows, width, seed=1)
        values = dequantized_by_reference(w, torch.float64).cpu()
        assert_agrees(nf4_matmul(x, w).cpu(), x.double().cpu() @ values.T, 4e-3)
        if nf4.has_wgmma(x.device):
            assert_agrees(by_wgmma(x, w).cpu(), x.double().cpu() @ values.T, 4e-3)
    y = nf4.matmul(x, *w.tensors(), 76, nf4.config(97, width, 90), 2)
    assert_agrees(y.cpu(), x.double().cpu() @ values.T, 1e-2)
    assert_agrees(nf4_dequantize(w).cpu(), values, 4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 17, 32, 33, 64, 80, 100, 128, 129])
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096)])
def test_matmul_equals_float64(shape, rows, dtype):
    assert_multiplies(shape, rows, dtype)


def assert_multiplies(shape, rows, dtype):
    w, x = quantise(normal(*shape, dtype=dtype)), normal(rows, shape[1], dtype=dtype, seed=1)
    oracle = x.double() @ dequantized_by_reference(w, dtype).double().T
    assert_agrees(nf4_matmul(x, w), oracle, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 9, 24, 40, 56, 88, 120])
def test_small_products_are_within_bounds_and_those_of_the_values_nf4_stands_for(rows, dtype):
    """More exact than dequantised weights could make them: in float32, only the product is rounded to `dtype`."""
    w, x = quantise(normal(76, 768, dtype=dtype)), normal(rows, 768, dtype=dtype, seed=1)
    oracle = x.double() @ dequantized_by_reference(w, torch.float64).T
    y = nf4_matmul(x, w)
    assert_agrees(y, oracle, 2.2e-3 if dtype == torch.bfloat16 else 4e-4)
    assert not torch.equal(y, x @ nf4_dequantize(w).T), "this was not the compiled kernel"


def test_float32_is_multiplied_in_float32():
    w, x = quantise(normal(1024, 4096, dtype=torch.float32)), normal(16, 4096, dtype=torch.float32, seed=1)
    assert_agrees(nf4_matmul(x, w), x.double() @ dequantized_by_reference(w, torch.float64).T, 1e-5)


def test_not_nested():
    w, x = quantise(normal(1024, 4096), nested=False), normal(16, 4096, seed=1)
    oracle = x.double() @ dequantized_by_reference(w, torch.bfloat16).double().T
    assert_agrees(nf4_matmul(x, w), oracle, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_a_concatenated_weight(name, nested):
    """Its bits are those of the parts; so are its products, where the inner dimension is cut alike."""
    width = LINEARS[name][1]
    parts = [quantise((i + 1) * normal(out, width, seed=i), nested) for i, out in enumerate(PARTS[name])]
    w = NF4Weight.concatenate(parts)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = torch.cat([nf4_dequantize(part, dtype=dtype) for part in parts])
        assert torch.equal(nf4_dequantize(w, dtype=dtype), expected)
    for rows in (1, 8, 16, 32, 64, 128, 129):
        x = normal(rows, width, seed=9)
        oracle = x.double() @ dequantized_by_reference(w, torch.bfloat16).double().T
        y = nf4_matmul(x, w)
        for mine, of_part in zip(y.split(PARTS[name], -1), oracle.split(PARTS[name], -1)):
            assert_agrees(mine, of_part, TOLERANCE[torch.bfloat16])
        if rows <= 128:
            blocks = nf4.config(rows, width, 90)
            whole, *apart = (nf4.matmul(x, *v.tensors(), v.shape[0], blocks, 2) for v in (w, *parts))
            assert torch.equal(whole, torch.cat(apart, -1))


@pytest.mark.parametrize("rows", [8, 300])
def test_the_gradient_of_x(rows):
    w, x = quantise(normal(1024, 4096)), normal(rows, 4096, seed=1).requires_grad_()
    dy = normal(rows, 1024, seed=2)
    dx = torch.autograd.grad(nf4_matmul(x, w), x, dy)[0]
    oracle = dy.double() @ dequantized_by_reference(w, torch.bfloat16).double()
    assert_agrees(dx, oracle, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("shape", LINEARS.values())
@pytest.mark.parametrize("rows", [8, 64])
def test_8b_20_runs_give_the_same_bytes(shape, rows):
    w, x = quantise(normal(*shape)), normal(rows, shape[1], seed=1)
    first, *others = (nf4_matmul(x, w) for _ in range(20))
    assert all(torch.equal(first, other) for other in others)


def test_nothing_waits_for_the_gpu():
    w, x = quantise(normal(1024, 4096)), normal(16, 4096, seed=1)
    nf4_matmul(x, w)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        nf4_matmul(x, w)
        nf4_dequantize(w)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_mixed_devices_are_refused():
    w = quantise(normal(16, 64))
    with pytest.raises(ValueError, match="^packed: got device cuda"):
        nf4_matmul(torch.randn(2, 64), w)
    with pytest.raises(ValueError, match="^out: got device cpu"):
        nf4_dequantize(w, out=torch.empty(16, 64))
