"""GPU-only checks of `token_logprob`: 8B shapes in bfloat16, memory, determinism, no waiting for the GPU."""

import pytest
import torch

from saga_kernels import token_logprob
from saga_kernels.logprob import CHUNK_ROWS, token_logprob_reference

WIDTH, VOCABULARY = 4096, 151_936
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of dh


def make(n, d, vocabulary, dtype, seed=0):
    """Logits of deviation 3, targets that are likelier than most."""
    g = torch.Generator("cuda").manual_seed(seed)
    h = torch.randn(n, d, generator=g, device="cuda").to(dtype)
    head = torch.randn(vocabulary, d, generator=g, device="cuda").mul_(3 * d**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (n,), generator=g, device="cuda")
    return h, head, targets, torch.randn(n, generator=g, device="cuda") / n


def assert_agree(got, expected, tolerance):
    logp, dh = got
    assert logp.dtype == torch.float32 and (logp - expected[0]).abs().max() <= 1e-3
    assert expected[1].norm() > 0 and (dh - expected[1]).norm() <= tolerance * expected[1].norm()


def test_8b_equals_float32():
    h, head, targets, coeff = make(2 * CHUNK_ROWS + 100, WIDTH, VOCABULARY, torch.bfloat16)
    got = token_logprob(h, head, targets, coeff, 0.7)
    assert_agree(got, token_logprob_reference(h.float(), head.float(), targets, coeff, 0.7, CHUNK_ROWS), 1e-2)


def test_smallest_case_of_every_kernel():
    h, head, targets, coeff = make(20, 64, 5000, torch.bfloat16)
    wide = (h.double().cpu(), head.double().cpu(), targets.cpu(), coeff.double().cpu())
    expected = token_logprob_reference(*wide, 1.3, 32)
    assert_agree([x.cpu() for x in token_logprob(h, head, targets, coeff, 1.3, 32)], expected, 1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocabulary", [1, 31, 4096, 4097, 20_003])
def test_small_equals_float64(dtype, vocabulary):
    h, head, targets, coeff = make(70, 64, vocabulary, dtype)
    got = token_logprob(h, head, targets, coeff, 1.3, 32)
    if vocabulary == 1:
        assert max(x.abs().max() for x in got) < 1e-6  # zero, but for a product that is rounded once or not at all
        return
    expected = token_logprob_reference(h.double(), head.double(), targets, coeff.double(), 1.3, 32)
    assert_agree(got, expected, TOLERANCE[dtype])


def test_8b_peak_memory_is_one_chunk():
    arguments = make(3 * CHUNK_ROWS, WIDTH, VOCABULARY, torch.bfloat16)
    token_logprob(*arguments)  # cuBLAS has its workspace now
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = token_logprob(*arguments)
    held = torch.cuda.memory_allocated() - before
    chunk = 4 * CHUNK_ROWS * (VOCABULARY + WIDTH)
    assert torch.cuda.max_memory_allocated() - before <= held + chunk + (1 << 20)
    del results


def test_8b_20_runs_give_the_same_bytes():
    arguments = make(CHUNK_ROWS + 9, WIDTH, VOCABULARY, torch.bfloat16)
    first = token_logprob(*arguments)
    for _ in range(19):
        assert all(map(torch.equal, first, token_logprob(*arguments)))


def test_small_coefficients_survive_float16():
    h, head, targets, coeff = make(64, 64, 20_000, torch.float16)
    coeff = coeff * 1e-3
    _, dh = token_logprob(h, head, targets, coeff)
    expected = token_logprob_reference(h.double(), head.double(), targets, coeff.double(), 1.0, 64)[1]
    assert (dh - expected).norm() <= 2e-2 * expected.norm()  # what float16 itself rounds of so small a result


def test_small_targets_out_of_range_give_nan_in_their_rows_alone():
    h, head, targets, coeff = make(6, 64, 5000, torch.bfloat16)
    targets[1], targets[4] = -1, 5000
    logp, dh = token_logprob(h, head, targets, coeff)
    assert logp.isnan().nonzero().flatten().tolist() == [1, 4]
    assert dh.isnan().all(1).nonzero().flatten().tolist() == dh.isnan().any(1).nonzero().flatten().tolist() == [1, 4]


def test_nothing_waits_for_the_gpu():
    arguments = make(70, 64, 5000, torch.bfloat16)
    token_logprob(*arguments, 1.0, 32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_logprob(*arguments, 1.0, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles():
    arguments = make(70, 64, 5000, torch.bfloat16)
    compiled = torch.compile(token_logprob, fullgraph=True)
    assert all(map(torch.equal, compiled(*arguments, 1.0, 32), token_logprob(*arguments, 1.0, 32)))


def test_float64_is_the_reference():
    h, head, targets, coeff = (x.double() if x.is_floating_point() else x for x in make(9, 8, 50, torch.float32))
    got, expected = (f(h, head, targets, coeff, 0.7, 4) for f in (token_logprob, token_logprob_reference))
    assert all(map(torch.equal, got, expected))


def test_bad_input_is_named_before_launch():
    h, head, targets, coeff = make(6, 64, 50, torch.bfloat16)
    with pytest.raises(ValueError, match="^targets: got device cpu, accepted is h's, cuda:0"):
        token_logprob(h, head, targets.cpu(), coeff)
    with pytest.raises(ValueError, match="^head: got strides .*, accepted is contiguous on a GPU"):
        token_logprob(h, head.T.contiguous().T, targets, coeff)
