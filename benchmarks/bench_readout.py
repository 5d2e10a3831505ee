"""The temporal readout: the last linear layer contracted with the basis before it is applied.

"reference" applies the layers of all J bumps and then mixes their outputs by g_j(t), one 1 x 1
convolution (or matrix product) and one weighted sum; "matmul" does the same in two matrix products.
"auto" is what `TemporalReadout` runs. The order of an image's features is that of the case's name,
and no provider changes it.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import Case
from dpm_fast import noise, reference

NUM_STEPS = 1000


class Readout(NamedTuple):
    """J layers of `features` inputs on `n` examples of the shape `spatial`."""

    n: int
    features: int
    outputs: int
    spatial: tuple[int, ...] = ()
    channels_last: bool = False
    shares_t: bool = False
    bumps: int = 10

    def __str__(self) -> str:
        shape = "x".join(map(str, (self.n, self.features, *self.spatial)))
        order = ("channels last, " if self.channels_last else "channels first, ") * (
            len(self.spatial) > 0
        )
        times = "one t" if self.shares_t else "t of each"
        return f"{shape} to {self.outputs}, J={self.bumps}, {order}{times}"


READOUTS = [
    # The 2015 network on MNIST, in training and in sampling.
    Readout(512, 20, 2, (28, 28), channels_last=True),
    Readout(512, 20, 2, (28, 28), channels_last=True, shares_t=True),
    Readout(512, 20, 2, (28, 28)),
    # An MLP in the plane, alike.
    Readout(10_000, 64, 4),
    Readout(10_000, 64, 4, shares_t=True),
]


def contracted_last(features: Tensor, weight: Tensor, bias: Tensor, basis: Tensor) -> Tensor:
    stacked, offsets = weight.flatten(0, 1), bias.flatten()  # [J O, F], [J O]
    if features.ndim == 2:
        per_bump = F.linear(features, stacked, offsets)
    else:
        per_bump = F.conv2d(features, stacked[:, :, None, None], offsets)
    per_bump = per_bump.unflatten(1, bias.shape)  # [N, J, O, *spatial]
    g = basis.view(*basis.shape, *[1] * (per_bump.ndim - 2))
    return (g * per_bump).sum(dim=1)


def contracted_last_by_matmul(
    features: Tensor, weight: Tensor, bias: Tensor, basis: Tensor
) -> Tensor:
    n, spatial = features.shape[0], features.shape[2:]
    per_bump = torch.matmul(weight.flatten(0, 1), features.flatten(2)) if spatial else None
    if per_bump is None:
        per_bump = features @ weight.flatten(0, 1).T
    per_bump = per_bump.reshape(n, bias.shape[0], -1)  # [N, J, O P]
    out = torch.matmul(basis[:, None], per_bump).view(n, bias.shape[1], *spatial)
    return out + (basis @ bias).view(-1, bias.shape[1], *[1] * len(spatial))


def inputs(readout: Readout, device: torch.device) -> tuple[Tensor, ...]:
    """Features, weight, bias and rows of the basis."""

    def normal(seed: int, n: int, *event: int) -> Tensor:
        return noise.normal(seed, noise.Stream.DATA, torch.arange(n), 0, event)

    ids = torch.arange(readout.n)
    t = noise.stratified_timesteps(0, ids, 1, NUM_STEPS)
    basis = reference.temporal_basis(NUM_STEPS, readout.bumps)[t[:1] if readout.shares_t else t]
    features = normal(0, readout.n, readout.features, *readout.spatial)
    if readout.channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    weight = normal(1, readout.bumps, readout.outputs, readout.features)
    weight = weight / math.sqrt(readout.features)
    bias = normal(2, readout.bumps, readout.outputs)
    return tuple(x.to(device) for x in (features, weight, bias, basis.float()))


def cases(device: torch.device) -> Iterator[Case]:
    providers = {
        "reference": contracted_last,
        "matmul": contracted_last_by_matmul,
        "auto": reference.readout,
    }
    for readout in READOUTS:
        pixels = readout.n * math.prod(readout.spatial)
        layer = 2 * readout.outputs * readout.features
        layers = readout.bumps * (1 if readout.shares_t else readout.n)
        for mode, passes in (("forward", 1), ("forward_backward", 3)):
            tensors = readout.features * (1 if passes == 1 else 2) + readout.outputs
            yield Case(
                op="readout",
                name=str(readout),
                mode=mode,
                inputs=partial(inputs, readout, device),
                providers=providers,
                expected=contracted_last,
                bytes=4 * pixels * tensors,
                flops=passes * layer * (layers + pixels),
                wrt=(0, 1, 2) if passes > 1 else (),
                # Gradients of the weights are sums over all pixels, oneDNN's of the bias too.
                tolerances=dict.fromkeys(providers, 1e-4) | {"reference": 1e-3},
            )


def bench_readout(call: object, benchmark: BenchmarkFixture) -> None:
    benchmark(call)
