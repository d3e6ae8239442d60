import dataclasses

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from saga_kernels import NF4Weight, nf4_dequantize, nf4_matmul
from saga_kernels.nf4 import CHUNK

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 64), (5, 320), (7, 6), (130, 192), (2 * CHUNK // 1024 + 3, 1024)]


def quantised(shape, dtype=torch.float32, nested=True, **options) -> bnb.nn.Params4bit:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"quant_type": "nf4", "compress_statistics": nested, **options}
    return bnb.nn.Params4bit(weight, requires_grad=False, **options).to("cpu")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_bits_are_bitsandbytes_own(shape, dtype, nested):
    parameter = quantised(shape, dtype, nested)
    w = NF4Weight.from_bitsandbytes(parameter)
    assert (w.shape, w.dtype) == (shape, dtype)
    expected = dequantize_4bit(parameter.data, parameter.quant_state)
    got = nf4_dequantize(w)
    assert got.dtype == dtype and torch.equal(got, expected)


def test_a_weight_is_a_view_of_the_parameter():
    parameter = quantised((4, 64))
    assert NF4Weight.from_bitsandbytes(parameter).packed.data_ptr() == parameter.data_ptr()


def test_other_quant_storage_is_read_as_bytes():
    parameter = quantised((4, 64), quant_storage=torch.bfloat16)
    w = NF4Weight.from_bitsandbytes(parameter)
    assert torch.equal(nf4_dequantize(w), dequantize_4bit(parameter.data.view(torch.uint8), parameter.quant_state))


def test_out_is_filled_in_place_and_float64_widens_float32():
    w = NF4Weight.from_bitsandbytes(quantised((4, 64)))
    buffer = torch.full((9, 64), 7.0)
    out = nf4_dequantize(w, out=buffer[2:6])
    assert out.data_ptr() == buffer[2:6].data_ptr()
    assert torch.equal(buffer[2:6], nf4_dequantize(w))
    assert (buffer[[0, 1, 6, 7, 8]] == 7).all()
    assert torch.equal(nf4_dequantize(w, dtype=torch.float64), nf4_dequantize(w).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matmul_and_its_gradient_are_those_of_the_dense_weight(dtype):
    parameter = quantised((24, 64), dtype if dtype != torch.float64 else torch.float32)
    w = NF4Weight.from_bitsandbytes(parameter)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = nf4_matmul(x, w)
    dense = dequantize_4bit(parameter.data, parameter.quant_state).to(dtype)
    torch.testing.assert_close(y, x @ dense.T)
    d_y = torch.ones_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, d_y)[0], d_y @ dense)
    if dtype == torch.float32:  # in bf16, bitsandbytes' own CPU path may round otherwise
        torch.testing.assert_close(y, bnb.matmul_4bit(x, parameter.data, parameter.quant_state))


@pytest.mark.parametrize("nested", [True, False])
def test_opcheck(nested):
    w = NF4Weight.from_bitsandbytes(quantised((24, 64), nested=nested))
    ops = torch.ops.saga_kernels
    torch.library.opcheck(ops.nf4_dequantize.default, (*w.tensors(), torch.empty(w.shape)))
    torch.library.opcheck(ops.nf4_matmul.default, (torch.randn(3, 64, requires_grad=True), *w.tensors(), 24))


def parts_of(shapes, nested, dtype=torch.float32) -> list[NF4Weight]:
    """Weights of growing size, whose offsets differ."""
    options = {"quant_type": "nf4", "compress_statistics": nested}
    weights = [
        (i + 1) * torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)
    ]
    parameters = [bnb.nn.Params4bit(w.to(dtype), requires_grad=False, **options).to("cpu") for w in weights]
    return [NF4Weight.from_bitsandbytes(parameter) for parameter in parameters]


