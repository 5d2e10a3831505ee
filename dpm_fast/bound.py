"""The lower bound on log p(x_0): its estimators over timesteps, and the result with its units."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpm_fast import noise

if TYPE_CHECKING:
    from dpm_fast.model import DiffusionModel

NATS_PER_BIT = math.log(2.0)
EDGES = ("decoder", "discretized", "discretized_tanh", "paper")


@dataclass(frozen=True)
class Bound:
    """Lower bounds K <= log p(x_0), one per example, of the model's scaled data.

    Attributes:
        bound_nats: (N,) float64, K: higher is better.
        null_nats: (N,) float64, the same for the null model: N(0, I) on the same data (integrated
            over each bin for a discretized edge), or independent bits of the prior rate.
        per_timestep_nats: (T + 1,) float64, mean over examples of the term of each timestep:
            KL for t >= 2, the decoder's -log p(x_0 | x_1) at t = 1 (0 for the edge "paper").
            Entry 0 is 0. mean(K) = -sum(per_timestep_nats) - mean(prior_nats).
        prior_nats: (N,) float64, the part of -K without a network.
        mc_variance_nats2: Monte-Carlo variance of the mean of K, or None with a single draw.
        num_dims: D, elements of one event.
        bits_per_dim_offset: added to bits/dim for the units of the data: -log2 of their scale.
        edge: how the trajectory ends, one of `EDGES`.
        settings: how the figure was made.
    """

    bound_nats: Tensor
    null_nats: Tensor
    per_timestep_nats: Tensor
    prior_nats: Tensor
    mc_variance_nats2: float | None
    num_dims: int
    edge: str
    bits_per_dim_offset: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def bound_bits(self) -> Tensor:
        """K in bits per example, (N,)."""
        return self.bound_nats / NATS_PER_BIT

    @property
    def bits_per_dim(self) -> Tensor:
        """-K / (D ln 2), (N,): the code length of the model's scaled data, lower is better."""
        return -self.bound_bits / self.num_dims

    @property
    def data_bits_per_dim(self) -> Tensor:
        """Code length per dimension in the units of the data, (N,)."""
        return self.bits_per_dim + self.bits_per_dim_offset

    @property
    def gap_to_null_bits(self) -> Tensor:
        """K - K_null in bits per example, (N,): what the model gains over no model."""
        return (self.bound_nats + self.null_nats) / NATS_PER_BIT

    @property
    def stderr(self) -> float:
        """Standard error of the mean of `bound_bits` over examples, bits; NaN for one example."""
        return (self.bound_bits.std() / math.sqrt(len(self.bound_bits))).item()

    @property
    def mc_stderr(self) -> float | None:
        """Monte-Carlo error of the mean of `bound_bits`, bits; None without repeated draws."""
        if self.mc_variance_nats2 is None:
            return None
        return math.sqrt(self.mc_variance_nats2) / NATS_PER_BIT

    def __str__(self) -> str:
        rows = [
            ("bound K", f"{self.bound_bits.mean():.4f} ± {self.stderr:.4f} bits per example"),
            ("null model", f"{-self.null_nats.mean() / NATS_PER_BIT:.4f} bits per example"),
            ("K - K_null", f"{self.gap_to_null_bits.mean():.4f} bits per example"),
            ("code length", f"{self.bits_per_dim.mean():.4f} bits/dim (scaled data)"),
            ("", f"{self.data_bits_per_dim.mean():.4f} bits/dim (data units)"),
            ("edge", self.edge),
            ("examples", f"{len(self.bound_nats)} of {self.num_dims} dimensions"),
        ]
        if self.mc_stderr is not None:
            rows.insert(1, ("Monte-Carlo error", f"{self.mc_stderr:.4f} bits per example"))
        rows += [(name, str(value)) for name, value in self.settings.items()]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


@dataclass
class _Totals:
    """Sums of terms: over t per example, and over examples per t."""

    per_example: Tensor  # (N,)
    per_timestep: Tensor  # (T + 1,)
    mc_variance: Tensor  # ()


@torch.no_grad()
def estimate(
    model: DiffusionModel,
    x_0: Tensor,
    *,
    timesteps: str | int,
    edge: str,
    seed: int,
    example_ids: Tensor,
    draws: int,
    batch_size: int,
) -> Bound:
    """See `DiffusionModel.bound`."""
    num_steps = model.process.num_steps
    first = 2 if edge == "paper" else 1
    if not edge.startswith("discretized"):
        x_0 = model.dequantize(x_0, seed, example_ids)
    totals = _Totals(
        torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device),
        torch.zeros(num_steps + 1, dtype=torch.float64, device=x_0.device),
        torch.zeros((), dtype=torch.float64, device=x_0.device),
    )
    if timesteps == "exact":
        for t in range(num_steps, first - 1, -1):
            t_of_each = torch.full_like(example_ids, t)
            ids = example_ids * draws
            _add(totals, model, x_0, t_of_each, ids, 1.0, edge, seed, draws, batch_size)
    else:
        assert isinstance(timesteps, int)
        if edge != "paper":  # the edge itself, always
            ids = example_ids * draws
            t_of_each = torch.ones_like(example_ids)
            _add(totals, model, x_0, t_of_each, ids, 1.0, edge, seed, draws, batch_size)
        weight = (num_steps - 1) / timesteps
        for stratum in range(timesteps):
            t_of_each = noise.stratified_timesteps(
                seed, example_ids, 2, num_steps, stratum, timesteps
            )
            ids = (example_ids * timesteps + stratum) * draws
            _add(totals, model, x_0, t_of_each, ids, weight, edge, seed, draws, batch_size)
    prior = model.process.prior_nats(x_0, edge).double()
    null = model.null_nats(x_0, edge)
    spec = model.data
    return Bound(
        bound_nats=-(totals.per_example + prior),
        null_nats=null,
        per_timestep_nats=totals.per_timestep / len(x_0),
        prior_nats=prior,
        mc_variance_nats2=totals.mc_variance.item() / len(x_0) ** 2 if draws > 1 else None,
        num_dims=math.prod(x_0.shape[1:]),
        edge=edge,
        bits_per_dim_offset=(
            0.0 if spec is None or edge.startswith("discretized") else -spec.log2_jacobian_per_dim
        ),
        settings={
            "num_steps": num_steps,
            "timesteps": timesteps,
            "draws": draws,
            "seed": seed,
            "parameterization": model.reverse.parameterization,
            "variance": model.reverse.variance,
        },
    )


def _add(
    totals: _Totals,
    model: DiffusionModel,
    x_0: Tensor,
    t: Tensor,
    ids: Tensor,
    weight: float,
    edge: str,
    seed: int,
    draws: int,
    batch_size: int,
) -> None:
    """Add one term per example, the mean of ``draws`` draws, times ``weight``."""
    for begin in range(0, len(x_0), batch_size):
        part = slice(begin, begin + batch_size)
        terms = torch.stack(
            [model.term_nats(x_0[part], t[part], seed, ids[part] + d, edge) for d in range(draws)]
        )
        mean = weight * terms.mean(dim=0)
        totals.per_example[part] += mean
        totals.per_timestep.index_add_(0, t[part], mean)
        if draws > 1:
            totals.mc_variance += weight**2 * (terms.var(dim=0) / draws).sum()
