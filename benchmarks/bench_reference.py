"""The reference implementations on batches of MNIST size: what the kernels have to beat.

Each case reports examples per second beside the times; `make bench` runs them.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dpm_fast import noise
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import ConvDenseNetwork

NUM_EXAMPLES, SHAPE, NUM_STEPS = 64, (1, 28, 28), 1000


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    torch.manual_seed(0)
    process = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
    return DiffusionModel(process, ConvDenseNetwork(SHAPE, NUM_STEPS))


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_0, t and example ids."""
    ids = torch.arange(NUM_EXAMPLES)
    x_0 = noise.normal(0, noise.Stream.DATA, ids, 0, SHAPE)
    return x_0, noise.stratified_timesteps(0, ids, 2, NUM_STEPS), ids


def bench_normal(benchmark: BenchmarkFixture) -> None:
    ids = torch.arange(NUM_EXAMPLES)
    eps = benchmark(noise.normal, 0, noise.Stream.FORWARD, ids, 1, SHAPE)
    benchmark.extra_info["normals_per_second"] = eps.numel() / benchmark.stats["median"]


def bench_kl(benchmark: BenchmarkFixture, model: DiffusionModel, batch: tuple) -> None:
    x_0, t, ids = batch
    x_t = model.process.sample_x_t(x_0, t, 0, ids)
    out = torch.zeros(NUM_EXAMPLES, 2, 28, 28)
    assert benchmark(model.reverse.kl, x_0, x_t, t, out).isfinite().all()


def bench_training_step(benchmark: BenchmarkFixture, model: DiffusionModel, batch: tuple) -> None:
    x_0, _, ids = batch

    def forward_backward() -> torch.Tensor:
        loss = model.loss(x_0, seed=0, example_ids=ids)
        loss.backward()
        return loss

    assert benchmark(forward_backward).isfinite()
    benchmark.extra_info["examples_per_second"] = NUM_EXAMPLES / benchmark.stats["median"]


def bench_sampling_step(benchmark: BenchmarkFixture, model: DiffusionModel, batch: tuple) -> None:
    x_t = batch[0]

    def one_step() -> torch.Tensor:
        return model.sample(NUM_EXAMPLES, start=(2, x_t), final="x_1")

    assert benchmark(one_step).isfinite().all()
    benchmark.extra_info["examples_per_second"] = NUM_EXAMPLES / benchmark.stats["median"]
