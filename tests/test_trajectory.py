"""Whole trajectories in a kernel: the states of the steps one by one, whatever is asked for."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpm_fast
from backends import BACKENDS, CPU_BACKENDS, Backend
from dpm_fast import dispatch, sampling, trajectory
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import PARAMETERIZATIONS, GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import ACTIVATIONS, MLP, RBFNetwork
from dpm_fast.ops.trajectory import TrajectoryInputs
from dpm_fast.sampling import Posterior

KERNELS = [backend for backend in BACKENDS if backend.name == "native"]
pytestmark = pytest.mark.skipif(not KERNELS, reason="needs native ops")

T, D, N = 12, 5, 40
VARIANCES = ("logit_scaled", "logit", "fixed_small", "fixed_large", "learned_range", "learned")


device = "cpu"  # of the models, while a backend is in use


# All tests here, for other instruction sets than the best one, are more than takes seconds.
@pytest.fixture(
    autouse=True,
    params=[
        pytest.param(b, marks=pytest.mark.slow if b in CPU_BACKENDS[1:] else ()) for b in KERNELS
    ],
    ids=str,
)
def backend(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    monkeypatch.setitem(globals(), "device", request.param.device)
    with request.param.use():
        yield request.param


def filled(network: nn.Module, scale: float = 0.3) -> nn.Module:
    """A network whose outputs are not zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return network


def gaussian(
    parameterization: str = "perturbation",
    variance: str | None = None,
    network: type[nn.Module] = MLP,
    dim: int = D,
    clamp: tuple[float, float] | None = None,
    **options: Any,
) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("log_linear", T)
    outputs = process.reverse(parameterization, variance).num_outputs
    if network is MLP:
        options = {"hidden": (7, 20)} | options
    made = filled(network(dim, T, num_outputs=outputs, **options))
    model = DiffusionModel(process, made, parameterization, variance=variance, clamp=clamp)
    return model.to(device)


def binomial(parameterization: str = "rate", **options: Any) -> DiffusionModel:
    process = BinomialDiffusion(T, prior_rate=0.3)
    network = filled(MLP(D, T, num_outputs=1, **{"hidden": (9,)} | options), 0.6)
    return DiffusionModel(process, network, parameterization).to(device)


