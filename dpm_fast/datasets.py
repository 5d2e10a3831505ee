"""Built-in data sets: three that are generated, and small real images.

Example i of a generated set is a function of (seed, i); held-out examples count from 2**32.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dpm_fast import noise
from dpm_fast.data import Data, DataSpec
from dpm_fast.data_arrays import describe, from_arrays

_FIRST_TEST_ID = 2**32

SWISS_ROLL_NOISE = 0.05  # standard deviation, in units of the data's
# E log2 p per example, by the trapezoid rule on a grid of 2.5 points per SWISS_ROLL_NOISE; grids
# of 1.5 to 3 points agree to 1e-14.
SWISS_ROLL_LIMIT_BITS = -1.390894187590
HEARTBEAT_LENGTH, HEARTBEAT_PERIOD = 20, 5


def swiss_roll(*, seed: int = 0, num_train: int = 100_000, num_test: int = 10_000) -> Data:
    """Points on a noisy spiral in the plane ([DPM] section 3.1.1), with their true density.

    x = s (theta (cos theta, sin theta) - m) + SWISS_ROLL_NOISE * eps, theta uniform on
    [3 pi / 2, 9 pi / 2], eps a unit Gaussian. m makes the mean of x zero and s makes the mean of
    its two variances one, exactly and noise included: E |x|^2 = 2. So models see x unscaled.
    """
    parts = []
    for ids in _example_ids(num_train, num_test):
        u = noise.uniform(seed, noise.Stream.DATA, ids, 0, (1,), torch.float64)[:, 0]
        eps = noise.normal(seed, noise.Stream.DATA, ids, 1, (2,), torch.float64)
        theta = _SPIRAL_START + u * (_SPIRAL_END - _SPIRAL_START)
        parts.append((_spiral(theta) + SWISS_ROLL_NOISE * eps).float())
    spec = DataSpec("swiss-roll", (2,), "continuous")
    return Data(spec, *parts, SWISS_ROLL_LIMIT_BITS, swiss_roll_log_density)


def swiss_roll_log_density(x: Tensor, num_panels: int = 128) -> Tensor:
    """log p of the Swiss roll: the mean of N(x; spiral(theta), SWISS_ROLL_NOISE^2 I) over theta.

    Args:
        x: (N, 2), finite.
        num_panels: equal parts of the interval of theta, with 16 Gauss-Legendre nodes each. 128
            are within 1e-10 (relative to max(1, |log p|)) of the integral for |x| < 20.

    Returns:
        (N,) float64 nats.
    """
    if x.dim() != 2 or x.shape[1] != 2:
        raise ValueError(f"x must have shape (N, 2), got {tuple(x.shape)}")
    node, weight = _gauss_legendre(16)
    panel = torch.arange(num_panels, dtype=torch.float64)[:, None]
    u = ((panel + (node + 1) / 2) / num_panels).flatten()
    center = _spiral(_SPIRAL_START + u * (_SPIRAL_END - _SPIRAL_START)).to(x.device)
    log_weight = (weight / (2 * num_panels)).log().repeat(num_panels).to(x.device)
    log_normalizer = math.log(2 * math.pi * SWISS_ROLL_NOISE**2)
    log_density = [
        torch.logsumexp(log_weight - distance2 / (2 * SWISS_ROLL_NOISE**2), dim=1)
        for part in x.double().split(1024)
        for distance2 in [(part[:, :1] - center[:, 0]) ** 2 + (part[:, 1:] - center[:, 1]) ** 2]
    ]
    return torch.cat(log_density) - log_normalizer


def heartbeat(*, seed: int = 0, num_train: int = 10_000, num_test: int = 2_000) -> Data:
    """Sequences of 20 bits with a one every fifth bin, the phase at random ([DPM] section 3.1.2).

    Five sequences, equally likely: E log2 p = log2(1/5).
    """
    phases = torch.arange(HEARTBEAT_LENGTH) % HEARTBEAT_PERIOD
    parts = []
    for ids in _example_ids(num_train, num_test):
        word = noise.words(seed, noise.Stream.DATA, ids, 0, 1)
        parts.append((phases == (word * HEARTBEAT_PERIOD >> 32)).to(torch.uint8))
    spec = DataSpec("heartbeat", (HEARTBEAT_LENGTH,), "binary")
    return Data(spec, *parts, -math.log2(HEARTBEAT_PERIOD), heartbeat_log_probability)


def is_valid_heartbeat(x: Tensor) -> Tensor:
    """Whether each of (N, 20) sequences is one of the five, (N,) bool."""
    if x.dim() != 2 or x.shape[1] != HEARTBEAT_LENGTH:
        raise ValueError(f"x must have shape (N, {HEARTBEAT_LENGTH}), got {tuple(x.shape)}")
    beats = x.reshape(len(x), -1, HEARTBEAT_PERIOD)
    periodic = (beats == beats[:, :1]).flatten(1).all(dim=1)
    return periodic & (beats[:, 0].sum(dim=1) == 1) & ((x == 0) | (x == 1)).all(dim=1)


def heartbeat_log_probability(x: Tensor) -> Tensor:
    """log p of (N, 20) sequences, (N,) float64 nats: ln(1/5), or -inf."""
    log_p = torch.full((len(x),), -math.log(HEARTBEAT_PERIOD), dtype=torch.float64)
    return log_p.masked_fill(~is_valid_heartbeat(x), -math.inf)


def dead_leaves(
    *,
    seed: int = 0,
    num_train: int = 10_000,
    num_test: int = 1_000,
    size: int = 32,
    channels: int = 1,
    num_disks: int = 128,
    smallest_radius: float = 1.0,
    largest_radius: float = 16.0,
) -> Data:
    """Occluding disks with power-law radii, p(r) proportional to r^-3 ([DPM] section 3.2.3).

    Later disks lie on earlier ones; centers are uniform on the image and a margin around it, each
    disk has one random color of 256 levels per channel.

    Args:
        size: height and width in pixels.
        channels: 1 (grey) or 3 (color).
        num_disks: per image; what they leave uncovered has a color of its own.
        smallest_radius, largest_radius: in pixels.

    Raises:
        ValueError: for sizes out of range.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if size < 1 or num_disks < 1:
        raise ValueError(f"size and num_disks must be at least 1, got {size} and {num_disks}")
    if not 0 < smallest_radius < largest_radius:
        raise ValueError(
            "radii must be 0 < smallest_radius < largest_radius, "
            f"got {smallest_radius} and {largest_radius}"
        )
    train, test = (
        torch.cat(
            [
                _leaves(seed, i, size, channels, num_disks, smallest_radius, largest_radius)
                for i in ids.split(1024)
            ]
        )
        for ids in _example_ids(num_train, num_test)
    )
    return Data(describe("dead-leaves", train, 256), train, test)


