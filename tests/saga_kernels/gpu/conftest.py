import pytest
import torch


@pytest.fixture(scope="session")
def assert_agrees():
    """Compare results with a float64 reference, by |result - reference| / |reference|; results of zeros must not
    pass."""

    def check(results, references, tolerance):
        for result, reference in zip(results, references, strict=True):
            assert reference.dtype == torch.float64 and result.shape == reference.shape

            def error(tensor, reference=reference):
                return ((tensor.double() - reference).norm() / reference.norm()).item()

            assert error(result) <= tolerance
            assert error(torch.zeros_like(result)) > tolerance, "the reference is too small to tell a result from zeros"

    return check
