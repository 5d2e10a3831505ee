"""Binomial diffusion of binary data: the forward process, its tables, and the reverse kernels."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpm_fast import noise, ops, reference, schedules
from dpm_fast.layers import check_timesteps
from dpm_fast.reference import BernoulliRow


class BinomialTables(NamedTuple):
    """Quantities of the forward process, float64, indexed by t; row 0 is the data.

    ``step_logit`` holds the logit of q(x_t = 1 | x_{t-1} = k) at [t, k], infinite in row 0, and
    ``posterior`` q(x_{t-1} = i | x_t = k, x_0 = j) at [t, i, j, k], all formed without
    cancellation; ``posterior_entropy`` is the posterior's entropy in nats at [t, j, k].
    """

    beta: Tensor  # (T + 1,)
    alpha_bar: Tensor  # (T + 1,)
    step_logit: Tensor  # (T + 1, 2)
    posterior: Tensor  # (T + 1, 2, 2, 2)
    posterior_entropy: Tensor  # (T + 1, 2, 2)


class BinomialDiffusion(nn.Module):
    """The process q(x_t = 1 | x_{t-1}) = x_{t-1} (1 - beta_t) + rho beta_t ([DPM] table 1).

    beta_t = 1 / (T - t + 1), so that alpha_bar_t = (T - t) / T and x_T forgets the data exactly.

    Args:
        num_steps: T, at least 2.
        prior_rate: rho, the rate of ones of x_T, in (0, 1); 0.5 in the paper's table.

    Raises:
        ValueError, TypeError: for values out of range, or no numbers.
    """

    kind = "binomial"

    def __init__(self, num_steps: int, prior_rate: float = 0.5):
        super().__init__()
        beta = schedules.beta_schedule("erase_paper", num_steps)
        if isinstance(prior_rate, Tensor) and prior_rate.ndim == 0:
            prior_rate = prior_rate.item()
        if not isinstance(prior_rate, float | Real):  # for mypy a float is no Real
            raise TypeError(f"prior_rate must be a number, got {type(prior_rate).__name__}")
        if not 0.0 < prior_rate < 1.0:
            raise ValueError(f"prior_rate must be in (0, 1), got {prior_rate}")
        self.num_steps, self.prior_rate = len(beta) - 1, float(prior_rate)
        cpu = torch.device("cpu")
        self._tables = {cpu: _tables(beta, self.prior_rate)}

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, prior_rate={self.prior_rate:g}"

    def tables(self, device: torch.device | str = "cpu") -> BinomialTables:
        """The tables, float64."""
        device = torch.device(device)
        if device not in self._tables:  # once per device: a copy waits for a GPU
            on_cpu = self._tables[torch.device("cpu")]
            self._tables[device] = BinomialTables(*(x.to(device) for x in on_cpu))
        return self._tables[device]

    def shared_tables(self) -> AbstractContextManager[None]:
        """As for Gaussian diffusion, where a schedule can be learned: nothing to do here."""
        return nullcontext()

    def reverse(
        self, parameterization: str | None = None, variance: str | None = None, clamp: None = None
    ) -> "BinomialReverse":
        """The reverse kernel of a parameterization; see `BinomialReverse`."""
        if variance is not None or clamp is not None:
            raise ValueError("a binomial process takes no variance and no clamp")
        return BinomialReverse(self, parameterization or "rate")

    def noise_rows(self, t: Tensor, x: Tensor) -> Tensor:
        """Rates q(x_t = 1 | x_0) for x_0 = 0 and 1, (N, 2), float64 for such x, else float32."""
        check_timesteps(t, self.num_steps, x, first=0)
        zero = (1 - self.tables(x.device).alpha_bar[t]) * self.prior_rate
        rates = torch.stack((zero, self.tables(x.device).alpha_bar[t] + zero), dim=1)
        return rates.to(_row_dtype(x))

    def sample_x_t(self, x_0: Tensor, t: Tensor, seed: int, example_ids: Tensor) -> Tensor:
        """x_t of q(x_t | x_0) with the noise of the forward stream; as for Gaussian diffusion."""
        return ops.bernoulli_noise(x_0, self.noise_rows(t, x_0), seed, example_ids, t)

    def sample_x_T(
        self, event_shape: Sequence[int], seed: int, example_ids: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The start of the reverse trajectory, independent bits of rate rho, (N, *event)."""
        t = self.num_steps
        u = ops.uniform(seed, noise.Stream.INITIAL, example_ids, t, event_shape, dtype)
        return reference.bernoulli(torch.full_like(u, self.prior_rate), u)

    def prior_nats(self, x_0: Tensor, edge: str) -> Tensor:
        """The part of the code length -K that no network enters, (N,) float64 nats.

        KL(q(x_T | x_0) || prior) = 0 for this schedule, or for the edge "paper"
        H_q(X_1 | X_0) - H_q(X_T | X_0) + H_p(X_T), where the last two cancel.
        """
        if edge != "paper":
            return torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
        alpha_bar = self.tables(x_0.device).alpha_bar[1]
        rate = alpha_bar * x_0.double() + (1 - alpha_bar) * self.prior_rate
        return reference.sum_over_event(reference.bernoulli_entropy(rate))

    def null_nats(self, x_0: Tensor) -> Tensor:
        """Code length under independent bits of rate rho, (N,) float64 nats."""
        x_0 = x_0.double()
        nats = -x_0 * math.log(self.prior_rate) - (1 - x_0) * math.log1p(-self.prior_rate)
        return reference.sum_over_event(nats)


