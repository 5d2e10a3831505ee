"""Gaussian diffusion: the forward process, its tables, and reverse kernels as coefficient rows."""

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dpm_fast import ops, reference, schedules
from dpm_fast.layers import check_timesteps
from dpm_fast.noise import Stream, check_integer
from dpm_fast.reference import Bins, ReverseRow

_Built = TypeVar("_Built")


class GaussianTables(NamedTuple):
    """Quantities of the forward process, each (T + 1,) float64 and indexed by t; row 0 is the data.

    ``c_0``, ``c_x`` and ``sigma2_q`` are the mean coefficients and the variance of
    q(x_{t-1} | x_t, x_0) = N(c_0 x_0 + c_x x_t, sigma2_q I), zero in row 0; at t = 1 it is a
    point mass at x_0.
    """

    beta: Tensor
    alpha_bar: Tensor
    beta_bar: Tensor
    log_alpha_bar: Tensor
    sigma2_q: Tensor
    c_0: Tensor
    c_x: Tensor


class GaussianDiffusion(nn.Module):
    """The process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) ([DPM] table 1).

    Args:
        betas: beta_1 ... beta_T, in (0, 1); the last may be 1.
        learned: make the schedule a parameter, starting from ``betas`` ([DPM] section 2.4.1).
        num_bumps: number of temporal bumps J of a learned schedule, at least 1.

    Attributes:
        num_steps: T.
        schedule_weights: the learned weights (J,), or None.

    Raises:
        ValueError: for betas that are not a 1-d array in (0, 1), or that a learned schedule cannot
            start from (`schedules.check_learnable`), or no bumps.
    """

    kind = "gaussian"

    def __init__(
        self,
        betas: Sequence[float] | np.ndarray | Tensor,
        *,
        learned: bool = False,
        num_bumps: int = 10,
    ):
        super().__init__()
        # Not a buffer: `model.half()` must not round the schedule.
        self._initial_beta = schedules.beta_from_array(betas)
        if check_integer(num_bumps, "num_bumps") < 1:
            raise ValueError(f"num_bumps must be at least 1, got {num_bumps}")
        if learned:
            schedules.check_learnable(self._initial_beta)
        self.num_steps = len(self._initial_beta) - 1
        self.schedule_weights = nn.Parameter(torch.zeros(num_bumps)) if learned else None
        # Per device, and only once: a copy waits for a GPU.
        self._fixed_tables: dict[torch.device, GaussianTables] = {}
        self._learning: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._shared: dict[Hashable, Any] | None = None

    def extra_repr(self) -> str:
        learned = self.schedule_weights is not None
        return f"num_steps={self.num_steps}{', learned=True' if learned else ''}"

    @classmethod
    def from_schedule(
        cls, name: str, num_steps: int, *, learned: bool = False, num_bumps: int = 10
    ) -> "GaussianDiffusion":
        """The process of a named schedule.

        Args:
            name: one of `dpm_fast.schedules.SCHEDULES`.
            num_steps: T, in 2..2**24 - 1.
            learned, num_bumps: as for the class.

        Raises:
            ValueError: for an unknown name, or a T that the schedule cannot have.
        """
        betas = schedules.beta_schedule(name, num_steps)[1:]
        return cls(betas, learned=learned, num_bumps=num_bumps)

    def tables(self, device: torch.device | str = "cpu") -> GaussianTables:
        """The tables, (T + 1,) float64; differentiable with respect to a learned schedule."""
        device = resolved(device)
        if self.schedule_weights is not None:
            return self.once(("tables", device), lambda: self._learned_tables(device))
        if device not in self._fixed_tables:
            tables = _tables(self._initial_beta)
            self._fixed_tables[device] = GaussianTables(*(x.to(device) for x in tables))
        return self._fixed_tables[device]

    @contextlib.contextmanager
    def shared_tables(self) -> Iterator[None]:
        """Build the tables of a learned schedule once for all that is computed inside.

        Its weights must not change there, and gradients can be taken through the tables once.
        """
        outer = self._shared
        self._shared = {} if outer is None else outer
        try:
            yield
        finally:
            self._shared = outer

    def once(self, key: Hashable, build: Callable[[], _Built]) -> _Built:
        """What ``build`` makes of the schedule; inside `shared_tables` what it made before."""
        if self._shared is None:
            return build()
        key = (key, torch.is_grad_enabled())
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]

    def reverse(
        self,
        parameterization: str | None = None,
        variance: str | None = None,
        clamp: tuple[float, float] | None = None,
    ) -> "GaussianReverse":
        """The reverse kernel of a parameterization; see `GaussianReverse`."""
        return GaussianReverse(self, parameterization or "perturbation", variance, clamp)

    def coefficients(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) of t (N,): (N, 2), as `ops.noise` takes.

        Args:
            t: (N,) int64 in 0..T.
            dtype: of the result.

        Raises:
            ValueError, TypeError: for a t that does not fit; its values are looked at on a CPU.
        """
        check_timesteps(t, self.num_steps, None, first=0)
        return self._coefficients(t, dtype)

    def _coefficients(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        tables = self.tables(t.device)
        return torch.stack((tables.alpha_bar[t], tables.beta_bar[t]), dim=1).sqrt().to(dtype)

    def sample_x_t(self, x_0: Tensor, t: Tensor, seed: int, example_ids: Tensor) -> Tensor:
        """x_t of q(x_t | x_0) with the noise of the forward stream; x_0 itself where t = 0.

        Args:
            x_0: (N, *event).
            t: (N,) int64 in 0..T.
            seed: of the noise.
            example_ids: (N,) int64.

        Returns:
            (N, *event), of the dtype of x_0.

        Raises:
            ValueError, TypeError: for a t that does not fit; its values are looked at on a CPU.
        """
        check_timesteps(t, self.num_steps, x_0, first=0)
        dtype = torch.float64 if x_0.dtype == torch.float64 else torch.float32
        return ops.noise(x_0, self._coefficients(t, dtype), seed, example_ids, t)

    def sample_x_T(
        self, event_shape: Sequence[int], seed: int, example_ids: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The start of the reverse trajectory, N(0, I), (N, *event)."""
        t = self.num_steps
        return ops.normal(seed, Stream.INITIAL, example_ids, t, event_shape, dtype)

    def prior_nats(self, x_0: Tensor, edge: str) -> Tensor:
        """The part of the code length -K that no network enters, (N,) float64 nats.

        KL(q(x_T | x_0) || N(0, I)), or for the edge "paper"
        H_q(X_1 | X_0) - H_q(X_T | X_0) + H_p(X_T) ([DPM] equation 14).
        """
        tables = self.tables(x_0.device)
        log_alpha_bar, beta_bar = tables.log_alpha_bar, tables.beta_bar
        if edge == "paper":
            dims = math.prod(x_0.shape[1:])
            ratio = torch.log(beta_bar[1]) - torch.log(beta_bar[-1])
            return (0.5 * dims * (ratio + reference.LOG_2PI + 1)).expand(len(x_0))
        return reference.prior_kl(x_0, log_alpha_bar[-1], beta_bar[-1])

    def null_nats(self, x_0: Tensor) -> Tensor:
        """Code length of the null model, -log N(x_0; 0, I), of x_0 (N, *event): (N,) float64 nats,
        summed over elements."""
        return reference.gaussian_nats(x_0)

    def _learned_tables(self, device: torch.device) -> GaussianTables:
        weights = self.schedule_weights
        assert weights is not None
        if weights.device not in self._learning:
            basis = reference.temporal_basis(self.num_steps, len(weights))
            self._learning[weights.device] = (
                self._initial_beta.to(weights.device),
                basis.to(weights.device),
            )
        beta = schedules.learned_beta(*self._learning[weights.device], weights)
        return _tables(beta.to(device))


