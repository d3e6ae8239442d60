"""GPU-only checks of `group_attention`: 8B shapes in bfloat16, memory, determinism, no waiting for the GPU."""

import pytest
import torch

from saga_kernels import AttentionOnto, GroupLayout, attention_onto, group_attention
from saga_kernels.attention import group_attention_backward_reference, group_attention_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
RAGGED = ([131, 1, 40], [[1, 200, 64], [], [129]])
FEWER = ([331, 40, 128, 7], [[1, 200, 64], [129], [64], []], [150, 0, 64, 3])  # queries of each prefix
GROUP = ([850], [[700, 633, 512, 700, 1, 64, 700, 127]])


def inputs(layout, heads, kv_heads, head_dim, dtype, seed=0):
    """q, k, v that require gradients, and do."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v, do = (
        torch.randn(*shape, head_dim, generator=generator, device="cuda").to(dtype)
        for shape in (
            (layout.queries, heads),
            (layout.tokens, kv_heads),
            (layout.tokens, kv_heads),
            (layout.queries, heads),
        )
    )
    return *(x.requires_grad_() for x in (q, k, v)), do


def chosen(layout, columns=32, each=7):
    """Rows of every completion, onto two runs of columns of its prefix where that is long enough."""
    rows, first = [], []
    for row in range(0, layout.queries, each):
        keys, _ = layout.visible(row)
        if keys.stop - keys.start >= columns:
            rows += [row, row]
            first += [keys.stop - columns, keys.start]
    return AttentionOnto(layout, rows, first, columns)


def run(layout, q, k, v, do, onto=None):
    o, lse = group_attention(q, k, v, layout, onto=onto)
    return o.detach(), lse, *torch.autograd.grad(o, (q, k, v), do)


def assert_equals_reference(layout, q, k, v, do, onto, wide):
    results = [*run(layout, q, k, v, do, onto), onto.attention]
    offsets, scale = layout.offsets, q.shape[2] ** -0.5
    q, k, v, do = (x.detach().to(wide) for x in (q, k, v, do))
    right = group_attention_reference(q, k, v, *offsets, scale)
    attention = torch.zeros_like(onto.attention, dtype=wide)
    chosen = onto.row_index, onto.first_columns, attention
    gradients = group_attention_backward_reference(do, q, k, v, *right, *offsets, scale, *chosen)
    tolerance = TOLERANCE[results[0].dtype]
    for name, got, expected in zip(
        ("o", "lse", "dq", "dk", "dv", "attention"), results, (*right, *gradients, attention), strict=True
    ):
        assert expected.norm() > 0
        error = ((got.to(wide) - expected).norm() / expected.norm()).item()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_small_groups_equal_float64(dtype, head_dim):
    layout = GroupLayout(*RAGGED, device="cuda")
    assert_equals_reference(layout, *inputs(layout, 8, 2, head_dim, dtype), chosen(layout), torch.float64)


@pytest.mark.parametrize("rep", [1, 2, 3, 4, 8])
def test_small_groups_of_every_ratio_equal_float64(rep):
    layout = GroupLayout(*RAGGED, device="cuda")
    assert_equals_reference(layout, *inputs(layout, 2 * rep, 2, 128, torch.bfloat16), chosen(layout), torch.float64)


@pytest.mark.parametrize("lengths", [([1], [[1]]), ([1] * 300, [[1]] * 299 + [[2]])])
def test_small_segments_equal_float64(lengths):
    layout = GroupLayout(*lengths, device="cuda")
    assert_equals_reference(layout, *inputs(layout, 4, 1, 64, torch.float16), chosen(layout, 1, 1), torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_prefixes_that_ask_with_fewer_queries_equal_float64(dtype, head_dim):
    layout = GroupLayout(*FEWER, device="cuda")
    assert_equals_reference(layout, *inputs(layout, 8, 2, head_dim, dtype), chosen(layout), torch.float64)


def test_8b_completions_alone_equal_themselves_beside_their_prefix():
    """The same bytes for the rows that are there both times; keys of the prefix lose what its own rows gave them."""
    whole = GroupLayout(*GROUP, device="cuda")
    q, k, v, do = inputs(whole, 32, 8, 128, torch.bfloat16)
    prefix = GROUP[0][0]
    do[:prefix] = 0
    expected = run(whole, q, k, v, do)
    alone = GroupLayout(*GROUP, [0], device="cuda")
    got = run(alone, q.detach()[prefix:].clone().requires_grad_(), k, v, do[prefix:])
    for x, y in zip(got, (expected[0][prefix:], expected[1][:, prefix:], expected[2][prefix:]), strict=False):
        assert torch.equal(x, y)
    for x, y in zip(got[3:], expected[3:], strict=True):
        assert torch.equal(x[prefix:], y[prefix:])
        assert (x - y).norm() <= TOLERANCE[torch.bfloat16] * y.norm()


def test_8b_a_group_equals_float32():
    layout = GroupLayout(*GROUP, device="cuda")
    assert_equals_reference(layout, *inputs(layout, 32, 8, 128, torch.bfloat16), chosen(layout, 256), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_large_group_of_another_dtype_equals_a_wider_one(dtype):
    layout = GroupLayout(*GROUP, device="cuda")
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    assert_equals_reference(layout, *inputs(layout, 32, 8, 128, dtype), chosen(layout, 256), wide)


def test_smallest_case_of_every_kernel():
    """Of the 8B's heads, with attention that the backward emits, and without."""
    layout = GroupLayout([40], [[9, 3]], device="cuda")
    tensors = inputs(layout, 4, 1, 128, torch.bfloat16)
    assert_equals_reference(layout, *tensors, chosen(layout), torch.float64)
    assert all(x.isfinite().all() for x in run(layout, *tensors))


