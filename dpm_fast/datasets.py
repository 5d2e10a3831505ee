"""Built-in data sets: three that are generated, and small real images.

Example i of a generated set is a function of (seed, i); held-out examples count from 2**32.
"""

import math

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
