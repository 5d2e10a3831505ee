"""Whole training steps and whole sampling steps of the published image networks.

A training step goes from data in memory to the optimizer's step: noise, network, bound term,
gradients, Adam. A sampling step is the network and a reverse step with its noise. Providers have
their own copies of the same weights:

    reference           eager PyTorch as one writes it: channels first, the layers of all bumps
                        applied and then mixed by time, the textbook's bound term
    channels_last       the same with images channels last and the readout contracted first
    channels_last_bf16  that under bfloat16 autocast
    torch               this package without kernels: its arrangement of the network in PyTorch
    auto, auto_bf16     this package as users run it, and under bfloat16 autocast

A sampling step draws its noise, and is checked against the distribution that float64 gives. A
training step's first call, the one that is checked, is given the timesteps and the noise of this
package and has to give the loss and all gradients of float64; then eager PyTorch draws its own.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.distributions import Normal

from benchmarks.bench_kl import textbook as textbook_nats
from benchmarks.bench_readout import contracted_last
from benchmarks.harness import Case
from dpm_fast import noise, ops, reference, use_backend
from dpm_fast.bound import NATS_PER_BIT
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.losses import choose_timesteps
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import ConvDenseNetwork
from dpm_fast.sampling import Posterior, reverse_trajectory

NUM_STEPS, T = 1000, 500
SEED = 0


class Network(NamedTuple):
    """A published network, and examples in a step."""

    name: str
    n: int
    shape: tuple[int, int, int]
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}, {self.n}x{'x'.join(map(str, self.shape))}"


NETWORKS = [
    Network("2015 MNIST S=1", 512, (1, 28, 28), {}),
    Network("2015 MNIST S=3", 512, (1, 28, 28), {"num_scales": 3}),
    Network(
        "2015 CIFAR-10",
        16,
        (3, 32, 32),
        {"conv_layers": 6, "conv_channels": 100, "dense_width": 1000},
    ),
]


def make_model(network: Network, device: torch.device) -> DiffusionModel:
    """The same weights at every call; those of the readout are not zero, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        process = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
        module = ConvDenseNetwork(network.shape, NUM_STEPS, **network.options)
        nn.init.normal_(module.readout.weight, std=0.1)
    return DiffusionModel(process, module, "perturbation").to(device)


class Plain(nn.Module):
    """The network in PyTorch alone, with the weights of one of this package."""

    def __init__(self, source: ConvDenseNetwork, *, channels_last: bool):
        super().__init__()
        self.source, self.channels_last = source, channels_last
        self.basis: Tensor
        self.register_buffer("basis", source.readout.basis.table)  # type: ignore[union-attr]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        source, y = self.source, x
        if self.channels_last:
            y = x.clone(memory_format=torch.channels_last)
        for layer in source.conv:
            y = reference.multiscale_conv(y, list(layer.weights), list(layer.biases))  # type: ignore[arg-type]
        if source.dense is not None:
            dense = source.dense(x.flatten(1)).unflatten(1, (*x.shape[2:], -1)).permute(0, 3, 1, 2)
            y = torch.cat([part / math.sqrt(part.shape[1]) for part in (y, dense)], dim=1)
        y = source.pixel(y)
        weight, bias, basis = source.readout.weight, source.readout.bias, F.embedding(t, self.basis)
        if not self.channels_last:
            return contracted_last(y, weight, bias, basis)
        weight = (basis @ weight.flatten(1)).unflatten(1, weight.shape[1:])
        offset = (basis @ bias)[:, :, None]
        out = torch.baddbmm(offset, weight.expand(len(x), -1, -1), y.flatten(2))
        return out.unflatten(2, x.shape[2:])


