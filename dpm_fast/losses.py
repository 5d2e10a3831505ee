"""Training losses: one timestep per example, its term of the bound or the error of its mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpm_fast import noise
from dpm_fast.bound import NATS_PER_BIT

if TYPE_CHECKING:
    from dpm_fast.importance import Importance
    from dpm_fast.model import DiffusionModel

KINDS = ("bound", "simple", "hybrid")


def estimate(
    model: DiffusionModel,
    x_0: Tensor,
    *,
    seed: int,
    example_ids: Tensor,
    kind: str,
    edge: str,
    vb_weight: float,
    importance: Importance | None,
) -> Tensor:
    """See `DiffusionModel.loss`."""
    first = 2 if edge == "paper" else 1
    place = (seed, example_ids, first, 0, 1, 0)
    t, weight = choose_timesteps(place, model.process.num_steps, importance)
    if not edge.startswith("discretized"):
        x_0 = model.dequantize(x_0, seed, example_ids)
    nats_per_unit = NATS_PER_BIT * math.prod(x_0.shape[1:])
    if kind == "bound":
        nats = model.term_nats(x_0, t, seed, example_ids, edge)
        if importance is not None:
            importance.record(t, nats)
        return (weight * nats + model.process.prior_nats(x_0, edge)).mean() / nats_per_unit

    x_t = model.process.sample_x_t(x_0, t, seed, example_ids)
    mu_out, sigma2_out = model.reverse.split(x_t, model.network_output(x_t, t))
    simple = (mu_out - model.reverse.simple_target(x_0, x_t, t)).square().mean()
    if kind == "simple":
        return simple
    assert sigma2_out is not None
    frozen = torch.cat((mu_out.detach(), sigma2_out), dim=1)
    nats = model.nats_of_output(x_0, x_t, t, frozen, edge)
    return simple + vb_weight * (weight * nats).mean() / nats_per_unit


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
