"""The Triton kernels of `decode_attention`, interpreted, against the reference in float64."""

import pytest
import torch
import triton.language as tl

from saga_kernels.decode import decode_attention_reference
from saga_kernels.gpu import decode
from saga_kernels.gpu.decode import Splits, Tile

from ...sweep import sweep

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
TILE = Tile(16, 4, 1)


def make(
    dtype=torch.float32, pairs=3, group=4, kv=1, rep=2, dim=64, length=37, end=34, counts=(0, 33, 15, 16, 17, 5, 32),
    query_slots=(7, 2, 0, 3, 1, 6, 4), padding=0,
):  # fmt: skip
    """Arguments of rows in views of larger blocks, nan wherever nobody should look; the last of three pairs is empty.

    q, k, v are slices of one projection; rows of prefix_k lie `padding` numbers further apart than they are long.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    rows, nan = len(counts), float("nan")
    qkv = draw(rows, kv * (rep + 2), dim)
    own = [draw(rows + 2, kv, end + 20, dim) for _ in range(2)]
    for block in own:
        block[rows:] = nan
        for row, count in enumerate(counts):
            block[row, :, count:] = nan
    prefix_k, prefix_v = draw(pairs + 1, kv, dim, length + padding), draw(pairs + 1, kv, length, dim)
    prefix_k[pairs:], prefix_v[pairs:] = nan, nan
    prefix_k[..., length:] = nan
    q, k, v = qkv[:, : kv * rep], qkv[:, kv * rep : kv * (rep + 1)], qkv[:, kv * (rep + 1) :]
    prefix = prefix_k[:pairs, ..., :length], prefix_v[:pairs]
    return (
        q,
        k,
        v,
        *prefix,
        *(block[:rows, :, :end] for block in own),
        torch.tensor(query_slots),
        torch.tensor(counts),
        group,
    )


def reference(arguments):
    """In float64, of copies, without what the reference weighs with zero."""
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
    for row, count in enumerate(arguments[8].tolist()):
        wide[6][row, :, count:] = 0
    return decode_attention_reference(*wide)


def assert_equals_reference(arguments, splits=None, tile=TILE, rows=slice(None)):
    q, k, v, *_, own_k, own_v, _, cached, _ = arguments
    right, before = reference(arguments), [own_k.clone(), own_v.clone()]
    got = decode.forward(*arguments, tile=tile, splits=splits)
    assert got.dtype == q.dtype and got.is_contiguous()
    error = (got.double() - right)[rows].norm() / right[rows].norm()
    assert error <= TOLERANCE[q.dtype]
    row = torch.arange(len(q))
    for block, old, new in zip((own_k, own_v), before, (k, v)):  # the new token is written, and nothing else is
        old[row, :, cached] = new
        torch.testing.assert_close(block, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [None, Splits(1, 3, 1, 3), Splits(3, 1, 3, 1), Splits(2, 2, 2, 2)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_float64_reference_however_it_is_cut(dtype, splits):
    assert_equals_reference(make(dtype), splits)


@pytest.mark.parametrize(
    ("rep", "kv", "group"), sweep([(3, 1, 4), (1, 2, 4), (4, 2, 8), (8, 1, 8), (32, 1, 4)], several=True)
)
def test_every_ratio_of_heads_and_more_queries_than_a_tile_has(rep, kv, group):
    assert_equals_reference(make(rep=rep, kv=kv, group=group), tile=Tile(32, 4, 1))


@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_every_head_dim(dim):
    assert_equals_reference(make(torch.float16, dim=dim))


@pytest.mark.parametrize(
    ("length", "padding", "dtype", "vector"),
    [
        (37, 0, torch.float16, 1),
        (38, 0, torch.float16, 2),
        (37, 1, torch.float16, 2),
        (37, 3, torch.float16, 8),
        (40, 0, torch.float16, 8),
        (37, 0, torch.float32, 1),
        (37, 3, torch.float32, 4),
        (36, 0, torch.float32, 4),
    ],
)
def test_keys_of_a_prefix_in_vectors(length, padding, dtype, vector):
    arguments = make(dtype, length=length, padding=padding)
    assert decode._vector(arguments[3]) == vector
    assert_equals_reference(arguments)


def test_a_vector_ends_where_the_memory_does():
    keys = torch.randn(2 * 64 * 40 - 3, dtype=torch.float16).as_strided((2, 1, 64, 37), (64 * 40, 64 * 40, 40, 1))
    assert decode._vector(keys) == 1
    assert decode._vector(keys[:1]) == 8


def test_seats_that_nobody_reads():
    """They see their own tokens alone; a row of a prefix with more pieces than are merged together among them."""
    arguments = make(query_slots=(7, 12, 0, 99, 1, 6, 4), length=16 * 9 + 1)
    assert_equals_reference(arguments, Splits(10, 1, 3, 1), rows=[0, 2, 4, 5, 6])
    assert decode.forward(*arguments, tile=TILE, splits=Splits(10, 1, 3, 1)).isfinite().all()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_smallest(wanted):
    """One key, one row and no token yet; a row alone of its pair; an end that one token fills."""
    shapes = [
        dict(pairs=1, group=1, rep=1, dim=8, length=1, end=1, counts=[0], query_slots=[0]),
        dict(pairs=3, group=8, counts=[9], query_slots=[15]),
        dict(pairs=1, end=1, counts=[0, 0], query_slots=[3, 1]),
    ]
    assert_equals_reference(make(**shapes[wanted]))


def test_more_rows_than_are_looked_at_together(monkeypatch):
    monkeypatch.setattr(decode, "SEARCH", tl.constexpr(4))
    assert_equals_reference(make())


def test_no_row_at_all():
    q, k, v, *prefix, own_k, own_v, query_slot, cached, group = make()
    none = [x[:0] for x in (q, k, v)], [x[:0] for x in (own_k, own_v, query_slot, cached)]
    assert decode.forward(*none[0], *prefix, *none[1], group).shape == (0, 2, 64)


def test_any_stride():
    q, k, v, prefix_k, prefix_v, own_k, own_v, query_slot, cached, group = make(kv=2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # numbers of a head apart from each other
    own_k, own_v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (own_k, own_v))
    prefix_k, prefix_v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (prefix_k, prefix_v))
    query_slot, cached = (torch.stack([x, x], 1)[:, 0] for x in (query_slot, cached))
    assert_equals_reference((q, k, v, prefix_k, prefix_v, own_k, own_v, query_slot, cached, group))


@pytest.mark.parametrize("chunk", [2, 8])
def test_scores_far_apart_and_pieces_merged_in_several_rounds(chunk, monkeypatch):
    monkeypatch.setattr(decode, "CHUNK", chunk)
    arguments = make()
    arguments[0].mul_(60)
    assert_equals_reference(arguments, Splits(3, 1, 3, 1))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("place", sweep(range(7)))
@pytest.mark.parametrize("splits", sweep([Splits(1, 3, 1, 3), Splits(3, 1, 3, 1)]))
def test_what_is_not_a_number_stays_so(place, splits):
    """Of the queries, new tokens and caches of row 1; or of the prefix of rows 0, 5 and 6."""
    arguments = make()
    if place in (3, 4):
        arguments[place][1, 0, -1, -1] = torch.nan
    else:
        arguments[place][1, ..., -2:, :] = torch.nan
    if place >= 5:
        arguments[place][1, :, 20] = torch.nan
    got = decode.forward(*arguments, tile=TILE, splits=splits)
    wrong = got.isnan().any(-1).any(-1).nonzero().flatten().tolist()
    assert wrong == ([0, 5, 6] if place in (3, 4) else [1])


@pytest.mark.parametrize(("n", "multiprocessors"), [(1, 132), (8, 132), (64, 132), (128, 84), (3, 1)])
def test_pieces_cover_what_there_is(n, multiprocessors):
    for length, end, keys in ((850, 384, 32), (1, 1, 32), (851, 1024, 64), (300, 17, 16)):
        cut = decode.choose_splits(n, -(-n // 8), 8, length, end, keys, multiprocessors)
        for count, tiles, size in ((cut.prefix, cut.prefix_tiles, length), (cut.own, cut.own_tiles, end)):
            assert (count - 1) * tiles * keys < size <= count * tiles * keys


def test_what_the_kernels_are_not_for():
    good = list(make()[:7])
    good = [good[i] for i in (0, 1, 3, 4, 5, 6)]
    assert decode.accepts(*good)

    def but(place, value):
        return decode.accepts(*(value if i == place else x for i, x in enumerate(good)))

    assert not but(0, good[0].double())
    assert not but(0, torch.empty(7, 2, 130)) and not but(0, torch.empty(7, 33, 64))
    assert not but(2, good[2].transpose(2, 3).contiguous().transpose(2, 3))
    assert not but(3, good[3][:, :, ::2]) and not but(4, good[4][:, :, ::2])


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_every_shipped_configuration_names_every_argument(arch):
    for shipped in decode.shipped(arch):
        assert {*shipped.signature, *shipped.constants} == set(shipped.kernel.arg_names), shipped.name
