"""The op `image_network`: a stack of multiscale convolutions and what follows it, in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpm_fast import dispatch
from dpm_fast.ops.multiscale_conv import (
    as_under_autocast,
    by_torch,
    check_parameter,
    check_stack,
    run,
)
from dpm_fast.ops.tail import MAX_PIXEL_LAYERS, Tail, tail_by_torch


def image_network(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]],
    pixel_weights: Sequence[Tensor],
    pixel_biases: Sequence[Tensor],
    readout_weight: Tensor,
    readout_bias: Tensor,
    *,
    beside: Tensor | None = None,
    activation: str = "per_scale",
    negative_slope: float = 0.05,
) -> Tensor:
    """The network of [DPM] appendix D.2.1 behind its dense path, with the layers of time t.

        y = multiscale_conv_stack(x), with the channels of ``beside`` behind its own
        y = leaky_relu(W y + b) at each pixel, for each pixel layer
        z = readout_weight[n] y[n] + readout_bias[n] at each pixel of example n

    In one call features of a pixel leave the cache only as outputs z. What is said of bits,
    rounding and second derivatives in `multiscale_conv_stack` holds here too.

    Args:
        x, weights, biases, activation, negative_slope: as of `multiscale_conv_stack`; the slope is
            not negative, and that of the pixel layers too.
        pixel_weights: (P_i, P_{i-1}) of each pixel layer, P_0 = F + K; none is no layer.
        pixel_biases: (P_i,) of each.
        readout_weight: (N, O, P), the linear layer of each example, P channels after the last pixel
            layer; float32, or float64 where x is that.
        readout_bias: (N, O), likewise.
        beside: (N, K, H, W), or None.

    Returns:
        z: (N, O, H, W) of the dtype of x.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape, device or option that does not fit.

    Reference: `dpm_fast.reference.multiscale_conv`, `torch.nn.functional.linear` on each pixel,
    `dpm_fast.reference.affine_per_example`.
    """
    check_stack(x, weights, biases, activation, negative_slope)
    if negative_slope < 0:
        raise ValueError(f"negative_slope must not be negative, got {negative_slope}")
    tail = Tail(readout_weight, readout_bias, list(pixel_weights), list(pixel_biases), beside)
    _check_tail(x, weights[-1][0].shape[0], tail)
    x, weights, biases = as_under_autocast(x, weights, biases)
    wide = torch.promote_types(x.dtype, torch.float32)
    tail = Tail(
        readout_weight.to(wide),
        readout_bias.to(wide),
        [w.to(x.dtype) for w in pixel_weights],
        [b.to(x.dtype) for b in pixel_biases],
        None if beside is None else beside.to(x.dtype),
    )

    def with_stack(y: Tensor) -> Tensor:
        return tail_by_torch(y, tail, negative_slope).to(x.dtype)

    def stack_by_torch() -> Tensor:
        return by_torch(x, weights, biases, activation, negative_slope)

    if len(pixel_weights) > MAX_PIXEL_LAYERS or not dispatch.takes_tail(x):
        y = run(x, weights, biases, [], activation, negative_slope, stack_by_torch)
        return with_stack(y)
    return run(
        x, weights, biases, tail.tensors(), activation, negative_slope,
        lambda: with_stack(stack_by_torch()),
    )  # fmt: skip


def _check_tail(x: Tensor, channels: int, tail: Tail) -> None:
    given = {"readout_weight": tail.readout_weight, "readout_bias": tail.readout_bias}
    given |= {f"pixel_weights[{i}]": w for i, w in enumerate(tail.pixel_weights)}
    if tail.beside is not None:
        given["beside"] = tail.beside
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tail.beside is not None:
        expected = x.shape[0], *tail.beside.shape[1:2], *x.shape[2:]
        check_parameter(tail.beside, x, "beside", expected)
        channels += tail.beside.shape[1]
    if len(tail.pixel_weights) != len(tail.pixel_biases):
        raise ValueError(
            f"pixel_weights and pixel_biases must name as many layers, got "
            f"{len(tail.pixel_weights)} and {len(tail.pixel_biases)}"
        )
    for layer, (weight, bias) in enumerate(zip(tail.pixel_weights, tail.pixel_biases, strict=True)):
        width = max(1, weight.shape[0]) if weight.dim() else 1
        check_parameter(weight, x, f"pixel_weights[{layer}]", (width, channels))
        check_parameter(bias, x, f"pixel_biases[{layer}]", (width,))
        channels = width
    outputs = tail.readout_weight.shape[1] if tail.readout_weight.dim() == 3 else 1
    like = torch.promote_types(x.dtype, torch.float32)
    shapes = (x.shape[0], outputs, channels), (x.shape[0], outputs)
    check_parameter(tail.readout_weight, x, "readout_weight", shapes[0], dtype=like)
    check_parameter(tail.readout_bias, x, "readout_bias", shapes[1], dtype=like)
