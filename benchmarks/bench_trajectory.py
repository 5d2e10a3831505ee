"""Reverse trajectories of vectors and images: networks, steps and noise, from a start to the end.

    reference    the loop as one writes it in eager PyTorch, the readouts of all bumps applied and
                 then mixed by time; images channels first
    contracted   the same with the readout contracted first; images channels last, and once more
                 under bfloat16 autocast
    compile      the former through `torch.compile`, one step or many to a graph; the noise is drawn
                 outside by eager PyTorch, whose generator is ten times as fast
    stepwise     `DiffusionModel.sample` with its ops, but step by step
    auto         `DiffusionModel.sample`
    diffusers, denoising_diffusion_pytorch
                 their loops around the network of "contracted", where epsilon is predicted

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
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.bench_training import flops_of_images, remembered
from benchmarks.harness import Case
from benchmarks.loops import SEED, Loop, PeerLoop, Setting, result
from dpm_fast import trajectory, use_backend
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP, ConvDenseNetwork, RBFNetwork
from dpm_fast.sampling import Posterior


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


def predicting_epsilon(num_steps: int) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("linear", num_steps)
    network = ConvDenseNetwork((1, 28, 28), num_steps, num_outputs=1)
    return DiffusionModel(process, network, "epsilon", variance="fixed_small", clamp=(-1.0, 1.0))


def colors(num_steps: int) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("erase", num_steps)
    options = {"conv_layers": 6, "conv_channels": 100, "dense_width": 1000}
    network = ConvDenseNetwork((3, 32, 32), num_steps, **options)
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
    Setting("2015 CIFAR-10", 1000, 3, 1, colors, (3, 32, 32), 16),
    Setting("2015 MNIST, epsilon", 1000, 10, 1, predicting_epsilon, (1, 28, 28), 64),
]
# With so many steps at least: a graph is captured first, which takes as long as some of them.
SETTINGS_OF_GPU = [replace(s, start=max(s.start, min(100, s.num_steps))) for s in SETTINGS]


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
        self.is_known_whole = False

    def __call__(self, x: Tensor) -> Tensor:
        start = None if self.setting.start == self.setting.num_steps else (self.setting.start, x)
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16),
            contextlib.nullcontext() if self.backend == "auto" else use_backend(self.backend),
        ):
            if self.stepwise:
                patch.setattr(trajectory, "can_launch", lambda *_: False)
            elif self.backend == "native" and not self.is_known_whole:
                if reason := trajectory._why_stepwise(self.model, Posterior(), len(x), len(x)):
                    raise RuntimeError(reason)
                self.is_known_whole = True  # so that no later call is timed with it
            samples = self.model.sample(
                len(x),
                seed=SEED,
                start=start,
                final="sample" if self.setting.is_binomial else "x_1",
                batch_size=len(x),
                use_graphs=self.graphs,
            )
        return result(self.setting, samples)


PEERS = {
    "diffusers": peers.diffusers_loop,
    "denoising_diffusion_pytorch": peers.denoising_diffusion_pytorch_loop,
}


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
        if setting.make is predicting_epsilon:
            for peer, make in PEERS.items():
                makers[peer] = partial(PeerLoop, setting, device, make)
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
    """Options of the providers whose kernels take a network whole, or say why they cannot."""
    native = {"native": {"backend": "native"}}
    if CONV_ONLY in name:
        native["native_bf16"] = {"backend": "native", "bfloat16": True}
    return native


def bench_trajectory(call: Callable[[], object], benchmark: Any) -> None:
    benchmark(call)
