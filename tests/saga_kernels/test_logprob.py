import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from saga_kernels import token_logprob
from saga_kernels.logprob import TILE_ROWS


def make(n=7, d=5, vocabulary=11, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    head = torch.randn(vocabulary, d, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (n,), generator=g)
    return (
        h,
        head,
        targets,
        torch.randn(n, generator=g, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32)),
    )


def autograd_oracle(h, head, targets, coeff, temperature):
    h = h.double().requires_grad_()
    logp = (h @ head.double().T / temperature).log_softmax(-1)[range(len(h)), targets]
    return logp, *torch.autograd.grad((coeff * logp).sum(), h)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_autograd_in_float64(chunk, temperature):
    args = make()
    torch.testing.assert_close(token_logprob(*args, temperature, chunk), autograd_oracle(*args, temperature))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_narrow_dtypes_and_a_head_of_several_tiles(dtype, tolerance):
    args = make(n=6, d=8, vocabulary=2 * TILE_ROWS + 5, dtype=dtype)
    logp, dh = token_logprob(*args, 0.7, 4)
    assert logp.dtype == torch.float32 and dh.dtype == dtype
    expected, expected_dh = autograd_oracle(*args, 0.7)
    torch.testing.assert_close(logp.double(), expected, rtol=1e-4, atol=1e-4)  # float32 sums, whatever the input
    assert (dh - expected_dh).norm() <= tolerance * expected_dh.norm()


def test_the_gradient_serves_a_backward():
    h, head, targets, coeff = make()
    x = h.clone().requires_grad_()
    hidden = x * 2
    logp, dh = token_logprob(hidden, head, targets, coeff)
    assert not logp.requires_grad and not dh.requires_grad
    hidden.backward(dh)
    torch.testing.assert_close(x.grad, 2 * autograd_oracle(2 * h, head, targets, coeff, 1.0)[1])


def test_no_rows_give_empty_results():
    h, head, targets, coeff = make()
    logp, dh = token_logprob(h[:0], head, targets[:0], coeff[:0])
    assert logp.shape == (0,) and dh.shape == (0, 5)


def test_opcheck():
    torch.library.opcheck(torch.ops.saga_kernels.token_logprob.default, (*make(), 0.7, 3))


def test_wrong_arguments_are_named():
    h, head, targets, coeff = make()
    with pytest.raises(ValueError, match="^targets: got .* to 11, accepted is 0 to 10"):
        token_logprob(h, head, targets.clone().fill_(11), coeff)
    with pytest.raises(ValueError, match="^targets: got -1 to"):
        token_logprob(h, head, targets.clone().fill_(-1), coeff)
    with pytest.raises(TypeError, match="^head: got dtype float32, accepted is float64"):
        token_logprob(h, head.float(), targets, coeff)
    with pytest.raises(ValueError, match="^coeff: got shape"):
        token_logprob(h, head, targets, coeff[1:])
    with pytest.raises(ValueError, match="^temperature: got 0"):
        token_logprob(h, head, targets, coeff, 0)
    with pytest.raises(ValueError, match="^chunk: got 0"):
        token_logprob(h, head, targets, coeff, 1.0, 0)
    with pytest.raises(ValueError, match="^head: got shape .*one token or more"):
        token_logprob(h, head[:0], targets, coeff)


def test_on_a_gpu_shapes_are_known_and_bad_input_is_named_before_launch():
    with FakeTensorMode():
        h, head = (torch.empty(n, 8, device="cuda", dtype=torch.bfloat16) for n in (6, 50))
        targets, coeff = torch.empty(6, device="cuda", dtype=torch.int64), torch.empty(6, device="cuda")
        logp, dh = token_logprob(h, head, targets, coeff)
        assert logp.shape == (6,) and logp.dtype == torch.float32
        assert dh.shape == h.shape and dh.dtype == h.dtype and dh.is_cuda
        with pytest.raises(ValueError, match="^targets: got device cpu, accepted is h's, cuda:0"):
            token_logprob(h, head, torch.empty(6, dtype=torch.int64), coeff)
        with pytest.raises(ValueError, match="^head: got strides .1, 50., accepted is contiguous on a GPU"):
            head = torch.empty_strided((50, 8), (1, 50), device="cuda", dtype=torch.bfloat16)
            token_logprob(h, head, targets, coeff)
