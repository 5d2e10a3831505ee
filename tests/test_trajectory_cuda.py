"""Trajectories in CUDA C++, networks resident in shared memory: tiles, orders and limits.

In the host runner. Values are those of test_trajectory.py, which also runs on a GPU.
"""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import needs_host_runner, running_in
from dpm_fast import trajectory, use_backend
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import RBFNetwork
from dpm_fast.sampling import Posterior
from host_runner import build
from test_multiscale_conv_cuda import multiprocessors
from test_trajectory import (
    MASK,
    SIGMA,
    VALUES,
    D,
    assert_same_states,
    binomial,
    gaussian,
)

pytestmark = needs_host_runner

N = 39
POSTERIOR = Posterior(known=(MASK, VALUES[:N]), observed=(VALUES[:N], SIGMA), known_as="forward")
# On one multiprocessor tiles are of 20 examples, which take a layer of 100 in blocks of 4 x 4.
MODELS: dict[str, Any] = {
    "blocks of all sizes": lambda: gaussian(hidden=(100, 30, 3)),
    "time in every layer": lambda: gaussian(hidden=(40,), time_input=True, num_bumps=4),
    "radial basis functions": lambda: gaussian(network=RBFNetwork, num_units=16),
    "bits": lambda: binomial("x0", hidden=(20, 21)),
}


@pytest.mark.parametrize("name", MODELS)
def test_neither_orders_of_threads_nor_sizes_of_tiles_change_a_bit(name: str) -> None:
    model = MODELS[name]()
    posterior = Posterior() if name == "bits" else POSTERIOR

    def sample() -> Tensor:
        return model.sample(N, seed=5, final="sample", posterior=posterior)

    with running_in("forward") as backend, backend.use():
        expected = sample()
        for count in (1, 132):
            with multiprocessors(count):
                assert torch.equal(sample(), expected)
                assert_same_states(model, N, posterior=posterior)
    for order in build.ORDERS:
        with running_in(order) as backend, backend.use(), multiprocessors(1):
            assert torch.equal(sample(), expected)


@pytest.mark.parametrize("name", MODELS)
def test_nor_do_they_change_a_term_of_the_bound(name: str) -> None:
    model = MODELS[name]()
    x_0 = (VALUES[:N] > 0).float() if name == "bits" else VALUES[:N]

    def bound() -> Tensor:
        found = model.bound(x_0, seed=5)
        assert "network included" in found.settings["path"]
        return torch.cat((found.bound_nats, found.per_timestep_nats))

    with running_in("forward") as backend, backend.use():
        expected = bound()
        for count in (1, 132):
            with multiprocessors(count):
                assert torch.equal(bound(), expected)
    for order in build.ORDERS:
        with running_in(order) as backend, backend.use(), multiprocessors(1):
            assert torch.equal(bound(), expected)


@pytest.fixture
def in_host_runner(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG, "dpm_fast")
    with running_in("forward") as backend, backend.use():
        yield


def reason(model: DiffusionModel, num_examples: int = 4, batch_size: int = 10**6) -> str:
    return str(trajectory._why_stepwise(model, Posterior(), num_examples, batch_size))


def perceptron(*hidden: int) -> DiffusionModel:
    return gaussian(hidden=hidden)


@pytest.mark.usefixtures("in_host_runner")
def test_what_no_block_can_hold_goes_step_by_step(caplog: pytest.LogCaptureFixture) -> None:
    widest = perceptron(190, 190)
    assert reason(widest) == "None"
    assert_same_states(widest, 2)
    wider = perceptron(240, 240)
    assert reason(wider).endswith("bytes of the 232448 that a block has")
    samples = wider.sample(2)
    assert samples.isfinite().all()
    assert "bytes of the 232448" in caplog.text
    assert_same_states(perceptron(*[3] * 15), 2)
    assert reason(perceptron(*[3] * 16)) == "its 17 layers are more than a kernel's 16"


@pytest.mark.usefixtures("in_host_runner")
def test_work_that_was_never_timed_has_to_be_asked_for() -> None:
    model = perceptron(64, 64)
    few = trajectory._STEP_WORK_OF_GPU // (64 * (D + 64 + 2 * D))
    with use_backend("auto"):
        assert reason(model, few) == "None"
        assert "unless native is asked for" in reason(model, few + 1)
        assert reason(model, 10**6, batch_size=few) == "None"  # many steps of the same work
    assert reason(model, few + 1) == "None"


@pytest.mark.usefixtures("in_host_runner")
def test_bytes_of_shared_memory_are_those_that_are_used() -> None:
    """A launch is refused where one byte less is there than the smallest tile needs."""
    model = perceptron(64, 64)
    shapes = [(D, 64, False, False), (64, 64, False, False), (64, 2 * D, True, True)]
    module = build.load_native_cuda()
    needed = module.trajectory_bytes(D, 0, shapes)
    # Weights and biases, twice those of a timestep; x, two layers, noise, factors and ids of four.
    timed = 64 * 12 + 12 + 20 + 4
    rows = D + 2 * 64 + 2 * 8 + 4 * D + 2
    assert needed == 4 * (64 * (D + 64 + 2) + 2 * timed + 4 * rows)
    most = module.most_shared_bytes()
    try:
        build.set_attribute(module, "shared_bytes_per_block", needed)
        assert reason(model) == "None"
        assert_same_states(model, 9, posterior=Posterior(known=(MASK, VALUES[:9])))
        build.set_attribute(module, "shared_bytes_per_block", needed - 1)
        assert "bytes of the" in reason(model)
        build.set_attribute(module, "shared_bytes_per_block", needed // 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trajectory, "_why_stepwise", lambda *_: None)
            with pytest.raises(ValueError, match=r"a network needs \d+ bytes of shared memory"):
                model.sample(2)
    finally:
        build.set_attribute(module, "shared_bytes_per_block", most)


@pytest.mark.usefixtures("in_host_runner")
def test_the_launcher_refuses_too_many_layers() -> None:
    model = perceptron(*[3] * 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectory, "_why_stepwise", lambda *_: None)
        with pytest.raises(ValueError, match="at most 16 layers"):
            model.sample(2)
