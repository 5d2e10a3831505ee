"""The safeguards of the test suite itself: they must not stop working unnoticed."""

import math

import numpy as np
import pytest
import torch

from tolerances import mean_stderr_multiple, rounding


@pytest.mark.parametrize(
    "allocate",
    [
        lambda like: torch.empty(2, 3),
        lambda like: torch.empty(2, 3, requires_grad=True),
        lambda like: torch.empty_like(like),
        lambda like: torch.empty_strided((2, 3), (1, 2)),
        lambda like: torch.empty_permuted((2, 3), (1, 0)),
        lambda like: like.new_empty(2, 3),
        lambda like: like.new_empty_strided((2, 3), (1, 2)),
    ],
)
def test_uninitialized_memory_is_poisoned(allocate):
    assert allocate(torch.zeros(2, 3)).isnan().all()


def test_poison_keeps_dtype_and_gradient():
    assert torch.empty(2, requires_grad=True).requires_grad
    assert (torch.empty(2, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert torch.nn.Linear(2, 3).weight.isfinite().all()


def test_golden_arrays_cannot_be_altered_for_other_tests(golden):
    words = golden("philox")["kat/expected"]
    words[:] = 0
    assert np.any(golden("philox")["kat/expected"])


@pytest.mark.parametrize("num_terms", [10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_covers_a_plain_sum_and_little_more(dtype, num_terms):
    generator = torch.Generator().manual_seed(0)
    terms = torch.rand(200, num_terms, dtype=dtype, generator=generator)
    total = torch.zeros(200, dtype=dtype)
    for term in terms.unbind(1):
        total = total + term
    exact = [math.fsum(row) for row in terms.tolist()]
    error = max(abs(a - b) / b for a, b in zip(total.tolist(), exact, strict=True))
    assert rounding(dtype, num_terms) / 20 < error < rounding(dtype, num_terms)


def test_stderr_multiple_is_the_gaussian_quantile():
    assert mean_stderr_multiple() == pytest.approx(4.8916, abs=1e-4)
    assert mean_stderr_multiple(100) == pytest.approx(5.7307, abs=1e-3)