# parameterization -> its own variance
PARAMETERIZATIONS = {
    "perturbation": "logit_scaled",
    "decay": "logit",
    "epsilon": "fixed_small",
    "x0": "fixed_small",
    "velocity": "fixed_small",
    "previous": "fixed_small",
}
# Where 1 / sqrt(alpha_bar_T) still is a float32.
_LEAST_ALPHA_BAR = torch.finfo(torch.float32).tiny ** 2
_VARIANCES = ("logit_scaled", "logit", "fixed_small", "fixed_large", "learned_range", "learned")


class GaussianReverse:
    """Reverse kernels p(x_{t-1} | x_t) = N(mu_p, sigma2_p) of one parameterization.

    mu_out and sigma2_out are the network's outputs:

    - "perturbation" (the 2015 code): mu_p = sqrt(alpha_t) x_t + sqrt(beta_t) mu_out
    - "decay" ([DPM] appendix D.2.3): mu_p = (x_t - mu_out)(1 - sigma2_p) + mu_out
    - "epsilon", "x0", "velocity": x_0 predicted from mu_out, optionally clamped, then the mean of
      q(x_{t-1} | x_t, x_0)
    - "previous": mu_p = mu_out

    and the variance is one of

    - "logit_scaled": sigmoid(sigma2_out / sqrt(T) + logit beta_t); "logit": without the scale
    - "fixed_small": the posterior's, sigma2_q; "fixed_large": beta_t
    - "learned_range": between those two, geometrically, sigma2_out from -1 to 1 ([iDDPM])
    - "learned": exp(sigma2_out)

    Where sigma2_q is 0, at t = 1, its value at t = 2 is used, as [iDDPM] does.

    Raises:
        ValueError: for unknown names, a clamp where no x_0 is predicted, or "epsilon" for a
            schedule that leaves nothing of the data (alpha_bar_T = 0): x_0 cannot follow from
            x_T and eps there.
    """

    def __init__(
        self,
        process: GaussianDiffusion,
        parameterization: str = "perturbation",
        variance: str | None = None,
        clamp: tuple[float, float] | None = None,
    ):
        if parameterization not in PARAMETERIZATIONS:
            raise ValueError(
                f"parameterization must be one of {', '.join(PARAMETERIZATIONS)} for a Gaussian "
                f"process, got {parameterization!r}"
            )
        variance = variance or PARAMETERIZATIONS[parameterization]
        if variance not in _VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(_VARIANCES)}, got {variance!r}")
        self.predicts_x_0 = parameterization in ("epsilon", "x0", "velocity")
        if clamp is not None and not (self.predicts_x_0 and _is_interval(clamp)):
            raise ValueError(
                "clamp must be (low, high) with low < high, of a parameterization that predicts "
                f"x_0; got {clamp} with {parameterization!r}"
            )
        last = process.tables().alpha_bar[-1].item()
        if parameterization == "epsilon" and last < _LEAST_ALPHA_BAR:
            raise ValueError(
                "parameterization 'epsilon' requires a schedule with alpha_bar_T of at least "
                f"{_LEAST_ALPHA_BAR:.2g}, by whose root it divides; got {last:g}"
            )
        self.process, self.parameterization, self.variance = process, parameterization, variance
        self.clamp = None if clamp is None else (float(clamp[0]), float(clamp[1]))
        self.num_outputs = 1 if variance.startswith("fixed") else 2
        self.default_final = (
            "mean" if self.predicts_x_0 or parameterization == "previous" else "x_1"
        )
        self._fixed_tables: dict[torch.device, Tensor] = {}
        self._first_kept, self._second_kept = 1, 2  # timesteps

    @property
    def is_deterministic(self) -> bool:
        """Whether steps have no variance."""
        return False

    def tables(self, device: torch.device | str = "cpu") -> GaussianTables:
        """Those of the process, of the steps that are taken."""
        return self.process.tables(device)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """One row of coefficients per timestep, (T + 1, len(ReverseRow._fields)) float64."""
        device = resolved(device)
        if self.process.schedule_weights is not None:
            return self.process.once((self, device), lambda: self._table(device))
        if device not in self._fixed_tables:
            self._fixed_tables[device] = self._table(torch.device("cpu")).to(device)
        return self._fixed_tables[device]

    def rows(self, t: Tensor, x: Tensor) -> Tensor:
        """Rows of the examples' timesteps, (N, 15), of float64 for such x and float32 otherwise.

        Args:
            t: (N,) int64 in 1..T, on the device of x.
            x: (N, *event).

        Raises:
            ValueError, TypeError: for a t that does not fit; its values are looked at on a CPU.
        """
        check_timesteps(t, self.process.num_steps, x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.table(x.device)[t].to(dtype)

    def row(self, t: Tensor, x: Tensor) -> ReverseRow:
        """The same column by column, each (N, 1, ...) with as many dimensions as x."""
        return reference.reverse_row(self.rows(t, x), x.dim())

    def moments(self, x_t: Tensor, t: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(x_{t-1} | x_t) ([DPM] section 2.2).

        Args:
            x_t: (N, *event).
            t: (N,) int64 in 1..T.
            out: the network's output at x_t and t, mu_out before sigma2_out along dimension 1.

        Returns:
            mu_p and sigma2_p, (N, *event) or, a constant variance, (N, 1, ...).

        Raises:
            ValueError, TypeError: for a t or an output that does not fit.
        """
        return reference.reverse_moments(x_t, *self.split(x_t, out), self.rows(t, x_t))

    def kl(
        self,
        x_0: Tensor,
        x_t: Tensor,
        t: Tensor,
        out: Tensor,
        edge: str = "decoder",
        bins: Bins | None = None,
    ) -> Tensor:
        """One term of the code length -K per example; see `dpm_fast.ops.kl`.

        Args:
            x_0, x_t: (N, *event), model scale.
            t: (N,) int64 in 1..T.
            out: the network's output at x_t and t, mu_out before sigma2_out along dimension 1.
            edge: the decoder at t = 1, "decoder", "discretized" or "discretized_tanh".
            bins: of a discretized edge.

        Returns:
            (N,) float64 nats, summed over elements: KL at t >= 2, the decoder at t = 1.

        Raises:
            ValueError, TypeError: for a t, an output or an edge that does not fit.
        """
        rows = self.rows(t, x_t)
        self.check_output(x_t, out)
        joined = self.num_outputs == 2
        return ops.kl(x_0, x_t, out, None, rows, joined=joined, edge=edge, bins=bins)

    def x_0_from_mean(self, mu_p: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 whose posterior mean given x_t is mu_p."""
        row, tables = self.row(t, x_t), self.tables(x_t.device)
        c_x = _at(tables.c_x, t, x_t)
        return (mu_p - c_x * x_t) / row.c_0

    def beta_bar(self, t: Tensor, x: Tensor) -> Tensor:
        """1 - alpha_bar_t of the examples' timesteps, shaped and cast for x."""
        return _at(self.process.tables(x.device).beta_bar, t, x)

    def simple_target(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mu_out for which mu_p equals mu_q (for "epsilon": eps), (N, *event).

        Raises:
            ValueError: for "decay", whose mean depends on the variance.
        """
        if self.parameterization == "decay":
            raise ValueError("the simple loss requires a mean free of the variance, got 'decay'")
        row = self.row(t, x_t)
        if self.predicts_x_0:
            return (x_0 - row.p * x_t) / row.q
        return (row.c_0 * x_0 + row.d * x_t) / row.a

    def split(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output as mu_out and sigma2_out, views of (N, *event)."""
        self.check_output(x, out)
        if self.num_outputs == 1:
            return out, None
        mu_out, sigma2_out = out.chunk(2, dim=1)
        return mu_out, sigma2_out

    def check_output(self, x: Tensor, out: Tensor) -> None:
        """Refuse an output that does not hold what this kernel needs."""
        expected = (x.shape[0], x.shape[1] * self.num_outputs, *x.shape[2:])
        if out.shape != expected:
            raise ValueError(
                f"the network must return shape {expected} for {self.parameterization!r} with "
                f"variance {self.variance!r}, got {tuple(out.shape)}"
            )

    def _mean_columns(self, device: torch.device) -> tuple[Tensor, ...]:
        """a, b, c, e, p, q and d of `ReverseRow`."""
        beta, alpha_bar, beta_bar, _, _, c_0, c_x = self.process.tables(device)
        zero, one = torch.zeros_like(beta), torch.ones_like(beta)
        signal, spread = alpha_bar.sqrt(), _sqrt(beta_bar)
        a, b, c, e, p, q, d = zero, zero, zero, zero, zero, one, zero
        if self.predicts_x_0:
            tables = self.tables(device)
            a, b = tables.c_0, tables.c_x
            if self.parameterization == "epsilon":
                p, q = 1 / signal, -spread / signal
            elif self.parameterization == "velocity":
                p, q = signal, -spread
        elif self.parameterization == "perturbation":
            a, b = _sqrt(beta), (1 - beta).sqrt()
            d = -c_0 * signal  # c_x - sqrt(alpha) in closed form
        elif self.parameterization == "decay":
            b, c, e, d = one, one, -one, c_x - 1
        else:
            a, d = one, c_x
        return a, b, c, e, p, q, d

    def _table(self, device: torch.device) -> Tensor:
        tables = self.tables(device)
        beta, sigma2_q, c_0 = tables.beta, tables.sigma2_q, tables.c_0
        zero, one = torch.zeros_like(beta), torch.ones_like(beta)
        a, b, c, e, p, q, d = self._mean_columns(device)
        # Row 0 is never used, and where steps lead to the data the posterior's variance is zero:
        # they take the value of the step before any logarithm, so that gradients stay finite.
        above = self._first_kept + 1
        if self._second_kept < len(beta):
            least = sigma2_q[self._second_kept].expand(above)
        else:  # a single step in all
            least = self.process.tables(device).sigma2_q[2].expand(above)
        small = torch.cat((least, sigma2_q[above:]))
        safe_beta = torch.cat((beta[1:2], beta[1:]))
        s, base, g = zero, small, zero
        if self.variance == "fixed_large":
            base = torch.cat((least, beta[above:]))
        elif self.variance.startswith("logit"):
            scale = 1.0 if self.variance == "logit" else 1 / math.sqrt(self.process.num_steps)
            s, base, g = one * scale, safe_beta, safe_beta
        elif self.variance == "learned_range":
            s, base = (safe_beta / small).log() / 2, (safe_beta * small).sqrt()
        elif self.variance == "learned":
            s, base = one, one

        low, high = self.clamp or (-math.inf, math.inf)
        is_first = zero.clone()
        is_first[1] = 1.0
        delta_0 = torch.where(is_first > 0, -base.log(), small.log() - base.log())
        columns = ReverseRow(
            a=a, b=b, c=c, e=e, p=p, q=q, low=one * low, high=one * high, s=s, base=base, g=g,
            c_0=c_0, d=d, delta_0=delta_0, is_first=is_first,
        )  # fmt: skip
        return torch.stack(columns, dim=1)


def _is_interval(clamp: object) -> bool:
    """Two numbers, the lower one first."""
    return (
        isinstance(clamp, tuple | list)
        and len(clamp) == 2
        and all(isinstance(x, Real) for x in clamp)
        and bool(clamp[0] < clamp[1])
    )


def resolved(device: torch.device | str) -> torch.device:
    """The device a tensor reports that was put on ``device``: "cuda" is one of several."""
    return torch.zeros(0, device=device).device


def _tables(beta: Tensor) -> GaussianTables:
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    alpha_bar, beta_bar = log_alpha_bar.exp(), -torch.expm1(log_alpha_bar)
    none = torch.zeros_like(beta)
    tables = GaussianTables(beta, alpha_bar, beta_bar, log_alpha_bar, none, none, none)
    return posterior_tables(tables, torch.arange(len(beta), device=beta.device) - 1)


def posterior_tables(tables: GaussianTables, previous: Tensor) -> GaussianTables:
    """With the coefficients of q(x_s | x_t, x_0), s = previous[t] (T + 1,); ``beta`` is of all the
    way from s to t."""
    beta, beta_bar = tables.beta[1:], tables.beta_bar[1:]
    before, signal = tables.beta_bar[previous[1:]], tables.alpha_bar[previous[1:]].sqrt()
    row_0 = torch.zeros_like(tables.beta[:1])
    ratio = beta / beta_bar
    return tables._replace(
        sigma2_q=torch.cat((row_0, ratio * before)),
        c_0=torch.cat((row_0, ratio * signal)),
        c_x=torch.cat((row_0, (1 - beta).sqrt() * before / beta_bar)),
    )


def _sqrt(x: Tensor) -> Tensor:
    """Square root of a column whose row 0 is 0, with gradient 0 there."""
    return torch.cat((torch.zeros_like(x[:1]), x[1:].sqrt()))


def _at(column: Tensor, t: Tensor, x: Tensor) -> Tensor:
    values = column[t].to(x.dtype)
    return values.view(-1, *(1 for _ in x.shape[1:]))
