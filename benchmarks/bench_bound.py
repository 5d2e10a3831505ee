"""Exact bounds: the terms of every timestep of every example, whatever the number of examples.

    reference    the loop over timesteps as one writes it in eager PyTorch, all examples at a time:
                 readouts of all bumps mixed last, images channels first, the textbook's KL
    contracted   the same with the readout contracted first, images channels last
    compile      the former, a timestep to a graph of `torch.compile`; eager PyTorch draws the noise
    by_timestep  the terms of this package, still a call of the network for each timestep
    network      nothing but the network of this package, in batches of 1024, at one t each
    auto         `DiffusionModel.bound`, which fills batches with (example, timestep) pairs, or has
                 the network in the launches that compute their terms
    native       on a GPU the latter in CUDA C++, which "auto" does for little work; of images also
                 under bfloat16 autocast, as "contracted" is then

The first call, which is checked, is given the noise of this package and has to give the bounds of
float64; then PyTorch draws its own, and `network`, which gives a bound first too, is only called.
Trajectories are short where there are many examples: all timesteps cost the same.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_kl import textbook
from benchmarks.bench_training import Plain, flops_of_images, remembered
from benchmarks.bench_trajectory import CONV_ONLY, GELU, images, whole_on_gpu
from benchmarks.harness import Case
from benchmarks.loops import MixedLast, with_readout
from dpm_fast import noise, ops, trajectory, use_backend
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP, ConvDenseNetwork

SEED, EDGE, BATCH_SIZE = 0, "paper", 1024


@dataclass(frozen=True)
class Setting:
    name: str
    num_steps: int  # T
    n: int
    make: Callable[[int], DiffusionModel]

    def __str__(self) -> str:
        return f"{self.name}, T = {self.num_steps}, {self.n} example{'s' * (self.n > 1)}"

    def model(self, device: torch.device) -> DiffusionModel:
        return with_readout(self.make, self.num_steps, device)

    @property
    def timesteps(self) -> range:
        """Those of the edge "paper"."""
        return range(self.num_steps, 1, -1)


S_1, S_3 = (partial(images, num_scales=scales) for scales in (1, 3))
SETTINGS = [
    Setting("2015 MNIST S=1", 9, 256, S_1),
    Setting("2015 MNIST S=1", 129, 16, S_1),
    Setting("2015 MNIST S=1", 1000, 1, S_1),
    Setting("2015 MNIST S=3", 9, 256, S_3),
    Setting("2015 MNIST S=3", 1000, 1, S_3),
    Setting("MLP 2-64-64-4 GELU", 1000, 16, GELU),
    Setting("MLP 2-64-64-4 GELU", 100, 1024, GELU),
]
CPU = torch.device("cpu")
SETTINGS_OF_GPU = [
    *SETTINGS,
    Setting("2015 MNIST S=1", 100, 256, S_1),
    *(
        Setting(f"2015 MNIST S={scales}{CONV_ONLY}", 100, 256, partial(make, dense_layers=0))
        for scales, make in ((1, S_1), (3, S_3))
    ),
]


class Loop:
    """The textbook's loop over timesteps."""

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        *,
        contracted: bool = False,
        compiled: bool = False,
        bfloat16: bool = False,
    ):
        self.setting, self.model, self.bfloat16 = setting, setting.model(device), bfloat16
        network = self.model.network
        if isinstance(network, ConvDenseNetwork):
            network = Plain(network, channels_last=contracted)
        elif isinstance(network, MLP) and not contracted:
            network = MixedLast(network)
        self.network = network
        tables = self.model.process.tables(device)
        self.coefficients = torch.stack((tables.alpha_bar, tables.beta_bar), dim=1).sqrt().float()
        self.rows = self.model.reverse.table(device).float()
        self.run = torch.compile(self.term, dynamic=False) if compiled else self.term
        self.checked: set[int] = set()  # with so many threads

    def term(self, x_0: Tensor, eps: Tensor, t: Tensor, signal: Tensor, row: Tensor) -> Tensor:
        x_t = signal[0] * x_0 + signal[1] * eps
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=self.bfloat16):
            out = self.network(x_t, t)
        return textbook(
            x_0, x_t, out.float() if self.bfloat16 else out, row,
            parameterization="perturbation", variance="logit_scaled",
        )  # fmt: skip

    def __call__(self, x_0: Tensor) -> Tensor:
        ids, nats = ids_and_nats(x_0)
        for t in self.setting.timesteps:
            if torch.get_num_threads() in self.checked:
                eps = torch.randn_like(x_0)
            else:
                eps = ops.normal(SEED, noise.Stream.FORWARD, ids, t, x_0.shape[1:])
            at = torch.tensor([t], device=x_0.device)
            nats += self.run(x_0, eps, at, self.coefficients[t], self.rows[at])
        self.checked.add(torch.get_num_threads())
        return -nats - self.model.process.prior_nats(x_0, EDGE)


