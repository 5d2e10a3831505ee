"""Sequential Monte Carlo: samples of a product of distributions with weights that make it exact.

The perturbed reverse kernels of `dpm_fast.sampling` ([DPM] section 2.5) are a proposal here. Let
p(x_{t-1} | x_t) be the model's kernel, p~ the perturbed one, and r_t(x_t) a guess at what the
factors say of x_t, with r_0 = r and r_T = 1. A step multiplies the weight of a particle by

    p(x_{t-1} | x_t) r_{t-1}(x_{t-1}) / (p~(x_{t-1} | x_t) r_t(x_t)),

whose product over a trajectory is p(x_0 ... x_T) r(x_0) / p~(x_0 ... x_T): r_t cancels, and only
decides who survives. Where the weights of an example have become uneven its particles are
resampled. r_t looks ahead to x_0 (twisted sequential Monte Carlo; Wu et al. 2023,
arXiv:2306.17775). All weights are in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpm_fast import noise, ops, reference, sampling

if TYPE_CHECKING:
    from dpm_fast.model import DiffusionModel
    from dpm_fast.sampling import Posterior, Request


# A step of a particle takes for each element, beside the network: 16 numbers, as measured.
_BYTES_OF_STEP = 16 * 8
# What steers an example's particles: a log r of -infinity counts as so much below the best of
# them, and log_r moves a mean by so many standard deviations, or a logit by so many nats, at most.
# Weights make up for the rest; for a kernel that leaves out where the product has mass, none could.
_NATS_OF_NEVER = 3.0
_MOST_SIGMAS = 1.0
_MOST_NATS = 3.0


@dataclass(frozen=True)
class WeightedSamples:
    """k particles of each of n examples, and how much each counts.

    Attributes:
        samples: (n, k, *event), in the model's scale.
        log_weights: (n, k) float64; their exponentials sum to 1 over the particles.
        effective_sample_size: (n,) float64, 1 / sum of squared weights, in 1..k: how many equally
            weighted samples the last weights are worth.
        least_effective_sample_size: (n,) float64, the least on the way, before resamplings, which
            make weights equal again. Near k, the perturbed kernels sample the product all but
            exactly; a few of k, and k is too small.
        log_evidence: (n,) float64 nats, log of an unbiased estimate of the integral of
            p(x_0) r(x_0): of log p(y), or of the log density of what is known.
        num_resamplings: (n,) int64, how often the particles were resampled on the way. Those of
            one example have then ancestors in common, and are not independent.
    """

    samples: Tensor
    log_weights: Tensor
    effective_sample_size: Tensor
    least_effective_sample_size: Tensor
    log_evidence: Tensor
    num_resamplings: Tensor

    def __repr__(self) -> str:
        n, k = self.log_weights.shape
        figures = ""
        if n:
            figures = (
                f", least effective sample size {self.least_effective_sample_size.min():.1f} of "
                f"{k}, mean log evidence {self.log_evidence.mean():.4f} nats"
            )
        return f"WeightedSamples(samples {tuple(self.samples.shape)}{figures})"

    def mean(self, values: Tensor | None = None) -> Tensor:
        """Weighted mean over the particles, (n, ...) float64.

        Args:
            values: (n, k, ...), some function of each sample; the samples themselves by default.

        Raises:
            ValueError: for values that are not of each particle.
        """
        values = self.samples if values is None else values
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a tensor, got {type(values).__name__}")
        shape = self.log_weights.shape
        if values.shape[:2] != shape:
            raise ValueError(
                f"values must have shape ({shape[0]}, {shape[1]}, ...), got {tuple(values.shape)}"
            )
        weights = self.log_weights.exp().view(shape + (1,) * (values.dim() - 2))
        return torch.where(weights > 0, weights * values, 0.0).sum(1)  # not 0 times infinity


def sample(model: DiffusionModel, request: Request, num_particles: int) -> WeightedSamples:
    """See `DiffusionModel.sample`."""
    event_shape, k = sampling.check(model, request), num_particles
    _check(model, request, k, math.prod(event_shape))
    device, dtype = sampling.place_of(model)
    shape, ids = torch.Size((request.n, *event_shape)), request.ids(device)
    if request.n == 0:
        none = torch.empty(0, dtype=torch.float64, device=device)
        samples = none.new_empty(0, k, *event_shape, dtype=dtype)
        return WeightedSamples(samples, none.new_empty(0, k), none, none, none, none.long())
    parts = [
        _of_examples(model, request, k, shape, ids, slice(first, first + per_batch))
        for per_batch in [max(1, request.batch_size // k)]
        for first in range(0, request.n, per_batch)
    ]
    samples, log_weights, least, num_resamplings = map(torch.cat, zip(*parts, strict=True))
    log_evidence = torch.logsumexp(log_weights, 1) - math.log(k)
    if sampling.is_wrong(log_evidence.isnan()):
        raise ValueError("the network must return finite values, got weights that are NaN")
    if sampling.is_wrong(log_evidence == -math.inf):
        first = int((log_evidence == -math.inf).nonzero()[0])
        raise ValueError(
            f"the posterior must give some particle a weight, got 0 for all {k} of example {first}"
        )
    log_weights = torch.log_softmax(log_weights, 1)
    size = _effective_size(log_weights)
    least = torch.minimum(least, size)
    return WeightedSamples(samples, log_weights, size, least, log_evidence, num_resamplings)


def _check(model: DiffusionModel, request: Request, k: int, num_elements: int) -> None:
    if k < 1:
        raise ValueError(f"num_particles must be at least 1, got {k}")
    route = request.route
    if route.final == "mean":
        raise ValueError(
            "num_particles requires draws all the way: final 'x_1' or 'sample', got 'mean'"
        )
    posterior = request.posterior
    if posterior.known is not None and posterior.known_as == "clean":
        raise ValueError(
            "num_particles requires known_as 'forward', got 'clean': no weights make samples of "
            "the posterior out of trajectories that hold the clean values at every t"
        )
    if request.return_trajectory is not None or (route.end and not route.writes_known):
        raise ValueError(
            "num_particles gives weights of samples alone, and takes neither return_trajectory "
            "nor a stop before them"
        )
    if request.callback is not None:
        raise ValueError("num_particles takes no callback: states without weights say nothing")
    if route.reverse.is_deterministic:
        raise ValueError("num_particles requires steps with a density, got eta 0")
    if posterior.known is not None and not route.timesteps:
        raise ValueError("num_particles with known elements requires a step, got none")
    if sampling.is_wrong(request.ids(torch.device("cpu")).abs() > (2**63 - 1) // k - 1):
        raise ValueError(f"example_ids must be within +-2**63 / num_particles, which is {k}")
    device, dtype = sampling.place_of(model)
    at_a_time = min(request.n, max(1, request.batch_size // k))
    needed = request.n * dtype.itemsize + at_a_time * _BYTES_OF_STEP
    needed, there = needed * k * num_elements, _memory(device)
    if needed > there:
        raise ValueError(
            f"num_particles must be so few that they fit into {there / 2**30:.1f} GiB of memory, "
            f"got {k} for each of {request.n} examples, about {needed / 2**30:.1f} GiB"
        )


def _memory(device: torch.device) -> int:
    """Bytes of memory of a device that nobody uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            (line,) = (line for line in file if line.startswith("MemAvailable:"))
    except (OSError, ValueError):  # a system that does not tell
        return 2**63
    return 1024 * int(line.split()[1])


