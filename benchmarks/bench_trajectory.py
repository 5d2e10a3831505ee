"""Reverse trajectories of vectors and images: networks, steps and noise, from a start to the end.

    reference    the loop as one writes it in eager PyTorch, the readouts of all bumps applied and
                 then mixed by time; images channels first
    contracted   the same with the readout contracted first; images channels last, and once more
                 under bfloat16 autocast
    compile      the former through `torch.compile`, one step or many to a graph; the noise is drawn
                 outside by eager PyTorch, whose generator is ten times as fast
    stepwise     `DiffusionModel.sample` with its ops, but step by step
    auto         `DiffusionModel.sample`

and on a GPU

    compile_graphs  `torch.compile` with mode="reduce-overhead": each call replays a CUDA graph
    graphs          a step of `DiffusionModel.sample` as a CUDA graph
    native          whole trajectories in CUDA C++, which "auto" takes for little work; of images
                    also under bfloat16 autocast

The first call, which is checked, is given the noise of this package and has to give the samples of
float64 (of bits the rates: a rate that meets its random number decides by rounding); then PyTorch
draws its own. Where T is large only the last steps are taken: all of them cost the same.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_readout import contracted_last
from benchmarks.bench_training import Plain, flops_of_images, remembered
from benchmarks.harness import Case
from dpm_fast import noise, ops, trajectory, use_backend
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP, ConvDenseNetwork, RBFNetwork

SEED = 0


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
        """With a readout that is not zero, and outputs that keep x where it is."""
        torch.manual_seed(0)
        model = self.make(self.num_steps).requires_grad_(False)
        torch.nn.init.normal_(model.network.readout.weight, std=0.05)
        return model.to(device)

    @property
    def is_image(self) -> bool:
        return len(self.event) == 3

    @property
    def timesteps(self) -> range:
        return range(self.start, 0 if self.is_binomial else 1, -1)


def swiss_roll(num_steps: int) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("erase", num_steps)
    return DiffusionModel(process, RBFNetwork(2, num_steps, num_units=16))


def perceptron(num_steps: int, activation: str) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("erase", num_steps)
    return DiffusionModel(process, MLP(2, num_steps, hidden=(64, 64), activation=activation))


def heartbeat(num_steps: int) -> DiffusionModel:
    process = BinomialDiffusion(num_steps, prior_rate=0.2)
    return DiffusionModel(process, MLP(20, num_steps, hidden=(128, 128), num_outputs=1), "x0")


def images(num_steps: int, **options: int) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("erase", num_steps)
    network = ConvDenseNetwork((1, 28, 28), num_steps, **options)
    return DiffusionModel(process, network, "perturbation")


CONV_ONLY = ", conv-only"  # the networks of images that a GPU takes whole
LEAKY, GELU = (partial(perceptron, activation=name) for name in ("leaky_relu", "gelu"))
SETTINGS = [
    Setting("Swiss roll, RBF 16, perturbation", 40, 40, 39, swiss_roll, (2,)),
    Setting("MLP 2-64-64-4 leaky ReLU", 1000, 100, 1, LEAKY, (2,)),
    Setting("MLP 2-64-64-4 GELU", 1000, 100, 1, GELU, (2,)),
    Setting("heartbeat, MLP 20-128-128-20 GELU", 2000, 40, 1, heartbeat, (20,)),
    *(
        Setting(
            f"2015 MNIST S={scales}", 1000, 5, 1, partial(images, num_scales=scales), (1, 28, 28), n
        )
        for n in (512, 49)
        for scales in (1, 3)
    ),
    *(
        Setting(
            f"2015 MNIST S={scales}{CONV_ONLY}",
            1000,
            100,
            1,
            partial(images, num_scales=scales, dense_layers=0),
            (1, 28, 28),
            64,
        )
        for scales in (1, 3)
    ),
]
# With so many steps at least: a graph is captured first, which takes as long as some of them.
SETTINGS_OF_GPU = [replace(s, start=max(s.start, min(100, s.num_steps))) for s in SETTINGS]


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
        else:
            self.step = self.gaussian_step
            beta = tables.beta
            columns = ((1 - beta).sqrt(), beta.sqrt(), (beta / (1 - beta)).log())
            self.table = torch.stack(columns, dim=1).float()
        self.steps_per_graph = steps_per_graph or 1
        mode = "reduce-overhead" if graphs else None
        compiled = steps_per_graph > 0
        self.run = torch.compile(self.steps, dynamic=False, mode=mode) if compiled else self.steps
        self.checked: set[int] = set()  # with so many threads

    def gaussian_step(self, x: Tensor, eps: Tensor, t: Tensor, row: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            out = self.network(x, t)
        mu_out, sigma2_out = out.float().chunk(2, dim=1)
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
        ids = torch.arange(self.setting.n, device=x.device)
        random = ops.uniform if self.setting.is_binomial else ops.normal
        draw = torch.rand if self.setting.is_binomial else torch.randn
        for begin in range(0, len(self.setting.timesteps), self.steps_per_graph):
            steps = self.setting.timesteps[begin : begin + self.steps_per_graph]
            if torch.get_num_threads() in self.checked:
                numbers = draw(len(steps), *x.shape, device=x.device)
            else:
                event, stream = x.shape[1:], noise.Stream.REVERSE
                numbers = torch.stack([random(SEED, stream, ids, t, event) for t in steps])
            t = torch.tensor(steps, device=x.device)
            if self.graphs:  # whose results are in memory of the next one
                torch.compiler.cudagraph_mark_step_begin()
                x = self.run(x, numbers, t, self.table[t]).clone()
            else:
                x = self.run(x, numbers, t, self.table[t])
        self.checked.add(torch.get_num_threads())
        return result(self.setting, x)


class Sample:
    """`DiffusionModel.sample`."""

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        *,
        stepwise: bool = False,
        bfloat16: bool = False,
        graphs: bool = False,
        backend: str = "auto",
    ):
        self.setting, self.model, self.stepwise = setting, setting.model(device), stepwise
        self.bfloat16, self.graphs, self.backend = bfloat16, graphs, backend

    def __call__(self, x: Tensor) -> Tensor:
        start = None if self.setting.start == self.setting.num_steps else (self.setting.start, x)
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16),
            contextlib.nullcontext() if self.backend == "auto" else use_backend(self.backend),
        ):
            if self.stepwise:
                patch.setattr(trajectory, "can_launch", lambda *_: False)
            samples = self.model.sample(
                len(x), seed=SEED, start=start, batch_size=len(x), use_graphs=self.graphs
            )
        return result(self.setting, samples)


def result(setting: Setting, x: Tensor) -> Tensor:
    return x.mean(dim=0) if setting.is_binomial else x


def expected(setting: Setting, x: Tensor) -> Tensor:
    sample = Sample(setting, x.device, backend="reference")
    sample.model.double()
    return sample(x)


def inputs(setting: Setting, device: torch.device) -> tuple[Tensor]:
    """x_T, wherever the trajectory starts."""
    process = setting.make(setting.num_steps).process
    x_t = process.sample_x_T(setting.event, SEED, torch.arange(setting.n), torch.float32)
    return (x_t.to(device),)


def flops(setting: Setting) -> int:
    """Of the network's layers; radial basis functions count 3 D + 1 with their exponential."""
    network, steps = setting.model(torch.device("cpu")).network, setting.n * len(setting.timesteps)
    if isinstance(network, ConvDenseNetwork):
        return steps * flops_of_images(network)
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    count = sum(layer.weight.numel() for layer in layers) + network.readout.weight[0].numel()
    radial = getattr(network, "centers", torch.empty(0))
    return steps * (2 * count + 3 * radial.numel() + len(radial))