def stepwise(model: DiffusionModel, *args: Any, **options: Any) -> Any:
    """The same request, step by step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectory, "can_launch", lambda *_: False)
        return model.sample(*args, **options)


def assert_same_states(model: DiffusionModel, n: int = N, **options: Any) -> None:
    """Those of the kernel, of the steps one by one, and of the reference in float64."""
    first = options.get("start", (T, None))[0]
    options = {"seed": 5, "return_trajectory": range(1, first + 1)} | options
    assert trajectory.can_launch(model, options.get("posterior") or Posterior(), n)
    samples, states = model.sample(n, **options)
    _, by_step = stepwise(model, n, **options)
    with dpm_fast.use_backend("reference"):
        exact_samples, exact = model.double().sample(n, **options)
    model.float()
    for t, expected in exact.items():
        assert_close(states[t].double(), expected)
        assert_close(states[t], by_step[t])
    assert_close(samples.double(), exact_samples)


def assert_close(x: Tensor, expected: Tensor) -> None:
    """Up to what T steps make of the roundings of one, beside the largest element."""
    largest = float(expected.abs().amax()) if len(expected) else 0.0
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4 * max(1.0, largest))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_gaussian_processes(parameterization: str, variance: str) -> None:
    clamp = (-1.0, 1.0) if parameterization in ("epsilon", "x0", "velocity") else None
    assert_same_states(gaussian(parameterization, variance, clamp=clamp))


@pytest.mark.parametrize("parameterization", ["rate", "perturbation", "x0"])
@pytest.mark.parametrize("final", ["sample", "mean", "x_1"])
def test_binomial_processes(parameterization: str, final: str) -> None:
    assert_same_states(binomial(parameterization), final=final)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    assert_same_states(gaussian(activation=activation))


@pytest.mark.parametrize("readout", ["bumps", "per_timestep"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": (1,)},
        {"hidden": (33, 6, 64), "dim": 1},
        {"time_input": True, "num_bumps": 4},
        {"hidden": (50, 50), "dim": 21},
    ],
    ids=str,
)
def test_perceptrons(options: dict[str, Any], readout: str) -> None:
    assert_same_states(gaussian(readout=readout, **options))


@pytest.mark.parametrize("readout", ["bumps", "per_timestep"])
@pytest.mark.parametrize(("dim", "num_units"), [(2, 16), (1, 1), (9, 3)])
def test_radial_basis_functions(dim: int, num_units: int, readout: str) -> None:
    model = gaussian(network=RBFNetwork, dim=dim, num_units=num_units, readout=readout)
    assert_same_states(model)
    # Where all but one of the exponentials are 0, and x is far from every center.
    model.network.log_widths.data.fill_(-4.0)
    assert_same_states(model)


@pytest.mark.parametrize("final", ["x_1", "mean", "sample"])
@pytest.mark.parametrize("t", [1, 2, 7, T])
def test_start_and_end(t: int, final: str) -> None:
    wanted = range(1 if final == "x_1" else 0, t + 1)
    x_t = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    assert_same_states(gaussian(), start=(t, x_t), final=final, return_trajectory=wanted)


def test_learned_schedule() -> None:
    process = GaussianDiffusion.from_schedule("erase", T, learned=True)
    process.schedule_weights.data = torch.linspace(-0.3, 0.3, 10)
    assert_same_states(DiffusionModel(process, filled(MLP(D, T, hidden=(8,)))).to(device))


MASK = torch.tensor([True, False, True, False, False])
VALUES = torch.randn(N, D, generator=torch.Generator().manual_seed(8))
SIGMA = torch.tensor([1.0, 0.01, 0.5, torch.inf, 2.0])
FACTORS: dict[str, dict[str, Any]] = {
    "known": {"known": (MASK, VALUES)},
    "known_of_each": {"known": (VALUES > 0.3, VALUES[0])},
    "known_forward": {"known": (MASK, VALUES), "known_as": "forward"},
    "observed": {"observed": (VALUES, SIGMA)},
    "observed_once": {"observed": (VALUES[3], 0.7)},
    "all": {"known": (MASK, VALUES), "observed": (VALUES, SIGMA), "known_as": "forward"},
    "transposed": {"known": (MASK, VALUES.T.contiguous().T), "observed": (VALUES[:, :1], SIGMA)},
}


@pytest.mark.parametrize("final", ["x_1", "mean"])
@pytest.mark.parametrize("name", FACTORS)
def test_posterior(name: str, final: str) -> None:
    posterior = Posterior(**FACTORS[name])
    model = gaussian()
    assert_same_states(model, posterior=posterior, final=final)
    if posterior.known is not None:
        mask, values = (x.expand(N, D) for x in posterior.known)
        samples = model.sample(N, posterior=posterior, final=final)
        assert torch.equal(samples.cpu()[mask], values[mask])


@pytest.mark.parametrize("name", FACTORS)
def test_posterior_of_bits(name: str) -> None:
    factors = dict(FACTORS[name])
    if "known" in factors:
        factors["known"] = factors["known"][0], (factors["known"][1] > 0).float()
    if "observed" in factors:
        flip = torch.as_tensor(factors["observed"][1]).clamp(0.05, 0.5)
        factors["observed"] = (factors["observed"][0] > 0).float(), flip
    assert_same_states(binomial(), posterior=Posterior(**factors))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100])
@pytest.mark.parametrize("make", [gaussian, binomial])
def test_any_number_of_examples(make: Any, n: int) -> None:
    assert_same_states(make(), n)
    whole = make().sample(100, seed=5, final="sample")
    assert torch.equal(make().sample(n, seed=5, final="sample"), whole[:n])


@pytest.mark.parametrize("network", [RBFNetwork, MLP])
def test_bits_depend_on_neither_threads_nor_launches(
    network: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = gaussian(network=network), torch.arange(200) * 2**33 + 7
    options: dict[str, Any] = {"seed": 2**63 + 9, "return_trajectory": [3, 7, T]}
    whole, states = model.sample(200, example_ids=ids, **options)
    monkeypatch.setattr(trajectory, "_LAUNCH_WORK", 1)
    monkeypatch.setattr(trajectory, "_LAUNCH_WORK_OF_GPU", 1)
    again, by_launches = model.sample(200, example_ids=ids, **options)
    assert torch.equal(again, whole)
    assert all(torch.equal(states[t], by_launches[t]) for t in states)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(model.sample(200, example_ids=ids, seed=2**63 + 9), whole)
    finally:
        torch.set_num_threads(threads)
    for part in (ids[3:4], ids[90:].flip(0), ids[::7]):
        expected = whole[torch.isin(ids, part).nonzero()[:, 0]]
        found = model.sample(len(part), example_ids=part, seed=2**63 + 9)
        assert torch.equal(found[part.argsort()], expected)


def test_examples_far_from_every_center_leave_the_others_alone() -> None:
    model = gaussian(network=RBFNetwork, dim=2)
    x_t = torch.randn(N, 2, generator=torch.Generator().manual_seed(1))
    x_t[::5] *= 300
    assert_same_states(model, start=(T, x_t))
    whole = model.sample(N, start=(T, x_t))
    for n in range(N):
        one = model.sample(1, example_ids=torch.tensor([n]), start=(T, x_t[n : n + 1]))
        assert torch.equal(one[0], whole[n])


def test_the_debug_log_says_which(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dpm_fast")
    gaussian().sample(2)
    assert caplog.messages == ["sample: whole trajectories in the kernel of MLP"]


class Own(MLP):
    pass


class OwnModel(DiffusionModel):
    pass


def hooked(network: nn.Module) -> None:
    network.hidden[0].register_forward_hook(lambda *_: None)


def replaced(network: nn.Module) -> None:
    network.hidden[1] = nn.Dropout()


def approximate(network: nn.Module) -> None:
    network.hidden[1] = network.hidden[3] = nn.GELU("tanh")


def mixed(network: nn.Module) -> None:
    network.hidden[1] = nn.Tanh()


def own_forward(network: nn.Module) -> None:
    network.hidden[0].forward = lambda x: x[:, :1].expand(-1, 7)


def own_outputs(network: nn.Module) -> None:
    network.outputs = lambda x, t: torch.ones(x.shape[0], 2 * D, device=x.device)


def doubled(network: nn.Module) -> None:
    network.double()


def without_bias(network: nn.Module) -> None:
    network.hidden[0].bias = None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "hooks, or layers other"),
        (replaced, "hooks, or layers other"),
        (approximate, "hooks, or layers other"),
        (mixed, "hooks, or layers other"),
        (own_forward, "hooks, or layers other"),
        (without_bias, "hooks, or layers other"),
        (own_outputs, "hooks, or layers other"),
        (doubled, "not float32"),
        (lambda network: network.bfloat16(), "not float32"),
    ],
)
def test_changed_networks_go_step_by_step(
    change: Any, reason: str, caplog: pytest.LogCaptureFixture, backend: Backend
) -> None:
    if change is doubled and torch.float64 not in backend.dtypes:
        pytest.skip("has no ops for it step by step either")
    caplog.set_level(logging.DEBUG, "dpm_fast")
    model = gaussian()
    change(model.network)
    samples = model.eval().sample(4)
    assert samples.isfinite().all()
    assert reason in caplog.text
    if change is own_forward:
        assert not torch.equal(samples, gaussian().sample(4))


def test_other_models_and_requests_go_step_by_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dpm_fast")
    model = gaussian()

    def reason(model: DiffusionModel, **options: Any) -> str:
        caplog.clear()
        model.sample(4, **options)
        (message,) = [said for said in caplog.messages if "step by step" in said]
        return message.removeprefix("sample: step by step, since ")

    own = DiffusionModel(model.process, filled(Own(D, T)))
    assert reason(own) == "no kernel has a network of type Own"
    for other in (
        OwnModel(model.process, model.network),
        DiffusionModel(model.process, filled(MLP(D, T)), t_base=0),
    ):
        if other.t_base == 1:
            assert reason(other) == "the model calls its network in its own way"
        else:
            assert "in its own way" in str(trajectory._why_stepwise(other, Posterior(), 4))
    assert "log_r" in reason(model, posterior=Posterior(log_r=lambda x: x.sum(1)))
    guided = Posterior(observed=(VALUES[:4], 1.0), guidance="x0")
    assert "guidance 'x0'" in reason(model, posterior=guided)
    with torch.autocast(device, torch.bfloat16):
        assert "autocast" in reason(model)
    with dpm_fast.use_backend("reference"):
        assert reason(model) == "the backend 'reference' was asked for"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "hooks" in reason(model)
    finally:
        handle.remove()


def test_variances_that_vanish_are_refused() -> None:
    if device != "cpu":
        pytest.skip("values are looked at on a CPU only")
    posterior = Posterior(observed=(VALUES, 1e-30))
    for run in (gaussian().sample, lambda *a, **k: stepwise(gaussian(), *a, **k)):
        with pytest.raises(ValueError, match="observed sigma2_y must be positive, got 0"):
            run(N, posterior=posterior)


def test_not_finite_stays_so() -> None:
    model = gaussian(activation="relu")
    model.network.hidden[0].bias.data[0] = torch.nan
    assert model.sample(3).isnan().all()


def given_to_the_op(model: DiffusionModel, n: int, **options: Any) -> tuple[Any, ...]:
    """What `launch` gives to the op, with states wanted."""
    given: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trajectory,
            "trajectory",
            lambda x, inputs: given.extend((x, inputs)) or (x, x.new_empty(0, *x.shape)),
        )
        model.sample(n, **options)
    x, inputs = given
    return x, *inputs._replace(wanted=[4, 1])


def op_arguments() -> tuple[Any, ...]:
    posterior = Posterior(known=(MASK, VALUES[:3]), known_as="forward")
    return given_to_the_op(gaussian(), 3, posterior=posterior)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.dpm_fast._trajectory, op_arguments())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("last", 0),
        ("first", T + 1),
        ("last", T + 1),
        ("previous", torch.arange(T + 1)),
        ("previous", torch.arange(T) - 1),
        ("rows", torch.zeros(T, 15)),
        ("rows", torch.zeros(T + 1, 14)),
        ("levels", torch.zeros(T, 2)),
        ("weights", [torch.zeros(7, D), torch.zeros(20, 8), torch.zeros(T + 1, 2 * D, 20)]),
        ("weights", [torch.zeros(7, D), torch.zeros(20, 7), torch.zeros(T, 2 * D, 20)]),
        ("biases", [torch.zeros(7), torch.zeros(20), torch.zeros(T + 1, 2 * D + 1)]),
        ("biases", [torch.zeros(7), torch.zeros(20), torch.zeros(T, 2 * D)]),
        ("example_ids", torch.arange(2)),
        ("mask", None),
        ("values", torch.zeros(2, D)),
        ("wanted", [T + 1]),
    ],
)
def test_what_would_be_read_beyond_its_end_is_refused(
    name: str, value: Any, backend: Backend
) -> None:
    if name == "previous" and len(value) > T and not backend.instruction_set:
        pytest.skip("a host does not read a GPU's table; the kernel keeps to earlier timesteps")
    arguments = list(op_arguments())
    arguments[1 + TrajectoryInputs._fields.index(name)] = value
    with pytest.raises((ValueError, IndexError)):
        torch.ops.dpm_fast._trajectory(*arguments)


def test_an_interrupt_is_heard(backend: Backend) -> None:
    if not backend.instruction_set:
        pytest.skip("a GPU's launches are short, and the host runner's long")
    process = GaussianDiffusion.from_schedule("log_linear", 4000)
    network = filled(MLP(2, 4000, hidden=(256, 256), activation="relu"), 0.01)
    model = DiffusionModel(process, network)
    heard: list[float] = []

    def interrupt() -> None:
        heard.append(time.perf_counter())
        signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(0.3, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        model.sample(100_000)
    assert time.perf_counter() - heard[0] < 10.0  # all of it takes ten minutes and more


def test_the_kernel_runs_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "backend", lambda *_: "reference")
    assert trajectory._why_stepwise(gaussian(), Posterior(), 4) == "native kernels are absent"
    assert sampling.trajectory is trajectory


def test_states_are_those_asked_for() -> None:
    samples, states = gaussian().sample(N, return_trajectory=[])
    assert states == {}
    assert isinstance(samples, Tensor)
