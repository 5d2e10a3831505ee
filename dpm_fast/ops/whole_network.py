"""Networks as the ops take them that compute a network too: `_trajectory` and `_bound_terms`.

The arguments of both have these names, in this order:

    centers         (units, D) of radial basis functions, or None
    scales          (units,): -log2(e) / (2 width^2), or None
    weights         of each layer (outputs, inputs), or one per timestep; the readout last
    biases          (outputs,), or one per timestep
    activation      of all layers but the last, a number of `ACTIVATIONS`
    slope           of a leaky ReLU, also in a stack
    shape           [C, H, W] of images, or [], and then the rest is empty
    num_scales
    after_sum
    conv_weights    as of the op `multiscale_conv`
    conv_biases
    pixel_weights   (F, C) of the layers of each pixel
    pixel_biases    (F,)

All are contiguous float32; convolutions and layers of each pixel may be bfloat16 on a GPU. Images
have a stack beside the dense layers before the readout, which then take and give pixels in the
order (y, x, channel) and end with an activation.
"""

from typing import Any, NamedTuple

import torch

from dpm_fast.ops.common import takes_tf32

# Numbered as in csrc/activation.h; "linear" is for csrc alone.
ACTIVATIONS = ("linear", "relu", "leaky_relu", "tanh", "silu", "gelu", "softplus")

SCHEMA = (
    "Tensor? centers, Tensor? scales, Tensor[] weights, Tensor[] biases, int activation, "
    "float slope, int[] shape, int num_scales, bool after_sum, Tensor[] conv_weights, "
    "Tensor[] conv_biases, Tensor[] pixel_weights, Tensor[] pixel_biases"
)


class ImageSizes(NamedTuple):
    """Of a network of images, as `image_network_bytes` of csrc/bind_cuda.cpp takes them."""

    height: int
    width: int
    num_scales: int
    layers: list[tuple[int, ...]]  # (F, C, K)
    pixel_layers: list[tuple[int, ...]]  # (F, C)
    outputs: int
    wide: bool  # float32, not bfloat16


def image_sizes(network: Any) -> ImageSizes:
    """Of anything whose parameters have the names above."""
    scales = network.num_scales
    return ImageSizes(
        network.shape[1],
        network.shape[2],
        scales,
        [tuple(w.shape[:3]) for w in network.conv_weights[::scales]],
        [tuple(w.shape) for w in network.pixel_weights],
        network.weights[-1].shape[-2],
        network.conv_weights[0].dtype == torch.float32,
    )


def as_launched(network: Any, module: Any, num_timesteps: int) -> tuple[Any, ...]:
    """Centers to the stack, as csrc/bind_trajectory.h takes them."""
    layers = tuple(zip(network.weights, network.biases, strict=True))
    stack = _stack(network, module, num_timesteps) if network.shape else None
    return network.centers, network.scales, layers, network.activation, network.slope, stack


def _stack(network: Any, module: Any, num_timesteps: int) -> tuple[Any, ...]:
    packed = None
    if hasattr(module, "image_network_bytes"):
        _, num_bytes = module.image_network_bytes(*image_sizes(network), num_timesteps)
        device = network.weights[-1].device
        packed = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    kinds, scales = (network.conv_weights, network.conv_biases), network.num_scales
    layers = tuple(
        (*(tuple(kind[i : i + scales]) for kind in kinds), None, None, None, None)
        for i in range(0, len(network.conv_weights), scales)
    )
    pixel = zip(network.pixel_weights, network.pixel_biases, strict=True)
    pixel_layers = tuple((weight, bias, None, None) for weight, bias in pixel)
    form = tuple(network.shape), scales, network.after_sum, layers, pixel_layers
    return *form, packed, takes_tf32()
