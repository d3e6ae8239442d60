import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from saga_kernels import AttentionOnto, GroupLayout, attention_onto, group_attention
from saga_kernels.attention import BLOCK_ROWS, _too_wide

SHAPES = {  # prefix lengths, completion lengths, queries of each prefix, heads, kv_heads, head_dim
    "ones": ([1], [[1]], None, 1, 1, 2),
    "prefill": ([3, 2], [[], []], None, 2, 1, 4),
    "ragged": ([5, 1, 4], [[3, 1, 4], [], [2, 7]], None, 6, 3, 8),
    "blocks": ([BLOCK_ROWS + 3], [[2 * BLOCK_ROWS + 1, BLOCK_ROWS, 5]], None, 4, 1, 8),
    "fewer": ([5, 1, 4, 3], [[3, 1, 4], [2], [2, 7], [1]], [2, 0, 4, 0], 6, 3, 8),
    "wide": ([200], [[197, 390, 33]], [150], 6, 2, 40),
    "many": ([7, 50], [[3], [60]], [4, 50], 97, 1, 20),  # query heads of a key head
    "slices": ([BLOCK_ROWS + 3, 9], [[BLOCK_ROWS + 1, 5], [7]], [BLOCK_ROWS + 1, 0], 4, 1, 8),
}


def make(name: str, dtype=torch.float64, seed=0):
    prefixes, completions, queries, heads, kv_heads, head_dim = SHAPES[name]
    layout, generator = GroupLayout(prefixes, completions, queries), torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(rows, n, head_dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for rows, n in ((layout.queries, heads), (layout.tokens, kv_heads), (layout.tokens, kv_heads))
    )
    return layout, q, k, v


def visible(name: str) -> torch.Tensor:
    """(queries, tokens) bool, token by token from the definition, without GroupLayout."""
    prefixes, completions, queries, *_ = SHAPES[name]
    owner, asks = [], []  # (group, completion or -1 for the prefix); whether there is a query
    for i, (prefix, lengths) in enumerate(zip(prefixes, completions, strict=True)):
        owner += [(i, -1)] * prefix + [(i, g) for g, n in enumerate(lengths) for _ in range(n)]
        asks += [queries is None or at >= prefix - queries[i] for at in range(prefix)] + [True] * sum(lengths)
    sees = [
        [a[0] == b[0] and column <= row and b[1] in (-1, a[1]) for column, b in enumerate(owner)]
        for row, a in enumerate(owner)
    ]
    return torch.tensor(sees)[torch.tensor(asks)]


def dense(name: str, q, k, v, scale: float):
    """Probabilities (heads, queries, tokens), o and LSE by one whole masked softmax."""
    rep = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(rep, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k).mul(scale).masked_fill(~visible(name), float("-inf"))
    p = scores.softmax(-1)
    return p, torch.einsum("hts,shd->thd", p, v), scores.logsumexp(-1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_forward_and_gradients_equal_dense_attention(name, scale):
    layout, q, k, v = make(name)
    o, lse = group_attention(q, k, v, layout, scale)
    _, expected, expected_lse = dense(name, q, k, v, scale or q.shape[2] ** -0.5)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)
    d_o = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(o, (q, k, v), d_o)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (q, k, v), d_o))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrow_dtypes_stay_near_float64(name, dtype, tolerance):
    layout, q, k, v = make(name, dtype)
    o, lse = group_attention(q, k, v, layout)
    assert o.dtype == dtype and lse.dtype == torch.float32 and o.is_contiguous()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    _, expected, expected_lse = dense(name, *wide, q.shape[2] ** -0.5)
    torch.testing.assert_close(lse.double(), expected_lse.detach(), rtol=tolerance, atol=tolerance)
    d_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = o, *torch.autograd.grad(o, (q, k, v), d_o)
    right = expected, *torch.autograd.grad(expected, wide, d_o.double())
    for got, wanted in zip(results, right, strict=True):
        assert got.dtype == dtype
        assert (got - wanted).norm() <= tolerance * right[1].norm()


def test_every_run_gives_the_same_bytes_and_groups_do_not_mix():
    layout, q, k, v = make("ragged", torch.float32)
    runs = []
    for _ in range(2):
        o, _ = group_attention(q, k, v, layout)
        runs.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    outside = torch.ones(layout.tokens, dtype=torch.bool)
    outside[layout.completion_slice(0, 1)] = False
    with torch.no_grad():
        changed = [torch.where(outside[:, None, None], x, x + 1) for x in (q, k, v)]
        assert torch.equal(group_attention(*changed, layout)[0][outside], runs[0][0][outside])


def test_lse_carries_no_gradient():
    layout, q, k, v = make("ones")
    assert not group_attention(q, k, v, layout)[1].requires_grad


@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_onto_is_the_mean_over_heads_of_the_probabilities(scale):
    layout, q, k, v = make("ragged")
    _, lse = group_attention(q, k, v, layout, scale)
    p, _, _ = dense("ragged", q, k, v, scale or q.shape[2] ** -0.5)
    rows = torch.arange(layout.tokens)[layout.completion_slice(2, 1)]
    columns = torch.arange(layout.tokens)[layout.prefix_slice(2)].flip(0)
    onto = attention_onto(q, k, lse, rows, columns, scale)
    assert not onto.requires_grad
    torch.testing.assert_close(onto, p.mean(0)[rows][:, columns])


ONTO = {  # shape → (rows, first_columns, columns): unsorted, twice with the same and with other columns, own segment
    "ones": ([1], [0], 1),
    "ragged": ([12, 6, 8, 8, 8, 15, 24, 3, 11], [0, 1, 0, 3, 3, 14, 15, 0, 9], 2),
    "blocks": ([500, 140, 133, 300, 389, 399], [0, 120, 2, 4, 125, 388], 6),
    "fewer": ([0, 2, 8, 9, 13, 25], [1, 1, 10, 10, 16, 30], 2),
}


