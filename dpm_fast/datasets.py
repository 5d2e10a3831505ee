"""Built-in data sets: three that are generated, and small real images.

Example i of a generated set is a function of (seed, i); held-out examples count from 2**32.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from dpm_fast import noise
from dpm_fast.data import Data, DataSpec
from dpm_fast.data_arrays import describe, from_arrays

SWISS_ROLL_NOISE = 0.05  # standard deviation, in the units of the data
# E log2 p per example, by the trapezoid rule on a grid of 2.5 points per SWISS_ROLL_NOISE; grids
# of 1.5 to 3 points agree to 1e-14.
SWISS_ROLL_LIMIT_BITS = -1.390894187590
HEARTBEAT_LENGTH, HEARTBEAT_PERIOD = 20, 5
SMALLEST_LEAF_RADIUS = 2  # pixels; smaller disks would not look round

_FIRST_TEST_ID = 2**32
_SPIRAL_START, _SPIRAL_END = 1.5 * math.pi, 4.5 * math.pi
# For theta uniform between these: E theta (cos, sin)(theta), and E theta^2 = 9.75 pi^2.
_SPIRAL_MEAN = (2.0, 2 / (3 * math.pi))
_SPIRAL_SCALE = math.sqrt(
    2
    * (1 - SWISS_ROLL_NOISE**2)
    / (9.75 * math.pi**2 - _SPIRAL_MEAN[0] ** 2 - _SPIRAL_MEAN[1] ** 2)
)
# Leaves of an image drawn at a time; pixels painted at a time, few enough for the L2 cache.
_LEAVES_PER_ROUND = 32
_PIXELS_PER_CHUNK = 2**16


def swiss_roll(*, seed: int = 0, num_train: int = 100_000, num_test: int = 10_000) -> Data:
    """Points on a noisy spiral in the plane ([DPM] section 3.1.1), with their true density.

    x = s (theta (cos theta, sin theta) - m) + SWISS_ROLL_NOISE * eps, theta uniform on
    [3 pi / 2, 9 pi / 2], eps a unit Gaussian. m makes the mean of x zero and s makes the mean of
    its two variances one, exactly and noise included: E |x|^2 = 2. So models see x unscaled.
    """

    def points(ids: Tensor) -> Tensor:
        u = noise.uniform(seed, noise.Stream.DATA, ids, 0, (1,), torch.float64)[:, 0]
        eps = noise.normal(seed, noise.Stream.DATA, ids, 1, (2,), torch.float64)
        return (_spiral(u) + SWISS_ROLL_NOISE * eps).float()

    train, test = map(points, _example_ids(num_train, num_test))
    spec = DataSpec("swiss-roll", (2,), "continuous")
    return Data(spec, train, test, SWISS_ROLL_LIMIT_BITS, swiss_roll_log_density)


def swiss_roll_log_density(x: Tensor, num_panels: int = 128) -> Tensor:
    """log p of the Swiss roll: the mean of N(x; spiral(theta), SWISS_ROLL_NOISE^2 I) over theta.

    Args:
        x: (N, 2), finite.
        num_panels: parts of the interval of theta, with 16 Gauss-Legendre nodes each. 128 are
            within 1e-12 of the integral for |x| < 8, relative to max(1, |log p|).

    Returns:
        (N,) float64 nats.
    """
    if x.dim() != 2 or x.shape[1] != 2:
        raise ValueError(f"x must have shape (N, 2), got {tuple(x.shape)}")
    node, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(16))
    v = math.pi * ((torch.arange(num_panels)[:, None] + (node + 1) / 2) / num_panels).flatten()
    # u = (1 - cos v) / 2 gathers the nodes at the ends of the curve, where for a distant x the
    # integrand falls steeply.
    center = _spiral((1 - v.cos()) / 2).to(x.device)
    log_weight = (math.pi / (4 * num_panels) * weight.repeat(num_panels) * v.sin()).log()
    log_weight = log_weight.to(x.device)
    log_density = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for part, result in zip(x.double().split(1024), log_density.split(1024), strict=True):
        distance2 = (part[:, :1] - center[:, 0]) ** 2 + (part[:, 1:] - center[:, 1]) ** 2
        result += torch.logsumexp(log_weight - distance2 / (2 * SWISS_ROLL_NOISE**2), dim=1)
    return log_density - math.log(2 * math.pi * SWISS_ROLL_NOISE**2)


def heartbeat(*, seed: int = 0, num_train: int = 10_000, num_test: int = 2_000) -> Data:
    """Binary sequences with a one in every fifth place ([DPM] section 3.1.2).

    (20,) each, of five kinds that are equally likely: the place of the first one. So the limit
    is log2(1/5) bits.
    """

    def sequences(ids: Tensor) -> Tensor:
        first = noise.words(seed, noise.Stream.DATA, ids, 0, 1) * HEARTBEAT_PERIOD >> 32
        return (torch.arange(HEARTBEAT_LENGTH) % HEARTBEAT_PERIOD == first).to(torch.uint8)

    train, test = map(sequences, _example_ids(num_train, num_test))
    spec = DataSpec("heartbeat", (HEARTBEAT_LENGTH,), "binary")
    return Data(spec, train, test, -math.log2(HEARTBEAT_PERIOD), heartbeat_log_probability)


def heartbeat_log_probability(x: Tensor) -> Tensor:
    """log p of (N, 20) sequences, ln(1/5) or -inf: (N,) float64 nats."""
    log_p = torch.full((len(x),), -math.log(HEARTBEAT_PERIOD), dtype=torch.float64)
    return log_p.to(x.device).masked_fill(~is_valid_heartbeat(x), -math.inf)


def is_valid_heartbeat(x: Tensor) -> Tensor:
    """Whether each of (N, 20) sequences, of any dtype, is one of the five: (N,) bool."""
    if x.dim() != 2 or x.shape[1] != HEARTBEAT_LENGTH:
        raise ValueError(f"x must have shape (N, {HEARTBEAT_LENGTH}), got {tuple(x.shape)}")
    beats = x.unflatten(1, (-1, HEARTBEAT_PERIOD))
    periodic = (beats == beats[:, :1]).flatten(1).all(dim=1)
    first = beats[:, 0]
    return periodic & ((first == 0) | (first == 1)).all(dim=1) & ((first == 1).sum(dim=1) == 1)


def dead_leaves(
    *,
    seed: int = 0,
    num_train: int = 10_000,
    num_test: int = 1_000,
    size: int = 32,
    color: bool = False,
    scaling: str = "standardize",
) -> Data:
    """Images of disks that hide one another ([DPM] section 3.2; Lee, Mumford, Huang 2001).

    Disks lie anywhere in the plane, one on another without end, with radii of density
    proportional to r^-3 from two pixels to the side of the image, and each with one of 256 grey
    levels (in each channel), all equally likely. A pixel shows the topmost disk over its center,
    to the last pixel and with nothing cut at the border, so that the images are stationary.

    Args:
        seed, num_train, num_test: which examples, and how many.
        size: H = W in pixels, at least 4.
        color: (3, H, W) examples instead of (1, H, W).
        scaling: see `from_arrays`.
    """
    if size < 2 * SMALLEST_LEAF_RADIUS:
        raise ValueError(f"size must be at least {2 * SMALLEST_LEAF_RADIUS}, got {size}")
    train, test = (
        torch.cat(
            [
                _leaves(seed, part, size, num_channels=3 if color else 1)
                for part in ids.split(max(1, _PIXELS_PER_CHUNK // size**2))
            ]
        )
        for ids in _example_ids(num_train, num_test)
    )
    return Data(describe("dead-leaves", train, 256, scaling), train, test)


def digits(*, seed: int = 0, test_fraction: float = 0.2, scaling: str = "standardize") -> Data:
    """The 1,797 handwritten digits inside scikit-learn: (1, 8, 8) with 17 grey levels.

    Args:
        seed, test_fraction, scaling: see `from_arrays`.

    Raises:
        RuntimeError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError("digits require scikit-learn: pip install 'dpm_fast[data]'") from error
    return from_arrays(
        load_digits().images,
        name="digits",
        levels=17,
        scaling=scaling,
        test_fraction=test_fraction,
        seed=seed,
    )


