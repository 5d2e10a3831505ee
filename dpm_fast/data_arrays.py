"""Data from examples in memory: checks, grey levels, scale, and the split into train and test."""

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dpm_fast import noise
from dpm_fast.data import GRID_TOLERANCE, Data, DataSpec, Examples, check_levels, nearest_levels

SCALINGS = ("standardize", "minus_one_one", "none")


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
    # Nine digits: the last ones of a sum depend on the machine and on the number of threads, and
    # a model refuses data of another specification.
    std = float(f"{math.sqrt(variance):.9g}")
    return DataSpec(name, shape, kind, round(mean / std, 9) * std, 1 / std, levels)


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
            f"{name} must be finite in float32, got NaN or infinity in {int((~finite).sum())} of "
            f"{x.size} elements"
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
        if min(shape, default=0) < 1 or math.prod(shape) != math.prod(x.shape[1:]):
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
    check_levels(levels)
    if data_range is None:
        x = nearest_levels(name, x, levels)
    else:
        low, high = data_range if len(data_range) == 2 else (0, 0)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"data_range must be two increasing numbers, got {data_range}")
        x = (x.to(torch.float32) - low) * ((levels - 1) / (high - low))
        x = nearest_levels(f"{name} scaled from data_range", x, levels, GRID_TOLERANCE)
    return x.to(torch.uint8 if levels <= 256 else torch.int32)


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
