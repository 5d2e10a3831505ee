"""Entropies of the forward process and bounds on the reverse conditional ([DPM] section 2.6)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.reference import bernoulli_entropy


class EntropyTables(NamedTuple):
    """Entropies per element in nats, each (T + 1,) float64, indexed by t; row 0 is 0.

    ``lower`` <= H_q(X_{t-1} | X_t) <= ``upper``, averaged over the data ([DPM] equations 23, 24):

        lower = H(X_t | X_{t-1}) + H(X_{t-1} | X_0) - H(X_t | X_0),   upper = H(X_t | X_{t-1})

    The upper bound assumes H(X_t) >= H(X_{t-1}): Gaussian data of variance at most 1, or binary
    data with a prior rate of 1/2. For continuous data the lower bound at t = 1 is -inf.
    ``produced`` is H(X_t | X_0) - H(X_{t-1} | X_0), the entropy that step t produces.
    """

    given_data: Tensor  # H(X_t | X_0)
    given_previous: Tensor  # H(X_t | X_{t-1})
    lower: Tensor
    upper: Tensor
    produced: Tensor


def entropies(
    process: GaussianDiffusion | BinomialDiffusion, data_rate: float | None = None
) -> EntropyTables:
    """Entropies of every step of a forward process, in closed form.

    Args:
        process: Gaussian or binomial.
        data_rate: for a binomial process the rate of ones of the data, in [0, 1].

    Raises:
        TypeError: for a process of another kind.
        ValueError: without a data rate for a binomial process, or with one for a Gaussian one.
    """
    if not isinstance(process, GaussianDiffusion | BinomialDiffusion):
        raise TypeError(
            "process must be a GaussianDiffusion or a BinomialDiffusion, "
            f"got {type(process).__name__}"
        )
    if isinstance(process, GaussianDiffusion):
        if data_rate is not None:
            raise ValueError(f"data_rate is for binomial processes, got {data_rate}")
        tables = process.tables()
        constant = 0.5 * (math.log(2 * math.pi) + 1)
        given_data = constant + 0.5 * tables.beta_bar.log()  # -inf in row 0: the data are known
        given_previous = constant + 0.5 * tables.beta.log()
    else:
        if data_rate is None or not 0.0 <= data_rate <= 1.0:
            raise ValueError(f"data_rate must be in [0, 1] for binomial data, got {data_rate}")
        given_data, given_previous = _binomial(process, data_rate)
    step_back = torch.cat((given_data[:1], given_data[:-1]))
    lower = given_previous + step_back - given_data
    produced = given_data - step_back
    rows = (given_data, given_previous, lower, given_previous, produced)
    return EntropyTables(*(torch.cat((torch.zeros_like(r[:1]), r[1:])) for r in rows))


def entropy_of_trajectory(
    process: GaussianDiffusion | BinomialDiffusion, data_rate: float | None = None
) -> Tensor:
    """Entropy that steps 2..T produce per element, H(X_T | X_0) - H(X_1 | X_0), nats, scalar."""
    given_data = entropies(process, data_rate).given_data
    return given_data[-1] - given_data[1]


def _binomial(process: BinomialDiffusion, data_rate: float) -> tuple[Tensor, Tensor]:
    beta, alpha_bar = process.tables().beta, process.tables().alpha_bar
    rho = process.prior_rate
    given_data = torch.zeros_like(beta)
    given_previous = torch.zeros_like(beta)
    previous = torch.cat((alpha_bar[:1], alpha_bar[:-1]))
    marginal = previous * data_rate + (1 - previous) * rho  # rate of ones of x_{t-1}
    for bit, weight in ((0.0, 1 - data_rate), (1.0, data_rate)):
        given_data += weight * bernoulli_entropy(alpha_bar * bit + (1 - alpha_bar) * rho)
    for bit, share in ((0.0, 1 - marginal), (1.0, marginal)):
        given_previous += share * bernoulli_entropy((1 - beta) * bit + beta * rho)
    return given_data, given_previous
