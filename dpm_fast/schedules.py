"""Variance schedules: float64 tables of beta, indexed by t itself (row 0 is the data, 0)."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dpm_fast.noise import as_integer

# A learned or erasing schedule keeps beta_t in [floor_t, floor_t + 1 - floor_t - GUARD].
FLOOR, FLOOR_FIRST_STEP, GUARD = 1e-6, 1e-3, 1e-5


def erase(num_steps: int) -> Tensor:
    """Erase a constant fraction of the data's variance in each step, as the 2015 code does.

    beta_t = floor_t + (1 - floor_t - 1e-5) r_t with r = 1 / linspace(T, 2, T); the floor is 1e-6,
    and 1e-3 more in the first step.
    """
    return _from_fraction(1.0 / torch.linspace(num_steps, 2, num_steps, dtype=torch.float64))


def erase_paper(num_steps: int) -> Tensor:
    """beta_t = 1 / (T - t + 1), the formula of [DPM] section 2.4.1: the last step erases all."""
    return _with_row_0(1.0 / torch.arange(num_steps, 0, -1, dtype=torch.float64))


def linear(num_steps: int) -> Tensor:
    """The DDPM schedule, 1e-4 to 0.02 for T = 1000, scaled to other T as improved-diffusion does.

    Raises:
        ValueError: for T <= 20, where the scaled end would reach 1.
    """
    scale = 1000 / num_steps
    if scale * 0.02 >= 1.0:
        raise ValueError(f"schedule 'linear' requires num_steps > 20, got {num_steps}")
    return _with_row_0(
        torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64),
    )


def cosine(num_steps: int) -> Tensor:
    """alpha_bar_t proportional to cos^2(pi/2 (t/T + 0.008) / 1.008), beta at most 0.999 [iDDPM]."""
    angle = [(t / num_steps + 0.008) / 1.008 * math.pi / 2 for t in range(num_steps + 1)]
    alpha_bar = [math.cos(a) ** 2 for a in angle]
    beta = [min(1 - alpha_bar[t] / alpha_bar[t - 1], 0.999) for t in range(1, num_steps + 1)]
    return _with_row_0(torch.tensor(beta, dtype=torch.float64))


def log_linear(num_steps: int) -> Tensor:
    """Noise-to-signal odds (1 - alpha_bar) / alpha_bar spaced geometrically from 1e-3 to 1e3."""
    odds = _with_row_0(torch.logspace(-3, 3, num_steps, dtype=torch.float64))
    return _with_row_0((odds[1:] - odds[:-1]) / (1 + odds[1:]))


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "erase": erase,
    "erase_paper": erase_paper,
    "linear": linear,
    "cosine": cosine,
    "log_linear": log_linear,
}


def beta_schedule(name: str, num_steps: int) -> Tensor:
    """Table of a named schedule.

    Args:
        name: one of `SCHEDULES`.
        num_steps: T, at least 2 and below 2**24.

    Returns:
        beta, (T + 1,) float64, beta[0] = 0.

    Raises:
        ValueError: for an unknown name or a T out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    steps = as_integer(num_steps)
    if steps is None or not 2 <= steps < 2**24:
        raise ValueError(f"num_steps must be an integer in 2..2**24 - 1, got {num_steps!r}")
    return SCHEDULES[name](steps)


def beta_from_array(betas: Sequence[float] | np.ndarray | Tensor) -> Tensor:
    """Table from the T values beta_1 ... beta_T of any schedule, in float64.

    Raises:
        ValueError: unless betas are a 1-d array of at least 2 finite values in (0, 1], only the
            last of which may be 1.
        TypeError: for what is no array of numbers.
    """
    try:
        beta = torch.as_tensor(betas, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"betas must be an array of numbers, got {type(betas).__name__}; "
            "GaussianDiffusion.from_schedule makes those of a name"
        ) from None
    if beta.dim() != 1 or not 2 <= len(beta) < 2**24:
        raise ValueError(f"betas must have shape (T,) with T >= 2, got {tuple(beta.shape)}")
    wrong = ~((beta > 0) & (beta <= 1))
    wrong[:-1] |= beta[:-1] == 1
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0]) + 1
        raise ValueError(
            f"betas must be in (0, 1), the last one may be 1; got {beta[t - 1].item():g} at t = {t}"
        )
    return _with_row_0(beta)


def check_learnable(beta: Tensor) -> None:
    """Refuse an initial schedule (T + 1,) that `learned_beta` cannot start from.

    Raises:
        ValueError: for a beta_t, t >= 2, that is not inside (1e-6, 1 - 1e-5).
    """
    wrong = ~((beta > FLOOR) & (beta < 1 - GUARD))
    wrong[:2] = False
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0])
        raise ValueError(
            f"betas of a learned schedule must be in ({FLOOR:g}, 1 - {GUARD:g}) from t = 2 on, "
            f"got {beta[t].item():.7g} at t = {t}"
        )


def learned_beta(beta: Tensor, basis: Tensor, weights: Tensor) -> Tensor:
    """A schedule with learned deviations from an initial one ([DPM] section 2.4.1).

    beta_t = floor + (1 - floor - 1e-5) sigmoid(logit r_t + sum_j g_j(t) w_j) for t >= 2, with r_t
    such that w = 0 gives the initial schedule, and the temporal basis g of the networks. beta_1
    stays fixed: its learning would make the bound of continuous data grow without limit.

    Args:
        beta: the initial schedule, (T + 1,) float64, one that `check_learnable` passes.
        basis: g, (T + 1, J) float64, `reference.temporal_basis`.
        weights: w, (J,); all on one device.

    Returns:
        (T + 1,) float64, differentiable with respect to ``weights``.
    """
    fraction = (beta[2:] - FLOOR) / (1 - FLOOR - GUARD)
    logit = torch.logit(fraction) + basis[2:] @ weights.double()
    return torch.cat((beta[:2], FLOOR + (1 - FLOOR - GUARD) * torch.sigmoid(logit)))


def _from_fraction(fraction: Tensor) -> Tensor:
    floor = torch.full_like(fraction, FLOOR)
    floor[0] += FLOOR_FIRST_STEP
    return _with_row_0(floor + (1 - floor - GUARD) * fraction)


def _with_row_0(values: Tensor) -> Tensor:
    return torch.cat((torch.zeros(1, dtype=torch.float64), values))
