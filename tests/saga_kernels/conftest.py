import pytest
import torch


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.fixture
def check_compiled():
    """Compares an op's float32 results on a CPU with its reference in float64. It must be the compiled kernel's,
    fresh and contiguous, and the same bytes with one thread and with two."""
    ops, threads = torch.ops.saga_kernels, torch.get_num_threads()
    if not ops.has_avx2():
        pytest.skip("this processor runs the references")

    def check(name, reference, *inputs, atol=1e-6):
        wide = (x.double() if isinstance(x, torch.Tensor) else x for x in inputs)
        expected, compiled = as_tuple(reference(*wide)), as_tuple(getattr(ops, f"{name}_cpu")(*inputs))
        for n in (1, 2):
            torch.set_num_threads(n)
            for y, same, exact in zip(as_tuple(getattr(ops, name)(*inputs)), compiled, expected, strict=True):
                assert y.is_contiguous() and torch.equal(y, same)
                torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=atol)

    yield check
    torch.set_num_threads(threads)
