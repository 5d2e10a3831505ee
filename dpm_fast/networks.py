"""Networks: modules that map (x_t, t) to the raw outputs from which a reverse step is made.

Every network computes features of x and then a linear layer whose coefficients depend on t. That
layer starts at zero, so an untrained network answers 0 everywhere, where a Gaussian process under
its own parameterization reverses nothing but the forward noise.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dpm_fast.layers import (
    NEGATIVE_SLOPE,
    MultiscaleConv,
    TemporalBasis,
    TemporalReadout,
    are_positive,
    check_choice,
    check_positive,
    check_timesteps,
    initialize,
)
from dpm_fast.ops.image_network import image_network

__all__ = [
    "MLP",
    "ConvDenseNetwork",
    "MultiscaleConv",
    "RBFNetwork",
    "TemporalReadout",
]

# Each with the gain of the weights before it: 1 / sqrt(E f(z)^2) for z ~ N(0, 1) keeps the mean
# square of the units from layer to layer.
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "tanh": (nn.Tanh, 1.593),
    "relu": (nn.ReLU, 1.414),
    "leaky_relu": (partial(nn.LeakyReLU, NEGATIVE_SLOPE), 1.412),
    "silu": (nn.SiLU, 1.677),
    "gelu": (nn.GELU, 1.534),
    "softplus": (nn.Softplus, 1.042),
}


class _Network(nn.Module, ABC):
    """Raw outputs, after the checks of what it is given.

    Attributes:
        event_shape: shape of one example.
        num_steps: T.
        num_outputs: raw outputs per element of an example; along the channels of z the first C
            are mu_out, the next C (where num_outputs is 2) sigma2_out.
    """

    readout: TemporalReadout

    def __init__(self, event_shape: Sequence[int], num_steps: int, num_outputs: int):
        super().__init__()
        check_positive(num_steps=num_steps, num_outputs=num_outputs)
        self.event_shape = tuple(event_shape)
        self.num_steps = num_steps
        self.num_outputs = num_outputs

    @abstractmethod
    def outputs(self, x: Tensor, t: Tensor) -> Tensor:
        """`forward` of arguments that fit."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Raw outputs z for noisy examples.

        Args:
            x: (N, *event_shape), of the parameters' dtype.
            t: (N,) int64 in 1..T, or (1,) where all examples share it.

        Returns:
            z: (N, num_outputs * C, *spatial).

        Raises:
            ValueError: a shape does not fit, or t is out of range (looked at on a CPU only).
            TypeError: a dtype does not fit.
        """
        if x.ndim == 0 or x.shape[1:] != self.event_shape:
            required = ", ".join(map(str, self.event_shape))
            raise ValueError(f"x must have shape (N, {required}), got {tuple(x.shape)}")
        parameter = self.readout.weight
        if x.device != parameter.device:
            raise ValueError(f"x must be on {parameter.device}, got {x.device}")
        if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must have dtype {parameter.dtype}, got {x.dtype}")
        return self.outputs(x, t)


class ConvDenseNetwork(_Network):
    """The image network of [DPM] appendix D.2.1; the defaults are those of the 2015 code.

        conv      a stack of multiscale convolutions                            [N, F, H, W]
        dense     an MLP on the whole image, leaky ReLU after every layer       [N, K, H, W]
        features  an MLP on each pixel of (conv / sqrt(F), dense / sqrt(K))     [N, P, H, W]
        z         the temporal readout of the features

    Without a dense path the pixels of `conv` are taken as they are.

    Args:
        shape: (C, H, W); H and W divisible by 2**(num_scales - 1).
        num_steps: T.
        num_outputs: raw outputs per element, 2 for a mean and a variance.
        conv_layers: number of multiscale convolutions.
        conv_channels: F.
        num_scales, kernel_size, activation, bias: see `MultiscaleConv`.
        dense_layers: layers of the dense path, 0 for none.
        dense_width: units of its hidden layers.
        dense_channels: K, its outputs per pixel.
        pixel_layers: layers of the per-pixel MLP, the readout being the last.
        pixel_width: P, units per pixel of its hidden layers.
        readout: "bumps" or "per_timestep", see `TemporalReadout`.
        num_bumps: J.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_steps: int,
        *,
        num_outputs: int = 2,
        conv_layers: int = 4,
        conv_channels: int = 20,
        num_scales: int = 1,
        kernel_size: int = 3,
        activation: str = "per_scale",
        bias: str = "per_channel",
        dense_layers: int = 4,
        dense_width: int = 500,
        dense_channels: int = 2,
        pixel_layers: int = 2,
        pixel_width: int = 20,
        readout: str = "bumps",
        num_bumps: int = 10,
    ):
        if not are_positive(shape) or len(shape) != 3:
            raise ValueError(f"shape must be (C, H, W), all positive, got {shape!r}")
        super().__init__(shape, num_steps, num_outputs)
        check_positive(
            conv_layers=conv_layers,
            conv_channels=conv_channels,
            pixel_layers=pixel_layers,
            pixel_width=pixel_width,
        )
        channels, height, width = shape
        self.conv = nn.Sequential(
            *(
                MultiscaleConv(
                    conv_channels if layer else channels,
                    conv_channels,
                    num_scales=num_scales,
                    kernel_size=kernel_size,
                    activation=activation,
                    bias=bias,
                    size=(height, width),
                )
                for layer in range(conv_layers)
            )
        )
        self.dense: nn.Sequential | None = None
        pixel_inputs = conv_channels
        if dense_layers:
            check_positive(
                dense_layers=dense_layers, dense_width=dense_width, dense_channels=dense_channels
            )
            dense_outputs = dense_channels * height * width
            widths = [math.prod(shape), *[dense_width] * (dense_layers - 1), dense_outputs]
            self.dense = _stack(widths, nn.Linear, "leaky_relu")
            pixel_inputs += dense_channels
        pixel_widths = [pixel_inputs, *[pixel_width] * (pixel_layers - 1)]
        self.pixel = _stack(pixel_widths, partial(nn.Conv2d, kernel_size=1), "leaky_relu")
        self.readout = TemporalReadout(
            pixel_widths[-1], num_outputs * channels, num_steps, mode=readout, num_bumps=num_bumps
        )

    def outputs(self, x: Tensor, t: Tensor) -> Tensor:
        check_timesteps(t, self.num_steps, x)
        layers: list[MultiscaleConv] = list(self.conv)  # type: ignore[arg-type]
        pixel: list[nn.Conv2d] = list(self.pixel)[::2]  # type: ignore[assignment]
        pixel_weights = [layer.weight.flatten(1) for layer in pixel]
        weight, bias = self.readout.layers(t)
        beside = None
        if self.dense is not None:
            image = self.dense(x.flatten(1)).unflatten(1, (*x.shape[2:], -1))
            beside = image.permute(0, 3, 1, 2)
            if pixel_weights:  # the scales of both paths go into the layer that takes them
                pixel_weights[0] = self.scaled(pixel_weights[0])
            else:
                weight = self.scaled(weight)
        return image_network(
            x,
            [list(layer.weights) for layer in layers],
            [list(layer.biases) for layer in layers],
            pixel_weights,
            [layer.bias for layer in pixel],  # type: ignore[misc]
            weight.expand(x.shape[0], -1, -1),
            bias.expand(x.shape[0], -1),
            beside=beside,
            activation=layers[0].activation,
            negative_slope=NEGATIVE_SLOPE,
        )

    def scaled(self, weight: Tensor) -> Tensor:
        """(..., F + K) for the channels of both paths as they are."""
        conv_channels = self.conv[-1].weights[0].shape[0]  # type: ignore[index]
        of_conv, of_dense = weight.tensor_split([conv_channels], dim=-1)
        return torch.cat([w * w.shape[-1] ** -0.5 for w in (of_conv, of_dense)], dim=-1)