def _of_examples(
    model: DiffusionModel,
    request: Request,
    k: int,
    shape: torch.Size,
    ids: Tensor,
    index: slice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples (B, k, *event), log-weights (B, k), least effective sample sizes and numbers of
    resamplings (B,) of B examples."""
    first_ids = ids[index] * k
    particle_ids = (first_ids[:, None] + torch.arange(k, device=ids.device)).flatten()
    num_examples, seed = len(first_ids), request.seed
    x = sampling.start_of_batch(model, request, shape, index, particle_ids, k)
    posterior = request.posterior.to_batch(shape, index, x, repeats=k)
    kind = _Gaussian if model.process.kind == "gaussian" else _Bits
    kernels = kind(request.route.reverse, posterior)
    log_weights = torch.zeros(num_examples, k, dtype=torch.float64, device=x.device)
    num_resamplings = torch.zeros_like(first_ids)
    least = torch.full_like(first_ids, k, dtype=torch.float64)
    steps = request.route.timesteps
    for t in steps:
        t_of_each = torch.full_like(particle_ids, t)
        out = _network_output(model, x, t_of_each, request.batch_size)
        moments, log_r = kernels.moments(x, t_of_each, out), torch.zeros_like(log_weights)
        if t != steps[0]:
            log_r = kernels.log_r(x, t_of_each, moments, k).view_as(log_weights)
            log_weights = log_weights + log_r
            least = torch.minimum(least, _effective_size(log_weights))
            u = ops.uniform(seed, noise.Stream.RESAMPLING, first_ids, t, (1,))
            ancestors, is_resampled = _ancestors(log_weights, u)
            num_resamplings = num_resamplings + is_resampled
            mean = (torch.logsumexp(log_weights, 1) - math.log(k))[:, None]
            log_weights = torch.where(is_resampled[:, None], mean, log_weights)
            rows = (ancestors + k * torch.arange(num_examples, device=x.device)[:, None]).flatten()
            x, log_r = x[rows], log_r.flatten()[rows].view_as(log_r)
            moments = tuple(moment[rows] for moment in moments)
        x, log_ratio = kernels.step(x, t_of_each, moments, seed, particle_ids, t == steps[-1])
        log_weights = log_weights + log_ratio.view_as(log_weights) - log_r
    log_weights = log_weights + kernels.log_r(x, None, (), k).view_as(log_weights)
    return x.unflatten(0, (num_examples, k)), log_weights, least, num_resamplings


def _network_output(model: DiffusionModel, x: Tensor, t: Tensor, batch_size: int) -> Tensor:
    """For all particles, so many at once."""
    parts = zip(x.split(batch_size), t.split(batch_size), strict=True)
    return torch.cat([model.network_output(*part) for part in parts])


def _effective_size(log_weights: Tensor) -> Tensor:
    """1 / sum of squared normalized weights, (N,)."""
    twice_the_sum = 2 * torch.logsumexp(log_weights, 1)
    return (twice_the_sum - torch.logsumexp(2 * log_weights, 1)).exp()


def _ancestors(log_weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Whose places particles take, (N, k), and whether those of an example were resampled, (N,).

    Systematic resampling where the effective sample size is below k / 2: particle i comes k w_i
    times on average, and never differs from that by 1 or more.

    Args:
        log_weights: (N, k) float64.
        u: (N, 1), uniform in (0, 1].
    """
    k = log_weights.shape[1]
    is_resampled = _effective_size(log_weights) < k / 2
    edges = torch.softmax(log_weights, 1).cumsum(1)
    edges = edges / edges[:, -1:]  # ends at 1, the last place that is asked for
    own = torch.arange(k, device=u.device).expand(log_weights.shape)
    places = (own + u.double()) / k
    drawn = torch.searchsorted(edges, places).clamp_max(k - 1)
    return torch.where(is_resampled[:, None], drawn, own), is_resampled


class _Gaussian:
    """Perturbed kernels of a Gaussian process, all in float64."""

    def __init__(self, reverse: Any, posterior: Posterior):
        self.reverse, self.posterior = reverse, posterior

    def moments(self, x: Tensor, t: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """mu_p and sigma2_p."""
        mu, sigma2 = self.reverse.moments(x.double(), t, out.double())
        return mu, sigma2.expand_as(mu)

    def log_r(self, x: Tensor, t: Tensor | None, moments: tuple[Tensor, ...], k: int) -> Tensor:
        """log r_t of x (N,), k particles an example, or log r itself where t is None.

        x_t says of x_0 what N(prediction, 1 - alpha_bar_t) does, and ``log_r`` is that of the
        prediction. To hold r constant in t, as the perturbed kernels may, would cancel as well, but
        early states at the data's scale are rare, and resampling would choose them.
        """
        posterior, x_0 = self.posterior, x.double()
        variance = torch.zeros((), dtype=torch.float64, device=x.device)
        if t is not None:
            variance = self.reverse.beta_bar(t, x_0)
            x_0 = self.reverse.x_0_from_mean(moments[0], x_0, t)
        total = _value(posterior, x_0.to(x.dtype), k, is_guess=t is not None)
        if posterior.known is not None and t is not None:
            mask, values = posterior.known
            nats = torch.where(mask, _log_normal(values.double(), x_0, variance), 0.0)
            total = total + reference.sum_over_event(nats)
        if posterior.observed is not None:
            y, sigma2_y = sampling.observation(posterior, x_0)
            nats = _log_normal(y, x_0, sigma2_y + variance)
            nats = torch.where(torch.isinf(sigma2_y), 0.0, nats)
            total = total + reference.sum_over_event(nats)
        return total

    def step(
        self,
        x: Tensor,
        t: Tensor,
        moments: tuple[Tensor, ...],
        seed: int,
        ids: Tensor,
        is_last: bool,
    ) -> tuple[Tensor, Tensor]:
        """x_{t-1} of the perturbed kernel, and log p(x_{t-1} | x_t) less log p~ of it, (N,)."""
        wide = x.double()
        mu, sigma2 = moments
        mu_r, sigma2_r, shift = sampling.perturbed(
            self.reverse, wide, t, mu, sigma2, self.posterior, x.dtype
        )
        most = _MOST_SIGMAS * sigma2_r.sqrt()
        mu_r = mu_r + torch.minimum(torch.maximum(shift, -most), most)
        eps = ops.normal(seed, noise.Stream.REVERSE, ids, t, x.shape[1:], torch.float64)
        known = self.posterior.known
        if known is not None:
            # Known elements cross a bridge to their values: q(x_{t-1} | x_t, x_0).
            tables = self.reverse.tables(x.device)
            at = _shaped(t, x)
            bridge = tables.c_0[at] * known[1].double() + tables.c_x[at] * wide
            mu_r = torch.where(known[0], bridge, mu_r)
            sigma2_r = torch.where(known[0], tables.sigma2_q[at], sigma2_r)
        x_prev = (mu_r + sigma2_r.sqrt() * eps).to(x.dtype)
        if known is not None and is_last:
            x_prev = torch.where(known[0], known[1], x_prev)
        log_p, log_r = (
            _log_normal(x_prev.double(), *kernel) for kernel in ((mu, sigma2), (mu_r, sigma2_r))
        )
        if known is not None and is_last:
            log_r = torch.where(known[0], 0.0, log_r)  # the values, and nothing else
        return x_prev, reference.sum_over_event(log_p - log_r)


class _Bits:
    """Perturbed kernels of a binomial process, in float64."""

    def __init__(self, reverse: Any, posterior: Posterior):
        self.reverse, self.posterior = reverse, posterior

    def moments(self, x: Tensor, t: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        """Logit of p(x_{t-1} = 1 | x_t)."""
        return (self.reverse.logit(x.double(), t, out.double()),)

    def log_r(self, x: Tensor, t: Tensor | None, moments: tuple[Tensor, ...], k: int) -> Tensor:
        """As of `_Gaussian`, but ``observed`` and ``log_r`` are held constant in t: bits at any t
        are of the data's scale. Of known bits x_t says q(x_t | x_0) beside its prior's probability.
        """
        posterior, total = self.posterior, _value(self.posterior, x, k, is_guess=t is not None)
        if posterior.known is not None and t is not None:
            process = self.reverse.process
            rates = process.noise_rows(t, x.double()).unbind(1)  # for values 0 and 1
            rate_0, rate_1 = (_shaped(rate, x) for rate in rates)
            mask, values = posterior.known
            rate, rho = torch.where(values > 0.5, rate_1, rate_0), process.prior_rate
            nats = torch.where(x > 0.5, rate / rho, (1 - rate) / (1 - rho)).log()
            total = total + reference.sum_over_event(torch.where(mask, nats, 0.0))
        if posterior.observed is not None:
            y, flip = posterior.observed
            flip = torch.as_tensor(flip, dtype=torch.float64, device=x.device)
            nats = torch.where(x == y, torch.log1p(-flip), torch.log(flip))
            total = total + reference.sum_over_event(nats)
        return total

    def step(
        self,
        x: Tensor,
        t: Tensor,
        moments: tuple[Tensor, ...],
        seed: int,
        ids: Tensor,
        is_last: bool,
    ) -> tuple[Tensor, Tensor]:
        """As of `_Gaussian`."""
        (logit,) = moments
        logit_r, drift = sampling.perturbed_logit(logit, self.posterior, x.dtype)
        logit_r = logit_r if drift is None else logit_r + drift.clamp(-_MOST_NATS, _MOST_NATS)
        known = self.posterior.known
        if known is not None and not is_last:
            q = self.reverse.process.tables(x.device).posterior
            at = q[_shaped(t, x), :, known[1].long(), x.long()]
            logit_r = torch.where(known[0], at[..., 1].log() - at[..., 0].log(), logit_r)
        u = ops.uniform(seed, noise.Stream.REVERSE, ids, t, x.shape[1:], torch.float64)
        x_prev = reference.bernoulli(torch.sigmoid(logit_r), u)
        if known is not None and is_last:
            x_prev = torch.where(known[0], known[1].double(), x_prev)
        sign = 2 * x_prev - 1
        log_p, log_r = F.logsigmoid(sign * logit), F.logsigmoid(sign * logit_r)
        if known is not None and is_last:
            log_r = torch.where(known[0], 0.0, log_r)
        return x_prev.to(x.dtype), reference.sum_over_event(log_p - log_r)


def _value(posterior: Posterior, x: Tensor, k: int, *, is_guess: bool) -> Tensor:
    """log r of the user's function, (N,) float64 nats; 0 without one.

    A guess is finite: r_t must be positive wherever r can be, or it would not cancel. What
    -infinity becomes is relative to the k particles of an example.
    """
    if posterior.log_r is None:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)
    value = sampling.value_of(posterior.log_r, x).double()
    if not is_guess:
        return value
    best = value.view(-1, k).amax(1, keepdim=True)
    never = torch.where(best.isinf(), 0.0, best - _NATS_OF_NEVER).expand(-1, k).flatten()
    return torch.where(value.isinf(), never, value)


def _shaped(t: Tensor, x: Tensor) -> Tensor:
    """(N,) as (N, 1, ...), which broadcasts against x."""
    return t.view(-1, *(1 for _ in x.shape[1:]))


def _log_normal(x: Tensor, mu: Tensor, sigma2: Tensor) -> Tensor:
    """log N(x; mu, sigma2) of each element."""
    return -0.5 * ((x - mu) ** 2 / sigma2 + sigma2.log() + reference.LOG_2PI)
