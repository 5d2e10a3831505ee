"""Schedules: what each is defined by, and what cannot be learned."""

import pytest
import torch

from dpm_fast import reference, schedules
from dpm_fast.gaussian import GaussianDiffusion


@pytest.mark.parametrize("num_steps", [2, 7, 1000])
def test_odds_of_log_linear_are_a_geometric_sequence(num_steps: int) -> None:
    tables = GaussianDiffusion.from_schedule("log_linear", num_steps).tables()
    odds = tables.beta_bar[1:] / tables.alpha_bar[1:]
    assert odds[0].item() == pytest.approx(1e-3, rel=1e-10)
    assert odds[-1].item() == pytest.approx(1e3, rel=1e-10)
    ratio = torch.full((num_steps - 1,), 10 ** (6 / (num_steps - 1)), dtype=torch.float64)
    torch.testing.assert_close(odds[1:] / odds[:-1], ratio, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [name for name in schedules.SCHEDULES if name != "erase_paper"])
def test_a_learned_schedule_starts_at_the_initial_one(name: str) -> None:
    fixed = GaussianDiffusion.from_schedule(name, 30).tables().beta
    learned = GaussianDiffusion.from_schedule(name, 30, learned=True, num_bumps=3)
    assert learned.schedule_weights is not None
    assert learned.schedule_weights.shape == (3,)
    torch.testing.assert_close(learned.tables().beta, fixed, rtol=1e-9, atol=0)


@pytest.mark.parametrize("beta", [1e-6, 5e-7, 1 - 1e-5, 1.0])
def test_what_a_learned_schedule_cannot_start_from_is_refused(beta: float) -> None:
    assert GaussianDiffusion([0.1, 0.2, beta]).tables().beta[-1] == beta
    GaussianDiffusion([1e-7, 0.2], learned=True)  # the first step is not learned
    message = r"must be in \(1e-06, 1 - 1e-05\) from t = 2 on, got .* at t = 3"
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion([0.1, 0.2, beta], learned=True)


def test_a_learned_schedule_needs_a_bump() -> None:
    for num_bumps in (0, -1):
        with pytest.raises(ValueError, match=f"num_bumps must be at least 1, got {num_bumps}"):
            GaussianDiffusion([0.1, 0.2], learned=True, num_bumps=num_bumps)


def test_gradients_of_a_learned_schedule() -> None:
    beta = schedules.beta_schedule("erase", 8)
    weights = torch.full((4,), 0.2, dtype=torch.float64, requires_grad=True)
    basis = reference.temporal_basis(8, 4)
    assert torch.autograd.gradcheck(lambda w: schedules.learned_beta(beta, basis, w), weights)
