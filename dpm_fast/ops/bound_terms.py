"""The op `_bound_terms`: terms of the bound at a run of timesteps, network included, in one launch.

It is private, as `_trajectory` is. Its reference is `DiffusionModel.term_nats` at each timestep.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpm_fast import dispatch
from dpm_fast.noise import Stream
from dpm_fast.ops import whole_network
from dpm_fast.ops.common import LIBRARY, Op, on_its_device


class BoundTermsInputs(NamedTuple):
    """Arguments of the op after x_0. Timesteps index all tables; everything is contiguous float32
    but where it says otherwise."""

    rows: Tensor  # (T + 1, columns) of the reverse kernels
    levels: Tensor  # (T + 1, 2), as `ops.noise` or `ops.bernoulli_noise` takes
    is_binomial: bool
    centers: Tensor | None  # the network, as in `whole_network`
    scales: Tensor | None
    weights: list[Tensor]
    biases: list[Tensor]
    activation: int
    slope: float
    shape: list[int]
    num_scales: int
    after_sum: bool
    conv_weights: list[Tensor]
    conv_biases: list[Tensor]
    pixel_weights: list[Tensor]
    pixel_biases: list[Tensor]
    seed: int  # signed
    noise_ids: Tensor  # (N,) int64
    first: int  # terms at t = first, first - 1 ... last
    last: int


LIBRARY.define(
    "_bound_terms(Tensor x_0, Tensor rows, Tensor levels, bool is_binomial, "
    f"{whole_network.SCHEMA}, SymInt seed, Tensor noise_ids, int first, int last) -> Tensor"
)


def _fake(x_0: Tensor, *args: Any) -> Tensor:
    first, last = args[-2:]
    return x_0.new_empty((first - last + 1, len(x_0)), dtype=torch.float64)


@on_its_device
def _bound_terms(x_0: Tensor, *args: Any) -> Tensor:
    """(first - last + 1, N) float64 nats."""
    nats = _fake(x_0, *args)
    if len(x_0) == 0:
        return nats
    inputs = BoundTermsInputs(*args)
    dispatch.kernels("bound_terms", x_0)
    module, threads = dispatch.native(x_0)
    module.bound_terms(
        x_0, inputs.rows, inputs.is_binomial, *whole_network.as_launched(inputs, module, len(nats)),
        inputs.seed, int(Stream.FORWARD), inputs.noise_ids, inputs.levels, inputs.first,
        inputs.last, nats, threads,
    )  # fmt: skip
    return nats


_OP = Op("_bound_terms", _bound_terms, _fake)


def bound_terms(x_0: Tensor, inputs: BoundTermsInputs) -> Tensor:
    """See `_bound_terms`; x_0 (N, D) is contiguous float32."""
    return _OP.op(x_0, *inputs)
