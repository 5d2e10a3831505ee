"""Data: examples as they were stored, how a model sees them, and how to load them."""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dpm_fast import noise

KINDS = ("continuous", "discrete", "binary")
SCALINGS = ("standardize", "minus_one_one", "none")
MAX_LEVELS = 2**16
# Grey levels that went through float32 come back within 0.02 of a level, for up to 2**16 levels.
_GRID_TOLERANCE = 0.05

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
            _check_levels(self.levels)
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
    def model_range(self) -> tuple[float, float]:
        """The lowest and the highest grey level, model units; discrete data only."""
        levels = self._require_levels()
        return -self.shift * self.scale, (levels - 1 - self.shift) * self.scale

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
        _nearest_levels("x_0 in data units", x / self.scale + self.shift, levels, _GRID_TOLERANCE)

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
                f"a data specification must have {', '.join(names)}, got {', '.join(values)}"
            )
        if not isinstance(values["shape"], list | tuple):
            raise TypeError(f"shape must be a list of integers, got {values['shape']!r}")
        return cls(**{**values, "shape": tuple(values["shape"])})

    def _require_levels(self) -> int:
        if self.levels is None:
            raise ValueError(f"{self.name} must be discrete to have grey levels, got {self.kind}")
        return self.levels

    def _check_shape(self, name: str, x: Tensor) -> None:
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
        for name, x in (("train", self.train), ("test", self.test)):
            self.spec._check_shape(name, x)
            if len(x) == 0:
                raise ValueError(f"{name} must hold at least one example, got none")
            if x.dtype != self.spec.dtype:
                raise TypeError(f"{name} must be of {self.spec.dtype}, got {x.dtype}")

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
            `data_files.image_folder`, else `from_arrays`. None stands for the loader's default.

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
    if "seed" in accepted:
        options["seed"] = seed
    for name in options:
        if name not in accepted:
            shown = source if isinstance(source, str | os.PathLike) else type(source).__name__
            raise ValueError(f"{shown} takes the options {', '.join(accepted)}, got {name!r}")
    return loader(*arguments, **{**defaults, **options})