class TrainingStep:
    """data (M, *event), order (N,) -> loss and gradients; then the optimizer has made its step."""

    def __init__(self, network: Network, device: torch.device, *, bfloat16: bool = False):
        self.model = make_model(network, device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=True)
        self.bfloat16 = bfloat16
        self.num_examples_seen = 0

    def __call__(self, data: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        first, n = self.num_examples_seen, len(order)
        ids = torch.arange(first, first + n, device=data.device)
        with torch.autocast(data.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self.loss(data[order], ids)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.num_examples_seen += n
        return loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)

    def loss(self, x_0: Tensor, ids: Tensor) -> Tensor:
        return self.model.loss(x_0, seed=SEED, example_ids=ids, edge="paper", check_values=False)


class TorchTrainingStep(TrainingStep):
    """The network of this package with its backend "reference"."""

    def loss(self, x_0: Tensor, ids: Tensor) -> Tensor:
        with use_backend("reference"):
            return super().loss(x_0, ids)


class PlainTrainingStep(TrainingStep):
    """[DPM] equation 14 as one writes it, in PyTorch alone."""

    def __init__(
        self,
        network: Network,
        device: torch.device,
        *,
        channels_last: bool = False,
        bfloat16: bool = False,
    ):
        super().__init__(network, device, bfloat16=bfloat16)
        assert isinstance(self.model.network, ConvDenseNetwork)
        self.network = Plain(self.model.network, channels_last=channels_last)
        tables = self.model.process.tables(device)
        self.coefficients = torch.stack([tables.alpha_bar, tables.beta_bar]).sqrt().float()
        self.rows = self.model.reverse.table(device).float()
        with torch.no_grad():
            zero = torch.zeros(1, *network.shape, device=device)
            self.prior_nats = float(self.model.process.prior_nats(zero, "paper"))

    def loss(self, x_0: Tensor, ids: Tensor) -> Tensor:
        if self.num_examples_seen == 0:  # to be checked: the other providers' t and noise
            t, _ = choose_timesteps((SEED, ids, 2, 0, 1, 0), NUM_STEPS, None)
            eps = ops.normal(SEED, noise.Stream.FORWARD, ids, t, x_0.shape[1:])
        else:
            t = torch.randint(2, NUM_STEPS + 1, (len(x_0),), device=x_0.device)
            eps = torch.randn_like(x_0)
        signal, spread = self.coefficients[:, t].view(2, -1, 1, 1, 1)
        x_t = signal * x_0 + spread * eps
        nats = textbook_nats(
            x_0, x_t, self.network(x_t, t).float(), self.rows[t],
            parameterization="perturbation", variance="logit_scaled",
        )  # fmt: skip
        nats = (NUM_STEPS - 1) * nats.mean() + self.prior_nats
        return nats / (NATS_PER_BIT * math.prod(x_0.shape[1:]))


def expected_training(network: Network, data: Tensor, order: Tensor) -> tuple[Tensor, ...]:
    with use_backend("reference"):
        step = TrainingStep(network, data.device)
        step.model.double()
        return step(data, order)


class SamplingStep:
    """x_t (N, *event) -> x_{t-1}, as `DiffusionModel.sample` does it."""

    def __init__(self, network: Network, device: torch.device, *, bfloat16: bool = False):
        self.model = make_model(network, device).requires_grad_(False)
        self.ids = torch.arange(network.n, device=device)
        self.bfloat16 = bfloat16

    def __call__(self, x_t: Tensor) -> Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bfloat16):
            return reverse_trajectory(
                self.model, x_t, [T], SEED, self.ids, Posterior(), lambda t: None, "x_1"
            )


class TorchSamplingStep(SamplingStep):
    """With this package's backend "reference"."""

    def __call__(self, x_t: Tensor) -> Tensor:
        with use_backend("reference"):
            return super().__call__(x_t)


class PlainSamplingStep(SamplingStep):
    """The 2015 step as one writes it, in PyTorch alone."""

    def __init__(
        self,
        network: Network,
        device: torch.device,
        *,
        channels_last: bool = False,
        bfloat16: bool = False,
    ):
        super().__init__(network, device, bfloat16=bfloat16)
        assert isinstance(self.model.network, ConvDenseNetwork)
        self.network = Plain(self.model.network, channels_last=channels_last)
        self.beta = float(self.model.process.tables().beta[T])
        self.logit_beta = math.log(self.beta / (1 - self.beta))
        self.t = torch.tensor([T], device=device)

    def __call__(self, x_t: Tensor) -> Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bfloat16):
            out = self.network(x_t, self.t)
        mu_out, sigma2_out = out.float().chunk(2, dim=1)
        mu = math.sqrt(1 - self.beta) * x_t + math.sqrt(self.beta) * mu_out
        sigma2 = torch.sigmoid(sigma2_out / math.sqrt(NUM_STEPS) + self.logit_beta)
        return mu + sigma2.sqrt() * torch.randn_like(x_t)