class ByTimestep:
    """The terms of `DiffusionModel`, all examples at a time."""

    def __init__(self, setting: Setting, device: torch.device):
        self.setting, self.model = setting, setting.model(device)

    def __call__(self, x_0: Tensor) -> Tensor:
        ids, nats = ids_and_nats(x_0)
        for t in self.setting.timesteps:
            nats += self.model.term_nats(x_0, torch.full_like(ids, t), SEED, ids)
        return -nats - self.model.process.prior_nats(x_0, EDGE)


class Packed:
    """`DiffusionModel.bound`."""

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        *,
        bfloat16: bool = False,
        backend: str = "auto",
    ):
        self.model = setting.model(device)
        self.bfloat16, self.backend, self.is_known_whole = bfloat16, backend, False

    def __call__(self, x_0: Tensor) -> Tensor:
        with (
            torch.autocast(x_0.device.type, torch.bfloat16, enabled=self.bfloat16),
            contextlib.nullcontext() if self.backend == "auto" else use_backend(self.backend),
        ):
            if self.backend == "native" and not self.is_known_whole:
                if reason := trajectory.why_not_bound(self.model, x_0, EDGE):
                    raise RuntimeError(reason)
                self.is_known_whole = True  # so that no later call is timed with it
            return self.model.bound(x_0, edge=EDGE, seed=SEED).bound_nats


class Network(Packed):
    """A bound once, then as many calls of the network alone."""

    def __init__(self, setting: Setting, device: torch.device):
        super().__init__(setting, device)
        total = setting.n * len(setting.timesteps)
        sizes = [min(BATCH_SIZE, total - i) for i in range(0, total, BATCH_SIZE)]
        event = self.model.network.event_shape
        middle = setting.num_steps // 2
        self.batches = [
            (torch.randn(n, *event, device=device), torch.full((n,), middle, device=device))
            for n in sizes
        ]
        self.checked: set[int] = set()

    def __call__(self, x_0: Tensor) -> Tensor:
        if torch.get_num_threads() not in self.checked:
            self.checked.add(torch.get_num_threads())
            return super().__call__(x_0)
        return torch.stack([self.model.network(x, t).sum() for x, t in self.batches])


def ids_and_nats(x_0: Tensor) -> tuple[Tensor, Tensor]:
    """Of examples, and zeros to add terms to."""
    nats = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    return torch.arange(len(x_0), device=x_0.device), nats


def expected(setting: Setting, x_0: Tensor) -> Tensor:
    packed = Packed(setting, x_0.device, backend="reference")
    packed.model.double()
    return packed(x_0)


def inputs(setting: Setting, device: torch.device) -> tuple[Tensor]:
    """Data of unit variance."""
    ids, event = torch.arange(setting.n), setting.model(CPU).network.event_shape
    return (noise.normal(1, noise.Stream.DATA, ids, 0, event).to(device),)


def flops(setting: Setting) -> int:
    """Of the network's layers."""
    network, terms = setting.model(CPU).network, setting.n * len(setting.timesteps)
    if isinstance(network, ConvDenseNetwork):
        return terms * flops_of_images(network)
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    count = sum(layer.weight.numel() for layer in layers) + network.readout.weight[0].numel()
    return 2 * terms * count


def cases(device: torch.device) -> Iterator[Case]:
    for setting in SETTINGS if device.type == "cpu" else SETTINGS_OF_GPU:
        packed, loop = partial(Packed, setting, device), partial(Loop, setting, device)
        makers: dict[str, Callable[[], Callable[..., Any]]] = {
            "reference": loop,
            "contracted": partial(loop, contracted=True),
            "compile": partial(loop, contracted=True, compiled=True),
            "by_timestep": partial(ByTimestep, setting, device),
            "network": partial(Network, setting, device),
            "auto": packed,
        }
        if device.type != "cpu":
            if CONV_ONLY in setting.name:
                makers["contracted_bf16"] = partial(loop, contracted=True, bfloat16=True)
            for name, options in whole_on_gpu(setting.name).items():
                makers[name] = partial(packed, **options)
        made = {name: cache(make) for name, make in makers.items()}
        providers = {name: lambda x, make=make: make()(x) for name, make in made.items()}
        yield Case(
            op="bound",
            name=str(setting),
            mode="forward",
            inputs=partial(inputs, setting, device),
            providers=providers,
            expected=remembered(partial(expected, setting)),
            bytes=4 * setting.n * math.prod(setting.model(CPU).network.event_shape),
            flops=flops(setting),
            compiled=None,
            # Of the textbook's KL, whose terms nearly cancel where q and p nearly agree.
            tolerances=dict.fromkeys(providers, 1e-5)
            | dict.fromkeys(("reference", "contracted", "compile"), 1e-3)
            | dict.fromkeys(("contracted_bf16", "native_bf16"), 5e-2),
        )


def bench_bound(call: Callable[[], object], benchmark: Any) -> None:
    benchmark(call)
