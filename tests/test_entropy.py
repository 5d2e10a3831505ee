"""Entropies of the forward process: against sums over all states, in order where order holds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.entropy import entropies, entropy_of_trajectory
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.schedules import SCHEDULES


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "erase_paper"])
def test_gaussian_bounds_hold_for_gaussian_data(schedule: str) -> None:
    process = GaussianDiffusion.from_schedule(schedule, 25)
    tables, result = process.tables(), entropies(process)
    # Data N(0, v): X_{t-1} given X_t is Gaussian, its entropy known.
    for v in (0.01, 0.5, 1.0):
        previous = tables.alpha_bar[1:-1] * v + tables.beta_bar[1:-1]
        now = tables.alpha_bar[2:] * v + tables.beta_bar[2:]
        exact = 0.5 * torch.log(2 * math.pi * math.e * tables.beta[2:] * previous / now)
        assert (result.lower[2:] <= exact + 1e-12).all()
        assert (exact <= result.upper[2:] + 1e-12).all()
    # At v = 1 the upper bound is met: X_{t-1} is distributed as X_t.
    torch.testing.assert_close(exact, result.upper[2:])


@given(steps=st.integers(2, 30), rate=st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_binomial_bounds_hold(steps: int, rate: float) -> None:
    process = BinomialDiffusion(steps)
    tables, result = process.tables(), entropies(process, rate)
    for t in range(2, steps + 1):
        one = tables.alpha_bar[t - 1] * rate + (1 - tables.alpha_bar[t - 1]) * 0.5
        beta = tables.beta[t]
        joint = torch.stack(
            (
                (1 - one) * torch.stack((1 - beta / 2, beta / 2)),
                one * torch.stack((beta / 2, 1 - beta / 2)),
            )
        )  # [x_{t-1}, x_t]
        marginal = joint.sum(dim=0)
        exact = torch.xlogy(marginal, marginal).sum() - torch.xlogy(joint, joint).sum()
        assert result.lower[t] <= exact + 1e-12
        assert exact <= result.upper[t] + 1e-12


@pytest.mark.parametrize(
    ("process", "rate"),
    [(GaussianDiffusion.from_schedule("erase", 9), None), (BinomialDiffusion(9, 0.2), 0.4)],
    ids=["gaussian", "binomial"],
)
def test_steps_produce_the_entropy_of_the_trajectory(
    process: GaussianDiffusion | BinomialDiffusion, rate: float | None
) -> None:
    result = entropies(process, rate)
    assert all(row.shape == (10,) and row[0] == 0 for row in result)
    total = entropy_of_trajectory(process, rate)
    assert total > 0
    torch.testing.assert_close(result.produced[2:].sum(), total)
    torch.testing.assert_close(result.given_previous - result.lower, result.produced)


def test_data_rate_belongs_to_binary_data() -> None:
    with pytest.raises(ValueError, match=r"data_rate must be in \[0, 1\] .*, got None"):
        entropies(BinomialDiffusion(5))
    with pytest.raises(ValueError, match=r"data_rate must be in \[0, 1\] .*, got 1.5"):
        entropies(BinomialDiffusion(5), 1.5)
    with pytest.raises(ValueError, match=r"data_rate is for binomial processes, got 0.5"):
        entropies(GaussianDiffusion.from_schedule("erase", 5), 0.5)