def digits(*, seed: int = 0, scaling: str = "standardize", test_fraction: float = 0.2) -> Data:
    """The 1797 handwritten digits inside scikit-learn: 8 x 8 pixels of 17 grey levels.

    Raises:
        RuntimeError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RuntimeError(
            "digits requires scikit-learn, got none: pip install 'dpm_fast[data]'"
        ) from None
    images = torch.from_numpy(load_digits().images).to(torch.uint8)
    return from_arrays(
        images, name="digits", levels=17, scaling=scaling, test_fraction=test_fraction, seed=seed
    )


def _leaves(
    seed: int,
    ids: Tensor,
    size: int,
    channels: int,
    num_disks: int,
    smallest: float,
    largest: float,
) -> Tensor:
    """(N, channels, size, size) uint8."""
    u = noise.uniform(seed, noise.Stream.DATA, ids, 0, (num_disks, 3))
    # The distribution function of r^-3 between the radii, inverted.
    radius = (smallest**-2 + u[..., 0] * (largest**-2 - smallest**-2)) ** -0.5
    center = u[..., 1:] * (size + 2 * largest) - largest
    color = noise.words(seed, noise.Stream.DATA, ids, 1, (num_disks + 1) * channels) >> 24
    color = color.view(len(ids), num_disks + 1, channels).to(torch.uint8)
    pixel = torch.arange(size) + 0.5
    topmost = torch.full((len(ids), size, size), num_disks)
    for disk in range(num_disks):  # the first disk is on top
        distance2 = (pixel[:, None] - center[:, disk, 0, None, None]) ** 2 + (
            pixel - center[:, disk, 1, None, None]
        ) ** 2
        inside = distance2 <= radius[:, disk, None, None] ** 2
        topmost = torch.where(inside & (topmost == num_disks), disk, topmost)
    index = topmost.flatten(1)[:, :, None].expand(-1, -1, channels)
    return color.gather(1, index).movedim(-1, 1).unflatten(2, (size, size)).contiguous()


def _example_ids(num_train: int, num_test: int) -> tuple[Tensor, Tensor]:
    for name, count in (("num_train", num_train), ("num_test", num_test)):
        if not 1 <= count <= _FIRST_TEST_ID:
            raise ValueError(f"{name} must be in 1..2**32, got {count}")
    return torch.arange(num_train), _FIRST_TEST_ID + torch.arange(num_test)


_SPIRAL_START, _SPIRAL_END = 1.5 * math.pi, 4.5 * math.pi


def _spiral(theta: Tensor) -> Tensor:
    """Points of the noiseless curve, (..., 2), centered, of mean variance 1 - noise^2."""
    mean_x, mean_y, variance = _spiral_moments()
    scale = math.sqrt((1 - SWISS_ROLL_NOISE**2) / variance)
    x, y = theta * theta.cos() - mean_x, theta * theta.sin() - mean_y
    return scale * torch.stack((x, y), dim=-1)


def _spiral_moments() -> tuple[float, float, float]:
    """Means of theta cos theta and theta sin theta, and the mean of their variances."""
    a, b = _SPIRAL_START, _SPIRAL_END
    mean_x = (math.cos(b) + b * math.sin(b) - math.cos(a) - a * math.sin(a)) / (b - a)
    mean_y = (math.sin(b) - b * math.cos(b) - math.sin(a) + a * math.cos(a)) / (b - a)
    mean_square = (b**3 - a**3) / (3 * (b - a))
    return mean_x, mean_y, (mean_square - mean_x**2 - mean_y**2) / 2


def _gauss_legendre(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], float64."""
    import numpy as np

    node, weight = np.polynomial.legendre.leggauss(num_nodes)
    return torch.from_numpy(node), torch.from_numpy(weight)


