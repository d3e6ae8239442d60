import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torch._subclasses.fake_tensor import FakeTensorMode

from saga_kernels import sample_top_p
from saga_kernels.sampling import SHORTLIST, nucleus_reference, philox4x32, philox_uniform, sample_top_p_reference

INFINITY = float("inf")


@pytest.mark.parametrize(  # known-answer vectors published with Random123
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    got = philox4x32(tuple(torch.tensor([c, 0]) for c in counter), key)
    assert tuple(w[0].item() for w in got) == words


def test_uniforms_are_uniform_and_depend_on_all_three():
    rows, step = torch.arange(4000), torch.full((4000,), 3)
    u = philox_uniform(5, rows, step)
    assert u.min() >= 0 and u.max() < 1
    assert kstest(u.numpy(), "uniform").pvalue > 1e-3
    others = philox_uniform(6, rows, step), philox_uniform(5, rows + 4000, step), philox_uniform(5, rows, step + 1)
    assert all((u != other).all() for other in others)
    assert (philox_uniform(5 + (1 << 40), rows, step) != u).all() and (
        philox_uniform(5, rows + (1 << 40), step) != u
    ).all()


def nucleus_by_hand(p: list[float], top_p: float) -> set[int]:
    kept, total = set(), 0.0
    for token in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if total >= top_p:
            break
        kept.add(token)
        total += p[token]
    return kept


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any),
    st.sampled_from([1e-9, 0.3, 0.5, 0.75, 0.95, 1.0]),
)
@example([1, 2, 3], 0.5)  # 1/2 + 1/3 - 1/3 is less than 1/2 in float64
def test_nucleus_is_the_smallest_set_that_reaches_top_p(counts, top_p):
    p = torch.tensor([counts], dtype=torch.float64) / sum(counts)  # small integers: many ties
    assert set(nucleus_reference(p, top_p)[0].nonzero()[:, 0].tolist()) == nucleus_by_hand(p[0].tolist(), top_p)


