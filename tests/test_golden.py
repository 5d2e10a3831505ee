"""The processes against numbers from the 2015 code, improved-diffusion, diffusers and mpmath."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpm_fast import noise, reference
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.entropy import entropies
from dpm_fast.gaussian import GaussianDiffusion
from tolerances import GOLDEN_RTOL


def close(actual, expected, rtol=GOLDEN_RTOL, floor=1e-3):
    """Relative agreement, entries below ``floor`` of the largest one measured against that."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        actual.double().detach().expand_as(expected),
        expected,
        rtol=rtol,
        atol=rtol * floor * expected.abs().max().item(),
    )


def tensor(array):
    return torch.from_numpy(array)


@pytest.mark.parametrize("num_steps", [40, 1000])
def test_erase_is_the_schedule_of_the_2015_code(golden, num_steps):
    stored = golden("sohldickstein_schedule")
    tables = GaussianDiffusion.from_schedule("erase", num_steps).tables()
    close(tables.beta[1:], stored[f"T{num_steps}/beta"])
    close(tables.alpha_bar[1:], stored[f"T{num_steps}/alpha_cum"])
    basis = reference.temporal_basis(num_steps, 10)
    close(basis[1:].T, stored[f"T{num_steps}/temporal_basis"])


@pytest.mark.parametrize("case", ["T1000/C1", "T1000/C3", "T40/C1"])
def test_step_of_the_2015_code(golden, case):
    stored = golden("sohldickstein_step")
    num_steps, channels = int(case.split("/")[0][1:]), int(case[-1])
    process = GaussianDiffusion.from_schedule("erase", num_steps)
    reverse, tables = process.reverse("perturbation"), process.tables()
    x_0, eps = tensor(stored[f"{case}/X0"]), tensor(stored[f"{case}/N"])
    bits_of_gaussian = channels * 0.5 * (1 + reference.LOG_2PI) / math.log(2)
    for index in stored[f"{case}/ts"]:
        at, t = f"{case}/t{index}", torch.full((len(x_0),), int(index) + 1)
        level = tables.alpha_bar[t[0]].sqrt(), tables.beta_bar[t[0]].sqrt()
        x_t = reference.noised(x_0, eps, *level)
        close(x_t, stored[f"{at}/X_noisy"])
        close(tables.c_0[t[0]] * x_0 + tables.c_x[t[0]] * x_t, stored[f"{at}/mu_posterior"])
        close(tables.sigma2_q[t[0]].sqrt(), stored[f"{at}/sigma_posterior"])
        mu_out = tensor(stored[f"{case}/mu_coeff"]).requires_grad_()
        sigma2_out = tensor(stored[f"{case}/beta_coeff"]).requires_grad_()
        out = torch.cat((mu_out, sigma2_out), dim=1)
        mu_p, sigma2_p = reverse.moments(x_t, t, out)
        close(mu_p, stored[f"{at}/coeff/mu"])
        close(sigma2_p.sqrt(), stored[f"{at}/coeff/sigma"])
        # That code multiplies one sampled KL by T, and counts entropies of the edges per pixel.
        entropy = 0.5 * (1 + reference.LOG_2PI + tables.beta_bar.log())
        edge = entropy[1] - entropy[-1] + 0.5 * (1 + reference.LOG_2PI)
        kl = num_steps * reverse.kl(x_0, x_t, t, out).mean() / x_0[0, 0].numel()
        bits = (kl + channels * edge) / math.log(2) - bits_of_gaussian
        close(bits, stored[f"{at}/coeff/negL_bits"])
        bits.backward()
        close(mu_out.grad, stored[f"{at}/coeff/grad_mu_coeff"])
        close(sigma2_out.grad, stored[f"{at}/coeff/grad_beta_coeff"])


VARIANCES = {
    "LEARNED_RANGE": "learned_range",
    "FIXED_SMALL": "fixed_small",
    "FIXED_LARGE": "fixed_large",
}