def heartbeat(*, seed: int = 0, num_train: int = 50_000, num_test: int = 10_000) -> Data:
    """Binary sequences with a one in every fifth place ([DPM] section 3.1.2).

    (20,) each, of five kinds that are equally likely: the place of the first one. So the limit
    is log2(1/5) bits.
    """
    place = torch.arange(HEARTBEAT_LENGTH)
    parts = []
    for ids in _example_ids(num_train, num_test):
        phase = noise.words(seed, noise.Stream.DATA, ids, 0, 1) % HEARTBEAT_PERIOD
        parts.append((place % HEARTBEAT_PERIOD == phase).to(torch.uint8))
    spec = DataSpec("heartbeat", (HEARTBEAT_LENGTH,), "binary")
    return Data(spec, *parts, -math.log2(HEARTBEAT_PERIOD), heartbeat_log_density)


def heartbeat_log_density(x: Tensor) -> Tensor:
    """log p of (N, 20) sequences: -ln 5, or -inf where one is impossible; (N,) float64 nats."""
    log_density = torch.full((len(x),), -math.log(HEARTBEAT_PERIOD), dtype=torch.float64)
    return log_density.to(x.device).masked_fill(~is_valid_heartbeat(x), -math.inf)


def is_valid_heartbeat(x: Tensor) -> Tensor:
    """Whether each of (N, 20) sequences, of any dtype, is one of the five; (N,) bool."""
    if x.dim() != 2 or x.shape[1] != HEARTBEAT_LENGTH:
        raise ValueError(f"x must have shape (N, {HEARTBEAT_LENGTH}), got {tuple(x.shape)}")
    beats = x.view(len(x), -1, HEARTBEAT_PERIOD)
    first = beats[:, :1]
    one_of_each = ((first == 1).sum(dim=2) == 1) & ((first == 0).sum(dim=2) == HEARTBEAT_PERIOD - 1)
    return one_of_each[:, 0] & (beats == first).all(dim=2).all(dim=1)


def dead_leaves(
    *,
    seed: int = 0,
    num_train: int = 10_000,
    num_test: int = 1_000,
    size: int = 32,
    color: bool = False,
    scaling: str = "standardize",
) -> Data:
    """Images of disks that hide one another ([DPM] section 3.2.2; Lee, Mumford, Huang 2001).

    Disks lie anywhere in the plane in layers without end, with radii of density proportional to
    r^-3 from one pixel to the side of the image; each has one of 256 grey levels, or colors,
    equally likely. A pixel shows the topmost disk over its center.

    Args:
        seed, num_train, num_test: which examples, and how many.
        size: H = W, at least 2.
        color: (3, H, W) examples instead of (1, H, W).
        scaling: see `from_arrays`.
    """
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}")
    parts = [
        _leaves(seed, ids, size, 3 if color else 1) for ids in _example_ids(num_train, num_test)
    ]
    return Data(describe("dead-leaves", parts[0], 256, scaling), *parts)