def _example_ids(num_train: int, num_test: int) -> tuple[Tensor, Tensor]:
    for name, count in (("num_train", num_train), ("num_test", num_test)):
        if not 1 <= count <= _FIRST_TEST_ID:
            raise ValueError(f"{name} must be in 1..2**32, got {count}")
    return torch.arange(num_train), _FIRST_TEST_ID + torch.arange(num_test)


def _spiral(u: Tensor) -> Tensor:  # [N] in [0, 1] -> [N, 2]
    theta = _SPIRAL_START + u * (_SPIRAL_END - _SPIRAL_START)
    x = theta * theta.cos() - _SPIRAL_MEAN[0]
    y = theta * theta.sin() - _SPIRAL_MEAN[1]
    return _SPIRAL_SCALE * torch.stack((x, y), dim=1)


def _leaves(seed: int, ids: Tensor, size: int, num_channels: int) -> Tensor:
    """Leaves from the top down, until they cover every pixel: (N, C, size, size) uint8."""
    stream, num_leaves = noise.Stream.DATA, _LEAVES_PER_ROUND
    painted = torch.empty(len(ids), size**2, num_channels, dtype=torch.uint8)
    # The pixels that are still bare: which image, and where in it.
    image = torch.arange(len(ids)).repeat_interleave(size**2)
    pixel = torch.arange(size**2).repeat(len(ids))
    side = torch.arange(size)[:, None] + 0.5
    for t in itertools.count(step=2):
        rows, row = image.unique_consecutive(return_inverse=True)
        u = noise.uniform(seed, stream, ids[rows], t, (num_leaves, 3))
        u_radius, u_y, u_x = u[:, None].unbind(3)
        radius = _leaf_radius(u_radius, size)  # [images, 1, leaves]
        dy, dx = (side + radius - u * (size + 2 * radius) for u in (u_y, u_x))
        half_chord2 = (radius**2 - dy**2).flatten(0, 1)  # [images * size, leaves]
        dx2 = (dx**2).flatten(0, 1)
        hit = dx2[row * size + pixel % size] < half_chord2[row * size + pixel // size]
        top = hit.byte().argmax(dim=1)  # the first leaf over each pixel, if there is one
        covered = hit.gather(1, top[:, None])[:, 0]
        color = noise.words(seed, stream, ids[rows], t + 1, num_leaves * num_channels) >> 24
        color = color.byte().view(len(rows), num_leaves, num_channels)
        painted[image[covered], pixel[covered]] = color[row[covered], top[covered]]
        image, pixel = image[~covered], pixel[~covered]
        if len(image) == 0:
            break
    return painted.transpose(1, 2).reshape(-1, num_channels, size, size)


def _leaf_radius(u: Tensor, size: int) -> Tensor:
    """Radii of the leaves that can touch the image, density r^-3 (size + 2 r)^2.

    A leaf that touches the image has its center in a square of side size + 2 r; the others change
    nothing and are not drawn. The three terms of the square are integrated one after the other.
    """
    smallest = SMALLEST_LEAF_RADIUS
    cubic = ((size / smallest) ** 2 - 1) / 2  # integral of size^2 r^-3
    quadratic = 4 * (size / smallest - 1)  # of 4 size r^-2
    inverse = 4 * math.log(size / smallest)  # of 4 r^-1
    # In float64: a library's last digit must not decide which pixels a leaf covers.
    area = u.double() * (cubic + quadratic + inverse)
    radius = torch.where(
        area < cubic,
        (smallest**-2 - area * (2 / size**2)).rsqrt(),
        torch.where(
            area < cubic + quadratic,
            1 / (1 / smallest - (area - cubic) / (4 * size)),
            smallest * torch.exp((area - cubic - quadratic) / 4),
        ),
    )
    return radius.float()
