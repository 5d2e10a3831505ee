"""What follows a stack of multiscale convolutions in an image network, and how PyTorch does it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpm_fast.reference import affine_per_example

MAX_PIXEL_LAYERS = 8  # of the kernels: csrc/multiscale_conv.h


class Tail(NamedTuple):
    """Layers of each pixel, leaky ReLU after each, of the stack's output with the channels of
    ``beside`` behind it; then a linear layer of each example's own."""

    readout_weight: Tensor  # (N, O, P), of float32, or float64 for float64
    readout_bias: Tensor  # (N, O), likewise
    pixel_weights: list[Tensor]  # (F, C) each
    pixel_biases: list[Tensor]  # (F,) each
    beside: Tensor | None  # (N, K, H, W)

    def tensors(self) -> list[Tensor]:
        beside = [] if self.beside is None else [self.beside]
        readout = [self.readout_weight, self.readout_bias]
        return [*readout, *self.pixel_weights, *self.pixel_biases, *beside]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "Tail":
        """From what `tensors` gave: two of each layer, and one beside them or not."""
        layers, beside = divmod(len(tensors) - 2, 2)
        middle, end = 2 + layers, 2 + 2 * layers
        return Tail(
            tensors[0], tensors[1], list(tensors[2:middle]), list(tensors[middle:end]),
            tensors[-1] if beside else None,
        )  # fmt: skip


def tail_by_torch(y: Tensor, tail: Tail, negative_slope: float) -> Tensor:
    """The tail of a stack's output y (N, F, H, W) in PyTorch.

    The first layer takes y and the images beside it by themselves: joining them would cost two more
    passes over images of F channels. Activations are computed in place, which for these layers the
    gradient allows.
    """
    layers = list(zip(tail.pixel_weights, tail.pixel_biases, strict=True))
    beside = tail.beside
    if beside is not None and not layers:
        y = torch.cat([y, beside], dim=1)
    elif beside is not None:
        weight, bias = layers.pop(0)
        of_y, of_beside = weight.split([y.shape[1], beside.shape[1]], dim=1)
        y = F.conv2d(y, of_y[:, :, None, None], bias)
        if y.requires_grad or not _is_channels_last(y):
            y += F.conv2d(beside, of_beside[:, :, None, None])
        else:  # one pass, 0.8 ms for 3.5 (512 x 28 x 28 pixels), whose gradient costs more
            rows = y.permute(0, 2, 3, 1).flatten(0, 2)
            rows.addmm_(beside.permute(0, 2, 3, 1).flatten(0, 2), of_beside.T)
        y = F.leaky_relu(y, negative_slope, inplace=True)
    for weight, bias in layers:
        y = F.leaky_relu(F.conv2d(y, weight[:, :, None, None], bias), negative_slope, inplace=True)
    weight, bias = (p.to(y.dtype) for p in (tail.readout_weight, tail.readout_bias))
    return affine_per_example(y, weight, bias)


def _is_channels_last(x: Tensor) -> bool:
    """False where that cannot be asked: in a trace, or under `torch.func`."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return x.is_contiguous(memory_format=torch.channels_last)