class RBFNetwork(_Network):
    """Normalized radial basis functions, [DPM] appendix D.1.

        h_k(x) = exp(-|x - c_k|^2 / 2 w_k^2) / (the same, summed over k)

    Centers start where noise and examples of unit variance lie, at draws from N(0, I); widths
    start at sqrt(D / 8), which is 0.5 in the plane (on the Swiss roll 0.3 and 1 trained less well).

    Args:
        dim: D, examples are vectors.
        num_steps: T.
        num_units: number of centers.
        num_outputs: raw outputs per element, 2 for a mean and a variance.
        readout: "per_timestep" (the paper) or "bumps", see `TemporalReadout`.
        num_bumps: J.
    """

    def __init__(
        self,
        dim: int,
        num_steps: int,
        *,
        num_units: int = 16,
        num_outputs: int = 2,
        readout: str = "per_timestep",
        num_bumps: int = 10,
    ):
        super().__init__((dim,), num_steps, num_outputs)
        check_positive(dim=dim, num_units=num_units)
        self.centers = nn.Parameter(torch.randn(num_units, dim))
        self.log_widths = nn.Parameter(torch.full((num_units,), 0.5 * math.log(dim / 8)))
        self.readout = TemporalReadout(
            num_units, num_outputs * dim, num_steps, mode=readout, num_bumps=num_bumps
        )

    def outputs(self, x: Tensor, t: Tensor) -> Tensor:
        square_distance = (x[:, None, :] - self.centers).square().sum(dim=2)  # [N, units]
        units = (square_distance * (-2 * self.log_widths).exp() * -0.5).softmax(dim=1)
        return self.readout(units, t)


