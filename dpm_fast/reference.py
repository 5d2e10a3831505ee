"""The whole algorithm in plain PyTorch, in the order of the paper: read it to learn the method.

Coefficients come as rows of float64 tables, cast and shaped to broadcast against x; a step of any
parameterization is such a row, so the functions below know no names.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dpm_fast.noise import Stream, normal, uniform

LOG_2PI = math.log(2 * math.pi)


class ReverseRow(NamedTuple):
    """Coefficients of one Gaussian reverse step, each broadcastable to x.

    mu_p = a clamp(p x_t + q mu_out, low, high) + b x_t + sigma2_p (c mu_out + e x_t)
    sigma2_p = base / (g + (1 - g) exp(-v)), v = s sigma2_out
    mu_q - mu_p = c_0 x_0 + d x_t - a clamp(...) - sigma2_p (c mu_out + e x_t)
    ln(sigma2_q / sigma2_p) = delta_0 - ln(sigma2_p / base)

    One form holds every variance: constant (s = 0), exponential (g = 0) and
    sigmoid(v + logit base), for which g = base. The differences d = c_x - b and
    delta_0 = ln(sigma2_q / base) are formed in float64, where their parts nearly cancel.
    ``is_first`` is 1 at t = 1, whose term of the bound is the decoder and whose ``delta_0`` is
    -ln base, and 0 elsewhere.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    e: Tensor
    p: Tensor
    q: Tensor
    low: Tensor
    high: Tensor
    s: Tensor
    base: Tensor
    g: Tensor
    c_0: Tensor
    d: Tensor
    delta_0: Tensor
    is_first: Tensor


def reverse_row(rows: Tensor, num_dims: int) -> ReverseRow:
    """Columns of rows (N, 15), each of shape (N, 1, ...) with ``num_dims`` dimensions."""
    return ReverseRow(*_columns(rows, num_dims))


class Bins(NamedTuple):
    """Grey levels in model scale: their bins are [x - half_width, x + half_width], open outwards
    at the lowest and the highest level."""

    half_width: float
    lowest: float
    highest: float


# The forward process ([DPM] section 2.1).


