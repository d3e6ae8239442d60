import pytest
import torch


@pytest.fixture(scope="session")
def assert_agrees():
    """Hold results against a float64 reference, by |result - reference| / |reference|; zeros must not pass for it."""

    def check(results, references, tolerance):
        for result, reference in zip(results, references, strict=True):
            assert reference.dtype == torch.float64 and result.shape == reference.shape

            def error(tensor, reference=reference):
                return ((tensor.double() - reference).norm() / reference.norm()).item()

            assert error(result) <= tolerance
            assert error(torch.zeros_like(result)) > tolerance, "the reference is too small to tell a result from zeros"

    return check