class MLP(_Network):
    """Multilayer perceptron on vectors.

    Args:
        dim: D, examples are vectors.
        num_steps: T.
        hidden: units of each hidden layer.
        activation: a name in `ACTIVATIONS`. On the Swiss roll (T = 100, two layers of 64, 2,000
            steps) "gelu" reached a bound 1.2 bits above that of "tanh", and 0.1 above "silu".
        num_outputs: raw outputs per element, 2 for a mean and a variance.
        readout: "bumps" or "per_timestep", see `TemporalReadout`.
        num_bumps: J.
        time_input: concatenate the J bump functions of t to x, so that the hidden layers know
            the time too.
    """

    def __init__(
        self,
        dim: int,
        num_steps: int,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "gelu",
        num_outputs: int = 2,
        readout: str = "bumps",
        num_bumps: int = 10,
        time_input: bool = False,
    ):
        super().__init__((dim,), num_steps, num_outputs)
        check_positive(dim=dim)
        if not are_positive(hidden) or len(hidden) == 0:
            raise ValueError(f"hidden must be one or more positive widths, got {hidden!r}")
        check_choice("activation", activation, ACTIVATIONS)
        self.time_basis = TemporalBasis(num_steps, num_bumps) if time_input else None
        inputs = dim + num_bumps if time_input else dim
        self.hidden = _stack([inputs, *hidden], nn.Linear, activation)
        self.readout = TemporalReadout(
            hidden[-1], num_outputs * dim, num_steps, mode=readout, num_bumps=num_bumps
        )

    def outputs(self, x: Tensor, t: Tensor) -> Tensor:
        if self.time_basis is not None:
            check_timesteps(t, self.num_steps, x)
            x = torch.cat([x, self.time_basis(t).expand(x.shape[0], -1)], dim=1)
        return self.readout(self.hidden(x), t)


def _stack(
    widths: Sequence[int],
    layer: Callable[[int, int], nn.Linear | nn.Conv2d],
    activation: str,
) -> nn.Sequential:
    """Layers from each width to the next, an activation after every one of them."""
    make_activation, gain = ACTIVATIONS[activation]
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        modules += [initialize(layer(inputs, outputs), gain), make_activation()]
    return nn.Sequential(*modules)
