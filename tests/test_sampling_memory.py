"""Sampling takes no memory per step, and gives back what a call takes."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from backends import CPU_BACKENDS
from dpm_fast import trajectory
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP
from dpm_fast.sampling import Posterior

pytestmark = pytest.mark.skipif(not CPU_BACKENDS, reason="needs the native ops of a CPU")

D, N = 64, 200
MASK = torch.arange(D) < 3


class Still(nn.Module):
    """A network that allocates nothing itself."""

    event_shape = (D,)

    def __init__(self, num_outputs: int):
        super().__init__()
        self.out = torch.zeros(N, D * num_outputs)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out


def gaussian(num_steps: int, network: str) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("log_linear", num_steps)
    made = Still(2) if network == "still" else MLP(D, num_steps, hidden=(8,))
    return DiffusionModel(process, made)


def binomial(num_steps: int, network: str) -> DiffusionModel:
    process = BinomialDiffusion(num_steps)
    made = Still(1) if network == "still" else MLP(D, num_steps, hidden=(8,), num_outputs=1)
    return DiffusionModel(process, made)


def num_allocations(model: DiffusionModel, **options: Any) -> int:
    model.sample(N, **options)  # tables are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.sample(N, **options)
    events = profiler.profiler.kineto_results.events()
    number = sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)
    assert number > 0
    return number


@pytest.mark.parametrize("make", [gaussian, binomial])
@pytest.mark.parametrize(
    ("network", "factors"),
    [
        ("still", {}),
        ("still", {"known": (MASK, torch.zeros(D))}),
        ("kernel", {}),
        ("kernel", {"known": (MASK, torch.zeros(D)), "observed": (torch.zeros(D), 0.5)}),
    ],
)
def test_steps_allocate_nothing(make: Any, network: str, factors: dict[str, Any]) -> None:
    posterior, numbers = Posterior(**factors), []
    for num_steps in (10, 40):
        model = make(num_steps, network)
        assert trajectory.can_launch(model, posterior, N) == (network == "kernel")
        numbers.append(num_allocations(model, posterior=posterior))
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_steps_that_skip_timesteps_allocate_nothing(eta: float) -> None:
    numbers = [
        num_allocations(gaussian(100, "still"), num_inference_steps=number, eta=eta)
        for number in (10, 40)
    ]
    assert numbers[0] == numbers[1]


def resident() -> int:
    """Bytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize("network", ["still", "kernel"])
def test_calls_do_not_grow_memory(network: str) -> None:
    model = gaussian(2, network)
    n = N if network == "still" else 4

    def call(number: int) -> int:
        for _ in range(number):
            model.sample(n)
        gc.collect()
        return resident()

    before = call(2_000)
    # 64 bytes a call: a tensor that stays has hundreds.
    assert call(20_000) - before < 64 * 20_000
