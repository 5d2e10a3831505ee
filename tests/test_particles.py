"""Sequential Monte Carlo: estimates beside posteriors that are known in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpm_fast import particles
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP
from dpm_fast.sampling import Posterior

T, N, K = 160, 16, 256  # so many steps that reverse kernels are all but Gaussian
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, -1.0], [1.0, 0.5]], dtype=torch.float64)
SIGMA2 = 0.1
FIRST = torch.tensor([True, False])


class ExactMixture(nn.Module):
    """Mean and log-variance of x_{t-1} given x_t, of data from a mixture of two Gaussians."""

    event_shape = (2,)

    def __init__(self, process: GaussianDiffusion):
        super().__init__()
        self.tables = process.tables()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        columns = self.tables._replace(**{k: v[t, None] for k, v in self.tables._asdict().items()})
        x, signal = x.double(), columns.alpha_bar.sqrt()
        variance = columns.alpha_bar * SIGMA2 + columns.beta_bar  # of x_t in a component
        away = x[:, None] - signal[..., None] * MEANS
        weights = (WEIGHTS.log() - 0.5 * (away**2).sum(2) / variance).softmax(1)[..., None]
        x_0 = MEANS + (signal * SIGMA2 / variance)[..., None] * away
        means = columns.c_0[..., None] * x_0 + columns.c_x[..., None] * x[:, None]
        mean = (weights * means).sum(1)
        within = columns.sigma2_q + columns.c_0**2 * SIGMA2 * columns.beta_bar / variance
        spread = (weights * (means - mean[:, None]) ** 2).sum(1) + within
        return torch.cat((mean, spread.log()), 1).float()


JOINT = torch.tensor([0.30, 0.02, 0.03, 0.15, 0.05, 0.05, 0.10, 0.30], dtype=torch.float64)
STATES = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])


class ExactBits(nn.Module):
    """Logits of x_{t-1} given x_t, of three bits with the probabilities `JOINT`."""

    event_shape = (3,)

    def __init__(self, process: BinomialDiffusion):
        super().__init__()
        self.process = process

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rates = self.process.noise_rows(t, x.double())[:, STATES]  # [N, 8, 3] of ones at t
        likelihood = torch.where(x[:, None] > 0.5, rates, 1 - rates).prod(2)
        of_x_0 = JOINT * likelihood
        of_x_0 = of_x_0 / of_x_0.sum(1, keepdim=True)
        q = self.process.tables().posterior[t]  # [N, i, j, k]
        n = torch.arange(len(x))[:, None, None]
        rate = (of_x_0[..., None] * q[n, 1, STATES, x[:, None].long()]).sum(1)
        return torch.logit(rate).float()


def mixture(num_steps: int = T) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("log_linear", num_steps)
    return DiffusionModel(process, ExactMixture(process), "previous", variance="learned")


def bits(num_steps: int = T) -> DiffusionModel:
    process = BinomialDiffusion(num_steps, prior_rate=0.4)
    return DiffusionModel(process, ExactBits(process), "rate")


Y, SIGMA_Y, TILT = torch.tensor([0.3, -0.6]), 0.7, torch.tensor([-2.0, 1.0])


def linear_log_r(x: Tensor) -> Tensor:
    return x @ TILT


def of_components(log_weights: Tensor, moments: Tensor) -> tuple[float, float]:
    """A moment of an element, and the log of the evidence."""
    return float(log_weights.softmax(0) @ moments), float(log_weights.logsumexp(0))


def truth(name: str) -> tuple[float, float]:
    """Posterior second moment of the first element (known: mean of the other), log evidence."""
    if name.startswith("observed"):
        total = SIGMA2 + SIGMA_Y**2
        log_weights = WEIGHTS.log() - ((Y - MEANS) ** 2).sum(1) / (2 * total)
        means = (MEANS + SIGMA2 / total * (Y - MEANS))[:, 0]
        log_weights = log_weights - math.log(2 * math.pi * total)
        return of_components(log_weights, means**2 + SIGMA2 * SIGMA_Y**2 / total)
    if name == "known":
        log_weights = WEIGHTS.log() - (Y[0] - MEANS[:, 0]) ** 2 / (2 * SIGMA2)
        log_weights = log_weights - 0.5 * math.log(2 * math.pi * SIGMA2)
        return of_components(log_weights, MEANS[:, 1])
    log_weights = WEIGHTS.log() + MEANS @ TILT.double() + 0.5 * SIGMA2 * float(TILT @ TILT)
    return of_components(log_weights, (MEANS + SIGMA2 * TILT)[:, 0] ** 2 + SIGMA2)


FACTORS: dict[str, Posterior] = {
    "observed_x_t": Posterior(observed=(Y, SIGMA_Y)),
    "observed_x0": Posterior(observed=(Y, SIGMA_Y), guidance="x0"),
    "known": Posterior(known=(FIRST, Y), known_as="forward"),
    "log_r": Posterior(log_r=linear_log_r),
}


def standard_errors(estimates: Tensor, expected: float) -> float:
    """How many standard errors a mean of independent estimates (n,) is from the truth."""
    error = estimates.std() / len(estimates) ** 0.5
    return float((estimates.mean() - expected).abs() / error)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "known" else pytest.mark.slow) for name in FACTORS],
)
def test_weighted_estimates_are_those_of_the_posterior(name: str) -> None:
    model, posterior = mixture(), FACTORS[name]

    def moment_of(x: Tensor) -> Tensor:
        return x[..., 1].double() if name == "known" else x[..., 0].double() ** 2

    weighted = model.sample(N, posterior=posterior, num_particles=K, batch_size=N * K, seed=1)
    assert weighted.samples.shape == (N, K, 2)
    assert weighted.log_weights.shape == (N, K)
    moment, log_evidence = truth(name)
    assert standard_errors(weighted.mean(moment_of(weighted.samples)), moment) < 3
    assert standard_errors((weighted.log_evidence - log_evidence).exp(), 1.0) < 3
    plain = model.sample(N * K, posterior=posterior, final="sample", batch_size=N * K, seed=1)
    assert standard_errors(moment_of(plain), moment) > 3


@pytest.mark.slow
def test_weighted_estimates_of_bits() -> None:
    y, known = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([False, False, True])
    flips = torch.where(y.long() == STATES, 0.8, 0.2).double().log().sum(1)
    has = torch.where(STATES[:, 2] == 1, 0.0, -math.inf).double()
    log_r = STATES.double() @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    cases = {
        "observed": (Posterior(observed=(y, 0.2)), flips),
        "known": (Posterior(known=(known, y), known_as="forward"), has),
        "log_r": (Posterior(log_r=lambda x: x @ torch.tensor([1.0, -2.0, 0.5])), log_r),
    }
    model = bits()
    for name, (posterior, factor) in cases.items():
        log_weights = JOINT.log() + factor
        rate, log_evidence = float(log_weights.softmax(0) @ STATES[:, 0].double()), log_weights
        weighted = model.sample(N, posterior=posterior, num_particles=K, batch_size=N * K, seed=2)
        assert standard_errors(weighted.mean()[:, 0], rate) < 3, name
        evidence = (weighted.log_evidence - log_evidence.logsumexp(0)).exp()
        assert standard_errors(evidence, 1.0) < 3, name
        plain = model.sample(N * K, posterior=posterior, batch_size=N * K, seed=2)
        assert standard_errors(plain[:, 0].double(), rate) > 3, name


@pytest.mark.parametrize("edge", [0.0, 1.5])
def test_what_is_impossible_on_the_way_is_not_in_the_end(edge: float) -> None:
    """log r of -infinity, of which nobody can say where x_t is bound for."""
    process = GaussianDiffusion(torch.linspace(1e-3, 0.2, 50))
    model = DiffusionModel(process, MLP(1, 50, hidden=(1,)))  # all outputs 0: of N(0, 1)
    above = Posterior(log_r=lambda x: torch.where(x[:, 0] > edge, 0.0 * x[:, 0], -torch.inf))
    weighted = model.sample(100, posterior=above, num_particles=64, batch_size=6400, stop=0)
    normal = torch.distributions.Normal(0.0, 1.0)
    probability = float(1 - normal.cdf(torch.tensor(edge)))
    assert standard_errors(weighted.log_evidence.exp(), probability) < 3
    mean = float(normal.log_prob(torch.tensor(edge)).exp()) / probability
    assert (
        abs(
            float((weighted.log_evidence.exp() * weighted.mean()[:, 0]).mean()) / probability - mean
        )
        < 0.1
    )
    assert (weighted.samples[weighted.log_weights > -torch.inf] > edge).all()


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_long_steps_leave_nothing_out(eta: float) -> None:
    """Ten steps, whose noise is small beside how far an observation moves their means."""
    process = GaussianDiffusion(torch.linspace(1e-3, 0.2, 50))
    model = DiffusionModel(process, MLP(1, 50, hidden=(1,)))
    posterior = Posterior(observed=(torch.tensor([1.0]), 0.5), guidance="x0")
    options = {"num_inference_steps": 10, "eta": eta, "stop": 0, "batch_size": 25_600}
    weighted = model.sample(100, posterior=posterior, num_particles=256, **options)
    plain = model.sample(20_000, **options, final="sample")[:, 0].double()
    likelihoods = torch.distributions.Normal(1.0, 0.5).log_prob(plain).exp()
    evidence = weighted.log_evidence.exp()
    spread = (evidence.var() / len(evidence) + likelihoods.var() / len(plain)) ** 0.5
    assert abs(evidence.mean() - likelihoods.mean()) < 3 * spread
    assert (weighted.least_effective_sample_size <= weighted.effective_sample_size).all()


def test_a_start_at_the_end_is_weighed() -> None:
    model, x = mixture(20), torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    posterior = Posterior(observed=(torch.tensor([1.0, 0.0]), 0.5))
    weighted = model.sample(2, num_particles=4, start=(1, x), posterior=posterior, final="x_1")
    normal = torch.distributions.Normal(torch.tensor([1.0, 0.0]), 0.5)
    expected = normal.log_prob(x).sum(1).double()
    torch.testing.assert_close(weighted.log_evidence, expected, rtol=1e-6, atol=1e-6)


def test_all_factors_at_once() -> None:
    model, known = mixture(20), (FIRST, Y)
    sigma = torch.tensor([torch.inf, SIGMA_Y])
    posterior = Posterior(known, (Y, sigma), linear_log_r, known_as="forward", guidance="x0")
    weighted = model.sample(3, posterior=posterior, num_particles=64)
    assert torch.equal(weighted.samples[..., 0], Y[0].expand(3, 64))
    assert (weighted.effective_sample_size > 6).all()
    assert weighted.log_evidence.isfinite().all()


def test_without_factors_all_weights_are_equal() -> None:
    weighted = mixture(20).sample(3, num_particles=8)
    torch.testing.assert_close(weighted.log_weights.exp(), torch.full((3, 8), 1 / 8).double())
    torch.testing.assert_close(weighted.effective_sample_size, torch.full((3,), 8.0).double())
    assert weighted.log_evidence.abs().max() < 1e-12
    assert not weighted.num_resamplings.any()
    assert repr(weighted).startswith(
        "WeightedSamples(samples (3, 8, 2), least effective sample size 8.0 of 8, mean log evidence"
    )
    plain = mixture(20).sample(24, final="sample")  # ids k id + i are 0..23
    torch.testing.assert_close(weighted.samples.flatten(0, 1), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(weighted.mean(), plain.view(3, 8, 2).double().mean(1))


def test_particles_depend_on_neither_batch_nor_place() -> None:
    posterior = FACTORS["observed_x_t"]
    whole = mixture(20).sample(4, posterior=posterior, num_particles=32, seed=3)
    assert whole.num_resamplings.sum() > 0
    for batch_size in (5, 40):
        again = mixture(20).sample(
            4, posterior=posterior, num_particles=32, seed=3, batch_size=batch_size
        )
        torch.testing.assert_close(again.samples, whole.samples, rtol=0, atol=1e-5)
        torch.testing.assert_close(again.log_weights, whole.log_weights, rtol=0, atol=1e-3)
    ids = torch.tensor([3, 1])
    some = mixture(20).sample(2, example_ids=ids, posterior=posterior, num_particles=32, seed=3)
    torch.testing.assert_close(some.samples, whole.samples[ids], rtol=0, atol=1e-5)


def test_factors_and_starts_of_each_example() -> None:
    y = torch.tensor([[1.0, 0.5], [-1.0, -1.0]])
    start = (3, torch.stack((y[1], y[0])))
    weighted = mixture(20).sample(
        2, posterior=Posterior(observed=(y, 0.5)), num_particles=16, start=start
    )
    # From three steps before the end no particle gets across to the observation.
    torch.testing.assert_close(weighted.mean(), start[1].double(), rtol=0, atol=0.8)
    assert (weighted.log_evidence < -3).all()


def test_systematic_resampling() -> None:
    weights = torch.tensor([[0.9, 0.0, 0.06, 0.04], [0.25, 0.25, 0.25, 0.25]]).double()
    u = torch.tensor([[0.5], [0.5]])
    ancestors, is_resampled = particles._ancestors(weights.log(), u)
    assert ancestors.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]
    assert is_resampled.tolist() == [True, False]
    ancestors, _ = particles._ancestors(weights.log(), torch.ones(2, 1))
    assert ancestors.tolist() == [[0, 0, 0, 3], [0, 1, 2, 3]]
    # Each comes k w_i times on average over u.
    number = 4000
    u = ((torch.arange(number) + 0.5) / number)[:, None]
    ancestors, _ = particles._ancestors(weights[:1].log().expand(number, -1), u)
    counts = torch.bincount(ancestors.flatten(), minlength=4).double() / number
    torch.testing.assert_close(counts, 4 * weights[0], rtol=0, atol=1e-3)


def test_no_examples() -> None:
    weighted = mixture(4).sample(0, num_particles=3)
    assert weighted.samples.shape == (0, 3, 2)
    assert weighted.log_weights.shape == (0, 3)
    assert weighted.mean().shape == (0, 2)
    assert repr(weighted) == "WeightedSamples(samples (0, 3, 2))"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_particles": 0}, "num_particles must be at least 1, got 0"),
        ({"final": "mean"}, "num_particles requires draws all the way: .* got 'mean'"),
        ({"return_trajectory": [1]}, "num_particles .* takes neither return_trajectory"),
        ({"posterior": Posterior(known=(FIRST, Y))}, "requires known_as 'forward', got 'clean'"),
        ({"num_particles": 10**12}, "num_particles must be so few that .* got 1000000000000 for"),
        (
            {"posterior": Posterior(log_r=lambda x: (x - x.detach()).sum(1).abs().sqrt())},
            "log_r must have a finite gradient, got NaN",
        ),
        (
            {"posterior": Posterior(log_r=lambda x: x.sum(1) + (x.detach() * torch.nan).sum(1))},
            "log_r must be a number or -infinity, got NaN or infinity",
        ),
        (
            {"posterior": Posterior(log_r=lambda x: x.sum(1) - torch.inf)},
            "the posterior must give some particle a weight, got 0 for all",
        ),
    ],
)
def test_sample_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(4).sample(2, **{"num_particles": 4} | arguments)


def test_numbers_of_particles_are_integers() -> None:
    with pytest.raises(TypeError, match="num_particles must be an integer, got float"):
        mixture(4).sample(2, num_particles=2.0)
    with pytest.raises(ValueError, match=r"values must have shape \(2, 4, ...\), got \(2, 3\)"):
        mixture(4).sample(2, num_particles=4).mean(torch.zeros(2, 3))
