"""Weights of the 2015 code, copied into a `ConvDenseNetwork`."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_fast.networks import ConvDenseNetwork


def load_2015_weights(network: ConvDenseNetwork, params: Mapping[str, np.ndarray]) -> None:
    """Copy the weights of a network of the 2015 code into one of ours, in place.

    That code stores kernels flipped, biases for every location of a "full" convolution (cropped
    here to the image), dense weights as (in, out), and the outputs of the last layer in the order
    color, mean or variance, bump. Gradients of its parameters convert in the same way.

    Args:
        network: of the same architecture, with bias="per_location" and readout="bumps".
        params: arrays by name, "conv/layer{l}/scale{s}/W", "dense_lower/linear{i}/W",
            "dense_upper/linear{i}/W" (the last of these is the readout), and ".../b" for each.

    Raises:
        TypeError: for a network of another kind.
        ValueError: an array is missing, left over or of a wrong shape; nothing is copied then.
    """
    if not isinstance(network, ConvDenseNetwork):
        raise TypeError(f"network must be a ConvDenseNetwork, got {type(network).__name__}")
    targets = list(_targets(network))
    names = {name for name, *_ in targets}
    if params.keys() != names:
        missing, unknown = sorted(names - params.keys()), sorted(params.keys() - names)
        raise ValueError(f"params must name this network's arrays, got {missing=}, {unknown=}")
    for name, _, shape, _ in targets:
        if params[name].shape != shape:
            raise ValueError(f"params[{name!r}] must have shape {shape}, got {params[name].shape}")
    with torch.no_grad():
        for name, parameter, _, convert in targets:
            parameter.copy_(convert(torch.from_numpy(params[name])))


def _targets(
    network: ConvDenseNetwork,
) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...], Callable[[Tensor], Tensor]]]:
    """Name in the 2015 code, parameter of ours, shape there, conversion from there to here."""
    if network.readout.mode != "bumps":
        raise ValueError(f"network must have readout 'bumps', got {network.readout.mode!r}")
    last = len(network.pixel) // 2  # a linear layer and its activation take two places
    outputs = (network.event_shape[0], network.num_outputs, network.readout.bias.shape[0])
    for our_name, parameter in network.named_parameters():
        shape = tuple(parameter.shape)
        match our_name.split("."):
            case ["conv", layer, "weights", scale]:
                name = f"conv/layer{layer}/scale{scale}/W"
                yield name, parameter, shape, lambda w: w.flip(2, 3)
            case ["conv", layer, "biases", scale]:
                if len(shape) == 1:
                    raise ValueError("network must have bias 'per_location', got 'per_channel'")
                rim = network.get_parameter(f"conv.{layer}.weights.{scale}").shape[-1] // 2
                full = (shape[0], shape[1] + 2 * rim, shape[2] + 2 * rim)
                name = f"conv/layer{layer}/scale{scale}/b"
                yield name, parameter, full, partial(F.pad, pad=[-rim] * 4)
            case ["dense", place, "weight"]:
                yield f"dense_lower/linear{int(place) // 2}/W", parameter, shape[::-1], Tensor.t
            case ["dense", place, "bias"]:
                yield f"dense_lower/linear{int(place) // 2}/b", parameter, shape, Tensor.clone
            case ["pixel", place, "weight"]:
                name = f"dense_upper/linear{int(place) // 2}/W"
                yield name, parameter, shape[1::-1], lambda w: w.t()[:, :, None, None]
            case ["pixel", place, "bias"]:
                yield f"dense_upper/linear{int(place) // 2}/b", parameter, shape, Tensor.clone
            case ["readout", _]:
                # [F, C M J] -> [J, M C, F], or without F; M = 0 is the mean, 1 the variance.
                name = f"dense_upper/linear{last}/{'b' if len(shape) == 2 else 'W'}"
                there = (*shape[2:], shape[0] * shape[1])
                yield name, parameter, there, partial(_by_bump, outputs=outputs)


def _by_bump(array: Tensor, outputs: tuple[int, int, int]) -> Tensor:
    by_output = array.unflatten(-1, outputs)
    return by_output.permute(*reversed(range(by_output.ndim))).flatten(1, 2)