def test_nucleus_beyond_the_shortlist():
    g = torch.Generator().manual_seed(0)
    p = torch.randn(3, 6 * SHORTLIST, generator=g, dtype=torch.float64)
    p[1] *= 8  # a peaked row between two flat ones
    p = p.softmax(-1)
    sizes = []
    for row, kept in zip(p, nucleus_reference(p, 0.9), strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == nucleus_by_hand(row.tolist(), 0.9)
        sizes.append(kept.sum().item())
    assert sizes[1] < SHORTLIST < min(sizes[0], sizes[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "reference"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
@pytest.mark.parametrize("logits", [torch.tensor([0.3, 2.0, -1.0, 1.2, 1.1, -3.0]), torch.arange(99).cos()], ids=len)
def test_draws_follow_the_renormalised_nucleus(logits, temperature, top_p, dtype):
    n, vocabulary = 20_000, len(logits)
    p = (logits.double() / temperature).softmax(-1)
    kept = nucleus_by_hand(p.tolist(), top_p)
    tokens = sample_top_p(logits.to(dtype).expand(n, -1), temperature, top_p, 11, torch.arange(n), 0)
    counts = torch.bincount(tokens, minlength=vocabulary)
    assert set(counts.nonzero()[:, 0].tolist()) == kept
    index = sorted(kept)
    assert chisquare(counts[index].numpy(), (p[index] / p[index].sum() * n).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "reference"])
def test_a_draw_depends_on_its_row_alone(dtype):
    g = torch.Generator().manual_seed(0)
    logits, rows = torch.randn(40, 3000, generator=g, dtype=dtype), torch.randperm(1000, generator=g)[:40]
    step = torch.randint(50, (40,), generator=g)
    together = sample_top_p(logits, 0.8, 0.95, 3, rows, step)
    alone = [sample_top_p(logits[i : i + 1], 0.8, 0.95, 3, rows[i : i + 1], int(step[i])) for i in range(40)]
    assert torch.equal(together, torch.cat(alone))
    order = torch.randperm(40, generator=g)
    assert torch.equal(together[order], sample_top_p(logits[order], 0.8, 0.95, 3, rows[order], step[order]))
    assert torch.equal(together, sample_top_p(logits.t().contiguous().t(), 0.8, 0.95, 3, rows, step))
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if threads == 1 else 1)
    try:
        assert torch.equal(together, sample_top_p(logits, 0.8, 0.95, 3, rows, step))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_temperature_zero_is_greedy_and_barred_tokens_never_come(dtype):
    logits = torch.randn(50, 21, generator=torch.Generator().manual_seed(0)).mul(4).round().to(dtype)  # ties
    rows = torch.arange(50)
    logits[0, 4:9:4], logits[1, 5:], logits[2, 20], logits[3] = float("nan"), INFINITY, INFINITY, -INFINITY
    assert torch.equal(sample_top_p(logits, 0, 0.9, 0, rows, 0), logits.argmax(-1))
    logits = logits[4:]
    logits[:, 3:] = -INFINITY
    assert sample_top_p(logits, 5.0, 1.0, 0, rows[4:], 0).max() < 3


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e40, INFINITY])
def test_no_temperature_is_too_high_or_too_low_for_the_compiled_kernel(temperature):
    logits, n = torch.tensor([1.0, 3.0, -INFINITY, 2.0, 3.0]), 200
    drawn = sample_top_p(logits.expand(n, -1), temperature, 1.0, 0, torch.arange(n), 0)
    assert set(drawn.tolist()) == ({1, 4} if temperature < 1 else {0, 1, 3, 4})


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 1 << 40),
    st.integers(1, 400),
    st.sampled_from([1, 3, 40]),
    st.sampled_from([0.2, 1.0, 7.0]),
    st.sampled_from([1e-9, 0.4, 0.95, 1 - 1e-4, 1.0]),
)
def test_the_compiled_kernel_draws_as_the_reference_does(seed, vocabulary, values, temperature, top_p):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(values, (1, vocabulary), generator=g).float() / 4  # many ties
    logits[torch.rand(1, vocabulary, generator=g) < 0.2] = -INFINITY
    logits[0, seed % vocabulary] = 0
    p = (logits.double() / temperature).softmax(-1)
    sums = p.sort(descending=True)[0].cumsum(-1)[:, :-1]
    assume(top_p == 1 or ((sums - top_p).abs() > 1e-6).all())  # else rounding may decide what is kept
    rows, step = torch.arange(64), torch.full((64,), seed)
    cumulative = torch.where(nucleus_reference(p, top_p), p, 0).cumsum(-1)
    point = philox_uniform(seed, rows, step)[:, None] * cumulative[:, -1:]
    clear = ((cumulative - point).abs() > 1e-6).all(-1)
    got = sample_top_p(logits.expand(64, -1), temperature, top_p, seed, rows, step)
    expected = sample_top_p_reference(logits.double().expand(64, -1), temperature, top_p, seed, rows, step)
    assert torch.equal(got[clear], expected[clear]) and clear.sum() > 60


@pytest.mark.parametrize("top_p", [0.95, 1.0])
def test_the_compiled_kernel_differs_from_float64_by_rounding_alone(top_p):
    """One draw in 24,000 differed when this was written."""
    logits, rows = torch.randn(4000, 1000, generator=torch.Generator().manual_seed(0)), torch.arange(4000)
    got = sample_top_p(logits, 0.7, top_p, 1, rows, 2)
    expected = sample_top_p_reference(logits.double(), 0.7, top_p, 1, rows, torch.full_like(rows, 2))
    assert (got != expected).double().mean() < 1e-3


