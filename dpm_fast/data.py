"""Data: examples as they were stored, how a model sees them, and how to load them."""

import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dpm_fast.reference import Bins

KINDS = ("continuous", "discrete", "binary")
MAX_LEVELS = 2**16
# Grey levels that went through float32 come back within 0.02 of a level, for up to 2**16 levels.
GRID_TOLERANCE = 0.05

Examples: TypeAlias = np.ndarray | Tensor | Dataset


@dataclass(frozen=True)
class DataSpec:
    """What one example is, and how a model sees it: x_model = (x_data - shift) * scale.

    Attributes:
        name: of the data set.
        shape: of one example, (C, *spatial) or (D,).
        kind: "continuous" (real numbers), "discrete" (grey levels 0, 1, ..., levels - 1) or
            "binary" (0 and 1, which a model sees unscaled).
        shift: in data units.
        scale: model units per data unit; the width of a grey level in a model's eyes.
        levels: number of grey levels of discrete data, 2..2**16; None for the other kinds.

    Raises:
        TypeError, ValueError: for values that do not fit together.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    shift: float = 0.0
    scale: float = 1.0
    levels: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {self.name!r}")
        if not isinstance(self.shape, tuple):
            raise TypeError(f"shape must be a tuple, got {self.shape!r}")
        if not self.shape or not all(type(n) is int and n > 0 for n in self.shape):
            raise ValueError(f"shape must be positive integers, got {self.shape!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for field in ("shift", "scale"):
            value = getattr(self, field)
            if type(value) not in (int, float):
                raise TypeError(f"{field} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{field} must be finite, got {value}")
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if self.kind == "discrete":
            check_levels(self.levels)
        elif self.levels is not None:
            raise ValueError(f"levels must be None for {self.kind} data, got {self.levels}")
        if self.kind == "binary" and (self.shift, self.scale) != (0, 1):
            raise ValueError(
                f"binary data must have shift 0 and scale 1, got {self.shift} and {self.scale}"
            )

    @property
    def num_dims(self) -> int:
        """D, the number of elements of one example."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the data as stored: float32, uint8, or int32 for more than 256 levels."""
        if self.kind == "continuous":
            return torch.float32
        return torch.int32 if (self.levels or 0) > 256 else torch.uint8

    @property
    def bits(self) -> float | None:
        """log2 of the number of values an element can take; None for continuous data."""
        if self.kind == "continuous":
            return None
        return math.log2(self.levels or 2)

    @property
    def log2_jacobian_per_dim(self) -> float:
        """log2 |dx_model / dx_data|: bits/dim in data units are those in model units less this."""
        return math.log2(self.scale)

    @property
    def bin_width(self) -> float:
        """Width of a grey level, model units; discrete data only."""
        self._require_levels()
        return self.scale

    @property
    def bins(self) -> Bins:
        """Bins of the grey levels, model units; discrete data only."""
        levels = self._require_levels()
        lowest = -self.shift * self.scale
        return Bins(self.scale / 2, lowest, lowest + (levels - 1) * self.scale)

    def to_model(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(x - shift) * scale.

        Args:
            x: (N, *shape), data units, any dtype.
            dtype: of the result, and of the arithmetic.

        Returns:
            (N, *shape), model units.
        """
        self._check_shape("x", x)
        return (x.to(dtype) - self.shift) * self.scale

    def to_data(self, x: Tensor) -> Tensor:
        """x / scale + shift; discrete and binary data as the nearest of their values.

        Args:
            x: (N, *shape), model units, floating point.

        Returns:
            (N, *shape), data units; of the dtype of x for continuous data, else of `dtype`.
        """
        self._check_shape("x", x)
        x = x / self.scale + self.shift
        if self.kind == "continuous":
            return x
        return x.round().clamp(0, (self.levels or 2) - 1).to(self.dtype)

    def check_on_grid(self, x: Tensor) -> None:
        """Refuse model-scale data that are not grey levels, whatever claims them to be.

        Args:
            x: (N, *shape), model units, floating point.

        Raises:
            ValueError: for an element further than rounding from each of the levels.
        """
        levels = self._require_levels()
        nearest_levels("x_0 in data units", x / self.scale + self.shift, levels, GRID_TOLERANCE)

    def to_dict(self) -> dict[str, Any]:
        """The attributes, as JSON knows them."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataSpec":
        """The inverse of `to_dict`, for what a file says.

        Raises:
            TypeError, ValueError: for missing, unknown or impossible attributes.
        """
        names = [field.name for field in fields(cls)]
        if sorted(values) != sorted(names):
            raise ValueError(
                f"a data specification must have {', '.join(names)}, "
                f"got {', '.join(values) or 'none of them'}"
            )
        if not isinstance(values["shape"], list | tuple):
            raise TypeError(f"shape must be a list of integers, got {values['shape']!r}")
        return cls(**{**values, "shape": tuple(values["shape"])})

    def _require_levels(self) -> int:
        if self.levels is None:
            raise ValueError(f"{self.name} must be discrete to have grey levels, got {self.kind}")
        return self.levels

    def _check_shape(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if tuple(x.shape[1:]) != self.shape or x.dim() == 0:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"{name} must have shape (N, {wanted}), got {tuple(x.shape)}")


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A data set in its own units; `spec.to_model(data.train[ids])` is what a model sees.

    Attributes:
        spec: what an example is.
        train: (N, *spec.shape) of `spec.dtype`, on the CPU.
        test: (M, *spec.shape), held out.
        limit_bits: E log2 p(x) per example, data units, where p is known: no bound is higher.
        log_density: log p of (N, *shape) examples, data units, in nats: (N,) float64; or None.
    """

    spec: DataSpec
    train: Tensor
    test: Tensor
    limit_bits: float | None = None
    log_density: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.spec, DataSpec):
            raise TypeError(f"spec must be a DataSpec, got {type(self.spec).__name__}")
        for name, x in (("train", self.train), ("test", self.test)):
            self.spec._check_shape(name, x)
            if len(x) == 0:
                raise ValueError(f"{name} must hold at least one example, got none")
            if x.dtype != self.spec.dtype:
                raise TypeError(f"{name} must be of {self.spec.dtype}, got {x.dtype}")
            if self.spec.kind != "continuous":
                highest, (least, most) = (self.spec.levels or 2) - 1, x.aminmax()
                if least < 0 or most > highest:
                    raise ValueError(
                        f"{name} must hold values in 0..{highest}, got {least}..{most}"
                    )

    def __repr__(self) -> str:
        spec = self.spec
        values = f"{spec.levels} levels" if spec.levels else spec.kind
        return (
            f"Data({spec.name}: {len(self.train)} train + {len(self.test)} test, "
            f"shape {spec.shape}, {values})"
        )


def load(
    source: str | os.PathLike[str] | Examples,
    *,
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Data:
    """Load a data set.

    Args:
        source: "swiss-roll", "heartbeat", "dead-leaves", "digits"; "mnist" or "cifar10" with
            ``path``; the path of a folder of images, of an .npy or an .npz file; or an array, a
            tensor, or a torch Dataset.
        path: where "mnist" or "cifar10" lie; nothing is downloaded.
        seed: of synthetic data, and of the split into train and test of a source without one.
        **options: of the loader: `datasets.swiss_roll`, `datasets.heartbeat`,
            `datasets.dead_leaves`, `datasets.digits`, `data_files.mnist`, `data_files.cifar10`,
            `data_images.image_folder`, else `data_arrays.from_arrays`. None stands for the
            loader's default.

    Raises:
        ValueError, TypeError: for an unknown name or option, and for data that cannot be used.
        OSError: for a file that cannot be read.
        RuntimeError: where an optional package is missing.
    """
    loader, arguments, defaults = _loader(source, path)
    options = {name: value for name, value in options.items() if value is not None}
    accepted = [
        name
        for name, parameter in inspect.signature(loader).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    takes_seed = "seed" in accepted
    if takes_seed:
        accepted.remove("seed")  # an argument of this function
    for name in options:
        if name not in accepted:
            shown = source if isinstance(source, str | os.PathLike) else type(source).__name__
            raise ValueError(f"{shown} takes the options {', '.join(accepted)}, got {name!r}")
    if takes_seed:
        options["seed"] = seed
    return loader(*arguments, **{**defaults, **options})


def _loader(
    source: str | os.PathLike[str] | Examples, path: str | os.PathLike[str] | None
) -> tuple[Callable[..., Data], tuple[Any, ...], dict[str, Any]]:
    """The function that loads a source, with its arguments and its own default options."""
    # These build on this module.
    from dpm_fast import data_files, datasets
    from dpm_fast.data_arrays import from_arrays
    from dpm_fast.data_images import image_folder

    generated: dict[str, Callable[..., Data]] = {
        "swiss-roll": datasets.swiss_roll,
        "heartbeat": datasets.heartbeat,
        "dead-leaves": datasets.dead_leaves,
        "digits": datasets.digits,
    }
    stored: dict[str, Callable[..., Data]] = {
        "mnist": data_files.mnist,
        "cifar10": data_files.cifar10,
    }
    if isinstance(source, str) and source in stored:
        if path is None:
            raise ValueError(f"{source} requires path (--path), where its files lie, got none")
        return stored[source], (Path(path),), {}
    if path is not None:
        with_what = repr(source) if isinstance(source, str | os.PathLike) else type(source).__name__
        raise ValueError(f"path is for {' and '.join(stored)}, got it with {with_what}")
    if isinstance(source, str) and source in generated:
        return generated[source], (), {}
    if not isinstance(source, str | os.PathLike):
        return from_arrays, (source,), {}
    file = Path(source)
    if file.is_dir():
        return image_folder, (file,), {}
    if file.suffix in (".npy", ".npz"):
        train, test = data_files.read_arrays(file)
        return from_arrays, (train,), {"test": test, "name": file.stem}
    if file.exists():
        raise ValueError(f"{file} must be a folder of images, an .npy or an .npz file")
    if len(file.parts) > 1 or file.suffix:
        raise FileNotFoundError(f"{file} does not exist")
    raise ValueError(
        f"data set must be one of {', '.join([*generated, *stored])}, or the path of a folder of "
        f"images, of an .npy or of an .npz file, got {str(source)!r}"
    )


def model_dtype(model: nn.Module) -> torch.dtype:
    """Of the data that a model takes: float64 for parameters of that, else float32."""
    parameter = next(model.parameters(), None)
    return (
        torch.float64
        if parameter is not None and parameter.dtype == torch.float64
        else torch.float32
    )


def nearest_levels(name: str, x: Tensor, levels: int, tolerance: float = 0.0) -> Tensor:
    """x as whole numbers; refused where one is no level, or off by more than ``tolerance``."""
    if x.dtype == torch.bool or (x.dtype == torch.uint8 and levels >= 256):
        return x
    nearest = x.round() if x.is_floating_point() else x.to(torch.int64)
    valid = (nearest >= 0) & (nearest < levels)
    if x.is_floating_point():
        valid &= (x - nearest).abs() <= tolerance
    if not bool(valid.all()):
        raise ValueError(
            f"{name} must be on the grid of {levels} levels 0, 1, ..., {levels - 1}, "
            f"got {x[~valid][0].item():g} (for a model: DataSpec.to_model of these)"
        )
    return nearest


def check_levels(levels: object) -> None:
    if type(levels) is not int or not 2 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels must be an integer in 2..2**16, got {levels!r}")
