"""Sampling in fewer steps than a model has: reverse kernels that lead from one kept timestep to the
one before it.

Nothing but the table of coefficients differs, whose rows are still those of the network's own
timesteps. [iDDPM] section 4 keeps the model's variance (ancestral steps); with ``eta`` the variance
is eta^2 times that of q(x_s | x_t, x_0), and the mean that which leaves the marginals as they are
(DDIM: Song, Meng, Ermon 2021, equations 12 and 16).
"""

from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

from dpm_fast.gaussian import GaussianReverse, GaussianTables, posterior_tables, resolved
from dpm_fast.noise import check_integer

_LEAST_ETA = 1e-6  # so that float32 has the squares of its variances


def spaced(number: int, last: int) -> list[int]:
    """``number`` timesteps of 1..last, ascending and evenly spaced, both ends among them (one alone
    is ``last``), as [iDDPM] has them.

    Raises:
        TypeError, ValueError: for a number that is none or outside 1..last.
    """
    number = check_integer(number, "num_inference_steps")
    if not 1 <= number <= last:
        raise ValueError(f"num_inference_steps must be in 1..{last}, got {number}")
    if number == 1:
        return [last]
    return [1 + round(i * (last - 1) / (number - 1)) for i in range(number)]


def checked_timesteps(timesteps: Iterable[int], num_steps: int) -> list[int]:
    """A user's timesteps, ascending.

    Raises:
        TypeError, ValueError: for no integers, none at all, twice the same, or some outside 1..T.
    """
    if isinstance(timesteps, Tensor) and timesteps.ndim:
        timesteps = timesteps.tolist()
    if isinstance(timesteps, Tensor | str) or not isinstance(timesteps, Iterable):
        given = type(timesteps).__name__
        raise TypeError(f"timesteps must be an iterable of integers, got {given}")
    kept = sorted(check_integer(t, "each of timesteps") for t in timesteps)
    if not kept or len(set(kept)) < len(kept) or not 1 <= kept[0] <= kept[-1] <= num_steps:
        raise ValueError(f"timesteps must be some of 1..{num_steps}, each once, got {kept}")
    return kept


class RespacedReverse(GaussianReverse):
    """Reverse kernels p(x_s | x_t), where s is the kept timestep before t, or 0.

    Args:
        reverse: of the model. "perturbation" and "previous" do as well as those that predict x_0:
            the x_0 whose posterior mean is theirs takes its place.
        timesteps: those kept, ascending, in 1..T.
        eta: in [0, 1], 0 for steps without noise; None keeps the model's variance, in which beta
            and sigma2_q become those of the longer step.

    Raises:
        ValueError: for "decay", whose mean is tied to the variance of a step of one; for an eta out
            of range; for the variance "learned", which is that of a step of one too, without eta.
    """

    def __init__(self, reverse: GaussianReverse, timesteps: list[int], eta: float | None):
        process = reverse.process
        if eta is not None and (isinstance(eta, bool) or not isinstance(eta, Real)):
            raise TypeError(f"eta must be a number, got {type(eta).__name__}")
        if eta is not None and not 0 <= float(eta) <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        if eta is not None and 0 < float(eta) < _LEAST_ETA:
            raise ValueError(f"eta must be 0 or at least {_LEAST_ETA:g}, got {eta}")
        if reverse.parameterization == "decay":
            raise ValueError(
                "steps that skip timesteps require a mean from which x_0 follows, got 'decay', "
                "whose mean depends on the variance"
            )
        if eta is None and reverse.variance == "learned" and len(timesteps) < process.num_steps:
            raise ValueError(
                "steps that skip timesteps require eta with the variance 'learned', which is that "
                "of one step"
            )
        variance = reverse.variance if eta is None else "fixed_small"
        super().__init__(process, reverse.parameterization, variance, reverse.clamp)
        self.num_outputs, self.default_final = reverse.num_outputs, reverse.default_final
        self.eta = None if eta is None else float(eta)
        self._first_kept = timesteps[0]
        self._second_kept = timesteps[1] if len(timesteps) > 1 else timesteps[0] + 1
        before = torch.zeros(process.num_steps + 2, dtype=torch.int64)
        before[torch.tensor(timesteps) + 1] = torch.tensor(timesteps)
        self._previous = before.cummax(0).values[:-1]  # (T + 1,): the kept timestep before each

    @property
    def is_deterministic(self) -> bool:
        return self.eta == 0

    def tables(self, device: torch.device | str = "cpu") -> GaussianTables:
        """Of a step from each t to the kept timestep before it; alpha_bar and beta_bar stay."""
        device = resolved(device)
        return self.process.once(("respaced", self, device), lambda: self._tables(device))

    def _tables(self, device: torch.device) -> GaussianTables:
        full = self.process.tables(device)
        previous = self._previous.to(full.beta.device)
        is_of_one = previous + 1 == torch.arange(len(previous), device=previous.device)
        longer = -torch.expm1(full.log_alpha_bar - full.log_alpha_bar[previous])
        beta = torch.where(is_of_one, full.beta, longer)
        tables = posterior_tables(full._replace(beta=beta), previous)
        if self.eta is None:
            return tables
        # Both are as they are for eta = 1, where each square root is exact.
        c_x = (tables.c_x**2 + (1 - self.eta**2) * tables.sigma2_q / _not_0(full.beta_bar)).sqrt()
        c_0 = tables.c_0 + full.alpha_bar.sqrt() * (tables.c_x - c_x)
        return tables._replace(c_0=c_0, c_x=c_x, sigma2_q=self.eta**2 * tables.sigma2_q)

    def split(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Without the network's variance where ``eta`` has taken its place."""
        mu_out, sigma2_out = super().split(x, out)
        return mu_out, None if self.eta is not None else sigma2_out

    def _mean_columns(self, device: torch.device) -> tuple[Tensor, ...]:
        a, b, c, e, p, q, d = super()._mean_columns(device)
        if not self.predicts_x_0:
            # b = c_x - d, and the x_0 of this mean is (a mu_out - d x_t) / c_0.
            full, own = self.process.tables(device), self.tables(device)
            ratio = own.c_0 / _not_0(full.c_0)
            a, b = ratio * a, b + (own.c_x - full.c_x) - (ratio - 1) * d
        return a, b, c, e, p, q, d


def _not_0(column: Tensor) -> Tensor:
    """A column by which to divide, 1 in row 0."""
    return torch.cat((torch.ones_like(column[:1]), column[1:]))