def from_arrays(
    train: Examples,
    *,
    test: Examples | None = None,
    name: str = "array",
    levels: int | None = None,
    data_range: tuple[float, float] | None = None,
    shape: tuple[int, ...] | None = None,
    channels_last: bool = False,
    scaling: str = "standardize",
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Data:
    """Data from examples in memory.

    Booleans are binary data, bytes have 256 grey levels, other integers need ``levels``, and
    real numbers are continuous unless ``levels`` says that they are not.

    Args:
        train: (N, D), (N, H, W) of grey images, or (N, C, *spatial); N at least 2. Of a Dataset
            whose items are tuples, the first element of each.
        test: held-out examples, like ``train``; None holds out some of ``train``.
        name: of the data set.
        levels: number of grey levels; 2 for binary data.
        data_range: the values of the lowest and of the highest grey level, such as (0, 1);
            without it they are 0 and levels - 1.
        shape: of one example, where it is not as stored.
        channels_last: examples are stored as (*spatial, C).
        scaling: "standardize", by the mean and standard deviation of all elements of ``train``
            (those of discrete data with uniform noise of one level, as models see them), so that
            E |x|^2 = D; "minus_one_one", the range of the grey levels becomes [-1, 1]; "none".
            Binary data stay 0 and 1.
        test_fraction: the fraction held out, in (0, 1), at random but fixed by ``seed``.
        seed: of that split.

    Raises:
        TypeError: for what is no array of numbers.
        ValueError: for empty, non-finite, constant or misshapen data, and values off the grid.
    """
    x_train = _with_event_shape("train", _as_tensor("train", train), shape, channels_last)
    if len(x_train) < 2:
        raise ValueError(f"train must hold at least 2 examples, got {len(x_train)}")
    if x_train.dtype == torch.uint8 and levels is None:
        levels = 256
    if x_train.dtype == torch.bool and levels is None:
        levels = 2
    x_train = _with_levels("train", x_train, levels, data_range)
    if test is None:
        held_out = split(len(x_train), test_fraction, seed)
        x_train, x_test = x_train[~held_out], x_train[held_out]
    else:
        x_test = _with_event_shape("test", _as_tensor("test", test), shape, channels_last)
        x_test = _with_levels("test", x_test, levels, data_range)
    spec = describe(name, x_train, levels, scaling)
    return Data(spec, x_train, x_test)


def describe(
    name: str, train: Tensor, levels: int | None, scaling: str = "standardize"
) -> DataSpec:
    """The specification of examples in their own units, scaled as in `from_arrays`."""
    shape = tuple(train.shape[1:])
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    if levels == 2:
        return DataSpec(name, shape, "binary")
    kind = "continuous" if levels is None else "discrete"
    if scaling == "none":
        return DataSpec(name, shape, kind, levels=levels)
    if scaling == "minus_one_one":
        if levels is None:
            raise ValueError("scaling 'minus_one_one' requires data with grey levels, got none")
        return DataSpec(name, shape, kind, (levels - 1) / 2, 2 / (levels - 1), levels)
    mean, variance = _mean_and_variance(train, levels)
    if variance == 0:
        raise ValueError(f"train must vary to be standardized, got the constant {mean}")
    if levels is not None:
        variance += 1 / 12  # of uniform noise of one level
    return DataSpec(name, shape, kind, mean, 1 / math.sqrt(variance), levels)


def split(num_examples: int, test_fraction: float, seed: int) -> Tensor:
    """Which examples are held out: (N,) bool, round(N * test_fraction) but at least 1 of each."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be in (0, 1), got {test_fraction}")
    num_test = min(max(round(num_examples * test_fraction), 1), num_examples - 1)
    ids = torch.arange(num_examples)
    order = noise.words(seed, noise.Stream.DATA, ids, 0, 1)[:, 0].argsort(stable=True)
    held_out = torch.zeros(num_examples, dtype=torch.bool)
    held_out[order[:num_test]] = True
    return held_out


def _loader(
    source: str | os.PathLike[str] | Examples, path: str | os.PathLike[str] | None
) -> tuple[Callable[..., Data], tuple[Any, ...], dict[str, Any]]:
    """The function that loads a source, with its arguments and its own default options."""
    from dpm_fast import data_files, datasets  # both build on this module

    generated = {
        "swiss-roll": datasets.swiss_roll,
        "heartbeat": datasets.heartbeat,
        "dead-leaves": datasets.dead_leaves,
        "digits": datasets.digits,
    }
    stored = {"mnist": data_files.mnist, "cifar10": data_files.cifar10}
    if isinstance(source, str) and source in stored:
        if path is None:
            raise ValueError(f"{source} requires path=, where its files lie, got None")
        return stored[source], (Path(path),), {}
    if path is not None:
        raise ValueError(f"path is for {' and '.join(stored)}, got it with {source!r}")
    if isinstance(source, str) and source in generated:
        return generated[source], (), {}
    if not isinstance(source, str | os.PathLike):
        return from_arrays, (source,), {}
    file = Path(source)
    if file.is_dir():
        return data_files.image_folder, (file,), {}
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


def _as_tensor(name: str, x: Examples) -> Tensor:
    """Numbers on the CPU: bool, uint8, int64 or finite float32."""
    if isinstance(x, Dataset):
        x = _stacked(name, x)
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        if x.dtype == torch.bfloat16:
            x = x.float()
        x = x.numpy()
    if not isinstance(x, np.ndarray):
        raise TypeError(
            f"{name} must be an array, a tensor, or a torch Dataset with a length, "
            f"got {type(x).__name__}"
        )
    if x.dtype.kind not in "buif":
        raise TypeError(f"{name} must hold real numbers, got an array of dtype {x.dtype}")
    if x.dtype.kind in "ui" and x.dtype != np.uint8:
        return torch.from_numpy(x.astype(np.int64))
    if x.dtype.kind != "f":
        return torch.from_numpy(np.require(x, requirements=["C", "W"]))
    with np.errstate(over="ignore"):  # an overflow shows below
        tensor = torch.from_numpy(np.require(x, np.float32, ["C", "W"]))
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        raise ValueError(
            f"{name} must be finite in float32, got {int((~finite).sum())} elements of "
            f"{x.size} that are not"
        )
    return tensor


def _stacked(name: str, dataset: Dataset) -> np.ndarray:
    """The items of a map-style Dataset, or the first element of each, as one array."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{name} must be a Dataset with a length and items, got {type(dataset).__name__}"
        )
    items: list[np.ndarray] = []
    for i in range(len(dataset)):
        item = dataset[i]
        if isinstance(item, tuple | list) and item:
            item = item[0]
        if isinstance(item, Mapping | str | bytes):
            raise TypeError(
                f"{name} must have items that are arrays, tensors or images, or tuples that "
                f"begin with one, got {type(item).__name__}"
            )
        item = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
        if items and (item.shape, item.dtype) != (items[0].shape, items[0].dtype):
            raise ValueError(
                f"{name} must have items like its first, {items[0].dtype} of shape "
                f"{items[0].shape}, got {item.dtype} of shape {item.shape} at {i}"
            )
        items.append(item)
    return np.stack(items) if items else np.empty((0, 1), np.float32)


