import pytest
import torch

from saga_kernels import GroupLayout, attention_onto, group_attention
from saga_kernels.attention import BLOCK_ROWS

SHAPES = {  # prefix lengths, completion lengths, heads, kv_heads, head_dim
    "ones": ([1], [[1]], 1, 1, 2),
    "prefill": ([3, 2], [[], []], 2, 1, 4),
    "ragged": ([5, 1, 4], [[3, 1, 4], [], [2, 7]], 6, 3, 8),
    "blocks": ([BLOCK_ROWS + 3], [[2 * BLOCK_ROWS + 1, BLOCK_ROWS, 5]], 4, 1, 8),
}


def make(name: str, dtype=torch.float64, seed=0):
    prefixes, completions, heads, kv_heads, head_dim = SHAPES[name]
    layout, generator = GroupLayout(prefixes, completions), torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(layout.tokens, n, head_dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    return layout, q, k, v


def visible(name: str) -> torch.Tensor:
    """(tokens, tokens) bool, token by token from the definition, without GroupLayout."""
    prefixes, completions, *_ = SHAPES[name]
    owner = []  # (group, completion or -1 for the prefix)
    for i, (prefix, lengths) in enumerate(zip(prefixes, completions, strict=True)):
        owner += [(i, -1)] * prefix + [(i, g) for g, n in enumerate(lengths) for _ in range(n)]
    sees = [
        [a[0] == b[0] and column <= row and b[1] in (-1, a[1]) for column, b in enumerate(owner)]
        for row, a in enumerate(owner)
    ]
    return torch.tensor(sees)


def dense(name: str, q, k, v, scale: float):
    """Probabilities (heads, tokens, tokens), o and LSE by one whole masked softmax."""
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrow_dtypes_stay_near_float64(dtype, tolerance):
    layout, q, k, v = make("ragged", dtype)
    o, lse = group_attention(q, k, v, layout)
    assert o.dtype == dtype and lse.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    _, expected, _ = dense("ragged", *wide, q.shape[2] ** -0.5)
    d_o = torch.ones_like(expected)
    results = o, *torch.autograd.grad(o, (q, k, v), d_o.to(dtype))
    for got, right in zip(results, (expected, *torch.autograd.grad(expected, wide, d_o)), strict=True):
        assert got.dtype == dtype
        assert (got - right).norm() <= tolerance * right.norm()


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


def test_opcheck():
    layout, q, k, v = make("ragged")
    ops = torch.ops.saga_kernels
    args = (q, k, v, layout.segment_offsets, layout.segment_prefix, 0.3)
    torch.library.opcheck(ops.group_attention.default, args)
    o, lse = ops.group_attention(*(x.detach() for x in args[:3]), *args[3:])
    backward = (o + 1, *(x.detach() for x in args[:3]), o, lse, *args[3:])
    torch.library.opcheck(ops.group_attention_backward.default, backward)
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
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    layout, *qkv = make("ragged")
    with pytest.raises(error, match=f"^{named}: got .*accepted is"):
        group_attention(*change(*qkv), layout)
