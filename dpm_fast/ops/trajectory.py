"""The op `_trajectory`: steps of a reverse trajectory, network included, in one launch.

It is private: its arguments are the insides of networks and processes, which `dpm_fast.trajectory`
puts together. Its reference is the loop over single steps, `sampling.reverse_trajectory`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpm_fast import dispatch
from dpm_fast.noise import Stream
from dpm_fast.ops import whole_network
from dpm_fast.ops.common import LIBRARY, Op, on_its_device


class TrajectoryInputs(NamedTuple):
    """Arguments of the op after x. Timesteps index all tables, of which rows past ``first`` may be
    absent; everything is contiguous float32 but where it says otherwise."""

    rows: Tensor  # (T + 1, columns) of the reverse kernels
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
    example_ids: Tensor  # (N,) int64
    levels: Tensor | None  # (T + 1, 2), as `ops.noise` takes: known values are noised to each level
    mask: Tensor | None  # (N, D) bool, with any strides, as the next three
    values: Tensor | None
    y: Tensor | None
    spread: Tensor | None  # sigma2_y, or the probabilities of a flip
    previous: Tensor  # (T + 1,) int64: a step from x_t leads to x_previous[t]
    first: int  # steps are taken from t = first, previous[first] ... last
    last: int
    mean_at_1: bool  # the step to x_0 takes the mean, or the likelier bit
    wanted: list[int]  # timesteps that steps lead to, whose states are returned


LIBRARY.define(
    f"_trajectory(Tensor x, Tensor rows, bool is_binomial, {whole_network.SCHEMA}, SymInt seed, "
    "Tensor example_ids, Tensor? levels, Tensor? mask, Tensor? values, Tensor? y, Tensor? spread, "
    "Tensor previous, int first, int last, bool mean_at_1, int[] wanted) -> (Tensor, Tensor)"
)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wanted = args[-1]
    return torch.empty_like(x), x.new_empty(len(wanted), *x.shape)


@on_its_device
def _trajectory(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Where the step from x_last leads (N, D), and the wanted states (number, N, D)."""
    out, states = _fake(x, *args)
    if x.numel() == 0:
        return out, states
    inputs = TrajectoryInputs(*args)
    dispatch.kernels("trajectory", x)
    module, threads = dispatch.native(x)
    state_of = torch.full((inputs.first + 1,), -1, device=x.device)
    if x.is_cpu:
        state_of[inputs.wanted] = torch.arange(len(inputs.wanted))
    else:  # where a copy from the host would wait for the device
        for number, t in enumerate(inputs.wanted):
            state_of[t].fill_(number)
    module.trajectory(
        x, inputs.rows, inputs.is_binomial,
        *whole_network.as_launched(inputs, module, inputs.first - inputs.last + 1),
        inputs.seed, int(Stream.REVERSE), int(Stream.FORWARD),
        inputs.example_ids, inputs.levels,
        inputs.mask, inputs.values, inputs.y, inputs.spread, inputs.previous, inputs.first,
        inputs.last, inputs.mean_at_1, out, state_of, states, threads,
    )  # fmt: skip
    return out, states


_OP = Op("_trajectory", _trajectory, _fake)


def trajectory(x: Tensor, inputs: TrajectoryInputs) -> tuple[Tensor, Tensor]:
    """See `_trajectory`; x is contiguous float32."""
    return _OP.op(x, *inputs)  # through the dispatcher: who knows what its lists hold