class BinomialReverse:
    """Reverse kernels p(x_{t-1} = 1 | x_t) = sigmoid(logit), bit by bit.

    - "rate": the network gives the logit itself
    - "perturbation": the network gives an offset to the logit of a forward step from x_t,
      x_t (1 - beta_t) + rho beta_t. The forward chain is reversible, so an output of 0 reverses
      it exactly on noise alone, and an untrained network has the bound of the null model
    - "x0": the network gives the logit of x_0, and the posterior q(x_{t-1} | x_t, x_0) is
      averaged over it

    Nearly all bits of x_{t-1} are those of x_t, which "rate" has to learn anew for every t. On the
    heartbeat with a readout per timestep (T = 2000, 800 steps of 16,000 examples, prior rate 1/2)
    it was still at a bound of -1456 bits where "perturbation" was at -2.8.

    Raises:
        ValueError: for an unknown name.
    """

    num_outputs = 1
    default_final = "sample"
    variance = None
    is_deterministic = False

    def __init__(self, process: BinomialDiffusion, parameterization: str = "rate"):
        if parameterization not in ("rate", "perturbation", "x0"):
            raise ValueError(
                "parameterization must be one of rate, perturbation, x0 for a binomial process, "
                f"got {parameterization!r}"
            )
        self.process, self.parameterization = process, parameterization
        self._tables = {torch.device("cpu"): self._table()}

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """One row of coefficients per timestep, (T + 1, len(BernoulliRow._fields)) float64."""
        device = torch.device(device)
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def rows(self, t: Tensor, x: Tensor) -> Tensor:
        """Rows of the examples' timesteps, (N, 20), of float64 for such x and float32 otherwise."""
        check_timesteps(t, self.process.num_steps, x)
        return self.table(x.device)[t].to(_row_dtype(x))

    def logit(self, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """Logit of x_{t-1} = 1, (N, *event), from the network's output at t."""
        return reference.bernoulli_logit(x_t, self.split(x_t, out)[0], self.rows(t, x_t))

    def kl(self, x_0: Tensor, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """Terms of the bound, (N,) float64 nats; see `dpm_fast.ops.bernoulli_kl`."""
        return ops.bernoulli_kl(x_0, x_t, self.split(x_t, out)[0], self.rows(t, x_t))

    def split(self, x: Tensor, out: Tensor) -> tuple[Tensor, None]:
        """The output and None, in the form of `GaussianReverse.split`."""
        if out.shape != x.shape:
            raise ValueError(
                f"the network must return shape {tuple(x.shape)} for a binomial process, "
                f"got {tuple(out.shape)}"
            )
        return out, None

    def _table(self) -> Tensor:
        """Row by row, with every sum of positive terms and no difference of logits of q and p."""
        tables, rho = self.process.tables(), self.process.prior_rate
        posterior, step_logit = tables.posterior, tables.step_logit
        kept = torch.cat((tables.alpha_bar[:1], tables.alpha_bar[:-1]))  # alpha_bar_{t-1}
        lost = 1 - kept
        zero, one = torch.zeros_like(kept), torch.ones_like(kept)
        is_first = zero.clone()
        is_first[1] = 1.0
        by_network = self.parameterization == "x0"
        columns = dict.fromkeys(BernoulliRow._fields, zero) | {"is_first": is_first}
        if by_network:
            columns["c"] = kept / (lost * lost * rho * (1 - rho))
        for k in (0, 1):
            q_0, q_1 = posterior[:, 0, :, k], posterior[:, 1, :, k]  # [T + 1, j]
            logit_q = q_1.log() - q_0.log()
            if by_network:
                columns[f"o_{k}"] = logit_q[:, 0]
                columns[f"h_0{k}"] = q_0[:, 1].log() - q_0[:, 0].log()
                columns[f"h_1{k}"] = q_1[:, 0].log() - q_1[:, 1].log()
            elif self.parameterization == "perturbation":
                columns[f"o_{k}"] = step_logit[:, k]
            for j in (0, 1):
                rarer_is_0 = q_0[:, j] < q_1[:, j]
                # Raises the log-odds of the rarer value by what lowers the logit, or the reverse.
                sign = torch.where(rarer_is_0, -one, one)
                columns[f"m_{j}{k}"] = torch.minimum(q_0[:, j], q_1[:, j])
                if by_network:
                    columns[f"b_{j}{k}"] = sign if j == 0 else -sign
                    continue
                columns[f"b_{j}{k}"] = sign
                logit_gap = logit_q[:, j]
                if self.parameterization == "perturbation":
                    # The chain is reversible: both logits differ from that of
                    # q(x_{t-1} = 1 | x_0 = j) by the same, up to the logit of rho.
                    logit_gap = _raised_logit(kept, lost, rho, j)
                columns[f"d_{j}{k}"] = -sign * logit_gap
        table = torch.stack(list(columns.values()), dim=1)
        table[0] = 0
        row = dict.fromkeys(columns, zero[1]) | {"is_first": one[1]}
        for k in (0, 1):
            if self.parameterization == "perturbation":
                row[f"o_{k}"] = step_logit[1, k]
            for j in (0, 1):
                row[f"b_{j}{k}"] = (1 - 2 * j) * one[1]
                row[f"d_{j}{k}"] = (1 - 2 * j) * row[f"o_{k}"]
        table[1] = torch.stack(list(row.values()))
        return table


def _raised_logit(kept: Tensor, lost: Tensor, rho: float, j: int) -> Tensor:
    """logit q(x_{t-1} = 1 | x_0 = j) - logit rho, from alpha_bar_{t-1} and 1 less it."""
    if j == 1:
        return torch.log1p(kept / (lost * rho))
    rate_of_0 = kept + lost * (1 - rho)
    near = torch.log1p(-kept / rate_of_0)
    return torch.where(kept < 0.5, near, (lost * (1 - rho)).log() - rate_of_0.log())


def _tables(beta: Tensor, rho: float) -> BinomialTables:
    num_steps = len(beta) - 1
    alpha_bar = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
    survive = torch.cat((alpha_bar[:1], alpha_bar[:-1]))  # alpha_bar_{t-1}
    forget = 1 - survive
    # q(x_{t-1} = i | x_0 = j) and q(x_t = k | x_{t-1} = i)
    prev_given_0 = torch.stack(
        (
            torch.stack((survive + forget * (1 - rho), forget * (1 - rho)), dim=-1),  # i = 0
            torch.stack((forget * rho, survive + forget * rho), dim=-1),  # i = 1
        ),
        dim=1,
    )  # [T + 1, i, j]
    keep = 1 - beta
    t_given_prev = torch.stack(
        (
            torch.stack((keep + beta * (1 - rho), beta * rho), dim=-1),  # i = 0
            torch.stack((beta * (1 - rho), keep + beta * rho), dim=-1),  # i = 1
        ),
        dim=1,
    )  # [T + 1, i, k]
    joint = prev_given_0[:, :, :, None] * t_given_prev[:, :, None, :]
    joint[:2] = prev_given_0[:2, :, :, None]  # x_0 itself: rows 0 and 1 know it from j alone
    posterior = joint / joint.sum(dim=1, keepdim=True)
    entropy = -torch.xlogy(posterior, posterior).sum(dim=1)
    step_logit = t_given_prev[:, :, 1].log() - t_given_prev[:, :, 0].log()
    return BinomialTables(beta, alpha_bar, step_logit, posterior, entropy)


def _row_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
