"""Samples: a function of seed and example id; products with known, observed and other factors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpm_fast import noise
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP
from dpm_fast.sampling import Posterior

NUM_STEPS, DIM, NUM_EXAMPLES = 12, 5, 8


def network(num_outputs: int = 2) -> nn.Module:
    """An untrained network whose outputs are not zero."""
    generator = torch.Generator().manual_seed(3)
    module = MLP(DIM, NUM_STEPS, hidden=(8,), num_outputs=num_outputs)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def gaussian(parameterization: str = "perturbation", variance: str | None = None) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
    outputs = process.reverse(parameterization, variance).num_outputs
    return DiffusionModel(process, network(outputs), parameterization, variance=variance)


def binomial(parameterization: str = "rate") -> DiffusionModel:
    process = BinomialDiffusion(NUM_STEPS, prior_rate=0.3)
    return DiffusionModel(process, network(1), parameterization)


class Zero(nn.Module):
    """With "perturbation", the exact reverse kernel of unit-Gaussian data."""

    num_steps, event_shape = NUM_STEPS, (DIM,)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((0 * x, 0 * x), dim=1)


def exact_kernel() -> DiffusionModel:
    return DiffusionModel(GaussianDiffusion.from_schedule("erase", NUM_STEPS), Zero())


def values(seed: int = 7, n: int = NUM_EXAMPLES) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([True, False, True, False, False])
MODELS = {
    "perturbation": lambda: gaussian(),
    "decay": lambda: gaussian("decay"),
    "epsilon": lambda: gaussian("epsilon"),
    "velocity_range": lambda: gaussian("velocity", "learned_range"),
    "rate": lambda: binomial(),
    "binomial_x0": lambda: binomial("x0"),
}


@pytest.mark.parametrize("name", MODELS)
def test_samples_do_not_depend_on_the_batch(name: str) -> None:
    model = MODELS[name]()
    whole = model.sample(NUM_EXAMPLES, seed=5)
    assert whole.shape == (NUM_EXAMPLES, DIM)
    assert whole.dtype == torch.float32
    assert whole.std() > 0.1
    for batch_size in (1, 7):
        torch.testing.assert_close(
            model.sample(NUM_EXAMPLES, seed=5, batch_size=batch_size), whole, rtol=0, atol=1e-5
        )
    ids = torch.tensor([6, 2])
    torch.testing.assert_close(
        model.sample(2, seed=5, example_ids=ids), whole[ids], rtol=0, atol=1e-5
    )
    assert not torch.equal(model.sample(NUM_EXAMPLES, seed=6), whole)


def test_noise_is_the_same_for_every_batch_size_bit_for_bit() -> None:
    ids = torch.arange(NUM_EXAMPLES)
    whole = noise.normal(5, noise.Stream.REVERSE, ids, 4, (DIM,))
    for batch_size in (1, 7):
        parts = [
            noise.normal(5, noise.Stream.REVERSE, part, 4, (DIM,)) for part in ids.split(batch_size)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("t", [1, 5, NUM_STEPS])
def test_a_trajectory_continues_from_any_of_its_states(name: str, t: int) -> None:
    model = MODELS[name]()
    samples, states = model.sample(
        NUM_EXAMPLES, seed=5, final="sample", return_trajectory=range(NUM_STEPS + 1)
    )
    assert sorted(states) == list(range(NUM_STEPS + 1))
    assert torch.equal(states[0], samples)
    again = model.sample(NUM_EXAMPLES, seed=5, final="sample", start=(t, states[t]))
    torch.testing.assert_close(again, samples, rtol=0, atol=1e-5)


def test_final_step() -> None:
    model = gaussian()
    x_1, states = model.sample(NUM_EXAMPLES, return_trajectory=[1])
    assert torch.equal(x_1, states[1])
    t = torch.ones(NUM_EXAMPLES, dtype=torch.int64)
    with torch.no_grad():
        mu, sigma2 = model.reverse.moments(x_1, t, model.network_output(x_1, t))
    torch.testing.assert_close(model.sample(NUM_EXAMPLES, final="mean"), mu, rtol=0, atol=1e-6)
    eps = noise.normal(0, noise.Stream.REVERSE, torch.arange(NUM_EXAMPLES), 1, (DIM,))
    torch.testing.assert_close(
        model.sample(NUM_EXAMPLES, final="sample"), mu + sigma2.sqrt() * eps, rtol=0, atol=1e-6
    )


def test_no_samples() -> None:
    assert gaussian().sample(0).shape == (0, DIM)


@pytest.mark.parametrize("known_as", ["clean", "forward"])
@pytest.mark.parametrize("name", MODELS)
def test_known_elements_are_bit_equal(name: str, known_as: Any) -> None:
    model = MODELS[name]()
    clean = values() if model.process.kind == "gaussian" else (values() > 0).float()
    posterior = Posterior(known=(MASK, clean), known_as=known_as)
    samples, states = model.sample(
        NUM_EXAMPLES, posterior=posterior, return_trajectory=[4, NUM_STEPS]
    )
    assert torch.equal(samples[:, MASK], clean[:, MASK])
    assert not torch.equal(samples[:, ~MASK], clean[:, ~MASK])
    for t, state in states.items():
        expected = clean
        if known_as == "forward":
            level = torch.full((NUM_EXAMPLES,), t)
            expected = model.process.sample_x_t(clean, level, 0, torch.arange(NUM_EXAMPLES))
        assert torch.equal(state[:, MASK], expected[:, MASK])


@pytest.mark.parametrize("known_as", ["clean", "forward"])
def test_known_elements_are_put_into_a_given_start(known_as: Any) -> None:
    model, start = gaussian(), (5, values(8))
    posterior = Posterior(known=(MASK, values()), observed=(values(9), 0.3), known_as=known_as)
    options: dict[str, Any] = {"posterior": posterior, "return_trajectory": [5]}
    samples, states = model.sample(NUM_EXAMPLES, start=start, **options)
    expected = values()
    if known_as == "forward":
        level = torch.full((NUM_EXAMPLES,), 5)
        expected = model.process.sample_x_t(values(), level, 0, torch.arange(NUM_EXAMPLES))
    assert torch.equal(states[5], torch.where(MASK, expected, values(8)))
    again, _ = model.sample(NUM_EXAMPLES, start=(5, states[5]), **options)
    assert torch.equal(again, samples)


@pytest.mark.parametrize("sigma", [0.3, 2.0])
@pytest.mark.parametrize("guidance", ["x_t", "x0"])
def test_observed_is_the_product_of_gaussians(guidance: Any, sigma: float) -> None:
    # Unit-Gaussian data under the exact kernel: the chain is a linear recursion in float64.
    model, y = exact_kernel(), values()
    tables = model.process.tables()
    ids = torch.arange(NUM_EXAMPLES)
    x = y.double()
    if guidance == "x0":
        x = model.process.sample_x_T((DIM,), 5, ids, torch.float32).double()
    for t in range(NUM_STEPS, 1, -1):
        beta, beta_bar = tables.beta[t], tables.beta_bar[t]
        eps = noise.normal(5, noise.Stream.REVERSE, ids, t, (DIM,)).double()
        mu, sigma2 = (1 - beta).sqrt() * x, beta
        if guidance == "x_t":
            precision = 1 / beta + 1 / sigma**2
            mu, sigma2 = (mu / beta + y / sigma**2) / precision, 1 / precision
        else:
            x_0 = tables.alpha_bar[t].sqrt() * x
            shifted = (x_0 / beta_bar + y / sigma**2) / (1 / beta_bar + 1 / sigma**2)
            mu = mu + tables.c_0[t] * (shifted - x_0)
        x = mu + sigma2.sqrt() * eps
    posterior = Posterior(observed=(y, sigma), guidance=guidance)
    samples = model.sample(NUM_EXAMPLES, seed=5, posterior=posterior)
    torch.testing.assert_close(samples.double(), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", ["x_t", "x0"])
def test_elements_with_infinite_sigma_are_not_observed(guidance: Any) -> None:
    model = exact_kernel()
    plain = model.sample(NUM_EXAMPLES, seed=5)
    sigma = torch.where(MASK, torch.inf, 0.1)
    posterior = Posterior(observed=(values(), sigma), guidance=guidance)
    samples = model.sample(NUM_EXAMPLES, seed=5, posterior=posterior)
    torch.testing.assert_close(samples[:, MASK], plain[:, MASK], rtol=0, atol=1e-6)
    assert (samples - plain)[:, ~MASK].abs().mean() > 0.1


def test_gaussian_log_r_equals_observed_to_first_order() -> None:
    # The mean moves by sigma2 / (sigma2 + sigma_y^2) of the way to y, or sigma2 / sigma_y^2.
    model, y, start = gaussian(), values(), (1, values(8))
    plain = model.sample(NUM_EXAMPLES, start=start, final="mean")
    errors = []
    for sigma in (1.0, 2.0):
        factors = (
            Posterior(log_r=lambda x, s=sigma: -0.5 * ((x - y) ** 2).sum(1) / s**2),
            Posterior(observed=(y, sigma)),
        )
        by_log_r, by_observed = (
            model.sample(NUM_EXAMPLES, start=start, final="mean", posterior=factor) - plain
            for factor in factors
        )
        assert by_log_r.norm() > 0.01
        errors.append((by_log_r - by_observed).norm() / by_observed.norm())
    assert errors[0] < 0.2
    torch.testing.assert_close(errors[0] / errors[1], torch.tensor(4.0), rtol=1e-2, atol=0)


def test_all_factors_act_together() -> None:
    model, y = gaussian(), values()
    sigma = torch.tensor([1.0, 0.01, 1.0, torch.inf, torch.inf])
    factors: dict[str, Any] = {
        "known": (MASK, y),
        "observed": (y, sigma),
        "log_r": lambda x: 3 * x[:, 4],
    }
    samples = model.sample(NUM_EXAMPLES, posterior=Posterior(**factors))
    assert torch.equal(samples[:, MASK], y[:, MASK])
    torch.testing.assert_close(samples[:, 1], y[:, 1], rtol=0, atol=0.06)
    without = model.sample(NUM_EXAMPLES, posterior=Posterior(**{**factors, "log_r": None}))
    assert ((samples - without)[:, 4] > 0).all()


def test_observed_bits() -> None:
    model, y = binomial(), (values(n=64) > 0).float()
    plain = model.sample(64)
    half = model.sample(64, posterior=Posterior(observed=(y, 0.5)))
    assert torch.equal(half, plain)
    sure = model.sample(64, posterior=Posterior(observed=(y, 1e-9)))
    assert torch.equal(sure, y)
    up = model.sample(64, posterior=Posterior(log_r=lambda x: 2 * x.sum(1)))
    # The start is the prior's, whatever has been observed: at sigma 1/2 that is nothing.
    _, states = model.sample(
        64, posterior=Posterior(observed=(y, 0.01)), return_trajectory=[NUM_STEPS]
    )
    start = model.process.sample_x_T((DIM,), 0, torch.arange(64), torch.float32)
    assert torch.equal(states[NUM_STEPS], start)
    assert (up >= plain).float().mean() > 0.95
    assert up.mean() > plain.mean() + 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"known": (MASK.float(), values())}, "known mask must have dtype bool, got torch.float32"),
        ({"known": (MASK, values() * torch.nan)}, "known values must be finite"),
        ({"observed": (values(), 0.0)}, "observed sigma must be positive, got 0"),
        ({"observed": (values(), -1.0)}, "observed sigma must be positive, got -1"),
        ({"observed": (values() * torch.inf, 1.0)}, "observed y must be finite"),
        ({"known_as": "noisy"}, "known_as must be 'clean' or 'forward', got 'noisy'"),
        ({"guidance": "x_1"}, "guidance must be 'x_t' or 'x0', got 'x_1'"),
    ],
)
def test_a_posterior_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Posterior(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"known": ([True], [1.0])}, "known must be .* two tensors, got tuple of list, list"),
        ({"known": [MASK, values()]}, "known must be a tuple .*, got list of Tensor, Tensor"),
        (
            {"known": MASK},
            r"known must be a tuple \(mask, values\) of .*, got Tensor of",
        ),
        ({"observed": ([0.0], 1.0)}, "observed must be .*, got tuple of list, float"),
        ({"observed": (values(), "1")}, "observed must be .*, got tuple of Tensor, str"),
        ({"log_r": values()}, "log_r must be a function, got Tensor"),
    ],
)
def test_factors_of_the_wrong_kind_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Posterior(**arguments)


X = values()
BITS = (X > 0).float()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rate", {"posterior": Posterior(guidance="x0")}, "requires a Gaussian process"),
        ("rate", {"posterior": Posterior(observed=(BITS, 0.7))}, r"in \(0, 1/2\] .* got 0.7"),
        ("rate", {"posterior": Posterior(observed=(X, 0.1))}, "observed y must be 0 or 1"),
        ("rate", {"posterior": Posterior(known=(MASK, X))}, "known values must be 0 or 1"),
        (
            "epsilon",
            {"posterior": Posterior(known=(MASK[:3], X))},
            r"known mask must broadcast to \(8, 5\), got \(3,\)",
        ),
        (
            "epsilon",
            {"posterior": Posterior(observed=(X[:3], 1.0))},
            r"observed y must broadcast to \(8, 5\), got \(3, 5\)",
        ),
        (
            "epsilon",
            {"posterior": Posterior(log_r=lambda x: x)},
            r"log_r must return shape \(8,\), got \(8, 5\)",
        ),
        ("epsilon", {"start": (0, X)}, "start t must be in 1..12, got 0"),
        ("epsilon", {"start": (13, X)}, "start t must be in 1..12, got 13"),
        ("epsilon", {"start": (3, X[:, :4])}, r"start x_t must have shape \(8, 5\), got \(8, 4\)"),
        ("epsilon", {"start": (3, X[:3])}, r"start x_t must have shape \(8, 5\), got \(3, 5\)"),
        ("epsilon", {"start": (3, X * torch.nan)}, "start x_t must be finite, got NaN or infinity"),
        ("rate", {"start": (3, X)}, "start x_t must be 0 or 1 for a binomial process"),
        (
            "epsilon",
            {"posterior": Posterior(log_r=lambda x: torch.nan * x.sum(1))},
            "log_r must be a number or -infinity, got NaN or infinity",
        ),
        (
            "epsilon",
            {"posterior": Posterior(log_r=lambda x: (x - x.detach()).sum(1).abs().sqrt())},
            "log_r must have a finite gradient, got NaN or infinity",
        ),
        ("epsilon", {"final": "x_0"}, "final must be 'x_1', 'mean' or 'sample', got 'x_0'"),
        ("epsilon", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            "epsilon",
            {"example_ids": torch.arange(7)},
            r"example_ids must have shape \(8,\), got \(7,\)",
        ),
        (
            "epsilon",
            {"return_trajectory": [0, 1], "final": "x_1"},
            r"return_trajectory must be timesteps in 1..12, where .* goes, got \[0, 1\]",
        ),
        (
            "epsilon",
            {"return_trajectory": [4, 5], "start": (4, X)},
            r"return_trajectory must be timesteps in 0..4, where .* goes, got \[4, 5\]",
        ),
        (
            "epsilon",
            {"return_trajectory": [13]},
            r"return_trajectory must be timesteps in 0..12, where .*, got \[13\]",
        ),
    ],
)
def test_sample_refuses(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODELS[name]().sample(NUM_EXAMPLES, **arguments)


def test_sample_needs_a_shape() -> None:
    process = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
    with pytest.raises(ValueError, match="sample requires data or a network with event_shape"):
        DiffusionModel(process, nn.Identity()).sample(2)