def noised(x_0: Tensor, eps: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, all (N, *event) or broadcastable."""
    return signal * x_0 + spread * eps


def noise(
    x_0: Tensor,
    coefficients: Tensor,
    seed: int,
    example_ids: Tensor,
    t: int | Tensor,
    *,
    stream: int = Stream.FORWARD,
) -> Tensor:
    """x_t with the noise of the contract; see `dpm_fast.ops.noise`, whose reference this is.

    Args:
        x_0: (N, *event).
        coefficients: (N, 2), signal and spread; float32, or float64 for such x_0.
        seed, stream, example_ids, t: of the unit Gaussian eps, see `dpm_fast.noise`.
    """
    signal, spread = (c.view(-1, *(1 for _ in x_0.shape[1:])) for c in coefficients.unbind(1))
    eps = normal(seed, stream, example_ids, t, x_0.shape[1:], coefficients.dtype)
    return noised(x_0, eps, signal, spread).to(x_0.dtype)


# The reverse kernel p(x_{t-1} | x_t) = N(mu_p, sigma2_p) ([DPM] section 2.2).


def reverse_variance(sigma2_out: Tensor | None, row: ReverseRow) -> tuple[Tensor, Tensor]:
    """u and ln u, with sigma2_p = base / u, (N, *event); 1 and 0 where no variance is learned.

    u = g + (1 - g) exp(-v), in which nothing cancels; its logarithm keeps its digits near u = 1.
    The shift v = s sigma2_out is limited to what `max_shift` says, so that a variance and its
    inverse are finite whatever a network says.
    """
    if sigma2_out is None:
        return torch.ones_like(row.base), torch.zeros_like(row.base)
    v = row.s * sigma2_out
    limit = max_shift(v.dtype)
    v = v.clamp(-limit, limit)
    u = row.g + (1 - row.g) * torch.exp(-v)
    less_one = (1 - row.g) * torch.expm1(-v)
    near = less_one.abs() < 0.5
    log_near = torch.log1p(torch.where(near, less_one, torch.zeros_like(less_one)))
    return u, torch.where(near, log_near, torch.log(u))


def max_shift(dtype: torch.dtype) -> float:
    """Largest magnitude of a shift of the log-variance, in nats."""
    return 600.0 if dtype == torch.float64 else 60.0


def reverse_moments(
    x_t: Tensor, mu_out: Tensor, sigma2_out: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """mu_p and sigma2_p of the reverse kernel, (N, *event), from rows (N, 15)."""
    row = reverse_row(rows, x_t.dim())
    _, log_u = reverse_variance(sigma2_out, row)
    sigma2_p = row.base * torch.exp(-log_u)
    prediction = _clamp(row.p * x_t + row.q * mu_out, row)
    mu_p = row.a * prediction + row.b * x_t + sigma2_p * (row.c * mu_out + row.e * x_t)
    return mu_p, sigma2_p


# The bound ([DPM] sections 2.3 and 2.4; [DDPM] equation 5).


def kl(
    x_0: Tensor,
    x_t: Tensor,
    mu_out: Tensor,
    sigma2_out: Tensor | None,
    rows: Tensor,
    *,
    joined: bool = False,
    edge: str = "decoder",
    bins: Bins | None = None,
) -> Tensor:
    """One term of the bound per example; see `dpm_fast.ops.kl`, whose reference this is.

    Args:
        x_0, x_t, mu_out, sigma2_out: (N, *event); sigma2_out is None for a constant variance.
        rows: (N, 15), columns as in `ReverseRow`; a ``base`` that is not positive gives NaN.
        joined: mu_out is (N, 2 C, *spatial) and holds sigma2_out too.
        edge: "decoder", "discretized" or "discretized_tanh"; matters at t = 1 alone.
        bins: of a discretized edge.

    Returns:
        (N,) float64 nats, summed over the elements in float64.
    """
    if joined:
        mu_out, sigma2_out = mu_out.chunk(2, dim=1)
    row = reverse_row(rows, x_t.dim())
    u, log_u = reverse_variance(sigma2_out, row)
    sigma2_p = row.base * torch.exp(-log_u)  # not base / u, whose gradient can overflow
    prediction = _clamp(row.p * x_t + row.q * mu_out, row)
    delta_mu = (
        row.c_0 * x_0 + row.d * x_t - row.a * prediction - sigma2_p * (row.c * mu_out + row.e * x_t)
    )
    log_ratio = row.delta_0 + log_u
    is_first = row.is_first > 0
    variance_term = torch.where(is_first, LOG_2PI - log_ratio, expm1_minus_identity(log_ratio))
    # Not delta_mu^2 / sigma2_p, whose gradient holds sigma2_p^-2, which overflows.
    square = delta_mu.square() * (u / row.base)
    nats = (0.5 * (variance_term + square)).expand_as(x_0)
    if bins is not None:
        mu_p = x_0.double() - delta_mu.double()  # mu_q is x_0 at t = 1
        nats = torch.where(is_first, bin_nats(edge)(x_0, mu_p, sigma2_p, bins), nats)
    return sum_over_event(torch.where(row.base > 0, nats, math.nan))


def expm1_minus_identity(x: Tensor) -> Tensor:
    """exp(x) - 1 - x without loss of digits near 0: twice the KL of two equal-mean Gaussians whose
    log-variances differ by x."""
    near = x.abs() < 0.05
    small = torch.where(near, x, torch.zeros_like(x))
    series = torch.zeros_like(x)
    for n in range(9, 1, -1):
        series = series * small + 1 / math.factorial(n)
    return torch.where(near, small * small * series, torch.expm1(x) - x)


def gaussian_nats(x: Tensor) -> Tensor:
    """-log N(x; 0, I) per example, (N,) float64."""
    return sum_over_event(0.5 * (x.double() ** 2 + LOG_2PI))


def prior_kl(x_0: Tensor, log_alpha_bar: Tensor, beta_bar: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)) per example, nats, (N,) float64; the coefficients at t = T."""
    log_variance = torch.log(beta_bar)
    mean2 = torch.exp(log_alpha_bar) * x_0.double() ** 2
    return sum_over_event(0.5 * (mean2 + expm1_minus_identity(log_variance)))


def discretized_gaussian_nats(x: Tensor, mu: Tensor, sigma2: Tensor, bins: Bins) -> Tensor:
    """-log of the probability that N(mu, sigma2) gives to the bin around x, by exact CDFs.

    [DDPM] equation 13, in float64; value and gradients keep their digits from bins far narrower
    than sigma to bins that are far wider or 1e10 sigma away.

    Args:
        x, mu, sigma2: (N, *event) or broadcastable.

    Returns:
        nats per element, broadcast shape, float64.
    """
    half_width, lowest, highest = bins
    x, mu, sigma = x.double(), mu.double(), sigma2.double().sqrt()
    open_below = x < lowest + half_width
    open_above = ~open_below & (x > highest - half_width)
    one_sided = open_below | open_above
    width, middle = 2 * half_width / sigma, (x - mu) / sigma
    # Mirrored or not so that the bin is a lower tail, which ends at ``inner``.
    inner = width / 2 + torch.where(open_above | (~open_below & (middle > 0)), -middle, middle)
    narrow = ~one_sided & (width * (1 + middle.abs()) < 1e-3)
    central = ~narrow & (inner > 0)

    # Each form sees harmless numbers where another one holds: `where` stops no NaN of a gradient.
    a = torch.where(narrow | central, torch.zeros_like(inner), -inner) * math.sqrt(0.5)
    scaled = torch.special.erfcx(a)  # 2 exp(a^2) Phi(inner)
    # ln [Phi(inner) / Phi(inner - width)]; the difference of the squares is exact.
    log_ratio = width * (width / 2 + math.sqrt(2) * a) + torch.log(
        scaled / torch.special.erfcx(a + width * math.sqrt(0.5))
    )
    is_tail = ~(one_sided | narrow | central)
    missing = log1mexp(torch.where(is_tail, log_ratio, torch.ones_like(log_ratio)))
    tail = a * a - torch.log(scaled / 2) - torch.where(is_tail, missing, torch.zeros_like(missing))

    near = torch.where(central, inner, torch.ones_like(inner)) * math.sqrt(0.5)
    far = width * math.sqrt(0.5) - near
    outside = torch.erfc(near) + torch.where(one_sided, torch.zeros_like(far), torch.erfc(far))
    center = -torch.log1p(torch.where(central, -outside / 2, torch.zeros_like(outside)))

    # Density at the middle times the width, and the curvature of the density.
    width = torch.where(narrow, width, torch.ones_like(width))
    square = torch.where(narrow, middle, torch.zeros_like(middle)) ** 2
    thin = 0.5 * (square + LOG_2PI) - width.log() + width**2 * (1 - square) / 24
    return torch.where(narrow, thin, torch.where(central, center, tail))


def discretized_tanh_nats(x: Tensor, mu: Tensor, sigma2: Tensor, bins: Bins) -> Tensor:
    """`discretized_gaussian_nats` as [iDDPM] computes it, for parity with its figures.

    The normal CDF is approximated by (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2 and
    probabilities are at least 1e-12; it differs from the exact value by up to 0.6 nats.
    """
    half_width, lowest, highest = bins
    x, mu, sigma = x.double(), mu.double(), sigma2.double().sqrt()

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper, lower = cdf((x - mu + half_width) / sigma), cdf((x - mu - half_width) / sigma)
    probability = torch.where(x > highest - half_width, 1 - lower, upper - lower)
    probability = torch.where(x < lowest + half_width, upper, probability)
    return -probability.clamp_min(1e-12).log()


def bin_nats(edge: str) -> Callable[[Tensor, Tensor, Tensor, Bins], Tensor]:
    """The decoder of a discretized edge."""
    return discretized_tanh_nats if edge == "discretized_tanh" else discretized_gaussian_nats


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0, with full relative accuracy."""
    near = x < math.log(2.0)
    safe_near = torch.where(near, x, torch.ones_like(x))
    safe_far = torch.where(near, torch.ones_like(x), x)
    return torch.where(
        near, torch.log(-torch.expm1(-safe_near)), torch.log1p(-torch.exp(-safe_far))
    )


# Sampling, and products with other distributions ([DPM] section 2.5).


def observe(mu: Tensor, sigma2: Tensor, y: Tensor, sigma2_y: Tensor) -> tuple[Tensor, Tensor]:
    """Product of N(mu, sigma2) with N(y, sigma2_y), renormalized: its mean and variance.

    An infinite sigma2_y leaves an element as it was, whatever y is there.
    """
    weight, left = sigma2 / (sigma2 + sigma2_y), sigma2_y / (sigma2 + sigma2_y)
    infinite = torch.isinf(sigma2_y)
    mu = torch.where(infinite, mu, mu + weight * (y - mu))
    return mu, torch.where(infinite, sigma2, sigma2 * left)


def step(
    x_t: Tensor,
    mu_out: Tensor,
    sigma2_out: Tensor | None,
    rows: Tensor,
    seed: int,
    example_ids: Tensor,
    t: int | Tensor,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    observed: tuple[Tensor, Tensor | float] | None = None,
    drift: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """x_{t-1} given x_t; see `dpm_fast.ops.step`, whose reference this is. Differentiable."""
    mu, sigma2 = reverse_moments(x_t, mu_out, sigma2_out, rows)
    if observed is not None:
        sigma2_y = torch.as_tensor(observed[1], dtype=rows.dtype, device=x_t.device)
        mu, sigma2 = observe(mu, sigma2, observed[0], sigma2_y)
    if drift is not None:
        mu = mu + sigma2 * drift
    x_prev = mu
    if not deterministic:
        event = x_t.shape[1:]
        x_prev = mu + sigma2.sqrt() * normal(
            seed, Stream.REVERSE, example_ids, t, event, rows.dtype
        )
    x_prev = x_prev.to(x_t.dtype)
    return x_prev if known is None else torch.where(known[0], known[1], x_prev)


# Binomial diffusion ([DPM] table 1, section 2.1).


class BernoulliRow(NamedTuple):
    """Coefficients of a reverse step of bits, each broadcastable to x; jk: for x_0 = j, x_t = k.

    logit p(x_{t-1} = 1 | x_t) = o_k + z_0
    KL(q || p) = ln(1 + m_jk expm1(e)) - m_jk e,  e = d_jk + b_jk z_j
    z_j = the network's output out, or ln(1 + c sigmoid(h_jk + (1 - 2 j) out)) where c > 0

    m <= 1/2 is the probability that q(x_{t-1} | x_t, x_0) gives to the value it makes less likely,
    and e by how much p raises the log-odds of that value; e is formed without a logit of q less
    one of p where these nearly cancel. With c > 0 the output is a logit of x_0, over which
    q(x_{t-1} | x_t, x_0) is averaged: then c = expm1(logit q(1 | x_t, 1) - logit q(1 | x_t, 0)),
    h_0k = ln q(0 | k, 1) / q(0 | k, 0) and h_1k = ln q(1 | k, 0) / q(1 | k, 1).

    ``is_first`` is 1 at t = 1, where q is certain: e is the logit of the value that x_0 is not,
    m = 0, and the term is its code length, ln(1 + exp(e)).
    """

    c: Tensor
    is_first: Tensor
    o_0: Tensor
    o_1: Tensor
    d_00: Tensor
    d_01: Tensor
    d_10: Tensor
    d_11: Tensor
    b_00: Tensor
    b_01: Tensor
    b_10: Tensor
    b_11: Tensor
    h_00: Tensor
    h_01: Tensor
    h_10: Tensor
    h_11: Tensor
    m_00: Tensor
    m_01: Tensor
    m_10: Tensor
    m_11: Tensor


def bernoulli_row(rows: Tensor, num_dims: int) -> BernoulliRow:
    """Columns of rows (N, 20), each of shape (N, 1, ...) with ``num_dims`` dimensions."""
    return BernoulliRow(*_columns(rows, num_dims))


def bernoulli(rate: Tensor, u: Tensor) -> Tensor:
    """1 with probability ``rate``, from uniform numbers in (0, 1]; the dtype of ``u``.

    A rate that is NaN gives NaN, where a comparison would make a plausible 0 of it.
    """
    return torch.where(rate.isnan(), torch.nan, (u <= rate).to(u.dtype))


@torch.no_grad()
def bernoulli_noise(x_0: Tensor, rows: Tensor, seed: int, example_ids: Tensor, t: Tensor) -> Tensor:
    """x_t of q(x_t | x_0); see `dpm_fast.ops.bernoulli_noise`, whose reference this is.

    NaN in x_0 or in the rates gives NaN here. Kernels look at no values: they take NaN for 0, and
    `DiffusionModel.check_data` is what refuses it.
    """
    rate_0, rate_1 = _columns(rows, x_0.dim())
    u = uniform(seed, Stream.FORWARD, example_ids, t, x_0.shape[1:], rows.dtype)
    rate = torch.where(x_0.isnan(), torch.nan, torch.where(x_0 > 0.5, rate_1, rate_0))
    return bernoulli(rate, u).to(x_0.dtype)


def bernoulli_logit(x_t: Tensor, logit_out: Tensor, rows: Tensor) -> Tensor:
    """Logit of p(x_{t-1} = 1 | x_t), (N, *event) in the dtype of the rows (N, 20)."""
    row, is_one = bernoulli_row(rows, x_t.dim()), x_t > 0.5
    h = torch.where(is_one, row.h_01, row.h_00)
    return torch.where(is_one, row.o_1, row.o_0) + _bernoulli_z(row, h, logit_out, logit_out)


def bernoulli_observe(logit: Tensor, y: Tensor, flip: Tensor) -> Tensor:
    """The logit of a bit of which y was seen, flipped with probability ``flip`` in (0, 1/2]."""
    flip = flip.to(logit.dtype)
    gain = torch.log1p(-flip) - torch.log(flip)
    return logit + torch.where(y > 0.5, gain, -gain)


@torch.no_grad()
def bernoulli_step(
    x_t: Tensor,
    logit_out: Tensor,
    rows: Tensor,
    seed: int,
    example_ids: Tensor,
    t: Tensor,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    observed: tuple[Tensor, Tensor] | None = None,
    drift: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """x_{t-1} of p(x_{t-1} | x_t); see `dpm_fast.ops.bernoulli_step`, whose reference this is."""
    logit = bernoulli_logit(x_t, logit_out, rows)
    if observed is not None:
        logit = bernoulli_observe(logit, *observed)
    if drift is not None:
        logit = logit + drift
    if deterministic:
        x_prev = torch.where(logit.isnan(), torch.nan, (logit > 0).to(x_t.dtype))
    else:
        u = uniform(seed, Stream.REVERSE, example_ids, t, x_t.shape[1:], rows.dtype)
        x_prev = bernoulli(torch.sigmoid(logit), u).to(x_t.dtype)
    return x_prev if known is None else torch.where(known[0], known[1], x_prev)


def bernoulli_kl(x_0: Tensor, x_t: Tensor, logit_out: Tensor, rows: Tensor) -> Tensor:
    """One term of the bound per example; see `dpm_fast.ops.bernoulli_kl`, whose reference this is.

    Returns:
        (N,) float64 nats, summed over the elements in float64.
    """
    row, j, k = bernoulli_row(rows, x_t.dim()), x_0 > 0.5, x_t > 0.5

    def of_bits(at_00: Tensor, at_01: Tensor, at_10: Tensor, at_11: Tensor) -> Tensor:
        return torch.where(j, torch.where(k, at_11, at_10), torch.where(k, at_01, at_00))

    h = of_bits(row.h_00, row.h_01, row.h_10, row.h_11)
    z = _bernoulli_z(row, h, logit_out, torch.where(j, -logit_out, logit_out))
    d = of_bits(row.d_00, row.d_01, row.d_10, row.d_11)
    e = d + of_bits(row.b_00, row.b_01, row.b_10, row.b_11) * z
    m = of_bits(row.m_00, row.m_01, row.m_10, row.m_11)
    return sum_over_event(
        torch.where(row.is_first > 0, -F.logsigmoid(-e), bernoulli_divergence(m, e))
    )


def bernoulli_divergence(m: Tensor, e: Tensor) -> Tensor:
    """ln(1 + m (exp(e) - 1)) - m e for m in [0, 1/2], with full relative accuracy: the KL of a bit.

    q gives the probability m to one of its values, p log-odds that are higher by e.
    """
    largest = max_log_odds(e.dtype)
    limited = e.clamp_max(largest)
    growth = torch.log1p(m * torch.expm1(limited))
    far = growth - m * limited + (1 - m) * F.relu(e - largest)
    # Near equality each part is of second order in e.
    near = e.abs() < 0.1
    e = torch.where(near, e, torch.zeros_like(e))
    parts = m * expm1_minus_identity(e) + log1p_minus_identity(m * torch.expm1(e))
    return torch.where(near, parts, far)


def max_log_odds(dtype: torch.dtype) -> float:
    """Where m exp(e) is still finite, and so large that 1 is nothing beside it."""
    return 700.0 if dtype == torch.float64 else 80.0


def log1p_minus_identity(y: Tensor) -> Tensor:
    """ln(1 + y) - y for |y| < 0.1 without loss of digits: 2 artanh s - y with s = y / (2 + y)."""
    s = y / (2 + y)
    series = torch.zeros_like(s)
    for n in (13, 11, 9, 7, 5, 3):
        series = series * s * s + 1 / n
    return 2 * s**3 * series - y * s


def _bernoulli_z(row: BernoulliRow, h: Tensor, logit_out: Tensor, toward_h: Tensor) -> Tensor:
    # Not by torch.sigmoid, whose derivative cancels at large values.
    mixture = torch.log1p(row.c * torch.exp(F.logsigmoid(h + toward_h)))
    return torch.where(row.c > 0, mixture, logit_out)


def _columns(rows: Tensor, num_dims: int) -> Iterator[Tensor]:
    return (r.view(-1, *(1 for _ in range(num_dims - 1))) for r in rows.unbind(1))


def bernoulli_entropy(rate: Tensor) -> Tensor:
    """Entropy of a bit, nats; 0 at rates 0 and 1."""
    return -torch.xlogy(rate, rate) - torch.special.xlog1py(1 - rate, -rate)


def sum_over_event(values: Tensor) -> Tensor:
    """Sum of (N, *event) over the event in float64: (N,)."""
    return values.double().flatten(1).sum(dim=1)


def _clamp(x: Tensor, row: ReverseRow) -> Tensor:
    return torch.minimum(torch.maximum(x, row.low), row.high)


# Networks: the multiscale convolution and the temporal readout ([DPM] appendix D.2).


def multiscale_conv(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    *,
    activation: str = "per_scale",
    negative_slope: float = 0.05,
) -> Tensor:
    """One layer: convolve the image and its mean-pooled copies, bring all to full size, add.

        per_scale:  (1/S) sum_s up^s(leaky_relu(conv_s(pool^s(x))))    as the 2015 code computes it
        after_sum:  softplus(sum_s up^s(conv_s(pool^s(x))))            as the paper describes it

    with pool the mean of 2 x 2 pixels, up the repetition of each pixel in both directions, and
    zeros beyond the border of every scale.

    Args:
        x: (N, C, H, W), both sides divisible by 2**(S - 1).
        weights: S kernels (F, C, K, K), K odd, finest scale first; cross-correlated, not flipped.
        biases: S biases, (F,) or one per location, (F, H / 2**s, W / 2**s).
        activation: "per_scale" or "after_sum".
        negative_slope: of the leaky ReLU; "after_sum" has no use for it.

    Returns:
        (N, F, H, W).
    """
    if activation not in ("per_scale", "after_sum"):
        raise ValueError(f"activation must be 'per_scale' or 'after_sum', got {activation!r}")
    pooled = x
    maps = []
    for scale, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if scale > 0:
            pooled = F.avg_pool2d(pooled, 2)
        padding = weight.shape[-1] // 2
        if bias.ndim == 1:
            convolved = F.conv2d(pooled, weight, bias, padding=padding)
        else:
            convolved = F.conv2d(pooled, weight, padding=padding) + bias
        if activation == "per_scale":
            convolved = F.leaky_relu(convolved, negative_slope)
        maps.append(convolved)
    total = maps.pop()
    while maps:
        total = F.interpolate(total, scale_factor=2, mode="nearest") + maps.pop()
    if activation == "after_sum":
        return F.softplus(total)
    return total / len(weights) if len(weights) > 1 else total


def temporal_basis(num_steps: int, num_bumps: int) -> Tensor:
    """Bump functions of time, g_j(t) = exp(-(t - tau_j)^2 / 2 w^2) / (the same, summed over j).

    The centers tau_j are spread evenly over 1..T and w is half their spacing.

    Returns:
        (T + 1, J) float64, indexed by t; row 0 is zero, every other row sums to one.
    """
    # In units of the spacing from tau_1 = 0: the exponent is -(difference)^2 / (2 (1/2)^2).
    position = torch.linspace(0, num_bumps - 1, num_steps, dtype=torch.float64)
    center = torch.arange(num_bumps, dtype=torch.float64)
    bumps = (-2 * (position[:, None] - center) ** 2).softmax(dim=1)
    return torch.cat([torch.zeros(1, num_bumps, dtype=torch.float64), bumps])


def readout(features: Tensor, weight: Tensor, bias: Tensor, basis_rows: Tensor) -> Tensor:
    """The last linear layer of a network, whose coefficients are a mixture of bumps in time.

        W_t = sum_j g_j(t) W_j,  b_t = sum_j g_j(t) b_j,  out = W_t features + b_t

    The layer is contracted with the basis before it is applied: an example of P pixels then
    costs (J + P) O F multiplications instead of P J O F. A single vector (P = 1) with a timestep
    of its own would gain nothing by that, so it is contracted last.

    Args:
        features: (N, F, *spatial).
        weight: (J, O, F).
        bias: (J, O).
        basis_rows: (N, J) rows of `temporal_basis`, or (1, J) where all examples share t.

    Returns:
        (N, O, *spatial).
    """
    if features.ndim == 2 and basis_rows.shape[0] > 1:
        per_bump = F.linear(features, weight.flatten(0, 1), bias.flatten())
        return (basis_rows[:, :, None] * per_bump.unflatten(1, bias.shape)).sum(dim=1)
    return affine_per_example(features, *readout_layers(weight, bias, basis_rows))


def readout_layers(weight: Tensor, bias: Tensor, basis_rows: Tensor) -> tuple[Tensor, Tensor]:
    """W_t (N, O, F) and b_t (N, O) of `readout`."""
    return (basis_rows @ weight.flatten(1)).unflatten(1, weight.shape[1:]), basis_rows @ bias


def affine_per_example(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight[n] @ features[n] + bias[n], at every pixel.

    Args:
        features: (N, F, *spatial).
        weight: (N, O, F), or (1, O, F) for all examples.
        bias: (N, O), or (1, O).

    Returns:
        (N, O, *spatial).
    """
    if features.ndim > 2:
        x = features.flatten(2)
        if _gradient_keeps_order(x):
            weight = weight.expand(x.shape[0], -1, -1)
            if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
                dtype = torch.get_autocast_dtype(x.device.type)
                weight, x = weight.to(dtype), x.to(dtype)
            out = _MatrixOfEach.apply(weight, x)
        else:
            out = torch.matmul(weight, x)
        return (out + bias[:, :, None]).unflatten(2, features.shape[2:])
    if weight.shape[0] == 1:
        return F.linear(features, weight[0], bias[0])
    return (weight * features[:, None, :]).sum(dim=2) + bias


def _gradient_keeps_order(x: Tensor) -> bool:
    """Whether `_MatrixOfEach` is worth it, and no transformation is at work that it has no rule
    for."""
    return (
        x.requires_grad
        and x.stride(1) == 1
        and x.shape[1] > 1
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


class _MatrixOfEach(torch.autograd.Function):
    """out[n] = weight[n] @ x[n], [N, O, F] and [N, F, P], for x that is channels last in memory:
    its gradient is so too.

    Autograd's own would be channels first, and the layer before then takes 9 times as long (leaky
    ReLU of 512 x 20 x 28 x 28, one thread: 28.5 ms against 3.2 ms).
    """

    @staticmethod
    def forward(ctx, weight, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight, x)
        return torch.bmm(weight, x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        weight, x = ctx.saved_tensors
        grad_weight = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_weight = torch.bmm(grad, x.transpose(1, 2))
        if ctx.needs_input_grad[1]:
            grad_x = torch.bmm(grad.transpose(1, 2), weight).transpose(1, 2)
        return grad_weight, grad_x
