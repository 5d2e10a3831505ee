"""Whole trajectories of images in a kernel: the states of the steps one by one."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from backends import CPU_BACKENDS
from dpm_fast import trajectory
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import ConvDenseNetwork
from dpm_fast.ops.trajectory import TrajectoryInputs
from dpm_fast.sampling import Posterior
from test_trajectory import T, assert_same_states, filled, given_to_the_op

pytestmark = pytest.mark.skipif(not CPU_BACKENDS, reason="needs the native ops of a CPU")

N = 80  # more than the groups of a tile on two threads; cutting images into parts would not pay
SHAPE = (2, 6, 10)
SMALL = {"conv_layers": 2, "conv_channels": 4, "dense_width": 7, "dense_layers": 3}
NETWORKS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "small": (SHAPE, {}),
    "scales": ((1, 8, 12), {"num_scales": 3, "conv_channels": 7, "conv_layers": 3}),
    "after_sum": (SHAPE, {"num_scales": 2, "activation": "after_sum", "kernel_size": 5}),
    "per_location": (SHAPE, {"bias": "per_location", "readout": "per_timestep"}),
    "no_dense": (SHAPE, {"dense_layers": 0, "pixel_layers": 3, "pixel_width": 9}),
    "one_dense": ((3, 5, 7), {"dense_layers": 1, "dense_channels": 5, "pixel_layers": 1}),
    "nothing_else": ((1, 4, 6), {"dense_layers": 0, "pixel_layers": 1, "conv_layers": 1}),
}


@pytest.fixture(autouse=True, params=CPU_BACKENDS, ids=str)
def instruction_set(request) -> Iterator[str]:
    with request.param.use():
        yield request.param.instruction_set


def gaussian(
    shape: tuple[int, int, int] = SHAPE, variance: str | None = None, **options: Any
) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("log_linear", T)
    outputs = process.reverse("perturbation", variance).num_outputs
    network = ConvDenseNetwork(shape, T, num_outputs=outputs, **(SMALL | options))
    return DiffusionModel(process, filled(network), "perturbation", variance=variance)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    shape, options = NETWORKS[name]
    assert_same_states(gaussian(shape, **options), N)


def test_fixed_variance_and_bits() -> None:
    assert_same_states(gaussian(variance="fixed_small"), N)
    network = filled(ConvDenseNetwork(SHAPE, T, num_outputs=1, **SMALL), 0.4)
    model = DiffusionModel(BinomialDiffusion(T, prior_rate=0.3), network, "x0")
    assert_same_states(model, N, final="sample")


def test_posterior_and_start() -> None:
    values = torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(2))
    mask = values[0] > 0.2
    for factors in (
        {"known": (mask, values), "known_as": "forward"},
        {"known": (values > 0.5, values[:1]), "observed": (values, 0.7)},
    ):
        assert_same_states(gaussian(), N, posterior=Posterior(**factors))
    assert_same_states(gaussian(), N, start=(5, values))


def test_bits_depend_on_neither_threads_nor_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gaussian(num_scales=2)
    whole, states = model.sample(N, seed=4, return_trajectory=[1, 7])
    monkeypatch.setattr(trajectory, "_LAUNCH_WORK", 1)
    again, by_launches = model.sample(N, seed=4, return_trajectory=[1, 7])
    assert torch.equal(again, whole)
    assert all(torch.equal(states[t], by_launches[t]) for t in states)
    threads = torch.get_num_threads()
    monkeypatch.setattr(trajectory, "_fills_lanes", lambda *_: True)
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(model.sample(N, seed=4), whole)
            for n in (0, 1, 17, 33):
                assert torch.equal(model.sample(n, seed=4), whole[:n])
    finally:
        torch.set_num_threads(threads)


def replaced(network: nn.Module) -> None:
    network.dense[1] = nn.ReLU()


def hooked(network: nn.Module) -> None:
    network.dense[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "n", "reason"),
    [
        (replaced, N, "hooks, or layers other"),
        (hooked, N, "hooks, or layers other"),
        (lambda network: network.double(), N, "not float32"),
        (lambda network: None, 3, "3 images leave lanes empty"),
    ],
)
def test_step_by_step(change: Any, n: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dpm_fast")
    model = gaussian()
    change(model.network)
    assert model.eval().sample(n).isfinite().all()
    assert reason in caplog.text


def test_terms_of_the_bound_have_no_kernel_here() -> None:
    model = gaussian()
    x_0 = torch.zeros(N, *SHAPE)
    assert trajectory.why_not_bound(model, x_0, "decoder") == (
        "a CPU's kernels have no terms of images"
    )


def op_arguments() -> tuple[Any, ...]:
    return given_to_the_op(gaussian(num_scales=2), N)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.dpm_fast._trajectory, op_arguments())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shape", [1, *SHAPE[1:]]),
        ("shape", [SHAPE[0], 5, 12]),
        ("shape", [SHAPE[0], 12, 10]),
        ("num_scales", 1),
        ("num_scales", 9),
        ("conv_weights", [torch.zeros(4, 3, 3, 3)] * 2 + [torch.zeros(4, 4, 3, 3)] * 2),
        ("conv_weights", [torch.zeros(4, 2, 3, 3)] * 2 + [torch.zeros(5, 4, 3, 3)] * 2),
        ("pixel_weights", [torch.zeros(20, 7)]),
        ("pixel_biases", [torch.zeros(19)]),
    ],
)
def test_what_would_be_read_beyond_its_end_is_refused(name: str, value: Any) -> None:
    arguments = list(op_arguments())
    arguments[1 + TrajectoryInputs._fields.index(name)] = value
    with pytest.raises(ValueError):
        torch.ops.dpm_fast._trajectory(*arguments)
