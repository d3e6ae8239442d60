import pytest
import torch

from saga_kernels import decode_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
PAIRS, GROUP, KV, EACH, DIM, LENGTH, END = 4, 8, 4, 2, 64, 300, 96


def make(dtype, device="cuda", length=LENGTH, dim=DIM, each=EACH):
    """Arguments of 21 rows that anyone reads and three that run along, as where a graph is larger than its batch."""
    generator = torch.Generator().manual_seed(0)
    rows, q_heads = 24, KV * each
    shapes = [(rows, q_heads, dim), (rows, KV, dim), (rows, KV, dim), (PAIRS, KV, dim, length)]
    shapes += [(PAIRS, KV, length, dim), (rows, KV, END, dim), (rows, KV, END, dim)]
    tensors = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
    query_slot = torch.randperm(PAIRS * GROUP, generator=generator)[:rows]
    query_slot[21:] = PAIRS * GROUP
    cached = torch.randint(END - 4, (rows,), generator=generator)
    return *tensors, query_slot.to(device), cached.to(device), GROUP


def error(arguments, shape):
    """Of the rows that anyone reads, against float64."""
    wide = [x.double() if x.is_floating_point() else x for x in make(arguments[0].dtype, "cpu", **shape)[:-1]]
    right = decode_attention(*wide, GROUP)
    return (decode_attention(*arguments).double().cpu() - right)[:21].norm() / right[:21].norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_against_float64(dtype):
    assert error(make(dtype), {}) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [dict(length=37, dim=80, each=1), dict(length=38, dim=128, each=4), dict(length=40)])
def test_small(dtype, shape):
    """Keys of a prefix one by one, in short vectors and in long ones."""
    assert error(make(dtype, **shape), shape) < TOLERANCE[dtype]


@pytest.mark.parametrize("aligned", [850, 864])
def test_8b(aligned):
    """64 rows of eight pairs in views of larger blocks, rows of keys dense or apart, what is not there nan."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    qkv, prefix_k, prefix_v = draw(64, 48, 128), draw(8, 8, 128, aligned), draw(8, 8, 850, 128)
    prefix_k[..., 850:] = torch.nan
    own_k, own_v = draw(72, 8, 1024, 128), draw(72, 8, 1024, 128)
    cached = torch.randint(384, (64,), device="cuda", generator=generator)
    cached[:2] = torch.tensor([0, 383])
    query_slot = torch.randperm(64, device="cuda", generator=generator)
    inputs = *qkv.split((32, 8, 8), 1), prefix_k[..., :850], prefix_v, own_k[:64, :, :384], own_v[:64, :, :384]
    right = decode_attention(*(x.double() for x in inputs), query_slot, cached, 8)
    unseen = torch.arange(1024, device="cuda") >= cached[:, None]
    for block in (own_k, own_v):
        block[:64].masked_fill_(unseen[:, None, :, None], torch.nan)
    got = decode_attention(*inputs, query_slot, cached, 8)
    assert (got.double() - right).norm() / right.norm() < TOLERANCE[torch.bfloat16]
    row = torch.arange(64, device="cuda")
    assert torch.equal(own_k[row, :, cached], inputs[1]) and torch.equal(own_v[row, :, cached], inputs[2])


def test_steps_in_a_graph_are_those_without():
    plain, captured = make(torch.float32), make(torch.float32)
    decode_attention(*make(torch.float32))  # compiles and allocates what there is to
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(*captured)
        captured[8].add_(1)
    for _ in range(3):
        expected = decode_attention(*plain)
        plain[8].add_(1)
        graph.replay()
        torch.testing.assert_close(out[:21], expected[:21])
    assert torch.equal(captured[5], plain[5]) and torch.equal(captured[6], plain[6])
