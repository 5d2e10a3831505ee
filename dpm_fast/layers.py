"""Layers: the modules that own parameters of an op, and the checks of what they are given."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_fast.noise import as_integer, check_integer, has_values
from dpm_fast.ops.multiscale_conv import multiscale_conv
from dpm_fast.reference import affine_per_example, readout, readout_layers, temporal_basis

NEGATIVE_SLOPE = 0.05  # of every leaky ReLU, as in the 2015 code


class MultiscaleConv(nn.Module):
    """One multiscale convolution layer with its nonlinearity, `ops.multiscale_conv`.

    Kernels start Gaussian with variance 1 / fan-in, or a sum over S scales with 1 / (S fan-in).
    Twice the variance, which white noise would want, left the bound 2 to 4 % worse after 800
    steps on digits: in smooth images the taps of a kernel add up.

    Args:
        in_channels: C.
        out_channels: F.
        num_scales: S; scale s sees the image mean-pooled by 2**s.
        kernel_size: K, odd.
        activation: "per_scale", a leaky ReLU at each scale, then the mean over scales (the 2015
            code); or "after_sum", one softplus after the sum over scales (the paper).
        bias: "per_channel", or "per_location" with one value per channel and pixel of each scale.
        size: (H, W) of the image; "per_location" needs it, otherwise any size is accepted.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_scales: int = 1,
        kernel_size: int = 3,
        activation: str = "per_scale",
        bias: str = "per_channel",
        size: tuple[int, int] | None = None,
    ):
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels, num_scales=num_scales)
        check_choice("activation", activation, ("per_scale", "after_sum"))
        check_choice("bias", bias, ("per_channel", "per_location"))
        if (as_integer(kernel_size) or 0) < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size!r}")
        if bias == "per_location" and size is None:
            raise ValueError("bias 'per_location' requires size=(H, W), got None")
        if size is not None:
            check_pooling(size, num_scales)
        self.in_channels = in_channels
        self.num_scales = num_scales
        self.activation = activation
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for scale in range(num_scales):
            location = [side >> scale for side in size or ()] if bias == "per_location" else []
            self.weights.append(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
            self.biases.append(torch.empty(out_channels, *location))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gain = 1.0 if self.activation == "per_scale" else self.num_scales**-0.5
        for weight, bias in zip(self.weights, self.biases, strict=True):
            nn.init.normal_(weight, std=gain / math.sqrt(weight[0].numel()))
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, F, H, W]
        self.check_input(x)
        return multiscale_conv(
            x,
            list(self.weights),
            list(self.biases),
            activation=self.activation,
            negative_slope=NEGATIVE_SLOPE,
        )

    def check_input(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must have shape (N, {self.in_channels}, H, W), got {tuple(x.shape)}"
            )
        location = self.biases[0].shape[1:]
        if location and x.shape[2:] != location:
            raise ValueError(
                f"x must have sides {tuple(location)}, one bias each, got {tuple(x.shape[2:])}"
            )
        check_pooling(x.shape[2:], self.num_scales)

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.weights[0].shape
        return (
            f"{in_channels}, {out_channels}, num_scales={self.num_scales}, "
            f"kernel_size={kernel_size}, activation={self.activation!r}"
        )


class TemporalBasis(nn.Module):
    """Bump functions of time as a module: rows of `reference.temporal_basis`, gathered by t."""

    table: Tensor  # [T + 1, J]

    def __init__(self, num_steps: int, num_bumps: int):
        super().__init__()
        check_positive(num_steps=num_steps, num_bumps=num_bumps)
        table = temporal_basis(num_steps, num_bumps).to(torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)
        self.num_steps = num_steps
        self.num_bumps = num_bumps

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TemporalBasis":
        # A module cast to float32 and then to float64 keeps no float32 rounding in its table.
        super()._apply(fn, recurse)
        self.table = temporal_basis(self.num_steps, self.num_bumps).to(self.table)
        return self

    def forward(self, t: Tensor) -> Tensor:  # [N] -> [N, J]
        return F.embedding(t, self.table)