@pytest.mark.parametrize(
    "run", ["linear100_plain", "linear1000_respaced100", "cosine1000_respaced100_fixedlarge"]
)
@pytest.mark.parametrize("clip", ["clip", "noclip"])
def test_bound_of_improved_diffusion(golden, run, clip):
    """Whole bounds on its noise, its approximate decoder at the end."""
    stored = golden("improved_bpd")
    process = GaussianDiffusion(stored[f"{run}/betas"])
    variance = VARIANCES[str(stored[f"{run}/config"][4])]
    clamp = (-1.0, 1.0) if clip == "clip" else None
    reverse, tables = process.reverse("epsilon", variance, clamp), process.tables()
    weight, bias = tensor(stored["W"]), tensor(stored["b"])
    x_0, noises = tensor(stored["x_start"]), tensor(stored["noise_stream"])
    dims = x_0[0].numel() * math.log(2)
    for column, eps in enumerate(noises):
        index = 100 - column
        t = torch.full((len(x_0),), index)
        x_t = reference.noised(
            x_0, eps, tables.alpha_bar[index].sqrt(), tables.beta_bar[index].sqrt()
        )
        out = F.conv2d(x_t, weight, bias, padding=1)[:, : 3 * reverse.num_outputs]
        nats = reverse.kl(x_0, x_t, t, out)
        if index == 1:
            mu_p, sigma2_p = reverse.moments(x_t, t, out)
            nats = reference.sum_over_event(
                reference.discretized_tanh_nats(
                    x_0, mu_p, sigma2_p.expand_as(mu_p), reference.Bins(1 / 255, -1.0, 1.0)
                )
            )
        # The golden file states 5e-8 at worst at the decoder's term.
        close(nats / dims, stored[f"{run}/{clip}/vb"][:, column], 1e-7 if index == 1 else 1e-9)
    # Formed there from rounded means and variances: for the cosine schedule, where the term is
    # 1e-10 bits, that leaves an error of a few units in the last place of 1.
    prior = process.prior_nats(x_0, "decoder") / dims
    expected = tensor(stored[f"{run}/{clip}/prior_bpd"])
    torch.testing.assert_close(prior, expected, rtol=GOLDEN_RTOL, atol=1e-15)


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_binomial_posteriors_and_entropies(golden, rate):
    stored, at = golden("math_binomial"), f"binomial/T2000/rate{rate}"
    process = BinomialDiffusion(2000, rate)
    tables = process.tables()
    close(tables.beta[1:], stored[f"{at}/beta"])
    posterior = tables.posterior[tensor(stored[f"{at}/ts"])]
    close(posterior[:, 1], stored[f"{at}/posterior_prob1"], floor=0.0)
    close(posterior[:, 0], stored[f"{at}/posterior_prob0"], floor=0.0)
    for bit in (0, 1):
        close(
            entropies(process, float(bit)).given_data[1:],
            stored[f"{at}/H_xt_given_x0_is{bit}_nats"],
        )


@pytest.mark.parametrize("name", ["linear_T1000", "recip_T1000", "repo_T1000", "repo_T40"])
def test_gaussian_tables_to_many_digits(golden, name):
    stored, at = golden("math_gaussian_schedules"), f"gauss_schedule/{name}"
    process = GaussianDiffusion(stored[f"{at}/beta"])
    tables, entropy = process.tables(), entropies(process)
    close(tables.alpha_bar[1:], stored[f"{at}/alpha_cum"])
    close(tables.beta_bar[1:], stored[f"{at}/one_minus_alpha_cum"], floor=0.0)
    close(tables.sigma2_q[1:], stored[f"{at}/posterior_variance"])
    close(tables.c_0[1:], stored[f"{at}/posterior_coef_x0"])
    close(tables.c_x[1:], stored[f"{at}/posterior_coef_xt"])
    close(entropy.given_data[1:], stored[f"{at}/H_xt_given_x0_nats"])
    close(entropy.upper[1:], stored[f"{at}/H_upper_nats"])
    close(entropy.lower[2:], stored[f"{at}/H_lower_nats"][1:])


def test_gaussian_kl_at_the_extremes(golden):
    stored = golden("math_kl_elementwise")
    mean_q, log_q, mean_p, log_p, expected = (
        tensor(stored[f"gauss_kl/{k}"]) for k in ("mean1", "logvar1", "mean2", "logvar2", "kl_nats")
    )
    shift = reference.expm1_minus_identity(log_q - log_p)
    nats = 0.5 * (shift + torch.exp(2 * torch.log((mean_q - mean_p).abs()) - log_p))
    close(nats, expected, floor=0.0)


