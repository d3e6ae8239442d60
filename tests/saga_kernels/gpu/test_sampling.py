"""The Triton kernels in the interpreter: small blocks, so that a few hundred tokens are many splits and steps."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from saga_kernels.gpu import sampling
from saga_kernels.sampling import philox_uniform, sample_top_p_reference

# NumPy warns where the kernels mean -inf
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
SMALL = {"splits": 2, "block": 16, "wide": 8, "scan": 16}
SEED = 0x123456789ABCDEF
few = settings(max_examples=10, derandomize=True, deadline=None, phases=[Phase.generate])


def draw(logits, temperature, top_p, seed=SEED, first=0, **blocks):
    """Ours and the reference's."""
    rows, step = torch.arange(first, first + len(logits)), torch.arange(len(logits)) % 3
    arguments = logits, temperature, top_p, seed, rows, step
    return sampling.forward(*arguments, **{**SMALL, **blocks}), sample_top_p_reference(*arguments)


@pytest.mark.slow
@few
@given(
    dtype=st.sampled_from([torch.float32, torch.float16]),
    vocabulary=st.sampled_from([1, 2, 31, 32, 33, 100, 150]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 6.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_p=st.sampled_from([1e-9, 0.2, 0.7, 0.95, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)
def test_draws_what_the_reference_draws(dtype, vocabulary, spread, temperature, top_p, seed):
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)).mul_(spread).to(dtype)
    logits[1, ::2] = -torch.inf
    logits[1, -1] = 0  # one that is not barred, where there is but one
    assert torch.equal(*draw(logits, temperature, top_p, seed, first=1 << 40))


@few
@given(st.lists(st.integers(-2, 1), min_size=5, max_size=70), st.sampled_from([0.1, 0.35, 0.6, 0.9]))
def test_ties_keep_the_lower_ids(logits, top_p):
    logits = torch.tensor([logits], dtype=torch.float32).expand(3, -1).contiguous()
    assert torch.equal(*draw(logits, 1.0, top_p))


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 2])
def test_ties_end_in_the_middle_of_several_steps(splits):
    """22 of 63 equal tokens are kept, and a likelier one after them, which half the rows draw."""
    logits = torch.zeros(6, 64)
    logits[:, -1] = 3
    ours, right = draw(logits, 1.0, 0.5, splits=splits)
    assert torch.equal(ours, right) and 63 in right


@pytest.mark.parametrize("blocks", [{"splits": 1}, {"splits": 4, "wide": 2}, {"block": 64, "scan": 8}])
def test_splits_and_blocks_change_no_draw(blocks):
    logits = torch.randn(3, 120, generator=torch.Generator().manual_seed(1))
    assert torch.equal(*draw(logits, 1.0, 0.9, **blocks))


def test_a_draw_depends_on_its_row_alone():
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(2))
    rows, step = torch.tensor([7, 0, 1 << 33, 5]), torch.tensor([0, 9, 2, 1 << 34])
    together = sampling.forward(logits, 0.8, 0.95, 3, rows, step, **SMALL)
    order = [2, 0]
    apart = sampling.forward(logits[order], 0.8, 0.95, 3, rows[order], step[order], **SMALL)
    assert torch.equal(together[order], apart)
    assert torch.equal(together, sample_top_p_reference(logits, 0.8, 0.95, 3, rows, step))


@pytest.mark.slow
def test_draws_follow_the_nucleus():
    logits, n = torch.tensor([0.3, 2.0, -1.0, 1.2, 1.1, -3.0]), 40
    p = (logits.double() / 0.7).softmax(-1)[[1, 3, 4]]  # 0.9 of the whole takes these three
    tokens = sampling.forward(
        logits.repeat(n, 1), 0.7, 0.9, 11, torch.arange(n), torch.zeros(n, dtype=torch.int64), 1, 8, 8, 8
    )
    counts = torch.bincount(tokens, minlength=6)
    assert counts[[0, 2, 5]].sum() == 0
    assert chisquare(counts[[1, 3, 4]].numpy(), (p / p.sum() * n).numpy()).pvalue > 1e-3


def test_rows_without_a_distribution_draw_minus_one_and_leave_others_alone():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    good = draw(logits, 1.0, 0.9)[0]
    logits[0, 7], logits[1, 39], logits[3] = torch.nan, torch.inf, -torch.inf
    ours = sampling.forward(logits, 1.0, 0.9, SEED, torch.arange(5), torch.arange(5) % 3, **SMALL)
    assert ours.tolist() == [-1, -1, good[2], -1, good[4]]


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, 1.0]])
    assert draw(logits, 0, 0.5)[0].tolist() == [1, 0]


def test_no_rows():
    assert draw(torch.empty(0, 9), 1.0, 0.9)[0].shape == (0,)


@triton.jit
def _bits(seed: tl.int64, row, step, out):
    """floor(u * 2^53) is the 53 bits themselves."""
    whole = tl.full([], 1 << 53, tl.int64)
    tl.store(out, sampling._fraction(seed, tl.load(row), tl.load(step), whole))


@pytest.mark.parametrize(("seed", "row", "step"), [(0, 0, 0), (SEED, (1 << 40) + 3, (1 << 33) + 1), (2**63 - 1, 5, 2)])
def test_random_bits_are_the_references(seed, row, step):
    row, step, out = torch.tensor([row]), torch.tensor([step]), torch.empty(1, dtype=torch.int64)
    _bits[(1,)](seed, row, step, out)
    assert out.item() * 2.0**-53 == philox_uniform(seed, row, step).item()