def test_a_real_vocabulary():
    g, v, rows = torch.Generator().manual_seed(0), 151_936, torch.arange(4)
    peaked = 25 - 1.5 * (1 + torch.randperm(v, generator=g)).log()
    logits = torch.stack([peaked, torch.randn(v, generator=g) * 4, torch.zeros(v), torch.arange(v) % 2.0])
    expected = sample_top_p_reference(logits.double(), 0.7, 0.95, 1, rows, rows)
    assert torch.equal(sample_top_p(logits, 0.7, 0.95, 1, rows, rows), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "reference"])
@pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY])
@pytest.mark.parametrize("place", [0, 5, 4999])
def test_a_row_without_a_distribution_draws_minus_one_and_spares_the_others(value, place, dtype):
    logits, rows = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0), dtype=dtype), torch.arange(3)
    fine = sample_top_p(logits, 0.7, 0.9, 0, rows, 0)
    logits[1, place if value != -INFINITY else slice(None)] = value
    assert sample_top_p(logits, 0.7, 0.9, 0, rows, 0).tolist() == [fine[0], -1, fine[2]]


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 12.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.95, 1.0])
def test_a_draw_inverts_the_sum_over_the_whole_vocabulary(spread, top_p):
    """The shortlist is an economy: the token is that of a cumulative sum over all ids, whatever the nucleus holds."""
    logits = (torch.randn(60, 5000, generator=torch.Generator().manual_seed(0)) * spread).bfloat16()  # many ties
    rows, step = torch.arange(60), torch.full((60,), 4)
    p = (logits.float() / 0.7).softmax(-1)
    cumulative = torch.where(nucleus_reference(p, top_p), p, 0).double().cumsum(-1)
    point = philox_uniform(9, rows, step)[:, None] * cumulative[:, -1:]
    assert torch.equal(
        sample_top_p(logits, 0.7, top_p, 9, rows, 4), torch.searchsorted(cumulative, point, right=True)[:, 0]
    )


def test_no_rows_draw_nothing():
    assert sample_top_p(torch.empty(0, 9), 1.0, 0.9, 0, torch.arange(0), 0).shape == (0,)


def test_opcheck():
    args = (torch.randn(4, 9), 0.7, 0.9, 1, torch.arange(4), torch.zeros(4, dtype=torch.int64))
    torch.library.opcheck(torch.ops.saga_kernels.sample_top_p.default, args)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"seed": -1}, ValueError, "seed"),
        ({"rows": torch.arange(3)}, ValueError, "rows"),
        ({"rows": torch.arange(2, dtype=torch.int32)}, TypeError, "rows"),
        ({"step": torch.zeros(1, dtype=torch.int64)}, ValueError, "step"),
        ({"logits": torch.zeros(2)}, ValueError, "logits"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    good = {
        "logits": torch.zeros(2, 4),
        "temperature": 1.0,
        "top_p": 0.9,
        "seed": 0,
        "rows": torch.arange(2),
        "step": 0,
    }
    with pytest.raises(error, match=f"^{named}: got .*accepted is"):
        sample_top_p(**{**good, **change})


def test_on_a_gpu_shapes_are_known_and_bad_input_is_named_before_launch():
    with FakeTensorMode():
        logits, rows = torch.empty(4, 50, device="cuda"), torch.empty(4, device="cuda", dtype=torch.int64)
        tokens = sample_top_p(logits, 0.7, 0.9, 0, rows, 1)
        assert tokens.shape == (4,) and tokens.dtype == torch.int64 and tokens.is_cuda
        with pytest.raises(ValueError, match="^step: got device cpu, accepted is logits's, cuda:0"):
            sample_top_p(logits, 0.7, 0.9, 0, rows, torch.empty(4, dtype=torch.int64))
        with pytest.raises(ValueError, match="^logits: got strides .50, 2., accepted is contiguous on a GPU"):
            sample_top_p(torch.empty_strided((4, 25), (50, 2), device="cuda"), 0.7, 0.9, 0, rows, 1)
