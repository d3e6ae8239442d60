import pytest
import torch

from saga_kernels import decode_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
PAIRS, GROUP, KV, EACH, DIM, LENGTH, END = 4, 8, 4, 2, 64, 300, 96


def make(dtype, device="cuda"):
    """Arguments of 21 rows that anyone reads and three that run along, as where a graph is larger than its batch."""
    generator = torch.Generator().manual_seed(0)
    rows, q_heads = 24, KV * EACH
    shapes = [(rows, q_heads, DIM), (rows, KV, DIM), (rows, KV, DIM), (PAIRS, KV, DIM, LENGTH)]
    shapes += [(PAIRS, KV, LENGTH, DIM), (rows, KV, END, DIM), (rows, KV, END, DIM)]
    tensors = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
    seat = torch.randperm(PAIRS * GROUP, generator=generator)[:rows]
    seat[21:] = PAIRS * GROUP
    cached = torch.randint(END - 4, (rows,), generator=generator)
    return *tensors, seat.to(device), cached.to(device), GROUP


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_against_float64(dtype):
    wide = [x.double() if x.is_floating_point() else x for x in make(dtype, "cpu")[:-1]]
    got, right = decode_attention(*make(dtype)), decode_attention(*wide, GROUP)
    error = (got.double().cpu() - right)[:21].norm() / right[:21].norm()
    assert error < TOLERANCE[dtype]


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
