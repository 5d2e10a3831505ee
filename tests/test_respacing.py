"""Fewer steps than a model has: coefficients, samples, and where a trajectory stops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dpm_fast
from backends import CPU_BACKENDS
from dpm_fast import noise, respacing, trajectory
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import PARAMETERIZATIONS, GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP
from dpm_fast.respacing import RespacedReverse
from dpm_fast.routes import route_of
from dpm_fast.sampling import Posterior

T, D, N = 12, 5, 24
IDS = torch.arange(N)
X = torch.randn(N, D, generator=torch.Generator().manual_seed(7))
MASK = torch.tensor([True, False, True, False, False])
RESPACED = [name for name in PARAMETERIZATIONS if name != "decay"]


def gaussian(
    parameterization: str = "velocity", variance: str | None = "fixed_small", **options: Any
) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("log_linear", T)
    outputs = process.reverse(parameterization, variance).num_outputs
    network = MLP(D, T, hidden=(9,), num_outputs=outputs)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return DiffusionModel(process, network, parameterization, variance=variance, **options)


@pytest.mark.parametrize(
    ("number", "last", "expected"),
    [(1, 12, [12]), (2, 12, [1, 12]), (4, 10, [1, 4, 7, 10]), (5, 5, [1, 2, 3, 4, 5])],
)
def test_spaced(number: int, last: int, expected: list[int]) -> None:
    assert respacing.spaced(number, last) == expected


@pytest.mark.parametrize(
    ("schedule", "num_steps"), [("linear", 1000), ("cosine", 1000), ("cosine", 4000)]
)
def test_tables_are_those_of_improved_diffusion(golden, schedule: str, num_steps: int) -> None:
    arrays = golden("improved_schedules")
    process = GaussianDiffusion.from_schedule(schedule, num_steps)
    prefix = f"respaced/{schedule}/T{num_steps}/"
    spacings = {
        name.removeprefix(prefix).split("/")[0] for name in arrays if name.startswith(prefix)
    }
    assert spacings
    for spacing in spacings:
        case = f"{prefix}{spacing}"
        kept = (torch.from_numpy(arrays[f"{case}/timestep_map"]).long() + 1).tolist()
        tables = RespacedReverse(process.reverse("epsilon"), kept, None).tables()
        for name, column in (
            ("betas", tables.beta),
            ("posterior_variance", tables.sigma2_q),
            ("posterior_mean_coef1", tables.c_0),
            ("posterior_mean_coef2", tables.c_x),
        ):
            expected = torch.from_numpy(arrays[f"{case}/{name}"])
            torch.testing.assert_close(column[kept], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.5)])
@pytest.mark.parametrize("parameterization", RESPACED)
def test_steps_are_those_of_ddim(parameterization: str, clamp: Any, eta: float) -> None:
    """Equation 12 of Song, Meng, Ermon 2021, in float64, from the x_0 that is predicted."""
    if clamp is not None and parameterization in ("perturbation", "previous"):
        pytest.skip("they have no clamp")
    model = gaussian(parameterization, clamp=clamp).double()
    kept, tables = [2, 5, 6, 12], model.process.tables()
    x = noise.normal(5, noise.Stream.INITIAL, IDS, T, (D,), torch.float64)
    with torch.no_grad():
        for t, s in ((12, 6), (6, 5), (5, 2), (2, 0)):
            out, at = model.network_output(x, torch.full((N,), t)), torch.full((N,), t)
            mu, _ = model.reverse.moments(x, at, out)
            x_0 = model.reverse.x_0_from_mean(mu, x, at)
            eps = (x - tables.alpha_bar[t].sqrt() * x_0) / tables.beta_bar[t].sqrt()
            ratio = tables.alpha_bar[t] / tables.alpha_bar[s]
            sigma = eta * (tables.beta_bar[s] / tables.beta_bar[t] * (1 - ratio)).sqrt()
            x = tables.alpha_bar[s].sqrt() * x_0 + (tables.beta_bar[s] - sigma**2).sqrt() * eps
            drawn = noise.normal(5, noise.Stream.REVERSE, IDS, t, (D,), torch.float64)
            x = x + sigma * drawn if s else x
    with dpm_fast.use_backend("reference"):
        samples = model.sample(N, seed=5, timesteps=kept, eta=eta, final="mean")
    torch.testing.assert_close(samples, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("parameterization", RESPACED)
def test_all_timesteps_are_the_plain_trajectory_bit_for_bit(parameterization: str) -> None:
    model = gaussian(parameterization)
    plain, states = model.sample(N, seed=5, return_trajectory=range(1, T + 1))
    for options in ({"num_inference_steps": T, "eta": 1.0}, {"timesteps": range(1, T + 1)}):
        samples, others = model.sample(N, seed=5, return_trajectory=range(1, T + 1), **options)
        assert torch.equal(samples, plain)
        assert all(torch.equal(others[t], states[t]) for t in states)


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range", "logit", "logit_scaled"])
def test_variances_are_those_of_the_longer_step(variance: str) -> None:
    model = gaussian(variance=variance).double()
    kept, full = [1, 4, 12], model.process.tables()
    beta = 1 - full.alpha_bar[12] / full.alpha_bar[4]
    small = beta * full.beta_bar[4] / full.beta_bar[12]
    t = torch.full((N,), 12)
    with torch.no_grad():
        out = model.network_output(X.double(), t)
    reverse = RespacedReverse(model.reverse, kept, None)
    _, sigma2 = reverse.moments(X.double(), t, out)
    z = reverse.split(X, out)[1]
    if variance == "fixed_large":
        expected = beta.expand_as(sigma2)
    elif variance == "learned_range":
        expected = ((1 + z) / 2 * beta.log() + (1 - z) / 2 * small.log()).exp()
    else:
        scale = 1 if variance == "logit" else math.sqrt(T)
        expected = torch.sigmoid(z / scale + torch.logit(beta))
    torch.testing.assert_close(sigma2, expected, rtol=1e-12, atol=0)


WAYS: dict[str, dict[str, Any]] = {
    "spaced": {"num_inference_steps": 5},
    "ddim": {"num_inference_steps": 4, "eta": 0.0},
    "given": {"timesteps": [3, 4, 12], "eta": 0.5},
    "one": {"num_inference_steps": 1},
    "one_drawn": {"timesteps": [12], "final": "sample"},
    "from_a_start": {"num_inference_steps": 3, "start": (8, X)},
    "to_a_stop": {"timesteps": [1, 4, 8, 12], "stop": 4},
    "known": {
        "num_inference_steps": 5,
        "posterior": Posterior(known=(MASK, X), observed=(X, 0.5), known_as="forward"),
    },
    "guided": {
        "num_inference_steps": 5,
        "eta": 0.0,
        "posterior": Posterior(observed=(X, 0.5), guidance="x0"),
    },
}


def stepwise(model: DiffusionModel, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectory, "can_launch", lambda *_: False)
        return model.sample(N, **options)


@pytest.mark.skipif(not CPU_BACKENDS, reason="needs the native ops of a CPU")
@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=str)
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("way", WAYS)
def test_the_kernel_takes_the_same_steps(way: str, variance: str, backend: Any) -> None:
    model, options = gaussian(variance=variance), {"seed": 5} | WAYS[way]
    with backend.use():
        samples, by_step = model.sample(N, **options), stepwise(model, **options)
    with dpm_fast.use_backend("reference"):
        exact = model.double().sample(N, **options)
    torch.testing.assert_close(samples.double(), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(by_step.double(), exact, rtol=0, atol=1e-4)
    assert samples.std() > 0.1


@pytest.mark.parametrize("in_one", [True, False])
@pytest.mark.parametrize("options", [{}, {"timesteps": [1, 3, 4, 9, 12], "eta": 0.7}])
@pytest.mark.parametrize("make", ["gaussian", "binomial"])
def test_a_stopped_trajectory_goes_on(make: str, options: dict[str, Any], in_one: bool) -> None:
    if make == "binomial":
        if options:
            pytest.skip("bits are not respaced")
        process = BinomialDiffusion(T, prior_rate=0.3)
        model = DiffusionModel(process, MLP(D, T, num_outputs=1))
        known = (MASK, (X > 0).float())
    else:
        model, known = gaussian(), (MASK, X)
    posterior = Posterior(known=known, known_as="forward")
    options = options | {"seed": 5, "posterior": posterior}

    def sample(**more: Any) -> Any:
        return (model.sample if in_one else lambda n, **o: stepwise(model, **o))(
            N, **(options | more)
        )

    whole, states = sample(return_trajectory=[12, 9, 4, 3])
    for t in (9, 4, 3):
        stopped, passed = sample(stop=t, return_trajectory=[12, t])
        assert torch.equal(stopped, states[t])
        assert torch.equal(passed[t], states[t])
        torch.testing.assert_close(sample(start=(t, stopped)), whole, rtol=0, atol=1e-5)
    assert torch.equal(sample(stop=T), states[T])
    torch.testing.assert_close(sample(stop=0), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("in_one", [True, False])
@pytest.mark.parametrize("options", [{}, {"timesteps": [1, 3, 4, 9, 12], "eta": 0.7}])
def test_callbacks(options: dict[str, Any], in_one: bool) -> None:
    model, seen = gaussian(), []
    options = options | {"seed": 5, "return_trajectory": options.get("timesteps", range(T + 1))}
    sample = model.sample if in_one else lambda n, **o: stepwise(model, **o)
    plain, states = sample(N, **options)

    def callback(t: int, x: Tensor) -> None:
        seen.append((t, x.clone()))

    samples, again = sample(N, **options, callback=callback, callback_every=3)
    expected = [12, 3, 0] if "timesteps" in options else [12, 9, 6, 3, 0]
    assert [t for t, _ in seen] == expected
    assert torch.equal(samples, plain)
    assert all(torch.equal(again[t], states[t]) for t in states)
    for t, x in seen[:-1]:
        assert torch.equal(x, states[t])
    assert torch.equal(seen[-1][1], plain)


def test_an_exception_of_a_callback_ends_the_call() -> None:
    def callback(t: int, x: Tensor) -> None:
        if t == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gaussian().sample(N, callback=callback)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, r"num_inference_steps must be in 1..12, got 0"),
        ({"num_inference_steps": 13}, r"num_inference_steps must be in 1..12, got 13"),
        ({"num_inference_steps": 9, "start": (8, X)}, r"must be in 1..8, got 9"),
        ({"num_inference_steps": 3, "timesteps": [1]}, "exclude each other, got both"),
        ({"timesteps": []}, r"timesteps must be some of 1..12, each once, got \[\]"),
        ({"timesteps": [3, 3]}, r"each once, got \[3, 3\]"),
        ({"timesteps": [0, 3]}, r"each once, got \[0, 3\]"),
        ({"timesteps": [3, 9]}, "timesteps must include T = 12, where x_T is drawn, got at most 9"),
        ({"timesteps": [13]}, r"each once, got \[13\]"),
        (
            {"timesteps": [3, 9], "start": (4, X)},
            "start t must be one of the timesteps 3, 9, got 4",
        ),
        (
            {"timesteps": [3, 12], "stop": 4},
            "stop must be 0 or one of the timesteps 3, 12, .* got 4",
        ),
        ({"timesteps": [3, 12], "final": "x_1"}, r"final 'x_1' is the state at t = 1, got it with"),
        (
            {"timesteps": [3, 12], "return_trajectory": [4]},
            r"one of the timesteps 12, 3, 0, .* got \[4\]",
        ),
        ({"stop": -1}, "stop must be in 0..12, where this trajectory goes, got -1"),
        ({"stop": 13}, "stop must be in 0..12, where this trajectory goes, got 13"),
        ({"stop": 5, "start": (4, X)}, "stop must be in 0..4, where .* got 5"),
        ({"stop": 5, "final": "x_1"}, "final 'x_1' is the state at t = 1, got it with stop 5"),
        ({"eta": -0.1}, r"eta must be in \[0, 1\], got -0.1"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        ({"eta": math.nan}, r"eta must be in \[0, 1\], got nan"),
        (
            {"eta": 0.0, "posterior": Posterior(log_r=lambda x: x.sum(1))},
            "eta must be above 0 with log_r",
        ),
        ({"eta": 0.0, "posterior": Posterior(observed=(X, 1.0))}, "eta must be above 0 with"),
        ({"eta": 0.0, "num_particles": 4}, "num_particles requires steps with a density"),
        ({"stop": 4, "num_particles": 4}, "num_particles .* nor a stop"),
        ({"callback": print, "num_particles": 4}, "num_particles takes no callback"),
        ({"callback": print, "callback_every": 0}, "callback_every must be an integer of at least"),
    ],
)
def test_sample_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian().sample(N, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 2.5}, "num_inference_steps must be an integer, got float"),
        ({"timesteps": 3}, "timesteps must be an iterable of integers, got int"),
        ({"timesteps": [1.5]}, "each of timesteps must be an integer, got float"),
        ({"stop": 1.5}, "stop must be an integer, got float"),
        ({"eta": "1"}, "eta must be a number, got str"),
        ({"callback": 3}, "callback must be a function, got int"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        gaussian().sample(N, **arguments)


def test_what_cannot_be_respaced_is_refused() -> None:
    with pytest.raises(ValueError, match="a mean from which x_0 follows, got 'decay'"):
        gaussian("decay", "logit").sample(N, num_inference_steps=3)
    with pytest.raises(ValueError, match="require eta with the variance 'learned'"):
        gaussian(variance="learned").sample(N, num_inference_steps=3)
    assert gaussian(variance="learned").sample(N, num_inference_steps=3, eta=1.0).isfinite().all()
    bits = DiffusionModel(BinomialDiffusion(T), MLP(D, T, num_outputs=1))
    with pytest.raises(ValueError, match="require a Gaussian process, got a binomial one"):
        bits.sample(N, num_inference_steps=3)


def test_particles_take_fewer_steps_too() -> None:
    posterior = Posterior(observed=(X[:3], 0.5), guidance="x0")
    weighted = gaussian().sample(3, posterior=posterior, num_particles=8, num_inference_steps=4)
    assert weighted.log_evidence.isfinite().all()
    assert route_of(gaussian(), None, None, None, 4, None, None, True).timesteps == [
        12, 8, 5, 1,
    ]  # fmt: skip