def test_8b_64k_tokens_without_a_score_matrix():
    """Each group as if alone, and beyond results and inputs only two float32 numbers a token and head."""
    prefixes, completions = [850] * 10, [[700] * 8] * 9 + [[700] * 7 + [1736]]
    layout = GroupLayout(prefixes, completions, device="cuda")
    assert layout.tokens == 1 << 16
    q, k, v, do = inputs(layout, 32, 8, 128, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(layout, q, k, v, do)
    held = torch.cuda.memory_allocated() - before
    statistics = 2 * 4 * layout.tokens * 32
    assert torch.cuda.max_memory_allocated() - before <= held + statistics + (1 << 20)
    for i in (0, 9):
        alone = GroupLayout([prefixes[i]], [completions[i]], device="cuda")
        rows = slice(layout.prefix_slice(i).start, layout.completion_slice(i, 7).stop)
        same = run(alone, *(x.detach()[rows].clone().requires_grad_() for x in (q, k, v)), do[rows])
        for got, expected in zip(results, same, strict=True):
            assert torch.equal(got[:, rows] if got.dim() == 2 else got[rows], expected)


def test_8b_20_runs_give_the_same_bytes():
    layout = GroupLayout(*GROUP, device="cuda")
    tensors, onto = inputs(layout, 32, 8, 128, torch.bfloat16), chosen(layout, 256)
    first = [*run(layout, *tensors, onto), onto.attention.clone()]
    for _ in range(19):
        onto.attention.fill_(float("nan"))
        again = [*run(layout, *tensors, onto), onto.attention]
        assert all(map(torch.equal, first, again))


def test_8b_attention_onto_gives_what_the_backward_writes():
    layout = GroupLayout(*GROUP, device="cuda")
    q, k, v, do = inputs(layout, 32, 8, 128, torch.bfloat16)
    rows = [layout.completion_slice(0, 1).start + i for i in (5, 300, 632)]
    onto = AttentionOnto(layout, rows, [17] * 3, 400)
    o, lse = group_attention(q, k, v, layout, onto=onto)
    o.backward(do)
    columns = torch.arange(17, 417, device="cuda")
    expected = attention_onto(q, k, lse, torch.tensor(rows, device="cuda"), columns)
    assert (onto.attention - expected).norm() <= 1e-3 * expected.norm()


def test_nothing_waits_for_the_gpu():
    layout = GroupLayout(*RAGGED, device="cuda")
    tensors, onto = inputs(layout, 8, 2, 128, torch.bfloat16), chosen(layout)
    run(layout, *tensors, onto)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layout, *tensors, onto)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_small_groups_compile():
    layout = GroupLayout(*RAGGED, device="cuda")
    q, k, v, do = inputs(layout, 8, 2, 64, torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: group_attention(q, k, v, layout)[0], fullgraph=True)
    expected = run(layout, q, k, v, do)
    o = compiled(q, k, v)
    assert torch.equal(o, expected[0])
    assert all(map(torch.equal, torch.autograd.grad(o, (q, k, v), do), expected[2:]))
