"""The mathematics against many-digit values, and the identity that makes the bound exact."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dpm_fast import noise, reference
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.entropy import entropies
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.reference import ReverseRow
from test_golden import close, tensor
from tolerances import GOLDEN_RTOL, mean_stderr_multiple

EPS = torch.finfo(torch.float64).eps


def test_gaussian_kl_and_its_gradients(golden):
    stored = golden("math_kl_elementwise")
    mean_q, log_q, mean_p, log_p, nats, grad_mean, grad_log = (
        tensor(stored[f"gauss_kl/{name}"])
        for name in (
            *("mean1", "logvar1", "mean2", "logvar2"),
            *("kl_nats", "grad_mean2", "grad_logvar2"),
        )
    )
    # Past this the gradient of a quotient of two variances leaves the range of float64.
    usual = (log_q.abs() < 100) & (log_p.abs() < 100)
    assert usual.sum() > 1500
    mean_q, log_q, mean_p, log_p, nats, grad_mean, grad_log = (
        values[usual][:, None]
        for values in (mean_q, log_q, mean_p, log_p, nats, grad_mean, grad_log)
    )
    mean_p, log_p = mean_p.requires_grad_(), log_p.requires_grad_()
    zero, one = torch.zeros_like(mean_q), torch.ones_like(mean_q)
    columns = ReverseRow(
        a=one, b=zero, c=zero, e=zero, p=zero, q=one, low=-math.inf * one, high=math.inf * one,
        s=one, base=one, g=zero, c_0=one, d=zero, delta_0=log_q, is_first=zero,
    )  # fmt: skip
    rows = torch.cat(columns, dim=1)
    got = reference.kl(mean_q, zero, mean_p, log_p, rows)[:, None]
    got.sum().backward()
    # The variances are rounded to float64 first, which shifts their log-ratio by up to 4 eps.
    shift = (log_q - log_p).detach()
    error = (got - nats).abs()
    assert bool((error <= GOLDEN_RTOL * nats + 4 * EPS * torch.expm1(shift).abs()).all())
    error = (log_p.grad - grad_log).abs()
    assert bool((error <= GOLDEN_RTOL * grad_log.abs() + 4 * EPS * torch.exp(shift)).all())
    close(mean_p.grad, grad_mean, floor=0.0)


def first_row():
    """Coefficients at t = 1, where the network gives a logit and a term is a code length."""
    return BinomialDiffusion(2).reverse("rate").table()[1][None]


def test_bernoulli_kl(golden):
    stored = golden("math_kl_elementwise")
    r, p, expected = (tensor(stored[f"bernoulli/{name}"]) for name in ("r", "p", "kl_nats"))
    usual = (p > 1e-200) & (p < 1) & ((r == 0) | (r > 1e-200))
    r, p, expected = r[usual], p[usual], expected[usual]
    m, p_of_m = torch.where(r > 0.5, 1 - r, r), torch.where(r > 0.5, 1 - p, p)
    p_of_other = torch.where(r > 0.5, p, 1 - p)
    certain = m == 0
    assert certain.sum() > 10
    # Log-odds by p less log-odds by q, without a difference of logarithms where they are near.
    gap = (p_of_m - m) / (m * p_of_other)
    apart = (p_of_m / m).log() + torch.log1p(-m) - p_of_other.log()
    e = torch.where(gap > -0.5, torch.log1p(gap), apart)[~certain]
    assert (e.abs() < 1e-6).sum() > 200
    close(reference.bernoulli_divergence(m[~certain], e), expected[~certain], floor=0.0)
    # A certain bit is coded, as at t = 1.
    bit, logit = r[certain][:, None], torch.logit(p[certain])[:, None]
    nats = reference.bernoulli_kl(bit, bit, logit, first_row().expand(len(bit), -1))
    close(nats, expected[certain], floor=0.0)


def test_bernoulli_kl_of_logits(golden):
    stored = golden("math_kl_elementwise")
    a, b, expected = (tensor(stored[f"bernoulli/logits/{name}"]) for name in ("a", "b", "kl_nats"))
    usual = a.abs() < 600
    a, b, expected = a[usual], b[usual], expected[usual]
    assert len(a) > 500
    e = torch.where(a > 0, a - b, b - a)
    close(reference.bernoulli_divergence(torch.sigmoid(-a.abs()), e), expected, floor=0.0)


def test_bernoulli_code_length(golden):
    stored = golden("math_kl_elementwise")
    target, logit = tensor(stored["bernoulli/bce/target"]), tensor(stored["bernoulli/bce/logit"])
    is_bit = (target == 0) | (target == 1)
    target, logit, expected = (
        x[is_bit][:, None] for x in (target, logit, tensor(stored["bernoulli/bce/nats"]))
    )
    rows = first_row().expand(len(target), -1)
    close(reference.bernoulli_kl(target, target, logit, rows), expected[:, 0], floor=0.0)


def test_bernoulli_entropy(golden):
    stored = golden("math_kl_elementwise")
    entropy = reference.bernoulli_entropy(tensor(stored["bernoulli/entropy/p"]))
    close(entropy, stored["bernoulli/entropy/nats"], floor=0.0)


def test_log1mexp(golden):
    stored = golden("math_kl_elementwise")
    x, expected = (tensor(stored[f"elementwise/log1mexp/{name}"]) for name in ("x", "out"))
    # The last value is the smallest subnormal number, which either neighbor is as close to.
    torch.testing.assert_close(reference.log1mexp(-x), expected, rtol=GOLDEN_RTOL, atol=5e-324)


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_binomial_tables_at_every_timestep(golden, rate):
    stored, at = golden("math_binomial"), f"binomial/T2000/rate{rate}"
    process = BinomialDiffusion(2000, rate)
    tables = process.tables()
    close(tables.alpha_bar[1:], stored[f"{at}/survival"], floor=0.0)
    assert tables.alpha_bar[-1] == 0
    close(tables.posterior[1:, 1], stored[f"{at}/posterior_prob1_all_t"], floor=0.0)
    previous = [np.array([bit, *stored[f"{at}/q_xt1_given_x0_is{bit}"][:-1]]) for bit in (0, 1)]
    for data_rate in (0.0, 0.3, 1.0):
        ones = (1 - data_rate) * previous[0] + data_rate * previous[1]
        given = [stored[f"{at}/H_xt_given_xprev_is{bit}_nats"] for bit in (0, 1)]
        entropy = entropies(process, data_rate)
        close(entropy.given_previous[1:], (1 - ones) * given[0] + ones * given[1])
        given = [stored[f"{at}/H_xt_given_x0_is{bit}_nats"] for bit in (0, 1)]
        close(entropy.given_data[1:], (1 - data_rate) * given[0] + data_rate * given[1])


@pytest.mark.parametrize("name", ["linear_T1000", "recip_T1000", "repo_T1000", "repo_T40"])
@pytest.mark.parametrize("std", ["1", "0.25"])
def test_entropy_bounds_hold_for_gaussian_data(golden, name, std):
    stored, at = golden("math_gaussian_schedules"), f"gauss_schedule/{name}"
    exact = tensor(stored[f"{at}/H_xprev_given_xt_gaussian_data_std{std}_nats"])
    table = entropies(GaussianDiffusion(stored[f"{at}/beta"]))
    # For unit variance the upper bound is attained, up to rounding.
    assert bool((table.lower[1:] <= exact).all())
    assert bool((exact <= table.upper[1:] + 1e-12).all())
    if std == "1":
        close(table.upper[1:], exact.numpy())


@pytest.mark.parametrize("name", ["linear_T1000", "repo_T1000", "repo_T40"])
def test_bound_of_gaussian_data_is_exact(golden, name):
    """Zero outputs of "perturbation" are the exact reverse kernel of unit Gaussian data."""
    stored, at = golden("math_gaussian_schedules"), f"gauss_schedule/{name}"
    process = GaussianDiffusion(stored[f"{at}/beta"])
    tables = process.tables()
    row = ReverseRow(*process.reverse("perturbation").table()[1:].unbind(1))
    square = row.c_0**2 + row.d**2 + 2 * row.c_0 * row.d * tables.alpha_bar[1:].sqrt()
    kl = 0.5 * (reference.expm1_minus_identity(row.delta_0) + square / row.base)
    close(kl[1:], stored[f"{at}/identity/expected_kl_t2_to_T_nats"])
    # Paper edge: the expected KLs are what the steps produce in entropy.
    entropy = entropies(process)
    close(kl[1:], entropy.produced[2:].numpy())
    # Decoder edge: the whole code length is the entropy of the data.
    decoder = 0.5 * (reference.LOG_2PI - row.delta_0[0] + square[0] / row.base[0])
    one = torch.ones(1, 1, dtype=torch.float64)
    code = kl[1:].sum() + decoder + process.prior_nats(one, "decoder")[0]
    assert abs(code.item() - 0.5 * (1 + reference.LOG_2PI)) < 1e-9


class ZeroNetwork(nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x).repeat(1, 2)


@pytest.mark.parametrize("edge", ["decoder", "paper"])
@pytest.mark.parametrize("timesteps", ["exact", 5])
def test_sampled_bound_of_gaussian_data_is_exact(edge, timesteps):
    model = DiffusionModel(GaussianDiffusion.from_schedule("erase", 30), ZeroNetwork())
    n, dims = 4000, 3
    x_0 = noise.normal(1, noise.Stream.DATA, torch.arange(n), 0, (dims,), torch.float64)
    bound = model.bound(x_0, edge=edge, timesteps=timesteps, seed=2)
    # With the decoder edge the bound of each example is its log density.
    truth = -0.5 * dims * (1 + reference.LOG_2PI)
    gap = bound.bound_nats - (-reference.gaussian_nats(x_0) if edge == "decoder" else truth)
    stderr = gap.std().item() / math.sqrt(n)
    assert 0 < stderr < 0.1
    assert abs(gap.mean().item()) < mean_stderr_multiple() * stderr
