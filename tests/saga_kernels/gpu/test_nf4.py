"""The Triton kernels in the interpreter, and how their blocks are chosen."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bench.gpu.nf4 import LINEARS, quantise
from saga_kernels import NF4Weight
from saga_kernels.gpu import nf4
from saga_kernels.gpu.nf4 import Config
from saga_kernels.nf4 import CODE, nf4_dequantize_reference, nf4_matmul_reference

from ...sweep import sweep

drawn = settings(max_examples=6, derandomize=True, deadline=None, phases=[Phase.generate])
TOLERANCE = 5e-4  # half a unit in the last place of float16, relative


def weight(out_features, in_features, nested=True, seed=0, scale=1) -> NF4Weight:
    normal = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    return quantise(scale * normal, nested)


def concatenated(*out_features, in_features, nested=True) -> tuple[NF4Weight, list[NF4Weight]]:
    parts = [weight(out, in_features, nested, i, i + 1) for i, out in enumerate(out_features)]
    return NF4Weight.concatenate(parts), parts


def dequantized_by_reference(w, dtype):
    out = torch.empty(w.shape, dtype=dtype)
    nf4_dequantize_reference(*w.tensors(), out)
    return out


def multiply(x, w, out=16, inner=64, parts=None):
    rows = next(n for n in (16, 32, 64, 128) if len(x) <= n)
    return nf4.matmul(x, *w.tensors(), w.shape[0], Config(rows, out, inner, 4, 1), parts)


def inputs(rows, in_features, seed=1):
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed)).half()


@pytest.fixture(scope="session")
def agrees(assert_agrees):
    def check(y, x, w):
        oracle = x.double() @ dequantized_by_reference(w, x.dtype).double().T
        assert y.dtype == x.dtype
        assert_agrees([y], [oracle], TOLERANCE)

    return check


@drawn
@given(
    rows=st.integers(1, 9),
    half_columns=st.integers(1, 150),
    nested=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 9),
)
def test_dequantized_bits_are_the_references(rows, half_columns, nested, dtype, seed):
    w = weight(rows, 2 * half_columns, nested, seed)
    buffer = torch.full((rows + 2, 2 * half_columns), 7, dtype=dtype)
    nf4.dequantize(*w.tensors(), buffer[1:-1])
    assert torch.equal(buffer[1:-1], dequantized_by_reference(w, dtype))
    assert (buffer[[0, -1]] == 7).all()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dequantized_bits_are_bitsandbytes_own(dtype, nested):
    packed, state = quantize_4bit(
        torch.randn(5, 320, generator=torch.Generator().manual_seed(0)).to(dtype),
        quant_type="nf4",
        blocksize=64,
        compress_statistics=nested,
    )
    second = (state.state2.code, state.state2.absmax, state.offset) if nested else (None, None, None)
    out = torch.empty(5, 320, dtype=dtype)
    nf4.dequantize(packed.view(-1), state.absmax, *second, out)
    assert torch.equal(out, dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", sweep([True, False]))
@pytest.mark.parametrize("dtype", sweep([torch.float16, torch.float32]))
def test_concatenated_weights_keep_their_bits(dtype, nested):
    w, parts = concatenated(256, 512, 5, in_features=64, nested=nested)
    out = torch.empty(w.shape, dtype=dtype)
    nf4.dequantize(*w.tensors(), out)
    assert torch.equal(out, torch.cat([dequantized_by_reference(part, dtype) for part in parts]))


def test_every_code_in_every_place():
    bytes = torch.arange(256, dtype=torch.uint8)
    packed = torch.stack((bytes, bytes.flip(0), bytes, bytes.roll(77)), 1).view(-1)
    w = NF4Weight(packed, torch.linspace(0.5, 3, 32), None, None, None, (32, 64), torch.float32)
    for dtype in (torch.float16, torch.float32):
        out = torch.empty(w.shape, dtype=dtype)
        nf4.dequantize(*w.tensors(), out)
        assert torch.equal(out, dequantized_by_reference(w, dtype))
    assert nf4.CODE.value == CODE


def test_packed_bytes_need_no_alignment():
    w = weight(16, 64)
    packed = torch.cat((w.packed[:1], w.packed))[1:]
    out, y = torch.empty(16, 64), nf4.matmul(inputs(3, 64), packed, *w.tensors()[1:], 16, Config(16, 16, 64, 4, 1), 1)
    nf4.dequantize(packed, *w.tensors()[1:], out)
    assert torch.equal(out, dequantized_by_reference(w, torch.float32))
    assert torch.equal(y, multiply(inputs(3, 64), w, parts=1))


@drawn
@given(
    rows=st.integers(1, 40),
    out_features=st.integers(1, 50),
    blocks=st.integers(1, 6),
    nested=st.booleans(),
    parts=st.integers(1, 8),
)
def test_matmul_against_float64(agrees, rows, out_features, blocks, nested, parts):
    x, w = inputs(rows, 64 * blocks), weight(out_features, 64 * blocks, nested)
    inner = 128 if blocks % 2 == 0 else 64
    y = multiply(x, w, inner=inner, parts=min(parts, 64 * blocks // inner))
    agrees(y, x, w)


@pytest.mark.parametrize("rows", [1, 17, 64, 65, 128])
def test_rows_at_the_chosen_blocks(agrees, rows):
    x, w = inputs(rows, 256), weight(33, 256)
    agrees(nf4.matmul(x, *w.tensors(), 33), x, w)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [64, 128])
@pytest.mark.parametrize("nested", [True, False])
def test_a_concatenated_weight_gives_what_its_parts_give(inner, nested):
    """128 columns: a group of 256 blocks is 128 rows, so that a tile of 96 lies in two of them."""
    w, parts = concatenated(128, 256, 5, in_features=128, nested=nested)
    x = inputs(3, 128)
    y = multiply(x, w, out=32, inner=inner, parts=1)
    assert torch.equal(y, torch.cat([multiply(x, part, out=32, inner=inner, parts=1) for part in parts], -1))


def test_rows_of_a_larger_input(agrees):
    x, w = inputs(4, 128), weight(16, 64)
    agrees(multiply(x[::2, :64], w, parts=1), x[::2, :64], w)


def test_parts_make_the_same_sum_the_same_way_every_time():
    x, w = inputs(3, 512), weight(5, 512)
    whole, eight, again = (multiply(x, w, parts=parts) for parts in (1, 8, 8))
    torch.testing.assert_close(eight, whole, rtol=2e-3, atol=2e-3)
    assert torch.equal(eight, again)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, in_features, dtype",
    [(0, 64, torch.float16), (3, 66, torch.float16), (129, 64, torch.float16), (3, 64, torch.float32)],
)
def test_what_is_not_fused_is_dequantized_once(rows, in_features, dtype):
    x, w = inputs(rows, in_features).to(dtype), weight(6, in_features)
    y = nf4.matmul(x, *w.tensors(), 6)
    assert torch.equal(y, nf4_matmul_reference(x, *w.tensors(), 6))


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_blocks_hold_the_rows_and_divide_the_inner_dimension(arch):
    shipped = {configuration.name.split()[-1] for configuration in nf4.shipped(arch)}
    for rows in range(1, nf4.MAX_ROWS + 1):
        for in_features in (64, 192, 4096, 12_288):
            blocks = nf4.config(rows, in_features, arch)
            assert blocks.rows >= rows and in_features % blocks.inner == 0
            if in_features % 256 == 0:
                assert f"{blocks.rows}x{blocks.out}x{blocks.inner}" in shipped


@given(
    rows=st.integers(1, 128),
    out_features=st.integers(1, 200_000),
    blocks=st.integers(1, 512),
    multiprocessors=st.integers(1, 200),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_every_part_has_work(rows, out_features, blocks, multiprocessors):
    chosen = nf4.config(rows, 64 * blocks, 90)
    parts = nf4.split(rows, out_features, 64 * blocks, chosen, multiprocessors)
    assert 1 <= parts <= min(nf4.MAX_SPLIT, 64 * blocks // chosen.inner)


@pytest.mark.parametrize("out_features, in_features", LINEARS.values())
@pytest.mark.parametrize("rows", [1, 8, 16, 32, 64, 128])
def test_an_h100_is_filled_at_the_shapes_of_8b(rows, out_features, in_features):
    blocks = nf4.config(rows, in_features, 90)
    parts = nf4.split(rows, out_features, in_features, blocks, 132)
    programs = -(-out_features // blocks.out) * parts
    assert programs >= 90 or parts == nf4.MAX_SPLIT
    assert parts == 1 or programs <= 132 * 8


def test_many_tiles_are_not_split():
    assert nf4.split(64, 151_936, 4096, nf4.config(64, 4096, 90), 132) == 1
