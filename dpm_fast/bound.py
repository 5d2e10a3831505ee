"""The lower bound on log p(x_0): its estimators over timesteps, and the result with its units."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpm_fast import noise
from dpm_fast.importance import Importance, add_by_timestep

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
        mc_variance_nats2: Monte-Carlo variance of the mean of K, as far as examples vary
            independently of each other; or None with a single draw.
        num_dims: D, elements of one event.
        bits_per_dim_offset: added to bits/dim for the units of the data: -log2 of their scale.
        edge: how the trajectory ends, one of `EDGES`.
        strata_nats: (strata, draws) float64, mean over examples of the term of each stratum in
            each draw, or None where every timestep is evaluated. All examples share where a
            stratum is looked at, so that only draws tell the Monte-Carlo variance.
        settings: how the figure was made.
    """

    bound_nats: Tensor
    null_nats: Tensor
    per_timestep_nats: Tensor
    prior_nats: Tensor
    mc_variance_nats2: float | None
    num_dims: int
    edge: str
    strata_nats: Tensor | None = None
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
        if len(self.bound_bits) < 2:
            return math.nan
        return (self.bound_bits.std() / math.sqrt(len(self.bound_bits))).item()

    @property
    def mc_stderr(self) -> float | None:
        """Monte-Carlo error of the mean of `bound_bits`, bits; None without repeated draws."""
        if self.mc_variance_nats2 is None:
            return None
        variance = self.mc_variance_nats2
        if self.strata_nats is not None:
            variance += self.strata_nats.var(dim=1).sum().item() / self.strata_nats.shape[1]
        return math.sqrt(variance) / NATS_PER_BIT

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


@torch.no_grad()
def estimate(
    model: DiffusionModel,
    x_0: Tensor,
    *,
    timesteps: str | int,
    importance: Importance | None,
    edge: str,
    seed: int,
    example_ids: Tensor,
    draws: int,
    batch_size: int,
) -> Bound:
    """See `DiffusionModel.bound`."""
    num_steps, num_examples = model.process.num_steps, len(x_0)
    if not edge.startswith("discretized"):
        x_0 = model.dequantize(x_0, seed, example_ids)
    nats = torch.zeros(num_examples, dtype=torch.float64, device=x_0.device)
    per_timestep = nats.new_zeros(num_steps + 1)
    mc_variance = nats.new_zeros(())
    strata: list[Tensor] = []

    def terms(t: Tensor, ids: Tensor) -> Tensor:
        """Of every example, (N,), at its t and with the noise of its id."""
        batches = zip(*(x.split(batch_size) for x in (x_0, t, ids)), strict=True)
        return torch.cat([model.term_nats(x, t, seed, ids, edge) for x, t, ids in batches])

    last = num_steps if timesteps == "exact" else 1  # of those that are evaluated one by one
    for t in range(last, 1 if edge == "paper" else 0, -1):
        t_of_each = torch.full_like(example_ids, t)
        each = torch.stack([terms(t_of_each, example_ids * draws + d) for d in range(draws)])
        nats += each.mean(dim=0)
        per_timestep[t] += each.mean(dim=0).sum()
        if draws > 1:
            mc_variance += each.var(dim=0).sum() / draws
    num_strata = 0 if isinstance(timesteps, str) else timesteps
    for stratum in range(num_strata):
        ids = (example_ids * num_strata + stratum) * draws
        means = []
        for d in range(draws):
            place = (seed, example_ids, 2, stratum, num_strata, d)
            t_of_each, weight = choose_timesteps(place, num_steps, importance)
            each = weight / (num_strata * draws) * terms(t_of_each, ids + d)
            nats += each
            add_by_timestep(per_timestep, t_of_each, each)
            means.append(each.mean() * draws)
        strata.append(torch.stack(means))
    prior = model.process.prior_nats(x_0, edge).double()
    spec = model.data
    return Bound(
        bound_nats=-(nats + prior),
        null_nats=model.null_nats(x_0, edge),
        per_timestep_nats=per_timestep / num_examples,
        prior_nats=prior,
        mc_variance_nats2=mc_variance.item() / num_examples**2 if draws > 1 else None,
        num_dims=math.prod(x_0.shape[1:]),
        edge=edge,
        strata_nats=torch.stack(strata) if strata else None,
        bits_per_dim_offset=(
            0.0 if spec is None or edge.startswith("discretized") else -spec.log2_jacobian_per_dim
        ),
        settings={
            "num_steps": num_steps,
            "timesteps": timesteps,
            "estimator": _estimator(timesteps, importance),
            "draws": draws,
            "seed": seed,
            "parameterization": model.reverse.parameterization,
            "variance": model.reverse.variance,
        },
    )


def choose_timesteps(
    place: tuple[int, Tensor, int, int, int, int], num_steps: int, importance: Importance | None
) -> tuple[Tensor, Tensor | float]:
    """A timestep for each example from one stratum of timesteps, all equal or by importance.

    Args:
        place: seed, example_ids (N,), the first timestep, stratum, number of strata, draw; see
            `noise.stratified_timesteps` and `Importance.timesteps`.
        num_steps: T.
        importance: None for equal strata.

    Returns:
        t: (N,) int64.
        weight: of the term at t, such that the mean over strata is the sum over timesteps.
    """
    if importance is not None:
        return importance.timesteps(*place)
    seed, example_ids, first, *where = place
    t = noise.stratified_timesteps(seed, example_ids, first, num_steps, *where)
    return t, float(num_steps - first + 1)


def _estimator(timesteps: str | int, importance: Importance | None) -> str:
    if timesteps == "exact":
        return "exact"
    return "stratified" if importance is None else "importance"
