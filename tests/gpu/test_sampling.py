"""GPU-only checks of `sample_top_p`: 151,936 tokens, up to 256 rows, determinism, no waiting for the GPU."""

import pytest
import torch
from scipy.stats import chisquare

from saga_kernels import sample_top_p
from saga_kernels.sampling import nucleus_reference, sample_top_p_reference

VOCABULARY = 151_936
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make(n, vocabulary=VOCABULARY, dtype=torch.bfloat16, kind="zipf", seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(n, vocabulary, generator=g, device="cuda")
    if kind == "zipf":  # a few likely tokens and a long tail, as a language model's
        logits = 25 - 1.5 * (1 + logits.argsort(-1)).log()
    elif kind == "ties":
        logits = logits.round()
    elif kind == "equal":
        logits.zero_()
    return logits.to(dtype)


def draw(logits, temperature=0.7, top_p=0.95, seed=5, first=0, step=3):
    rows = torch.arange(first, first + len(logits), device="cuda")
    return sample_top_p(logits, temperature, top_p, seed, rows, step)


def reference(logits, temperature=0.7, top_p=0.95, seed=5, first=0, step=3):
    rows = torch.arange(first, first + len(logits), device="cuda")
    return sample_top_p_reference(logits.double(), temperature, top_p, seed, rows, torch.full_like(rows, step))


KINDS = [("zipf", 0.99), ("flat", 0.9), ("ties", 0.9), ("equal", 1.0)]  # and how many draws must agree


@pytest.mark.parametrize(("kind", "agreeing"), KINDS)
def test_8b_draws_what_float64_draws(kind, agreeing):
    assert_draws_what_float64_draws(torch.bfloat16, kind, agreeing)


def test_smallest_case_of_every_kernel():
    logits = make(3, 3000)
    wide = logits.double().cpu(), 0.7, 0.95, 5, torch.arange(3), torch.full((3,), 3)
    assert torch.equal(draw(logits).cpu(), sample_top_p_reference(*wide))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("kind", "agreeing"), KINDS)
def test_draws_of_another_dtype_are_what_float64_draws(dtype, kind, agreeing):
    assert_draws_what_float64_draws(dtype, kind, agreeing)


def assert_draws_what_float64_draws(dtype, kind, agreeing):
    """Flat rows have a token every 1e-5 of the distribution, near the rounding of a sum of 151,936 float32 weights."""
    for first in range(0, 256, 64):
        logits = make(64, dtype=dtype, kind=kind, seed=first)
        assert (draw(logits, first=first) == reference(logits, first=first)).float().mean() >= agreeing


@pytest.mark.parametrize("kind", ["zipf", "flat", "ties"])
def test_8b_draws_lie_in_the_nucleus(kind):
    logits = make(64, kind=kind)
    probabilities = (logits.double() / 0.7).softmax(-1)
    inside = nucleus_reference(probabilities, 0.95 + 1e-6)
    tokens = torch.stack([draw(logits, step=step) for step in range(20)], 1)
    assert inside.gather(1, tokens).all()
    assert inside.sum(1).max() < VOCABULARY


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 511, 513, 20_003])
@pytest.mark.parametrize("top_p", [1e-9, 0.9, 1.0])
def test_small_vocabularies(dtype, vocabulary, top_p):
    logits = make(40, vocabulary, dtype, "flat").mul_(2)
    logits[::3, 1:] = -torch.inf
    got, expected = draw(logits, 1.0, top_p), reference(logits, 1.0, top_p)
    assert (got == expected).float().mean() >= 0.97 and not got[::3].any()


@pytest.mark.parametrize(("temperature", "top_p", "kept"), [(1.0, 1.0, range(6)), (0.7, 0.9, (1, 3, 4))])
def test_draws_follow_the_nucleus(temperature, top_p, kept):
    logits, n, kept = torch.tensor([0.3, 2.0, -1.0, 1.2, 1.1, -3.0]), 4000, list(kept)
    p = (logits.double() / temperature).softmax(-1)[kept]
    counts = torch.bincount(draw(logits.cuda().repeat(n, 1), temperature, top_p), minlength=6).cpu()
    assert counts[kept].sum() == n
    assert chisquare(counts[kept].numpy(), (p / p.sum() * n).numpy()).pvalue > 1e-3


def test_8b_a_draw_depends_on_its_row_alone():
    logits = make(256)
    together = draw(logits)
    assert torch.equal(together[200:208], draw(logits[200:208], first=200))
    assert torch.equal(together[77:78], draw(logits[77:78], first=77))


def test_8b_20_runs_draw_the_same():
    logits = make(64)
    first = draw(logits)
    assert all(torch.equal(first, draw(logits)) for _ in range(19))


def test_small_rows_without_a_distribution_draw_minus_one():
    logits = make(5, 3000, torch.float32)
    good = draw(logits)
    logits[0, 7], logits[1, 2999], logits[3] = torch.nan, torch.inf, -torch.inf
    assert draw(logits).tolist() == [-1, -1, good[2].item(), -1, good[4].item()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_takes_the_first_of_the_largest(dtype):
    logits = make(64, dtype=dtype, kind="ties")
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(draw(logits, 0), first)


def test_nothing_waits_for_the_gpu():
    logits = make(4, 3000)
    draw(logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles():
    logits, rows = make(4, 3000), torch.arange(4, device="cuda")
    compiled = torch.compile(lambda x: sample_top_p(x, 0.7, 0.95, 5, rows, 3), fullgraph=True)
    assert torch.equal(compiled(logits), draw(logits))


def test_bad_input_is_named_before_launch():
    logits, rows = make(4, 3000), torch.arange(4, device="cuda")
    with pytest.raises(ValueError, match="^rows: got device cpu, accepted is logits's, cuda:0"):
        sample_top_p(logits, 0.7, 0.95, 5, rows.cpu(), 3)
    with pytest.raises(ValueError, match="^logits: got strides .*, accepted is contiguous on a GPU"):
        sample_top_p(logits[:, ::2], 0.7, 0.95, 5, rows, 3)