def test_discretized_gaussian_to_many_digits(golden):
    stored = golden("math_kl_elementwise")
    x, mean, log_scale, expected = (
        tensor(stored[f"discretized_gaussian/{k}"])
        for k in ("x", "mean", "log_scale", "log_likelihood_exact_nats")
    )
    nats = reference.discretized_gaussian_nats(
        x, mean, torch.exp(2 * log_scale), reference.Bins(1 / 255, -1.0, 1.0)
    )
    close(-nats, expected, floor=0.0)


def test_discretized_gaussian_and_its_gradients_at_the_extremes():
    """Against the expansions of the tail and of the density: x = mu + distance, mid bins."""
    half_width = 1 / 255
    bins = reference.Bins(half_width, -1.0, 1.0)

    def nats_and_gradients(distance, sigma, x=0.0):
        mu = tensor(np.array([x - distance])).requires_grad_()
        sigma2 = tensor(np.array([sigma**2])).requires_grad_()
        nats = reference.discretized_gaussian_nats(tensor(np.array([x])), mu, sigma2, bins)
        return nats, *torch.autograd.grad(nats, (mu, sigma2))

    # Far away the near end of the bin decides: z^2 / 2 + ln(z sqrt(2 pi)).
    for distance, sigma in ((1.0, 1e-10), (-1.0, 1e-10), (100.0, 1e-8), (1.0, 1e-15), (-3.0, 1e-5)):
        near = abs(distance) - half_width
        z = near / sigma
        nats, mean, variance = nats_and_gradients(distance, sigma)
        close(nats, [z * z / 2 + math.log(z) + reference.LOG_2PI / 2], floor=0.0)
        sign = math.copysign(1, distance)
        close(mean, [-sign * (z + 1 / z) / sigma], floor=0.0)
        close(variance, [-(z * z + 1) / (2 * sigma**2)], floor=0.0)
    # The outer bins are open: their end is as far as that of an inner one.
    for x, distance in ((-1.0, -0.7), (1.0, 0.7)):
        z = (abs(distance) - half_width) / 1e-12
        nats, mean, _ = nats_and_gradients(distance, 1e-12, x)
        close(nats, [z * z / 2 + math.log(z) + reference.LOG_2PI / 2], floor=0.0)
        close(mean, [-math.copysign(z / 1e-12, distance)], floor=0.0)
    # In a wide Gaussian the bin has density times width.
    for sigma in (1e3, 1e6, 1e15):
        nats, mean, variance = nats_and_gradients(0.1, sigma)
        log_density = -0.5 * ((0.1 / sigma) ** 2 + reference.LOG_2PI) - math.log(sigma)
        close(nats, [-log_density - math.log(2 * half_width)], floor=0.0)
        close(mean, [-0.1 / sigma**2], floor=0.0)
        close(variance, [(1 - (0.1 / sigma) ** 2) / (2 * sigma**2)], rtol=1e-5, floor=0.0)
    # And a bin that holds everything costs nothing, whichever form computes it.
    nats, mean, variance = nats_and_gradients(0.0, 1e-5)
    assert (nats.item(), mean.item(), variance.item()) == (0, 0, 0)


def test_forms_of_the_discretized_gaussian_meet():
    """Where narrow, central and distant bins change over, value and gradients do not jump."""
    bins = reference.Bins(1 / 255, -1.0, 1.0)
    for distance, scale in ((1 / 255, 1.0), (0.0, 7.84), (3.0, 7.84), (0.5, 1e-2)):
        sigma = tensor(scale * np.linspace(0.99, 1.01, 2001)).requires_grad_()
        mu = torch.full_like(sigma, distance, requires_grad=True)
        nats = reference.discretized_gaussian_nats(torch.zeros_like(sigma), mu, sigma**2, bins)
        for values in (nats, *torch.autograd.grad(nats.sum(), (mu, sigma))):
            bend = values.detach().diff(n=3).abs().max()
            assert bend < 1e-6 * values.abs().max() + 1e-15


def test_philox_vectors(golden):
    stored = golden("philox")
    for kind in ("kat", "random"):
        counter, key = (stored[f"{kind}/{k}"].astype("int64") for k in ("counter", "key"))
        rounds = stored["kat/rounds"] if kind == "kat" else [10] * len(counter)
        expected = stored["kat/expected" if kind == "kat" else "random/out"].astype("int64")
        for c, k, r, out in zip(counter, key, rounds, expected, strict=True):
            got = noise.philox4x32([int(w) for w in c], (int(k[0]), int(k[1])), int(r))
            assert [int(w) for w in got] == out.tolist()