def digits(*, seed: int = 0, test_fraction: float = 0.2, scaling: str = "standardize") -> Data:
    """1,797 handwritten digits, (1, 8, 8) with 17 grey levels, that come with scikit-learn.

    Args:
        seed, test_fraction, scaling: see `from_arrays`.
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
    if num_train < 2 or num_test < 1:
        raise ValueError(
            f"num_train must be at least 2 and num_test at least 1, got {num_train} and {num_test}"
        )
    return torch.arange(num_train), _FIRST_TEST_ID + torch.arange(num_test)


_SPIRAL_START, _SPIRAL_END = 1.5 * math.pi, 4.5 * math.pi
# The integrals over theta: E theta (cos, sin)(theta), and E theta^2 = 9.75 pi^2.
_SPIRAL_MEAN = (2.0, 2 / (3 * math.pi))
_SPIRAL_SCALE = math.sqrt(
    2
    * (1 - SWISS_ROLL_NOISE**2)
    / (9.75 * math.pi**2 - _SPIRAL_MEAN[0] ** 2 - _SPIRAL_MEAN[1] ** 2)
)


def _spiral(theta: Tensor) -> Tensor:  # [N] -> [N, 2]
    x = theta * theta.cos() - _SPIRAL_MEAN[0]
    y = theta * theta.sin() - _SPIRAL_MEAN[1]
    return _SPIRAL_SCALE * torch.stack((x, y), dim=1)


def _gauss_legendre(num_nodes: int) -> tuple[Tensor, Tensor]:
    node, weight = np.polynomial.legendre.leggauss(num_nodes)
    return torch.from_numpy(node), torch.from_numpy(weight)


_LEAVES_PER_ROUND = 32
# Images painted together: a boolean per pixel and leaf of these stays within 8 MB.
_PIXEL_LEAVES_PER_CHUNK = 2**23


def _leaves(seed: int, ids: Tensor, size: int, num_channels: int) -> Tensor:
    chunk = max(1, _PIXEL_LEAVES_PER_CHUNK // (_LEAVES_PER_ROUND * size**2))
    return torch.cat([_paint(seed, part, size, num_channels) for part in ids.split(chunk)])


def _paint(seed: int, ids: Tensor, size: int, num_channels: int) -> Tensor:
    """Leaves from the top down, until they cover each pixel: (N, C, size, size) uint8."""
    image = torch.zeros(len(ids), num_channels, size**2, dtype=torch.uint8)
    bare = torch.ones(len(ids), size**2, dtype=torch.bool)
    rows = torch.arange(len(ids))  # images that are not covered yet
    pixel = torch.arange(size) + 0.5
    round_number = 0
    while len(rows) > 0:
        shape = (_LEAVES_PER_ROUND, 4)
        u = noise.uniform(seed, noise.Stream.DATA, ids[rows], 2 * round_number, shape)
        color = noise.words(
            seed,
            noise.Stream.DATA,
            ids[rows],
            2 * round_number + 1,
            _LEAVES_PER_ROUND * num_channels,
        )
        color = (color >> 24).to(torch.uint8).view(len(rows), _LEAVES_PER_ROUND, num_channels)
        radius = _leaf_radius(u[..., 0], u[..., 1], size)
        center = u[..., 2:] * (size + 2 * radius[..., None]) - radius[..., None]
        x, y = ((pixel - center[..., axis, None]) ** 2 for axis in (0, 1))  # [N, leaves, size]
        hit = y[..., :, None] + x[..., None, :] < radius[..., None, None] ** 2
        hit = hit.flatten(2)
        top = hit.to(torch.uint8).argmax(dim=1)  # the first leaf over each pixel, if any
        shown = color.gather(1, top[..., None].expand(-1, -1, num_channels)).transpose(1, 2)
        covered = hit.any(dim=1)
        now = bare[rows] & covered
        image[rows] = torch.where(now[:, None], shown, image[rows])
        bare[rows] &= ~covered
        rows = rows[bare[rows].any(dim=1)]
        round_number += 1
    return image.view(-1, num_channels, size, size)


def _leaf_radius(u_term: Tensor, u: Tensor, size: int) -> Tensor:
    """Radii of the leaves that can touch the image, density r^-3 (size + 2 r)^2 on [1, size].

    The center of a leaf that touches the image lies in a square of side size + 2 r. Leaves that
    do not touch it change nothing, so only these are drawn; the square's terms size^2 r^-3,
    4 size r^-2 and 4 r^-1 are each inverted in closed form.
    """
    ratio = 1 / size
    weights = (size**2 * (1 - ratio**2) / 2, 4 * size * (1 - ratio), 4 * math.log(size))
    first = weights[0] / sum(weights)
    second = first + weights[1] / sum(weights)
    cubic = (1 - u * (1 - ratio**2)).rsqrt()
    quadratic = 1 / (1 - u * (1 - ratio))
    log_uniform = torch.exp(u * math.log(size))
    return torch.where(u_term < first, cubic, torch.where(u_term < second, quadratic, log_uniform))
