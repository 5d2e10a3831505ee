"""The op `_trajectory`: steps of a reverse trajectory, network included, in one launch.

It is private: its arguments are the insides of networks and processes, which `dpm_fast.trajectory`
puts together. Its reference is the loop over single steps, `sampling.reverse_trajectory`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpm_fast import dispatch
from dpm_fast.noise import Stream
from dpm_fast.ops.common import LIBRARY, Op, on_its_device, takes_tf32

# Numbered as in csrc/activation.h; "linear" is for csrc alone.
ACTIVATIONS = ("linear", "relu", "leaky_relu", "tanh", "silu", "gelu", "softplus")


class TrajectoryInputs(NamedTuple):
    """Arguments of the op after x. Timesteps index all tables, of which rows past ``first`` may be
    absent; everything is contiguous float32 but where it says otherwise."""

    rows: Tensor  # (T + 1, columns) of the reverse kernels
    is_binomial: bool
    centers: Tensor | None  # (units, D) of radial basis functions
    scales: Tensor | None  # (units,): -log2(e) / (2 width^2)
    weights: list[Tensor]  # of each layer (outputs, inputs), or one per timestep; the readout last
    biases: list[Tensor]  # (outputs,), or one per timestep
    activation: int  # of all layers but the last
    slope: float  # of a leaky ReLU, also in a stack
    # Images have a stack beside the dense layers before the readout, which then take and give
    # pixels in the order (y, x, channel) and end with an activation; otherwise these are empty.
    shape: list[int]  # C, H, W
    num_scales: int
    after_sum: bool
    conv_weights: list[Tensor]  # as of the op `multiscale_conv`
    conv_biases: list[Tensor]
    pixel_weights: list[Tensor]  # (F, C) of the layers of each pixel
    pixel_biases: list[Tensor]  # (F,)
    seed: int  # signed
    example_ids: Tensor  # (N,) int64
    levels: Tensor | None  # (T + 1, 2), as `ops.noise` takes: known values are noised to each level
    mask: Tensor | None  # (N, D) bool, with any strides, as the next three
    values: Tensor | None
    y: Tensor | None
    spread: Tensor | None  # sigma2_y, or the probabilities of a flip
    previous: Tensor  # (T + 1,) int64: a step from x_t leads to x_previous[t]
    first: int  # steps are taken from t = first, previous[first] ... last
    last: int
    mean_at_1: bool  # the step to x_0 takes the mean, or the likelier bit
    wanted: list[int]  # timesteps that steps lead to, whose states are returned


LIBRARY.define(
    "_trajectory(Tensor x, Tensor rows, bool is_binomial, Tensor? centers, Tensor? scales, "
    "Tensor[] weights, Tensor[] biases, int activation, float slope, int[] shape, int num_scales, "
    "bool after_sum, Tensor[] conv_weights, Tensor[] conv_biases, Tensor[] pixel_weights, "
    "Tensor[] pixel_biases, SymInt seed, "
    "Tensor example_ids, Tensor? levels, Tensor? mask, Tensor? values, Tensor? y, Tensor? spread, "
    "Tensor previous, int first, int last, bool mean_at_1, int[] wanted) -> (Tensor, Tensor)"
)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wanted = args[-1]
    return torch.empty_like(x), x.new_empty(len(wanted), *x.shape)


@on_its_device
def _trajectory(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Where the step from x_last leads (N, D), and the wanted states (number, N, D)."""
    out, states = _fake(x, *args)
    if x.numel() == 0:
        return out, states
    inputs = TrajectoryInputs(*args)
    dispatch.kernels("trajectory", x)
    module, threads = dispatch.native(x)
    state_of = torch.full((inputs.first + 1,), -1)
    state_of[inputs.wanted] = torch.arange(len(inputs.wanted))
    module.trajectory(
        x, inputs.rows, inputs.is_binomial, inputs.centers, inputs.scales,
        tuple(zip(inputs.weights, inputs.biases, strict=True)), inputs.activation, inputs.slope,
        _stack(inputs, module, x.device), inputs.seed, int(Stream.REVERSE), int(Stream.FORWARD),
        inputs.example_ids, inputs.levels,
        inputs.mask, inputs.values, inputs.y, inputs.spread, inputs.previous, inputs.first,
        inputs.last, inputs.mean_at_1, out, state_of.to(x.device), states, threads,
    )  # fmt: skip
    return out, states


def _stack(inputs: TrajectoryInputs, module: Any, device: torch.device) -> tuple[Any, ...] | None:
    """As csrc/bind_trajectory.h takes it."""
    if not inputs.shape:
        return None
    packed = None
    if hasattr(module, "image_trajectory_bytes"):
        num_timesteps = inputs.first - inputs.last + 1
        _, num_bytes = module.image_trajectory_bytes(*image_sizes(inputs), num_timesteps)
        packed = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    kinds, scales = (inputs.conv_weights, inputs.conv_biases), inputs.num_scales
    layers = tuple(
        (*(tuple(kind[i : i + scales]) for kind in kinds), None, None, None, None)
        for i in range(0, len(inputs.conv_weights), scales)
    )
    pixel = zip(inputs.pixel_weights, inputs.pixel_biases, strict=True)
    pixel_layers = tuple((weight, bias, None, None) for weight, bias in pixel)
    form = tuple(inputs.shape), scales, inputs.after_sum, layers, pixel_layers
    return *form, packed, takes_tf32()


class ImageSizes(NamedTuple):
    """Of a network of images, as `image_trajectory_bytes` of csrc/bind_cuda.cpp takes them."""

    height: int
    width: int
    num_scales: int
    layers: list[tuple[int, ...]]  # (F, C, K)
    pixel_layers: list[tuple[int, ...]]  # (F, C)
    outputs: int


def image_sizes(network: Any) -> ImageSizes:
    """Of `TrajectoryInputs`, or of another network whose parameters have these names."""
    scales = network.num_scales
    return ImageSizes(
        network.shape[1],
        network.shape[2],
        scales,
        [tuple(w.shape[:3]) for w in network.conv_weights[::scales]],
        [tuple(w.shape) for w in network.pixel_weights],
        network.weights[-1].shape[-2],
    )


_OP = Op("_trajectory", _trajectory, _fake)


def trajectory(x: Tensor, inputs: TrajectoryInputs) -> tuple[Tensor, Tensor]:
    """See `_trajectory`; x is contiguous float32."""
    return _OP.op(x, *inputs)  # through the dispatcher: who knows what its lists hold
