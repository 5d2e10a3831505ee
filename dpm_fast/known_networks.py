"""Networks of this package as kernels compute them: whether one is as it was made, how much work
it is, and its parameters by the names of `ops.whole_network`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeGuard, get_args

import torch
from torch import Tensor, nn

from dpm_fast.layers import NEGATIVE_SLOPE, MultiscaleConv, TemporalBasis, TemporalReadout
from dpm_fast.networks import MLP, ConvDenseNetwork, RBFNetwork
from dpm_fast.ops.whole_network import ACTIVATIONS

KnownNetwork = RBFNetwork | MLP | ConvDenseNetwork

_METHODS = {"forward", "outputs", "scaled", "layers", "_layers"}  # that others could replace
_LEAKY_RELU = repr(nn.LeakyReLU(NEGATIVE_SLOPE))  # of image networks
_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Softplus: "softplus",
}


@dataclass(frozen=True)
class Parameters:
    """See `ops.whole_network`."""

    centers: Tensor | None
    scales: Tensor | None
    weights: list[Tensor]
    biases: list[Tensor]
    activation: int
    slope: float
    shape: list[int] = field(default_factory=list)
    num_scales: int = 0
    after_sum: bool = False
    conv_weights: list[Tensor] = field(default_factory=list)
    conv_biases: list[Tensor] = field(default_factory=list)
    pixel_weights: list[Tensor] = field(default_factory=list)
    pixel_biases: list[Tensor] = field(default_factory=list)


class CallCounter:
    """A forward hook that only counts a network's calls, and in a launch those it stands for."""

    def __init__(self, count: Callable[[int], object]):
        self.count = count

    def __call__(self, *call: object) -> None:
        self.count(1)


def is_known(network: nn.Module) -> TypeGuard[KnownNetwork]:
    """Whether its class is one of this package's."""
    return type(network) in get_args(KnownNetwork)


def is_as_made(network: KnownNetwork) -> bool:
    """Whether calling a network runs its class's code on its class's layers and nothing else."""
    hooks = nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    for module in network.modules():
        others = [h for h in module._forward_hooks.values() if not isinstance(h, CallCounter)]
        if others or module._forward_pre_hooks:
            return False
        if not _METHODS.isdisjoint(vars(module)):
            return False
    basis = type(network.readout.basis)
    if type(network.readout) is not TemporalReadout or basis not in (TemporalBasis, type(None)):
        return False
    if isinstance(network, ConvDenseNetwork):
        dense = network.dense
        return dense is None or (_is_plain_stack(dense) and repr(dense[1]) == _LEAKY_RELU)
    return not isinstance(network, MLP) or _is_plain_stack(network.hidden)


def _is_plain_stack(hidden: nn.Module) -> bool:
    """Linear layers with a bias, each followed by the same activation of `_ACTIVATIONS`."""
    if type(hidden) is not nn.Sequential or len(hidden) == 0 or len(hidden) % 2:
        return False
    layers, activation = list(hidden), hidden[1]
    return (
        all(type(layer) is nn.Linear and layer.bias is not None for layer in layers[::2])
        and all(repr(layer) == repr(activation) for layer in layers[1::2])
        and type(activation) in _ACTIVATIONS
        and getattr(activation, "approximate", "none") == "none"
        and (getattr(activation, "beta", 1), getattr(activation, "threshold", 20)) == (1, 20)
    )


def work_of(network: KnownNetwork) -> int:
    """Multiply-adds of one example and timestep, about."""
    readout = network.readout.weight[0].numel()
    if isinstance(network, RBFNetwork):
        return 8 * network.centers.numel() + readout
    if isinstance(network, MLP):
        return sum(layer.weight.numel() for layer in _linear(network.hidden)) + readout
    pixels = math.prod(network.event_shape[1:])
    stack: list[MultiscaleConv] = list(network.conv)  # type: ignore[arg-type]
    convolutions = sum(
        w.numel() * (pixels >> 2 * scale)
        for layer in stack
        for scale, w in enumerate(layer.weights)
    )
    dense = 0 if network.dense is None else sum(w.numel() for w in network.dense.parameters())
    of_pixel = readout + sum(w.numel() for w in network.pixel.parameters())
    return convolutions // 2 + dense + pixels * of_pixel  # a product less for every second


def parameters_of(network: KnownNetwork, first: int, dtype: torch.dtype) -> Parameters:
    """Those that depend on t as tables for t up to ``first``; those of convolutions and of the
    layers of each pixel in ``dtype``, all others in float32."""
    t = torch.arange(first + 1, device=network.readout.weight.device)
    weight, bias = (table.detach() for table in network.readout.layers(t))
    if isinstance(network, RBFNetwork):
        scales = -0.5 * math.log2(math.e) * (-2 * network.log_widths.detach()).exp()
        centers = network.centers.detach().contiguous()
        return Parameters(centers, scales, [weight.contiguous()], [bias.contiguous()], 0, 0.0)
    if isinstance(network, ConvDenseNetwork):
        return _of_images(network, weight, bias, dtype)
    linear, activation = _linear(network.hidden), network.hidden[1]
    weights = [*(layer.weight.detach() for layer in linear), weight]
    biases = [*(layer.bias.detach() for layer in linear), bias]
    if network.time_basis is not None:
        basis = network.time_basis
        weights[0], of_time = weights[0].tensor_split([linear[0].in_features - basis.num_bumps], 1)
        biases[0] = biases[0] + basis.table[: first + 1] @ of_time.T
    return Parameters(
        None,
        None,
        [w.contiguous() for w in weights],
        [b.contiguous() for b in biases],
        ACTIVATIONS.index(_ACTIVATIONS[type(activation)]),
        getattr(activation, "negative_slope", 0.0),
    )


def _linear(layers: nn.Module) -> list[nn.Linear]:
    return [layer for layer in layers.children() if isinstance(layer, nn.Linear)]


def _of_images(
    network: ConvDenseNetwork, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> Parameters:
    """With the scales of both paths in the first layer that joins them, as `outputs` has them."""

    def stored(tensors: Iterable[Tensor]) -> list[Tensor]:
        return [tensor.detach().to(dtype).contiguous() for tensor in tensors]

    shape = network.event_shape
    stack: list[MultiscaleConv] = list(network.conv)  # type: ignore[arg-type]
    dense = [] if network.dense is None else _linear(network.dense)
    weights = [layer.weight.detach() for layer in dense]
    if weights:  # pixels as they lie in memory, channels last
        image = weights[0].unflatten(1, shape).permute(0, 2, 3, 1)
        weights[0] = image.flatten(1)
    pixel: list[nn.Conv2d] = list(network.pixel)[::2]  # type: ignore[assignment]
    pixel_weights = [layer.weight.detach().flatten(1) for layer in pixel]
    if dense and pixel_weights:
        pixel_weights[0] = network.scaled(pixel_weights[0])
    elif dense:
        weight = network.scaled(weight)
    return Parameters(
        None,
        None,
        [*(w.contiguous() for w in weights), weight.contiguous()],
        [*(layer.bias.detach().contiguous() for layer in dense), bias.contiguous()],
        ACTIVATIONS.index("leaky_relu"),
        NEGATIVE_SLOPE,
        list(shape),
        stack[0].num_scales,
        stack[0].activation == "after_sum",
        stored(w for layer in stack for w in layer.weights),
        stored(b for layer in stack for b in layer.biases),
        stored(pixel_weights),
        stored(layer.bias for layer in pixel),  # type: ignore[misc]
    )