CONCATENATED = [  # nested, shapes: the last may end within a block
    (True, [(64, 256), (128, 256), (64, 256)]),
    (True, [(512, 96), (5, 96)]),
    (True, [(64, 256)]),
    (False, [(64, 256), (3, 256), (1, 256)]),
    (False, [(2, 96), (5, 96)]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested, shapes", CONCATENATED)
def test_concatenated_weights_keep_their_bits(nested, shapes, dtype):
    parts = parts_of(shapes, nested, dtype)
    w = NF4Weight.concatenate(parts)
    assert (w.shape, w.dtype) == ((sum(out for out, _ in shapes), shapes[0][1]), dtype)
    assert torch.equal(nf4_dequantize(w), torch.cat([nf4_dequantize(part) for part in parts]))
    x = torch.randn(3, w.shape[1], generator=torch.Generator().manual_seed(9)).to(dtype)
    torch.testing.assert_close(nf4_matmul(x, w), torch.cat([nf4_matmul(x, part) for part in parts], -1))
    if len(parts) == 3:
        again = NF4Weight.concatenate([NF4Weight.concatenate(parts[:2]), parts[2]])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(again.tensors(), w.tensors()))


def test_opcheck_of_a_concatenated_weight():
    w = NF4Weight.concatenate(parts_of([(256, 64), (3, 64)], True))
    ops = torch.ops.saga_kernels
    torch.library.opcheck(ops.nf4_dequantize.default, (*w.tensors(), torch.empty(w.shape)))
    torch.library.opcheck(ops.nf4_matmul.default, (torch.randn(3, 64, requires_grad=True), *w.tensors(), 259))


def test_weights_that_cannot_be_concatenated_are_refused():
    (w, short), (plain, odd) = parts_of([(256, 64), (3, 64)], True), parts_of([(4, 64), (5, 6)], False)
    with pytest.raises(ValueError, match="^weights: got none"):
        NF4Weight.concatenate([])
    with pytest.raises(ValueError, match=r"^weights\[0\]: got shape \(3, 64\), accepted is a multiple of 16384 elem"):
        NF4Weight.concatenate([short, w])
    with pytest.raises(ValueError, match=r"^weights\[0\]: got shape \(5, 6\), accepted is a multiple of 64 elements"):
        NF4Weight.concatenate([odd, odd])
    with pytest.raises(ValueError, match=r"^weights\[1\]: got in 6, accepted is weights\[0\]'s, 64"):
        NF4Weight.concatenate([plain, odd])
    with pytest.raises(ValueError, match=r"^weights\[1\]: got nesting False, accepted is weights\[0\]'s, True"):
        NF4Weight.concatenate([w, plain])
    with pytest.raises(ValueError, match=r"^weights\[1\]: got dtype torch.float16, accepted is weights\[0\]'s"):
        NF4Weight.concatenate([w, dataclasses.replace(w, dtype=torch.float16)])
    with pytest.raises(ValueError, match=r"^weights\[1\]: got a code2 of its own"):
        NF4Weight.concatenate([w, dataclasses.replace(w, code2=w.code2 + 1)])
    on_meta = [None if tensor is None else tensor.to("meta") for tensor in plain.tensors()]
    with pytest.raises(ValueError, match=r"^weights\[1\]: got device meta, accepted is weights\[0\]'s, cpu"):
        NF4Weight.concatenate([plain, NF4Weight(*on_meta, plain.shape, plain.dtype)])


def test_weights_that_are_not_canonical_nf4_are_refused():
    with pytest.raises(TypeError, match="without quant_state"):
        NF4Weight.from_bitsandbytes(torch.nn.Parameter(torch.randn(2, 64)))
    with pytest.raises(ValueError, match="quant_type fp4, accepted is nf4"):
        NF4Weight.from_bitsandbytes(quantised((2, 64), quant_type="fp4"))
    with pytest.raises(ValueError, match="blocksize 128, accepted is 64"):
        NF4Weight.from_bitsandbytes(quantised((2, 128), blocksize=128))


def test_a_weight_repacked_for_the_cpu_is_refused():
    parameter = quantised((32, 64))
    parameter.data, parameter.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        parameter.data, parameter.quant_state
    )
    with pytest.raises(ValueError, match="repacked for the CPU"):
        NF4Weight.from_bitsandbytes(parameter)


def test_wrong_arguments_are_named():
    w = NF4Weight.from_bitsandbytes(quantised((4, 64)))
    with pytest.raises(ValueError, match=r"^out: got shape \(4, 63\)"):
        nf4_dequantize(w, out=torch.empty(4, 63))
    with pytest.raises(ValueError, match="^out: got strides"):
        nf4_dequantize(w, out=torch.empty(64, 4).T)
    with pytest.raises(TypeError, match="^out: got dtype int32"):
        nf4_dequantize(w, out=torch.empty(4, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^x: got shape \(3, 4\)"):
        nf4_matmul(torch.randn(3, 4), w)
    packed, state = quantize_4bit(torch.randn(4, 64), quant_type="nf4")
    with pytest.raises(ValueError, match="^absmax: got shape"):
        NF4Weight(packed.view(-1), state.absmax[1:], None, None, None, (4, 64), torch.float32)
    with pytest.raises(TypeError, match="^w: got Tensor, accepted is NF4Weight"):
        nf4_matmul(torch.randn(3, 64), torch.randn(4, 64))
    with pytest.raises(TypeError, match="^w: got Tensor, accepted is NF4Weight"):
        nf4_dequantize(torch.randn(4, 64))
    with pytest.raises(ValueError, match="^out: got device meta, accepted is packed's, cpu"):
        nf4_dequantize(w, out=torch.empty(4, 64, device="meta"))
    with pytest.raises(ValueError, match="^packed: got device cpu, accepted is x's, meta"):
        nf4_matmul(torch.empty(3, 64, device="meta"), w)


def test_a_weight_whose_parts_do_not_fit_together_is_refused():
    w = NF4Weight.from_bitsandbytes(quantised((4, 64)))
    with pytest.raises(ValueError, match=r"^packed: got strides \(2,\), accepted is a contiguous tensor"):
        dataclasses.replace(w, packed=torch.empty(256, dtype=torch.uint8)[::2])
    with pytest.raises(ValueError, match="^absmax2: got device meta, accepted is packed's, cpu"):
        dataclasses.replace(w, absmax2=w.absmax2.to("meta"))
    with pytest.raises(ValueError, match=r"^offset: got shape \(2,\), accepted is shape \(1\)"):
        dataclasses.replace(w, offset=w.offset.expand(2).contiguous())
    with pytest.raises(TypeError, match="^absmax: got dtype uint8, accepted is float32"):
        dataclasses.replace(w, code2=None)
