"""How far two computations of the same quantity may differ, each bound with its reason."""

import math

import torch

# The golden arrays are float64 results that two independent programs agree on to 1e-10 or better
# unless their description says otherwise; a mistake in a formula is far larger than this.
GOLDEN_RTOL = 1e-9

# The noise contract: a float32 normal lies within this of the same Box-Muller formula in float64.
NORMAL_ATOL = 1e-5


def rounding(dtype: torch.dtype, num_terms: int = 1, num_operations: int = 8) -> float:
    """Error relative to the sum of magnitudes when `num_terms` are summed in `dtype`.

    Each term carries at most `num_operations` roundings of half a unit in the last place. The
    roundings of the sum itself behave as independent (num_terms * eps is the worst case, and an
    implementation that reaches it sums in the wrong way), so they grow as the square root.
    """
    return torch.finfo(dtype).eps * (num_operations + math.sqrt(num_terms)) / 2


def mean_stderr_multiple(num_comparisons: int = 1) -> float:
    """Standard errors by which a correct mean strays once in a million runs of a test.

    Two-sided Gaussian quantile with the allowance divided among the comparisons of the test.
    """
    tail = 1e-6 / num_comparisons / 2
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * tail, dtype=torch.float64)))
