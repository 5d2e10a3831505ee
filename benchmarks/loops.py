"""Loops over timesteps of a reverse trajectory, as one writes them and as other libraries do."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.bench_readout import contracted_last
from benchmarks.bench_training import Plain
from dpm_fast import noise, ops
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP, ConvDenseNetwork

SEED = 0


def with_readout(
    make: Callable[[int], DiffusionModel], num_steps: int, device: torch.device
) -> DiffusionModel:
    """The same model at every call; its outputs are not zero, and keep x about where it is."""
    torch.manual_seed(0)
    model = make(num_steps).requires_grad_(False)
    torch.nn.init.normal_(model.network.readout.weight, std=0.05)
    return model.to(device)


@dataclass(frozen=True)
class Setting:
    name: str
    num_steps: int  # T
    start: int  # steps are taken from here on
    steps_per_graph: int
    make: Callable[[int], DiffusionModel]
    event: tuple[int, ...]
    n: int = 10_000

    def __str__(self) -> str:
        part = "" if self.start == self.num_steps else f", the last {self.start} steps"
        return f"{self.name}, T = {self.num_steps}{part}, {self.n} examples"

    @property
    def is_binomial(self) -> bool:
        return self.name.startswith("heartbeat")

    def model(self, device: torch.device) -> DiffusionModel:
        return with_readout(self.make, self.num_steps, device)

    @property
    def is_image(self) -> bool:
        return len(self.event) == 3

    @property
    def timesteps(self) -> range:
        return range(self.start, 0 if self.is_binomial else 1, -1)


class MixedLast(nn.Module):
    """A perceptron whose readouts of all bumps are applied and then mixed."""

    def __init__(self, source: MLP):
        super().__init__()
        self.source = source

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        readout = self.source.readout
        basis = F.embedding(t, readout.basis.table)  # type: ignore[union-attr]
        return contracted_last(self.source.hidden(x), readout.weight, readout.bias, basis)


class Loop:
    """The textbook's loop; a graph of `torch.compile` holds ``steps_per_graph`` steps."""

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        steps_per_graph: int = 0,
        *,
        contracted: bool = False,
        bfloat16: bool = False,
        graphs: bool = False,
    ):
        self.setting, self.bfloat16, self.graphs = setting, bfloat16, graphs
        model = setting.model(device)
        self.network: nn.Module = model.network
        if isinstance(self.network, ConvDenseNetwork):
            self.network = Plain(self.network, channels_last=contracted)
        elif not contracted and isinstance(self.network, MLP):
            self.network = MixedLast(self.network)
        tables = model.process.tables(device)
        if setting.is_binomial:
            self.step = self.binomial_step
            self.table = tables.posterior[:, 1].float()  # [T + 1, x_0, x_t]
        elif model.reverse.parameterization == "epsilon":
            self.step = self.epsilon_step
            beta, alpha_bar = tables.beta[1:], tables.alpha_bar
            before, after = alpha_bar[:-1], alpha_bar[1:]
            columns = (
                after.sqrt(),
                (1 - after).sqrt(),
                before.sqrt() * beta / (1 - after),
                (1 - beta).sqrt() * (1 - before) / (1 - after),
                (beta * (1 - before) / (1 - after)).sqrt(),
            )
            self.table = F.pad(torch.stack(columns, dim=1), (0, 0, 1, 0)).float()
        else:
            self.step = self.perturbation_step
            beta = tables.beta
            columns = ((1 - beta).sqrt(), beta.sqrt(), (beta / (1 - beta)).log())
            self.table = torch.stack(columns, dim=1).float()
        self.steps_per_graph = steps_per_graph or 1
        mode = "reduce-overhead" if graphs else None
        compiled = steps_per_graph > 0
        self.run = torch.compile(self.steps, dynamic=False, mode=mode) if compiled else self.steps
        self.checked: set[int] = set()  # with so many threads

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.network(x, t).float()

    def epsilon_step(self, x: Tensor, eps: Tensor, t: Tensor, row: Tensor) -> Tensor:
        x_0 = ((x - row[1] * self.output(x, t)) / row[0]).clamp(-1, 1)
        return row[2] * x_0 + row[3] * x + row[4] * eps

    def perturbation_step(self, x: Tensor, eps: Tensor, t: Tensor, row: Tensor) -> Tensor:
        mu_out, sigma2_out = self.output(x, t).chunk(2, dim=1)
        mu = row[0] * x + row[1] * mu_out
        sigma2 = torch.sigmoid(sigma2_out / self.setting.num_steps**0.5 + row[2])
        return mu + sigma2.sqrt() * eps

    def binomial_step(self, x: Tensor, u: Tensor, t: Tensor, row: Tensor) -> Tensor:
        rate_of_x_0 = torch.sigmoid(self.network(x, t))
        if_0, if_1 = (torch.where(x > 0.5, rates[1], rates[0]) for rates in row)
        return (u <= if_0 + rate_of_x_0 * (if_1 - if_0)).to(x.dtype)

    def steps(self, x: Tensor, numbers: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        for i in range(len(t)):
            x = self.step(x, numbers[i], t[i : i + 1], rows[i])
        return x

    def __call__(self, x: Tensor) -> Tensor:
        draw = torch.rand if self.setting.is_binomial else torch.randn
        for begin in range(0, len(self.setting.timesteps), self.steps_per_graph):
            steps = self.setting.timesteps[begin : begin + self.steps_per_graph]
            if torch.get_num_threads() in self.checked:
                numbers = draw(len(steps), *x.shape, device=x.device)
            else:
                numbers = torch.stack([of_this_package(self.setting, t, x) for t in steps])
            t = torch.tensor(steps, device=x.device)
            if self.graphs:  # whose results are in memory of the next one
                torch.compiler.cudagraph_mark_step_begin()
                x = self.run(x, numbers, t, self.table[t]).clone()
            else:
                x = self.run(x, numbers, t, self.table[t])
        self.checked.add(torch.get_num_threads())
        return result(self.setting, x)


class PeerLoop:
    """The loop of another library around the same network, readouts contracted first."""

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        make: Callable[[nn.Module], Callable[[Tensor, range], Tensor]],
    ):
        self.setting = setting
        network = setting.model(device).network
        assert isinstance(network, ConvDenseNetwork)
        self.run = make(Plain(network, channels_last=True))
        self.checked: set[int] = set()  # with so many threads

    def __call__(self, x: Tensor) -> Tensor:
        timesteps = self.setting.timesteps
        if torch.get_num_threads() in self.checked:
            return self.run(x, timesteps)
        self.checked.add(torch.get_num_threads())
        numbers = [of_this_package(self.setting, t, x) for t in timesteps]
        with peers.drawing(numbers):
            return self.run(x, timesteps)


def of_this_package(setting: Setting, t: int, x: Tensor) -> Tensor:
    """The random numbers of the step from x_t."""
    random = ops.uniform if setting.is_binomial else ops.normal
    ids = torch.arange(len(x), device=x.device)
    return random(SEED, noise.Stream.REVERSE, ids, t, x.shape[1:])


def result(setting: Setting, x: Tensor) -> Tensor:
    return x.mean(dim=0) if setting.is_binomial else x