class TemporalReadout(nn.Module):
    """Linear layer with coefficients that depend on the timestep; starts at zero.

    With "bumps" the coefficients vary smoothly, as mixtures of J bump functions of time
    (`reference.readout`); with "per_timestep" every t has its own.

    Args:
        in_features: F.
        out_features: O.
        num_steps: T.
        mode: "bumps" or "per_timestep".
        num_bumps: J; "per_timestep" has no use for it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_steps: int,
        *,
        mode: str = "bumps",
        num_bumps: int = 10,
    ):
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features, num_steps=num_steps)
        check_choice("readout mode", mode, ("bumps", "per_timestep"))
        self.in_features = in_features
        self.num_steps = num_steps
        self.mode = mode
        self.basis = TemporalBasis(num_steps, num_bumps) if mode == "bumps" else None
        # Row 0 of a "per_timestep" table is never read: tables are indexed by t itself.
        rows = num_bumps if mode == "bumps" else num_steps + 1
        self.weight = nn.Parameter(torch.empty(rows, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(rows, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """Apply the layer of each example's own timestep.

        Args:
            features: (N, F, *spatial).
            t: (N,) int64 in 1..T, or (1,) where all examples share it (one contraction for all).

        Returns:
            (N, O, *spatial).
        """
        if features.ndim < 2 or features.shape[1] != self.in_features:
            raise ValueError(
                f"features must have shape (N, {self.in_features}, *spatial), "
                f"got {tuple(features.shape)}"
            )
        check_timesteps(t, self.num_steps, features)
        if self.basis is not None:
            return readout(features, self.weight, self.bias, self.basis(t))
        # Where timesteps recur, a copy of the layer for each example costs several times as much
        # (50 to 20 units, forward and gradient, one thread: 94 ms against 16 ms for 8192 examples
        # at 2000 timesteps). A GPU would wait for the counts.
        on_cpu = features.device.type == "cpu" and has_values()
        if on_cpu and features.ndim == 2 and t.shape[0] > 1:
            times, group, counts = t.unique(return_inverse=True, return_counts=True)
            width = int(counts.max())
            if len(t) >= 2 * len(times) and len(times) * width <= 4 * len(t):
                return self._grouped(features, times, group, counts, width)
        return affine_per_example(features, *self._layers(t))

    def layers(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The layer of each timestep.

        Args:
            t: (N,) int64 in 1..T.

        Returns:
            weight (N, O, F) and bias (N, O), of float32 at least, under autocast too.
        """
        with torch.autocast(self.weight.device.type, enabled=False):
            if self.basis is None:
                weight, bias = self._layers(t)
            else:
                weight, bias = readout_layers(self.weight, self.bias, self.basis(t))
            wide = torch.promote_types(weight.dtype, torch.float32)
            return weight.to(wide), bias.to(wide)

    def _layers(self, t: Tensor) -> tuple[Tensor, Tensor]:
        weight = F.embedding(t, self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
        return weight, F.embedding(t, self.bias)  # [N, O, F], [N, O]

    def _grouped(
        self, features: Tensor, times: Tensor, group: Tensor, counts: Tensor, width: int
    ) -> Tensor:
        """One matrix product per timestep, over its examples padded to ``width``."""
        order = group.argsort(stable=True)
        rank = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group[order]]
        place = torch.empty_like(group)
        place[order] = group[order] * width + rank
        padded = features.new_zeros(len(times) * width, self.in_features)
        padded = padded.index_copy(0, place, features).unflatten(0, (-1, width))
        weight, bias = self._layers(times)
        out = torch.baddbmm(bias[:, None], padded, weight.transpose(1, 2))
        return out.flatten(0, 1)[place]

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.bias.shape[1]}, num_steps={self.num_steps}"
        return f"{sizes}, mode={self.mode!r}"


def initialize(layer: nn.Linear | nn.Conv2d, gain: float) -> nn.Linear | nn.Conv2d:
    """Gaussian weights of variance gain^2 / fan-in, zero bias."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def check_positive(**values: int) -> None:
    for name, value in values.items():
        if check_integer(value, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def are_positive(sizes: object) -> bool:
    """Whether they are several integers of at least 1."""
    return isinstance(sizes, Iterable) and all((as_integer(n) or 0) >= 1 for n in sizes)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_pooling(size: Sequence[int], num_scales: int) -> None:
    """Each scale halves the image once more: both sides must allow it."""
    divisor = 2 ** (num_scales - 1)
    if any(side % divisor for side in size):
        raise ValueError(
            f"image sides must be divisible by {divisor} for {num_scales} scales, "
            f"got {' x '.join(map(str, size))}"
        )


def check_timesteps(t: Tensor, num_steps: int, batch: Tensor | None, first: int = 1) -> None:
    """t must be in ``first``..T, (N,) int64 for the examples of `batch` (None for any number of
    them, anywhere); row 0 is the data.

    Values are looked at on a CPU only: elsewhere that would stall the device.
    """
    if not isinstance(t, Tensor):
        raise TypeError(
            f"t must be an int64 tensor, one timestep per example, got {type(t).__name__}"
        )
    if t.dtype != torch.int64:
        raise TypeError(f"t must have dtype torch.int64, got {t.dtype}")
    if batch is None:
        if t.ndim != 1:
            raise ValueError(f"t must have shape (N,), got {tuple(t.shape)}")
    else:
        num_examples = batch.shape[0]
        # Two comparisons: under torch.compile `in` takes a symbolic size for a different one.
        if t.ndim != 1 or (t.shape[0] != 1 and t.shape[0] != num_examples):
            raise ValueError(f"t must have shape ({num_examples},) or (1,), got {tuple(t.shape)}")
        if t.device != batch.device:
            raise ValueError(f"t must be on {batch.device}, got {t.device}")
    if t.device.type == "cpu" and has_values() and t.numel():
        low, high = t.aminmax()
        if low < first or high > num_steps:
            raise ValueError(f"t must lie in {first}..{num_steps}, got {low.item()}..{high.item()}")