def cases(device: torch.device) -> Iterator[Case]:
    for setting in SETTINGS if device.type == "cpu" else SETTINGS_OF_GPU:
        loop, sample = partial(Loop, setting, device), partial(Sample, setting, device)
        makers: dict[str, Callable[[], Callable[..., Any]]] = {
            "reference": loop,
            "contracted": partial(loop, contracted=True),
            "compile": partial(loop, setting.steps_per_graph, contracted=True),
            "stepwise": partial(sample, stepwise=True),
            "auto": sample,
        }
        if setting.is_image:
            makers["contracted_bf16"] = partial(makers["contracted"], bfloat16=True)
        if device.type != "cpu":
            makers["compile_graphs"] = partial(makers["compile"], graphs=True)
            makers["graphs"] = partial(sample, stepwise=True, graphs=True)
            for name, options in whole_on_gpu(setting.name).items():
                makers[name] = partial(sample, **options)
        made = {name: cache(make) for name, make in makers.items()}
        providers = {name: lambda x, make=make: make()(x) for name, make in made.items()}
        yield Case(
            op="trajectory",
            name=str(setting),
            mode="sample",
            inputs=partial(inputs, setting, device),
            providers=providers,
            expected=remembered(partial(expected, setting)),
            bytes=8 * setting.n * math.prod(setting.event),
            flops=flops(setting),
            compiled=None,
            tolerances={name: 5e-2 if name.endswith("bf16") else 1e-2 for name in providers},
        )


def whole_on_gpu(name: str) -> dict[str, dict[str, Any]]:
    """Options of the providers whose kernels take a network whole, of a setting's name."""
    native = {"native": {"backend": "native"}}
    if "MNIST" not in name:
        return native
    if CONV_ONLY not in name:
        return {}
    in_bfloat16 = {"native_bf16": {"backend": "native", "bfloat16": True}}
    return in_bfloat16 if "S=3" in name else native | in_bfloat16  # what fits into a block


def bench_trajectory(call: Callable[[], object], benchmark: Any) -> None:
    benchmark(call)