def _with_event_shape(
    name: str, x: Tensor, shape: tuple[int, ...] | None, channels_last: bool
) -> Tensor:
    """The same elements as (N, *shape), or as (N, D) or (N, C, *spatial) where that is None."""
    given = tuple(x.shape)
    if x.dim() < 2 or 0 in given[1:]:
        raise ValueError(f"{name} must have shape (N, D) or (N, C, *spatial), got {given}")
    if channels_last:
        if x.dim() < 3:
            raise ValueError(f"{name} must have shape (N, *spatial, C), got {given}")
        x = x.movedim(-1, 1).contiguous()
    if shape is not None:
        if math.prod(shape) != math.prod(x.shape[1:]):
            raise ValueError(f"{name} must have examples of shape {tuple(shape)}, got {given}")
        return x.reshape(-1, *shape)
    if channels_last or x.dim() != 3:
        if x.dim() == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
            raise ValueError(
                f"{name} must have shape (N, C, H, W), got {given}: give channels_last=True, or "
                "the shape of an example if this is meant"
            )
        return x
    return x[:, None]


def _with_levels(
    name: str, x: Tensor, levels: int | None, data_range: tuple[float, float] | None
) -> Tensor:
    """Examples as they are stored: grey levels as integers from 0, continuous data as they are."""
    if levels is None:
        if data_range is not None:
            raise ValueError(f"data_range requires levels, got {data_range} without")
        if not x.is_floating_point():
            raise ValueError(f"{name} holds integers and requires levels, got None")
        _warn_if_on_a_grid(name, x)
        return x
    _check_levels(levels)
    if data_range is None:
        x = _nearest_levels(name, x, levels)
    else:
        low, high = data_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"data_range must be two increasing numbers, got {data_range}")
        x = (x.to(torch.float32) - low) * ((levels - 1) / (high - low))
        x = _nearest_levels(f"{name} scaled from data_range", x, levels, _GRID_TOLERANCE)
    return x.to(torch.uint8 if levels <= 256 else torch.int32)


def _nearest_levels(name: str, x: Tensor, levels: int, tolerance: float = 0.0) -> Tensor:
    """x rounded; refused where that changes it by more than ``tolerance``, or outside 0..levels."""
    if x.dtype in (torch.bool, torch.uint8) and levels >= torch.iinfo(torch.uint8).max + 1:
        return x
    nearest = x.round() if x.is_floating_point() else x.to(torch.int64)
    valid = (nearest >= 0) & (nearest < levels)
    if x.is_floating_point():
        valid &= (x - nearest).abs() <= tolerance
    if not bool(valid.all()):
        raise ValueError(
            f"{name} must be on the grid of {levels} levels 0, 1, ..., {levels - 1}, "
            f"got {x[~valid][0].item()}"
        )
    return nearest


def _warn_if_on_a_grid(name: str, x: Tensor) -> None:
    """Say so where continuous data look like grey levels: their density has no bound."""
    first = x.flatten()[: 2**16]
    num_values = len(first.unique())
    if num_values <= 256 <= len(first) / 16:
        warnings.warn(
            f"{name} has only {num_values} different values in {len(first)} elements, so a bound "
            "on its density means nothing: give levels (and data_range) if it is discrete",
            stacklevel=4,
        )


def _check_levels(levels: object) -> None:
    if type(levels) is not int or not 2 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels must be an integer in 2..2**16, got {levels!r}")


def _mean_and_variance(x: Tensor, levels: int | None) -> tuple[float, float]:
    """Over all elements; exact but for the last rounding where there are levels."""
    if levels is None:
        variance, mean = torch.var_mean(x.double(), correction=0)
        return mean.item(), variance.item()
    counts = torch.bincount(x.flatten(), minlength=levels).double()
    level = torch.arange(levels, dtype=torch.float64)
    mean = (counts * level).sum() / x.numel()
    variance = (counts * (level - mean) ** 2).sum() / x.numel()
    return mean.item(), variance.item()
