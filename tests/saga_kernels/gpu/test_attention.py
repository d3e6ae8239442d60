"""The Triton kernels of `group_attention`, interpreted, against the reference in float64."""

import pytest
import torch
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saga_kernels import AttentionOnto, GroupLayout
from saga_kernels.attention import group_attention_backward_reference, group_attention_reference
from saga_kernels.gpu import attention
from saga_kernels.gpu.attention import Tile

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
TILES = [Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)]
RAGGED = ([17, 1, 3], [[18, 1, 2], [], [5]])
FEWER = ([37, 3, 2], [[5, 1], [7], []], [20, 0, 1])  # the last: queries of each prefix
SCALE = 0.4


def inputs(layout, rep, kv_heads, head_dim, dtype, seed=0):
    """q, k, v, do, on the grid of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (layout.queries, rep * kv_heads), (layout.tokens, kv_heads)
    shapes = queries, keys, keys, queries
    return [torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes]


def chosen(layout, columns=2):
    """Every other row, last first, each onto the first and the last columns of all it sees."""
    rows, first = [], []
    for row in range(layout.queries - 1, -1, -2):
        for keys in layout.visible(row):
            if keys.stop - keys.start >= columns:
                rows += [row, row]
                first += [keys.stop - columns, keys.start]
    return AttentionOnto(layout, rows, first, columns)


def close(got, right, tolerance):
    return (got.double() - right).norm() <= tolerance * right.norm()


def assert_equals_reference(layout, q, k, v, do, tiles=TILES[:1] * 3, onto=None):
    offsets = layout.offsets
    wide = [x.double() for x in (q, k, v)]
    right = group_attention_reference(*wide, *offsets, SCALE)
    o, lse = attention.forward(q, k, v, *offsets, SCALE, tile=tiles[0])
    assert o.dtype == q.dtype and lse.dtype == torch.float32
    results = {"o": (o, right[0]), "lse": (lse, right[1])}
    buffers = (onto.row_index, onto.first_columns, onto.attention) if onto else (None, None, None)
    wide_attention = torch.zeros_like(onto.attention, dtype=torch.float64) if onto else None
    gradients = attention.backward(
        do, q, k, v, o, lse, *offsets, SCALE, *buffers, query_tile=tiles[1], key_tile=tiles[2]
    )
    buffers = (*buffers[:2], wide_attention)
    right = group_attention_backward_reference(do.double(), *wide, *right, *offsets, SCALE, *buffers)
    results |= dict(zip(("dq", "dk", "dv"), zip(gradients, right, strict=True), strict=True))
    if onto and len(onto.attention):
        results["attention"] = (onto.attention, wide_attention)
    for name, (got, expected) in results.items():
        assert close(got, expected, TOLERANCE[q.dtype]), name
        assert not close(torch.zeros_like(got), expected, TOLERANCE[q.dtype]), f"{name}: zeros would pass"


@st.composite
def layouts(draw):
    """The first group has a completion, so that some row sees two keys and no gradient vanishes."""
    length = st.integers(1, 18)
    completions = [draw(st.lists(length, min_size=1, max_size=2))]
    completions += draw(st.lists(st.lists(length, max_size=1), max_size=2))
    prefixes = [draw(length) for _ in completions]
    return prefixes, completions, draw(st.none() | st.tuples(*(st.integers(0, n) for n in prefixes)))


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    layouts(),
    st.sampled_from([(1, 2), (2, 2), (3, 1), (4, 1)]),
    st.sampled_from([16, 32, 64, 80]),
    st.sampled_from([torch.float32, torch.float16]),
    st.permutations(TILES),
)
def test_equals_float64_reference_on_drawn_shapes(lengths, ratio, head_dim, dtype, tiles):
    layout = GroupLayout(*lengths)
    assert_equals_reference(layout, *inputs(layout, *ratio, head_dim, dtype), tiles, chosen(layout))


@pytest.mark.parametrize("rep", [1, 2, 3, 4, 8])
def test_every_ratio_of_heads(rep):
    layout = GroupLayout(*RAGGED)
    assert_equals_reference(layout, *inputs(layout, rep, 1, 16, torch.float32), TILES[1:2] * 3, chosen(layout))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_every_head_dim(head_dim):
    layout = GroupLayout([5, 1], [[3, 17], [1]])
    assert_equals_reference(layout, *inputs(layout, 2, 2, head_dim, torch.float16))


@pytest.mark.parametrize(("rep", "tile"), [(1, TILES[0]), (3, TILES[2]), (4, TILES[1])])
def test_prefixes_that_ask_with_fewer_queries(rep, tile):
    layout = GroupLayout(*FEWER)
    assert_equals_reference(layout, *inputs(layout, rep, 1, 16, torch.float32), [tile] * 3, chosen(layout))


def test_without_any_query_there_is_nothing_to_do():
    layout = GroupLayout([17, 2], [[], []], [0, 0])
    q, k, v, do = inputs(layout, 2, 1, 16, torch.float32)
    o, lse = attention.forward(q, k, v, *layout.offsets, SCALE)
    dq, dk, dv = attention.backward(do, q, k, v, o, lse, *layout.offsets, SCALE)
    assert len(o) == len(dq) == lse.numel() == 0
    assert not dk.any() and not dv.any()


@pytest.mark.parametrize(
    "lengths",
    [
        ([1], [[1]]),
        ([16], [[16, 16]]),
        ([2, 1, 1], [[], [1] * 9, []]),
        ([1], [[1]], [0]),
        ([32, 16], [[16], [16, 16]], [16, 0]),
        ([32], [[1]], [4]),
    ],
)
def test_smallest_and_exact_lengths(lengths):
    layout = GroupLayout(*lengths)
    assert_equals_reference(layout, *inputs(layout, 4, 1, 16, torch.float32), onto=chosen(layout, 1))


def test_more_segments_than_are_looked_at_together(monkeypatch):
    monkeypatch.setattr(attention, "SEARCH", tl.constexpr(4))
    layout = GroupLayout([1, 2], [[1, 1, 2, 1, 17], [3, 1]])
    assert_equals_reference(layout, *inputs(layout, 1, 1, 16, torch.float32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # in rows of keys that are not there, never stored
def test_scores_far_below_zero():
    """Where exp(-LSE) overflows, keys that are not there must not come in as zeros."""
    layout = GroupLayout([3], [[2]])
    q, k, v, do = (x / 100 for x in inputs(layout, 1, 1, 16, torch.float32))
    q, k, offsets = q + 5, k - 5, layout.offsets
    o, lse = attention.forward(q, k, v, *offsets, SCALE, tile=TILES[0])
    assert lse.max() < -100
    gradients = attention.backward(do, q, k, v, o, lse, *offsets, SCALE, query_tile=TILES[0], key_tile=TILES[0])
    assert all(x.isfinite().all() for x in (o, *gradients))


def test_any_stride_of_token_and_head_and_gradients_that_are_one_number_expanded():
    layout = GroupLayout([5], [[3, 17]])
    q, k, v, do = inputs(layout, 2, 2, 16, torch.float32)
    packed = torch.cat([q, k, v], 1)
    q, k, v = packed[:, :4], packed[:, 4:6], packed[:, 6:].transpose(0, 1).contiguous().transpose(0, 1)
    assert_equals_reference(layout, q, k, v, do.transpose(1, 2).contiguous().transpose(1, 2))
    assert_equals_reference(layout, q, k, v, torch.tensor(0.5).expand(do.shape))


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_every_shipped_configuration_names_every_argument(arch):
    for shipped in attention.shipped(arch):
        assert {*shipped.signature, *shipped.constants} == set(shipped.kernel.arg_names), shipped.name
