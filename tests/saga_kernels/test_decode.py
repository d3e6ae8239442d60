import pytest
import torch

from saga_kernels import decode_attention
from saga_kernels.decode import decode_attention_reference


def make(pairs=3, group=4, kv=2, each=3, dim=16, length=150, most=140, rows=9, dtype=torch.float32):
    """Arguments of rows whose caches are views of larger blocks, as the engine's are; what is not cached is nan."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    cached = torch.randint(most + 1, (rows,), generator=generator)
    cached[0] = 0
    query_slot = torch.randperm(pairs * group, generator=generator)[:rows]
    qkv = draw(rows, kv * (each + 2), dim)
    own = [draw(rows + 2, kv, most + 20, dim) for _ in range(2)]
    for row, count in enumerate(cached):
        own[0][row, :, count:] = torch.nan
        own[1][row, :, count:] = 0  # weighed with zero by those who compute it
    q, k, v = qkv[:, : kv * each], qkv[:, kv * each : kv * (each + 1)], qkv[:, kv * (each + 1) :]
    prefix = draw(pairs + 1, kv, dim, length)[:pairs], draw(pairs + 1, kv, length, dim)[:pairs]
    return q, k, v, *prefix, *(block[:rows, :, : most + 3] for block in own), query_slot, cached, group


def attention_by_hand(q, k, v, prefix_k, prefix_v, own_k, own_v, query_slot, cached, group):
    """In float64, one row and head at a time, over keys and values laid end to end."""
    out = torch.empty(q.shape, dtype=torch.float64)
    each = q.shape[1] // k.shape[1]
    for i, (place, count) in enumerate(zip(query_slot.tolist(), cached.tolist())):
        for head in range(q.shape[1]):
            h, pair = head // each, place // group
            keys = torch.cat([prefix_k[pair, h].T, own_k[i, h, :count], k[i, h][None]]).double()
            values = torch.cat([prefix_v[pair, h], own_v[i, h, :count], v[i, h][None]]).double()
            out[i, head] = torch.softmax(keys @ q[i, head].double() / q.shape[2] ** 0.5, 0) @ values
    return out


SHAPES = [
    dict(),
    dict(pairs=1, group=1, kv=1, each=1, dim=8, length=1, most=0, rows=1),
    dict(
        pairs=2, group=5, kv=1, each=7, dim=24, length=64, most=64, rows=10
    ),  # 35 queries of a prefix: tiles of 6 and 5
    dict(pairs=4, group=8, kv=2, each=2, dim=64, length=79, most=15, rows=3),  # a pair without rows
    dict(dim=12),  # no multiple of eight
    dict(kv=1, each=1, dim=6, most=5),
]


@pytest.mark.parametrize("op", [decode_attention, decode_attention_reference])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_one_softmax_over_prefix_and_own_tokens(op, shape):
    arguments = make(**shape)
    expected = attention_by_hand(*arguments)
    torch.testing.assert_close(op(*arguments).double(), expected, rtol=1e-5, atol=1e-6)
    k, v, own_k, own_v, cached = *arguments[1:3], *arguments[5:7], arguments[8]
    row = torch.arange(len(cached))
    assert torch.equal(own_k[row, :, cached], k) and torch.equal(own_v[row, :, cached], v)


def test_scores_far_apart_neither_overflow_nor_lose_the_greatest():
    arguments = make()
    arguments[0].mul_(60)  # scores beyond e^88
    torch.testing.assert_close(
        decode_attention(*arguments).double(), attention_by_hand(*arguments), rtol=1e-4, atol=1e-4
    )


def test_what_is_not_a_number_stays_so():
    for place in range(3):
        arguments = make()
        arguments[place][2] = torch.nan
        assert decode_attention(*arguments).isnan().any(-1).any(-1).nonzero().flatten().tolist() == [2]


def test_a_row_depends_on_no_other_and_not_on_threads():
    arguments = make(dim=64, length=3000)  # work enough for a second thread
    whole = decode_attention(*arguments)
    q, k, v, *prefix, own_k, own_v, query_slot, cached, group = arguments
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [
            decode_attention(*(x[i : i + 1] for x in (q, k, v)), *prefix, *(x[i : i + 1] for x in rest), group)
            for i, rest in ((i, (own_k, own_v, query_slot, cached)) for i in range(len(q)))
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), whole)


def test_a_seat_nobody_reads_disturbs_nobody():
    arguments = list(make())
    right = decode_attention(*arguments)
    arguments[7] = arguments[7].clone()
    arguments[7][-1] = 12  # pairs * group
    torch.testing.assert_close(decode_attention(*arguments)[:-1], right[:-1])


def test_narrow_dtypes_and_opcheck():
    exact = attention_by_hand(*make(dtype=torch.bfloat16))
    torch.testing.assert_close(decode_attention(*make(dtype=torch.bfloat16)).double(), exact, rtol=0.05, atol=0.05)
    small = dict(pairs=1, group=2, kv=1, each=2, dim=8, length=3, most=2, rows=2)
    for dtype in (torch.float32, torch.float64):
        arguments = [
            x.nan_to_num() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in make(**small, dtype=dtype)
        ]
        torch.library.opcheck(torch.ops.saga_kernels.decode_attention.default, tuple(arguments))


def test_wrong_arguments_are_named():
    good = list(make())

    def wrong(place, value, error, message):
        with pytest.raises(error, match=message):
            decode_attention(*(value if i == place else x for i, x in enumerate(good)))

    wrong(0, good[0][:, :5], ValueError, "^q: got 5 heads, accepted is a multiple of k's 2")
    wrong(1, good[1].double(), TypeError, "^k: got dtype float64")
    wrong(3, good[3][..., :0], ValueError, "^prefix_k: got shape .*, accepted is one key or more")
    wrong(4, good[4][:, :, 1:], ValueError, "^prefix_v: ")
    wrong(5, good[5][1:], ValueError, "^own_k: ")
    wrong(7, good[7].int(), TypeError, "^query_slot: got dtype int32")
    wrong(7, good[7] - 12, ValueError, "^query_slot: got -.* at 0, accepted is 0 or more")
    wrong(8, good[8] + 143, ValueError, "^cached: got 143 at 0, accepted is 0 to 142")
    wrong(9, 0, ValueError, "^group: got 0, accepted is 1 or more")
