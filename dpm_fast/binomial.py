"""Binomial diffusion of binary data: the forward process, its tables, and the reverse kernels."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpm_fast import noise, ops, reference, schedules


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
        ValueError: for values out of range.
    """

    kind = "binomial"

    def __init__(self, num_steps: int, prior_rate: float = 0.5):
        super().__init__()
        beta = schedules.beta_schedule("erase_paper", num_steps)
        if not 0.0 < prior_rate < 1.0:
            raise ValueError(f"prior_rate must be in (0, 1), got {prior_rate}")
        self.num_steps, self.prior_rate = num_steps, float(prior_rate)
        cpu = torch.device("cpu")
        self._tables = {cpu: _tables(beta, self.prior_rate)}

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

    def sample_x_t(self, x_0: Tensor, t: Tensor, seed: int, example_ids: Tensor) -> Tensor:
        """x_t of q(x_t | x_0) with the noise of the forward stream; as for Gaussian diffusion."""
        alpha_bar = _column(self.tables(x_0.device).alpha_bar[t], x_0)
        rate = alpha_bar * x_0 + (1 - alpha_bar) * self.prior_rate
        u = ops.uniform(seed, noise.Stream.FORWARD, example_ids, t, x_0.shape[1:], dtype=x_0.dtype)
        return reference.bernoulli_noise(rate, u)

    def sample_x_T(
        self, event_shape: Sequence[int], seed: int, example_ids: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The start of the reverse trajectory, independent bits of rate rho, (N, *event)."""
        t = self.num_steps
        u = ops.uniform(seed, noise.Stream.INITIAL, example_ids, t, event_shape, dtype)
        return reference.bernoulli_noise(torch.full_like(u, self.prior_rate), u)

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

    def __init__(self, process: BinomialDiffusion, parameterization: str = "rate"):
        if parameterization not in ("rate", "perturbation", "x0"):
            raise ValueError(
                "parameterization must be one of rate, perturbation, x0 for a binomial process, "
                f"got {parameterization!r}"
            )
        self.process, self.parameterization = process, parameterization

    def logit(self, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """Logit of x_{t-1} = 1, (N, *event) float64, from the network's output at t."""
        if out.shape != x_t.shape:
            raise ValueError(
                f"the network must return shape {tuple(x_t.shape)} for a binomial process, "
                f"got {tuple(out.shape)}"
            )
        if self.parameterization == "rate":
            return out.double()
        tables, is_one = self.process.tables(x_t.device), x_t > 0.5
        if self.parameterization == "perturbation":
            at_0, at_1 = (_column(logit, x_t) for logit in tables.step_logit[t].unbind(1))
            return out + torch.where(is_one, at_1, at_0)
        log_q = tables.posterior[t].log()  # [N, 2 (i), 2 (j), 2 (k)]
        given = [
            torch.where(is_one, _column(log_q[:, i, j, 1], x_t), _column(log_q[:, i, j, 0], x_t))
            for i in (1, 0)
            for j in (1, 0)
        ]
        return reference.bernoulli_mixture_logit(
            out.double(), (given[0], given[1], given[2], given[3])
        )

    def kl(self, x_0: Tensor, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """Terms of the bound, (N,) float64 nats: KL for t >= 2, -log p(x_0 | x_1) at t = 1."""
        tables = self.process.tables(x_t.device)
        n = torch.arange(len(t), device=t.device).view(-1, *(1 for _ in x_t.shape[1:]))
        j, k = (x_0 > 0.5).long(), (x_t > 0.5).long()
        q = tables.posterior[t]
        entropy = tables.posterior_entropy[t]
        logit = self.logit(x_t, t, out)
        return reference.sum_over_event(
            reference.bernoulli_kl(q[n, 1, j, k], q[n, 0, j, k], entropy[n, j, k], logit)
        )

    def split(self, x: Tensor, out: Tensor) -> tuple[Tensor, None]:
        """The output and None, in the form of `GaussianReverse.split`."""
        return out, None


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


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in x.shape[1:]))
