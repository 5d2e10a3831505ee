"""Miniature training runs, for the tests of the trainer."""

import signal

import torch
from torch import Tensor, nn

import dpm_fast
from dpm_fast.config import TrainConfig
from dpm_fast.data import DataSpec
from dpm_fast.model import DiffusionModel
from dpm_fast.trainer import Trainer

NUM_STEPS = 8
CONFIG = TrainConfig(train_steps=12, batch_size=16, log_every=5, checkpoint_every=4)


class Dropout(nn.Module):
    """A network that draws from torch's generator, with a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 4)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x)


def small_model(*, learned: bool = True, dropout: bool = False, data: DataSpec | None = None):
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS, learned=learned)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Dropout() if dropout else dpm_fast.MLP(2, NUM_STEPS, hidden=(8,))
    return DiffusionModel(process, network, data=data)


def small_data(num_examples: int = 50) -> Tensor:
    return torch.randn(num_examples, 2, generator=torch.Generator().manual_seed(1))


def small_trainer(config: TrainConfig = CONFIG, model: DiffusionModel | None = None, **options):
    return Trainer(
        small_model() if model is None else model, small_data(), config, progress=False, **options
    )


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that later steps follow from."""
    states = {"weights": trainer.model.state_dict(), "averaged": trainer.averaged.state_dict()}
    moments = {
        f"{i}/{key}": tensor
        for i, memory in trainer.optimizer.state_dict()["state"].items()
        for key, tensor in memory.items()
    }
    return {
        f"{part}/{name}": tensor.clone()
        for part, tensors in (states | {"moments": moments}).items()
        for name, tensor in tensors.items()
    }


def assert_equal_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def points_spec() -> DataSpec:
    return DataSpec("points", (2,), "continuous", shift=1.0, scale=2.0)


class SignalAt(nn.Module):
    """A network that sends this process signals in a training step."""

    def __init__(self, step: int, *numbers: signal.Signals) -> None:
        super().__init__()
        self.network, self.step, self.numbers = dpm_fast.MLP(2, NUM_STEPS), step, numbers

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.step -= 1
        if self.step == 0:
            for number in self.numbers:
                signal.raise_signal(number)
        return self.network(x, t)