@pytest.mark.parametrize("name", ONTO)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_backward_writes_what_attention_onto_gives_and_changes_no_gradient(name, scale):
    layout, q, k, v = make(name)
    rows, first_columns, columns = ONTO[name]
    onto = AttentionOnto(layout, rows, first_columns, columns, torch.float64)
    o, lse = group_attention(q, k, v, layout, scale, onto)
    assert not onto.attention.any() and not lse.requires_grad
    d_o = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(o, (q, k, v), d_o)
    plain, _ = group_attention(q, k, v, layout, scale)
    assert torch.equal(plain, o)
    assert all(map(torch.equal, gradients, torch.autograd.grad(plain, (q, k, v), d_o)))
    p = dense(name, q, k, v, scale or q.shape[2] ** -0.5)[0].mean(0)
    for i, (row, first) in enumerate(zip(rows, first_columns, strict=True)):
        seen = torch.arange(first, first + columns)
        torch.testing.assert_close(onto.attention[i], p[row, seen].detach())
        torch.testing.assert_close(onto.attention[i], attention_onto(q, k, lse, torch.tensor([row]), seen, scale)[0])


def test_no_row_chosen_gives_no_attention():
    layout, q, k, v = make("ragged")
    onto = AttentionOnto(layout, [], [], 3, torch.float64)
    group_attention(q, k, v, layout, onto=onto)[0].sum().backward()
    assert onto.attention.shape == (0, 3) and q.grad.any()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([5], [0, 1], 2), "first_columns"),
        (([5], [0], 0), "columns"),
        (([27], [0], 1), r"rows\[0\]"),
        (([5, -1], [0, 0], 1), r"rows\[1\]"),
        (([5, 6], [0, 4], 2), r"first_columns\[1\]"),  # over the prefix's end
        (([9], [5], 1), r"first_columns\[0\]"),  # another completion's
        (([2], [2], 2), r"first_columns\[0\]"),  # after itself
        (([5], [-1], 1), r"first_columns\[0\]"),
    ],
)
def test_what_a_row_does_not_see_is_refused(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}: got .*accepted is"):
        AttentionOnto(make("ragged")[0], *arguments)


def test_attention_that_no_backward_would_write_is_refused():
    layout, q, k, v = make("ragged")
    for given, onto in (
        ((q, k, v), AttentionOnto(make("ragged")[0], [5], [0], 1, torch.float64)),
        ((q.detach(), k.detach(), v.detach()), AttentionOnto(layout, [5], [0], 1, torch.float64)),
    ):
        with pytest.raises(ValueError, match="^onto: got .*accepted is"):
            group_attention(*given, layout, onto=onto)
    with pytest.raises(TypeError, match="^onto: got .*accepted is"):
        group_attention(q, k, v, layout, onto=AttentionOnto(layout, [5], [0], 1))


def test_strides_do_not_matter():
    layout, q, k, v = make("ragged")
    packed = torch.cat([q, k, v], 1).detach().requires_grad_()
    views = packed.split([6, 3, 3], 1)
    o, _ = group_attention(*views, layout)
    assert torch.equal(o, group_attention(q, k, v, layout)[0])
    o.sum().backward()  # its gradient is one number, expanded
    assert packed.grad.isfinite().all()


def test_opcheck():
    layout, q, k, v = make("fewer")
    ops = torch.ops.saga_kernels
    args = (q, k, v, *layout.offsets, 0.3)
    torch.library.opcheck(ops.group_attention.default, args)
    o, lse = ops.group_attention(*(x.detach() for x in args[:3]), *args[3:])
    backward = (o + 1, *(x.detach() for x in args[:3]), o, lse, *args[3:])
    torch.library.opcheck(ops.group_attention_backward.default, (*backward, None, None, None))
    chosen = AttentionOnto(layout, *ONTO["fewer"], torch.float64)
    buffers = (chosen.row_index, chosen.first_columns, chosen.attention)
    torch.library.opcheck(ops.group_attention_backward.default, (*backward, *buffers))
    onto = (q.detach(), k.detach(), lse, torch.tensor([1, 2]), torch.tensor([0]), 0.3)
    torch.library.opcheck(ops.attention_onto.default, onto)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda q, k, v: (q[1:], k, v), ValueError, "q"),
        (lambda q, k, v: (q, k[:, :, 1:], v), ValueError, "k"),
        (lambda q, k, v: (q, k.float(), v), TypeError, "k"),
        (lambda q, k, v: (q[:, :4], k, v), ValueError, "q"),
        (lambda q, k, v: (q, k, v.to("meta")), ValueError, "v"),
        (lambda q, k, v: (q.int(), k, v), TypeError, "q"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), ValueError, "q"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    layout, *qkv = make("ragged")
    with pytest.raises(error, match=f"^{named}: got .*accepted is"):
        group_attention(*change(*qkv), layout)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(scale):
    layout, q, k, v = make("ragged")
    with pytest.raises(ValueError, match="^scale: got .*accepted is"):
        group_attention(q, k, v, layout, scale)


def test_heads_that_the_gpu_kernels_do_not_hold_go_through_the_reference():
    with FakeTensorMode():
        layout = GroupLayout([3], [[2]], device="cuda")
        for dtype, head_dim, wide in (
            (torch.bfloat16, 256, True), (torch.bfloat16, 136, True), (torch.bfloat16, 128, False),
            (torch.float64, 64, True),
        ):  # fmt: skip
            q = torch.empty(5, 2, head_dim, dtype=dtype, device="cuda")
            assert _too_wide(q) == wide
            assert group_attention(q, q, q, layout)[0].shape == q.shape