def expected_sample(network: Network, x_t: Tensor) -> Normal:
    with use_backend("reference"):
        model = make_model(network, x_t.device).double()
        t = torch.full((len(x_t),), T, device=x_t.device)
        mu_p, sigma2_p = model.reverse.moments(x_t, t, model.network_output(x_t, t))
    return Normal(mu_p, sigma2_p.sqrt())


def inputs(network: Network, mode: str, device: torch.device) -> tuple[Tensor, ...]:
    count = 2 * network.n if mode == "train" else network.n
    data = noise.normal(1, noise.Stream.DATA, torch.arange(count), 0, network.shape).to(device)
    return (data, torch.arange(0, count, 2, device=device)) if mode == "train" else (data,)


def remembered(expected: Callable[..., Any]) -> Callable[..., Any]:
    """Computed once: every provider is given equal inputs, and float64 takes seconds."""
    result: list[Any] = []

    def recall(*tensors: Tensor) -> Any:
        if not result:
            result.append(expected(*tensors))
        return result[0]

    return recall


def made_when_called(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """A provider whose weights take no memory until its first call."""
    made = cache(make)
    return lambda *tensors: made()(*tensors)


def providers(network: Network, mode: str, device: torch.device) -> dict[str, Callable[..., Any]]:
    plain, alone, ours = {
        "train": (PlainTrainingStep, TorchTrainingStep, TrainingStep),
        "sample": (PlainSamplingStep, TorchSamplingStep, SamplingStep),
    }[mode]
    steps: dict[str, Callable[[], Callable[..., Any]]] = {
        "reference": partial(plain, network, device),
        "channels_last": partial(plain, network, device, channels_last=True),
        "channels_last_bf16": partial(plain, network, device, channels_last=True, bfloat16=True),
        "torch": partial(alone, network, device),
        "auto": partial(ours, network, device),
        "auto_bf16": partial(ours, network, device, bfloat16=True),
    }
    return {name: made_when_called(make) for name, make in steps.items()}


def flops(network: Network) -> int:
    """Of the layers, for one example, forward."""
    return flops_of_images(ConvDenseNetwork(network.shape, NUM_STEPS, **network.options))


def flops_of_images(module: ConvDenseNetwork) -> int:
    pixels = math.prod(module.event_shape[1:])
    count = 0
    for layer in module.conv:
        for scale, weight in enumerate(layer.weights):  # type: ignore[arg-type,union-attr]
            count += weight.numel() * (pixels >> (2 * scale))
    dense = module.dense or ()
    count += sum(layer.weight.numel() for layer in dense[::2])  # type: ignore[misc]
    count += pixels * sum(layer.weight.numel() for layer in module.pixel[::2])  # type: ignore[union-attr,misc]
    weight = module.readout.weight
    return 2 * (count + pixels * weight[0].numel() + weight.numel())


def cases(device: torch.device) -> Iterator[Case]:
    for network in NETWORKS:
        for mode, expected in (("train", expected_training), ("sample", expected_sample)):
            # Where sums near 0 change their sign by rounding, a slope of the leaky ReLU changes.
            exact = dict.fromkeys(("reference", "channels_last", "torch", "auto"), 1e-2)
            yield Case(
                op="network_step",
                name=str(network),
                mode=mode,
                inputs=partial(inputs, network, mode, device),
                providers=providers(network, mode, device),
                expected=remembered(partial(expected, network)),
                bytes=8 * network.n * math.prod(network.shape),
                flops=(3 if mode == "train" else 1) * network.n * flops(network),
                # Compiled gradients of convolutions are slower on a CPU than eager ones (floors).
                compiled="channels_last" if mode == "sample" else None,
                # In bfloat16 the gradients of biases, sums over all pixels that nearly cancel, are
                # off by as much as their root mean square.
                tolerances=exact | {"channels_last_bf16": 1.5, "auto_bf16": 1.5},
            )


def bench_training(call: object, benchmark: BenchmarkFixture) -> None:
    benchmark(call)
